//! Priors: moments of samples, the loss of variational inference, verdicts on penalties, and predicted factors.

use candle_core::{DType, Device, Result};
use kronwake::penalty::Prior;

/// The mean and the standard error of `f` over `values`.
fn mean(values: impl Iterator<Item = f64> + Clone, f: impl Fn(f64) -> f64) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let (sum, squares) = values.map(f).fold((0., 0.), |(s, q), v| (s + v, q + v * v));
    let mean = sum / n;
    (mean, ((squares / n - mean * mean) / n).sqrt())
}

#[test]
fn samples_have_the_moments() -> Result<()> {
    for prior in [
        Prior::l2(0.2)?,
        Prior::l1(3.)?,
        Prior::group_lasso(0.7, 2)?,
        Prior::group_lasso(2., 25)?,
        Prior::cosine(-2., 1.5, 0.1)?,
        Prior::cosine(1.5, 0.5, 0.4)?,
    ] {
        let n = 100_000 / prior.size();
        let w = prior.sample((n, prior.size()), DType::F64, &Device::Cpu, 5, 2)?;
        let flat: Vec<f64> = w.flatten_all()?.to_vec1()?;
        let (first, error) = mean(flat.iter().copied(), |w| w);
        assert!(first.abs() < 5. * error, "{prior:?}: mean {first} +- {error}");
        // Weights of a group are dependent, so the groups' mean squares are what is independent.
        let squares = flat.chunks(prior.size()).map(|b| b.iter().map(|w| w * w).sum::<f64>());
        let (second, error) = mean(squares, |s| s / prior.size() as f64);
        let variance = prior.variance()?;
        assert!(
            (second - variance).abs() < 5. * error,
            "{prior:?}: {second} +- {error}, expected {variance}"
        );
        // The mean penalty under the density itself: n of a group's radius, 1/2 of a square.
        let blocks = w.to_vec2::<f64>()?;
        let mut logs = Vec::with_capacity(n);
        for block in &blocks {
            logs.push(-prior.log_density(block)? - prior.log_normalizer()?);
        }
        let (penalty, error) = mean(logs.iter().copied(), |l| l);
        let expected = match (prior == Prior::l2(0.2)?, prior == Prior::l1(3.)?, prior.size()) {
            (true, ..) => 0.5,
            (_, true, _) => 1.,
            (.., size @ 2..) => size as f64,
            _ => continue,
        };
        assert!((penalty - expected).abs() < 5. * error, "{prior:?}: {penalty} +- {error}");
    }
    Ok(())
}

#[test]
fn samples_are_a_function_of_seed_and_stream() -> Result<()> {
    let draw = |seed, stream| -> Result<Vec<f32>> {
        Prior::group_lasso(1., 4)?
            .sample((5, 4), DType::F32, &Device::Cpu, seed, stream)?
            .flatten_all()?
            .to_vec1()
    };
    assert_eq!(draw(1, 2)?, draw(1, 2)?);
    assert_ne!(draw(1, 2)?, draw(1, 3)?);
    assert_ne!(draw(1, 2)?, draw(2, 2)?);
    Ok(())
}
