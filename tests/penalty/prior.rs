//! Priors: moments of samples, the loss of variational inference, and predicted factors.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use kronwake::penalty::{Factor, Family, Init, MeanField, Prior, variational_loss};

/// The mean and the standard error of `f` over `values`.
fn mean(values: impl Iterator<Item = f64> + Clone, f: impl Fn(f64) -> f64) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let (sum, squares) = values.map(f).fold((0., 0.), |(s, q), v| (s + v, q + v * v));
    let mean = sum / n;
    (mean, ((squares / n - mean * mean) / n).sqrt())
}

#[test]
fn samples_have_the_moments() -> Result<()> {
    // With the mean penalty under the density itself: 1/2 of a square, n of a group's radius.
    for (prior, expected) in [
        (Prior::l2(0.2)?, Some(0.5)),
        (Prior::l1(3.)?, Some(1.)),
        (Prior::group_lasso(0.7, 2)?, Some(2.)),
        (Prior::group_lasso(2., 25)?, Some(25.)),
        (Prior::cosine(-2., 1.5, 0.1)?, None),
        (Prior::cosine(1.5, 0.5, 0.4)?, None),
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
        let Some(expected) = expected else { continue };
        let blocks = w.to_vec2::<f64>()?;
        let mut logs = Vec::with_capacity(n);
        for block in &blocks {
            logs.push(-prior.log_density(block)? - prior.log_normalizer()?);
        }
        let (penalty, error) = mean(logs.iter().copied(), |l| l);
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

/// Least squares in one weight with a Gaussian prior, whose posterior is a Gaussian.
#[test]
fn bayes_by_backprop_reaches_the_exact_posterior() -> Result<()> {
    let x = Tensor::new(&[[1f64], [-1.], [0.5], [2.]], &Device::Cpu)?;
    let y = Tensor::new(&[[2.2f64], [-1.5], [1.4], [3.8]], &Device::Cpu)?;
    let factor = 0.75;
    // Precision: that of the prior, 2 factor, and sum x^2.
    let precision = 2. * factor + 6.25;
    let mean = (2.2 + 1.5 + 0.7 + 7.6) / precision;
    let weights =
        MeanField::new(&Tensor::zeros((1, 1), DType::F64, &Device::Cpu)?, 0.1, Prior::l2(factor)?, 4)?;
    let mut optimizer = AdamW::new(weights.vars(), ParamsAdamW { weight_decay: 0., ..Default::default() })?;
    for step in 0..3000 {
        optimizer.set_learning_rate(0.02 / (1. + step as f64 / 200.));
        let residuals = (x.matmul(&weights.sample(step)?)? - &y)?;
        let mean_nll = (residuals.sqr()?.mean_all()? * 0.5)?;
        optimizer.backward_step(&variational_loss(&mean_nll, &[&weights], 4)?)?;
    }
    let found = weights.mean().flatten_all()?.to_vec1::<f64>()?[0];
    assert!((found - mean).abs() < 0.03, "{found}, expected {mean}");
    let scale = weights.log_scale().flatten_all()?.to_vec1::<f64>()?[0].exp();
    assert!((scale * precision.sqrt() - 1.).abs() < 0.1, "{scale}, expected {}", precision.powf(-0.5));
    Ok(())
}

/// The prior of a predicted factor has the initialization's variance, and a penalty's own samples show it.
#[test]
fn predicted_factors_give_the_variance_of_the_initialization() -> Result<()> {
    let shape = Shape::from((40, 6, 5, 5));
    for init in [Init::LeCun, Init::Glorot, Init::He] {
        let variance = init.variance(&shape)?;
        for size_weighted in [false, true] {
            let family = Family::GroupLasso { size: 150, size_weighted };
            let prior = family.prior(family.factor(variance)?)?;
            let w = prior.sample(&shape, DType::F64, &Device::Cpu, 1, 0)?;
            let found = w.sqr()?.mean_all()?.to_scalar::<f64>()?;
            // Forty groups, whose squared radii deviate by about 0.16 of their mean.
            assert!(
                (found / variance - 1.).abs() < 5. * 0.17 / 40f64.sqrt(),
                "{init:?}: {found}, {variance}"
            );
        }
        // For L2 as evidence has it: prior precision = 2 lambda.
        let factor =
            Factor::Auto { temperature: 1. }.of_layers(&[("w", &shape)], |_, _| Family::L2, init, 1)?[0];
        assert!((2. * factor * variance - 1.).abs() < 1e-14);
    }
    Ok(())
}
