//! Options that change between two steps.

use crate::common::*;
use candle_core::{DType, Result};
use kronwake::curvature::{Damping, Relative};
use kronwake::optim::{Every, NaturalGradient, Optimizer, Params, ParamsAdamW};
use kronwake::tape::{Fisher, Likelihood};

fn step(net: &Net, opt: &mut NaturalGradient, k: u64) -> Result<()> {
    let (x, y) = small_batch(k, 9, DType::F64)?;
    let z = (net.forward)(&x)?;
    opt.observe(&z, Likelihood::Categorical)?;
    opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &y)?)
}

/// A relative damping is that of the inverses in use, so it stays until the next are made; with EKFAC it enters at every refresh.
#[test]
fn a_relative_damping_stays() -> Result<()> {
    for ekfac in [false, true] {
        let every = Every { factors: 2, inverses: 6 };
        let run = |touched: bool| -> Result<Vec<Vec<f64>>> {
            let net = Net::of(DType::F64, 1, small)?;
            let params = Params { every, ekfac, fisher: Fisher::Exact, ..Params::kld_wrm(&net.tape) };
            let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
            for k in 0..9 {
                step(&net, &mut opt, k)?;
                if touched {
                    let before = opt.damping();
                    opt.set_params(opt.params().clone())?;
                    assert_eq!(opt.damping(), before);
                    assert!(before > 0.0);
                }
            }
            net.values()?.iter().map(|value| value.flatten_all()?.to_vec1()).collect()
        };
        assert_eq!(run(true)?, run(false)?, "ekfac: {ekfac}");
    }
    // Where the relative damping is new, the old one holds until the inverses are due.
    let net = Net::of(DType::F64, 1, small)?;
    let mut opt = NaturalGradient::from_varmap(
        &net.varmap,
        Params { every: Every { factors: 2, inverses: 2 }, ..Params::k_fac(&net.tape) },
    )?;
    step(&net, &mut opt, 0)?;
    let fixed = opt.damping();
    opt.set_params(Params { damping: Damping::Relative(Relative::default()), ..opt.params().clone() })?;
    assert_eq!(opt.damping(), fixed);
    step(&net, &mut opt, 1)?;
    assert_eq!(opt.damping(), fixed);
    step(&net, &mut opt, 2)?;
    assert_ne!(opt.damping(), fixed);
    Ok(())
}

/// Adam's rate is in proportion to the learning rate; one that begins at 0, for a warm-up, has the options' at its largest.
#[test]
fn a_learning_rate_of_zero() -> Result<()> {
    let net = Net::of(DType::F64, 1, small)?;
    let fallback_adam = ParamsAdamW { lr: 0.001, weight_decay: 0.0, ..ParamsAdamW::default() };
    let params = Params { lr: 0.0, fallback_adam: fallback_adam.clone(), ..Params::k_fac(&net.tape) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
    let before = net.values()?;
    step(&net, &mut opt, 0)?;
    for (before, after) in before.iter().zip(net.values()?) {
        assert_eq!(flat(before), flat(&after));
    }
    opt.set_learning_rate(0.1);
    assert_eq!(opt.params().fallback_adam.lr, 0.001);
    let gain = flat(net.var("gain").as_tensor());
    step(&net, &mut opt, 1)?;
    // Adam's step is at most its rate, but for what the first moments have of the step at rate 0.
    for (before, after) in gain.iter().zip(flat(net.var("gain").as_tensor())) {
        assert!((before - after).abs() < 0.0015 && before != &after);
    }

    // A warm-up to 0.2, a decay to 0.05; and the same after a resume in the middle.
    let path = scratch("warm-up");
    opt.set_learning_rate(0.2);
    assert_eq!(opt.params().fallback_adam.lr, 0.001);
    opt.save(&path)?;
    let params = Params { lr: 0.0, fallback_adam, ..Params::k_fac(&net.tape) };
    let mut resumed = NaturalGradient::from_varmap(&net.varmap, params)?;
    resumed.resume(&path)?;
    std::fs::remove_file(&path)?;
    for opt in [&mut opt, &mut resumed] {
        opt.set_learning_rate(0.05);
        assert!((opt.params().fallback_adam.lr - 0.00025).abs() < 1e-15);
    }
    Ok(())
}
