//! Scaled losses and clipped gradients.

use crate::common::*;
use candle_core::{DType, Device, Result, Var};
use kronwake::optim::{LossScale, NaturalGradient, NonFinite, Optimizer, Params, clip_gradients};
use kronwake::tape::{Fisher, Likelihood};

#[test]
fn a_scaled_step_is_the_step() -> Result<()> {
    for fisher in [Fisher::Empirical, Fisher::Exact] {
        let build = || -> Result<(Net, NaturalGradient)> {
            let net = Net::of(DType::F64, 1, small)?;
            let opt = NaturalGradient::from_varmap(
                &net.varmap,
                Params { fisher, ekfac: true, ..Params::k_fac(&net.tape) },
            )?;
            Ok((net, opt))
        };
        let ((plain, mut once), (scaled, mut often)) = (build()?, build()?);
        // A power of two: nothing is rounded on the way.
        let mut scale = LossScale { scale: 1024.0, interval: 3, good_steps: 0 };
        for k in 0..4 {
            let (x, y) = small_batch(k, 8, DType::F64)?;
            for (net, opt, scaling) in [(&plain, &mut once, false), (&scaled, &mut often, true)] {
                let z = (net.forward)(&x)?;
                let loss = mean_loss(Likelihood::Categorical, &z, &y)?;
                opt.observe(&z, Likelihood::Categorical)?;
                match scaling {
                    true => assert!(opt.backward_step_scaled(&loss, &mut scale)?),
                    false => opt.backward_step(&loss)?,
                }
            }
        }
        assert_eq!((scale.scale, scale.good_steps), (2048.0, 1));
        for ((found, expected), name) in scaled.values()?.iter().zip(plain.values()?).zip(plain.names()) {
            assert_close(found, &expected, 1e-14, &format!("{fisher:?} {name}"));
        }
    }
    Ok(())
}

#[test]
fn an_overflow_takes_no_step_and_halves_the_scale() -> Result<()> {
    let net = Net::of(DType::F16, 1, small)?;
    let mut opt: NaturalGradient = NaturalGradient::from_varmap(&net.varmap, Params::k_fac(&net.tape))?;
    let before = net.values()?;
    let (x, y) = small_batch(0, 8, DType::F16)?;
    let mut scale = LossScale { scale: 1e8, ..Default::default() };
    let mut left_out = 0;
    loop {
        let z = (net.forward)(&x)?.to_dtype(DType::F32)?;
        opt.observe(&z, Likelihood::Categorical)?;
        if opt.backward_step_scaled(&mean_loss(Likelihood::Categorical, &z, &y)?, &mut scale)? {
            break;
        }
        left_out += 1;
        assert_eq!(scale.scale, 1e8 / 2f64.powi(left_out));
        assert_eq!(opt.steps(), 0);
        for (found, expected) in net.values()?.iter().zip(&before) {
            assert_eq!(flat(found), flat(expected));
        }
    }
    assert!(left_out > 0 && opt.steps() == 1 && scale.scale > 1.0, "{left_out} {scale:?}");
    Ok(())
}

#[test]
fn clipping_keeps_the_direction_and_extreme_sizes() -> Result<()> {
    for size in [1e-25f32, 1.0, 1e25] {
        let vars = [Var::new(&[3. * size, 0.], &Device::Cpu)?, Var::new(&[[4. * size]], &Device::Cpu)?];
        let unused = Var::new(&[1f32], &Device::Cpu)?;
        let loss = ((vars[0].sum_all()? * 3.0)? + (vars[1].sum_all()? * 4.0)?)?;
        let loss = (loss * f64::from(size))?;
        let all = [vars[0].clone(), vars[1].clone(), unused];
        let norm = (9. + 9. + 16f64).sqrt() * f64::from(size);
        for max_norm in [2.0 * norm, 0.5 * norm] {
            let mut grads = loss.backward()?;
            let before = grads.get(&vars[0]).unwrap().to_vec1::<f32>()?[0];
            let found = clip_gradients(&mut grads, &all, max_norm)?;
            assert!((found / norm - 1.0).abs() < 1e-6, "{found} {norm}");
            let after = grads.get(&vars[0]).unwrap().to_vec1::<f32>()?[0];
            let expected = if max_norm > norm { 1.0 } else { 0.5 };
            assert!((after / before - expected).abs() < 1e-6, "{after} {before}");
        }
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let theta = Var::new(&[1f32, 2.], &Device::Cpu)?;
    let loss = theta.sum_all()?;
    let vars = [theta.clone()];
    let mut grads = loss.backward()?;
    assert_says(clip_gradients(&mut grads, &vars, 0.0), &["clip", "above 0", "got 0"]);
    let mut broken = (loss.log()? * f64::NAN)?.backward()?;
    assert_says(clip_gradients(&mut broken, &vars, 1.0), &["Var 0 [2]", "NaN"]);
    let mut scale = LossScale { scale: 0.0, ..Default::default() };
    assert_says(scale.backward(&loss, &vars), &["loss scale", "got 0"]);
    assert_says(LossScale::default().backward(&theta, &vars), &["scalar", "[2]"]);
    let net = Net::of(DType::F32, 1, small)?;
    let opt: NaturalGradient = NaturalGradient::from_varmap(&net.varmap, Params::k_fac(&net.tape))?;
    for (non_finite, refused) in [(NonFinite::Error, true), (NonFinite::Skip, false)] {
        let mut opt: NaturalGradient =
            NaturalGradient::from_varmap(&net.varmap, Params { non_finite, ..opt.params().clone() })?;
        let (x, y) = small_batch(0, 8, DType::F32)?;
        let z = ((net.forward)(&x)? * f64::NAN)?;
        let loss = mean_loss(Likelihood::Categorical, &z, &y)?;
        let step = opt.backward_step_scaled(&loss, &mut LossScale::default());
        match refused {
            true => assert_says(step, &["step 0", "the loss is NaN"]),
            false => assert!(!step?),
        }
    }
    Ok(())
}
