use super::super::groups::Grouping;
use super::*;
use crate::gpu::emulate::emulate;
use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};
use candle_core::{DType, Var};

/// Steps of weights and multipliers, and all that is seen of them.
fn steps(omega: Omega, bound: Bound, dual: Dual, start: &Tensor) -> Result<Vec<Tensor>> {
    let mut multiplier = Multiplier::new(omega, bound, dual, start.dims())?;
    let (mut w, mut seen) = (start.clone(), vec![]);
    for _ in 0..4 {
        multiplier.update(&w)?;
        let var = Var::from_tensor(&w)?;
        let term = (multiplier.term(&var)? * 3.0)?;
        let (value, gradient) = multiplier.term_and_gradient(&w)?;
        seen.extend(term.backward()?.get(&var).cloned());
        seen.push((&w - (&gradient * 1e-4)?)?);
        w = seen[seen.len() - 1].clone();
        seen.extend([term, value, gradient, Tensor::new(multiplier.report(&w)?.slackness, w.device())?]);
    }
    Ok(seen)
}

#[test]
fn on_the_device_as_on_the_host() -> Result<()> {
    for (dims, grouping) in [
        (vec![5, 7], Grouping::Rows),
        (vec![5, 7], Grouping::Columns),
        (vec![3, 4, 3, 3], Grouping::InputChannels),
        (vec![6, 5], Grouping::Blocks { rows: 1, columns: 1 }),
        (vec![40, 30], Grouping::Whole),
        (vec![0, 3], Grouping::Rows),
    ] {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 3e-2)] {
            let mut start = values(&random(0, &dims)?)?;
            start.iter_mut().step_by(4).for_each(|w| *w = 0.0);
            let start = Tensor::from_vec(start, &dims[..], &Device::Cpu)?.to_dtype(dtype)?;
            for omega in [Omega::Norm(grouping), Omega::SquaredNorm(grouping), Omega::L1(grouping)] {
                // The ways differ in numbers of groups, which are in f64 whatever the weights are in.
                for (bound, dual) in ways().into_iter().take(if dtype == DType::F64 { 4 } else { 1 }) {
                    let run = || steps(omega, bound, dual, &start);
                    let (found, expected) = (emulate(run)?, run()?);
                    assert_eq!((found.len(), expected.len()), (24, 24));
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_eq!(found.dtype(), expected.dtype());
                        assert_close(found, &values(expected)?, tolerance);
                    }
                    // Of one evaluation, and with the factor of the backward pass.
                    for seen in expected.chunks(6) {
                        assert_close(&(&seen[4] * 3.0)?, &values(&seen[0])?, tolerance);
                        assert_close(&(&seen[3] * 3.0)?, &values(&seen[2])?, 1e-6);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Each kind of bound and of dual.
fn ways() -> [(Bound, Dual); 4] {
    let plain = Dual { augmented: 0.7, ..Dual::nu_pi(0.5, 0.3, 0.4) };
    let growing = AugmentedLagrangian { penalty: 0.7, growth: 1.5, ..Default::default() };
    [
        (Bound::AtMost(0.9), plain),
        (Bound::AtMost(0.9), Dual { restart: Some(0.1), cap: Some(0.4), ..plain }),
        (Bound::Equal(0.9), plain),
        (Bound::Equal(0.9), Dual::augmented_lagrangian(growing)),
    ]
}

/// Terms and their gradients against the formulas in the docs and central differences, of one tensor and of two together.
#[test]
fn terms_by_their_formulas() -> Result<()> {
    let grouping = Grouping::Rows;
    for omega in [Omega::Norm(grouping), Omega::SquaredNorm(grouping), Omega::L1(grouping)] {
        for (bound, dual) in ways().into_iter().chain([(
            Bound::AtMost(0.9),
            Dual::augmented_lagrangian(AugmentedLagrangian { penalty: 0.7, ..Default::default() }),
        )]) {
            let args = [random_var(0, &[4, 3])?, random_var(1, &[4])?];
            let mut multiplier = Multiplier::total(omega, bound, dual, &[&[4, 3], &[4]])?;
            // Multipliers of an earlier place, so that excesses of both signs meet them.
            multiplier.total_update(&[&(args[0].as_tensor() * 0.9)?, &(args[1].as_tensor() * 1.1)?])?;
            let rows = args[0].to_vec2::<f64>()?.into_iter().zip(values(&args[1])?);
            let report = multiplier.total_report(&[&args[0], &args[1]])?;
            let mut expected = 0.0;
            for (group, (mut row, last)) in rows.enumerate() {
                row.push(last);
                let value = match omega {
                    Omega::Norm(_) => row.iter().map(|v| v * v).sum::<f64>().sqrt(),
                    Omega::SquaredNorm(_) => row.iter().map(|v| v * v).sum(),
                    Omega::L1(_) => row.iter().map(|v| v.abs()).sum(),
                };
                let (e, alpha, c) = (value - 0.9, report.alpha[group], report.penalty[group]);
                assert!((report.excess[group] - e).abs() < 1e-14);
                expected += match (bound, dual.augmented_lagrangian) {
                    (Bound::AtMost(_), None) => alpha * e + 0.5 * c * e.max(0.0).powi(2),
                    (Bound::Equal(_), _) => alpha * e + 0.5 * c * e * e,
                    (Bound::AtMost(_), Some(_)) => {
                        ((alpha + c * e).max(0.0).powi(2) - alpha * alpha) / (2.0 * c)
                    }
                };
            }
            assert_close(&multiplier.total_term(&[&args[0], &args[1]])?, &[expected], 1e-13);
            check_gradients(&args, |a| multiplier.total_term(&[&a[0], &a[1]]));
            let run = || -> Result<Vec<Tensor>> {
                let grads = multiplier.total_term(&[&args[0], &args[1]])?.backward()?;
                let (value, mut all) = multiplier.total_gradients(&[&args[0], &args[1]])?;
                all.extend(args.iter().filter_map(|var| grads.get(var).cloned()));
                all.push(value);
                Ok(all)
            };
            let (found, device) = (run()?, emulate(run)?);
            assert_eq!(found.len(), 5);
            assert_close(&found[4], &[expected], 1e-13);
            for (at, found) in found.iter().enumerate() {
                assert_close(&device[at], &values(found)?, 1e-13);
                if at < 2 {
                    assert_close(found, &values(&device[at + 2])?, 1e-13);
                }
            }
        }
    }
    Ok(())
}

/// Half-precision weights beside those in f64.
#[test]
fn tensors_of_several_dtypes_together() -> Result<()> {
    let a = Var::from_tensor(&Tensor::new(&[3f32], &Device::Cpu)?.to_dtype(DType::BF16)?)?;
    let b = Var::new(&[4f64], &Device::Cpu)?;
    for dims in [[1usize; 1], [2]] {
        let multiplier = Multiplier::total(
            Omega::Norm(Grouping::Whole),
            Bound::AtMost(1.0),
            Dual::ascent(0.5),
            &[&[1], &dims],
        );
        assert_eq!(multiplier?.count(), 1);
    }
    let mut multiplier =
        Multiplier::total(Omega::Norm(Grouping::Rows), Bound::AtMost(1.0), Dual::ascent(0.5), &[&[1], &[1]])?;
    multiplier.total_update(&[&a, &b])?; // alpha = (5 - 1) / 2
    let term = multiplier.total_term(&[&a, &b])?;
    assert_eq!(term.to_scalar::<f64>()?, 8.0);
    let grads = term.backward()?;
    assert_close(grads.get(&a).unwrap(), &[1.2], 4e-3);
    assert_eq!(grads.get(&a).unwrap().dtype(), DType::BF16);
    assert_close(grads.get(&b).unwrap(), &[1.6], 1e-15);
    let error =
        Multiplier::total(Omega::L1(Grouping::Rows), Bound::AtMost(1.0), Dual::ascent(0.5), &[&[3, 2], &[2]]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("expected as many of each tensor, got [3, 2]"), "{error}");
    Ok(())
}
