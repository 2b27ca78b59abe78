//! States that commit ec2ec01 wrote, after 7 and after 14 steps: they resume, and go on as they did there.

use crate::common::*;
use candle_core::{DType, Result};
use kronwake::curvature::Damping;
use kronwake::optim::{
    AdaptiveKl, Average, Decay, Every, FallbackRate, NaturalGradient, Params, StepRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood};

/// What the files were written with, beside the defaults.
fn options(wake: Wake, net: &Net) -> Params {
    let every = Every { factors: 2, inverses: 4 };
    let p = Params { every, weight_decay: 0.01, ..Params::of(wake, &net.tape) };
    match p.wake {
        Wake::KFac => Params { momentum: 0.5, ..p },
        Wake::So(_) => Params { ekfac: true, average: Some(Average::default()), ..p },
        Wake::Q(_) => Params { damping: Damping::Pi(0.02), decay: Decay::Loss, ..p },
        Wake::Qe(_) => Params { rms_clip: Some(0.5), ..p },
        Wake::KldWrm(_) => Params {
            overlap: 2,
            fisher: Fisher::Exact,
            step_rule: StepRule::AdaptiveKl(AdaptiveKl {
                slope: 0.1,
                noise: 0.0,
                longest: f64::INFINITY,
                ..AdaptiveKl::default()
            }),
            orthogonal: None,
            fallback_rate: FallbackRate::Own,
            ..p
        },
    }
}

#[test]
fn go_on_as_they_did() -> Result<()> {
    for wake in Wake::members() {
        let name = wake.name();
        // Other values: all that counts is in the file.
        let net = Net::of(DType::F64, 2, small)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options(wake, &net))?;
        let state = |steps: usize| root().join(format!("tests/golden/states/{name}-{steps}.safetensors"));
        opt.resume(state(7))?;
        assert_eq!(opt.steps(), 7);
        for k in 7..14 {
            let (x, y) = small_batch(k, 9, DType::F64)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            let loss = mean_loss(Likelihood::Categorical, &z, &y)?;
            opt.step_with(&loss, Likelihood::Categorical, &mut || (net.forward)(&x))?;
        }
        let expected = Checkpoint::read(state(14), &candle_core::Device::Cpu)?;
        let path = scratch("former");
        opt.save(&path)?;
        let found = Checkpoint::read(&path, &candle_core::Device::Cpu)?;
        std::fs::remove_file(&path)?;
        assert_eq!(found.tensors.keys().collect::<Vec<_>>(), expected.tensors.keys().collect::<Vec<_>>());
        for (tensor, found) in &found.tensors {
            // Which vectors span an eigenspace is free, and moments are in their coordinates.
            if !["basis_", "moments", "scale"].iter().any(|free| tensor.contains(free)) {
                assert_close(found, &expected.tensors[tensor], 1e-9, &format!("{name}: {tensor}"));
            }
        }
    }
    Ok(())
}
