//! Room for a state on a GPU.

use crate::device::cuda;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Beyond, Damping, FactorLimit, Inverse};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{Budget, NaturalGradient, Optimizer, Params};
use kronwake::tape::{Likelihood, Tape};
use std::process::Command;

/// Inputs, and as many outputs as make a factor that is not full unless much time may go into it.
const SIZES: (usize, usize) = (4, 1800);

/// K-FAC of one layer, with a step or without.
fn k_fac(device: &Device, factor_limit: FactorLimit, step: bool) -> Result<NaturalGradient> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let layer = tape.build(|| nn::linear_no_bias(SIZES.0, SIZES.1, vb.pp("layer")))?;
    let budget = Budget { share: 1e-6, rows: 1 };
    let params = Params {
        damping: Damping::Pi(0.1),
        inverse: Inverse::Cholesky,
        factor_limit,
        budget,
        ..Params::k_fac(&tape)
    };
    let mut opt = NaturalGradient::from_varmap(&vars, params)?;
    if step {
        let outputs = layer.forward(&Tensor::ones((2, SIZES.0), DType::F32, device)?)?;
        opt.observe(&outputs, Likelihood::Categorical)?;
        opt.backward_step(&outputs.sqr()?.mean_all()?)?;
    }
    Ok(opt)
}

/// What is tried in a process with as much memory as `KRONWAKE_HOST_GPU_MEMORY` says.
fn resumed(file: &str, fits: bool) -> Result<()> {
    let by_cost = FactorLimit { rows: 16, beyond: Beyond::ByCost };
    let Some(device) = cuda() else { return Ok(()) };
    let mut opt = k_fac(&device, by_cost, false)?;
    assert!(opt.summary().blocks[0].ranks[0].is_some(), "{}", opt.summary());
    let outcome = opt.resume(file).map_err(|error| error.to_string());
    match fits {
        true => {
            outcome.expect("it fits");
            assert_eq!(opt.summary().blocks[0].ranks, [None; 2]);
        }
        false => {
            let error = outcome.expect_err("it does not fit");
            assert!(error.contains("but the GPU has free"), "{error}");
            assert!(opt.summary().blocks[0].ranks[0].is_some());
        }
    }
    Ok(())
}

/// A file that brings other shapes is taken where the state has room, although the file's tensors lie beside it when that is asked, and
/// refused where it has none.
#[test]
fn a_files_tensors_are_not_counted_twice() -> Result<()> {
    const NAME: &str = "room::a_files_tensors_are_not_counted_twice";
    if let Ok(file) = std::env::var("KRONWAKE_TEST_RESUME") {
        return resumed(&file, std::env::var_os("KRONWAKE_TEST_FITS").is_some());
    }
    let Some(device) = cuda() else { return Ok(()) };
    if !std::fs::read_to_string("/proc/self/maps")?.contains("libhost_gpu") {
        eprintln!("skipped: only the GPU on the host has as much memory as it is told");
        return Ok(());
    }
    let file = std::env::temp_dir().join(format!("kronwake-room-{}.safetensors", std::process::id()));
    k_fac(&Device::Cpu, FactorLimit::NONE, true)?.save(&file)?;
    let peak = k_fac(&device, FactorLimit::NONE, false)?.summary().peak_bytes();
    let (state, beside) = (std::fs::metadata(&file)?.len() as usize, 1 << 20);
    // So that counting the file's tensors twice would refuse it.
    assert!(state > 4 * beside);
    for (memory, fits) in [(peak + beside, true), (peak - beside, false)] {
        let mut child = Command::new(std::env::current_exe()?);
        child.args(["--exact", NAME, "--nocapture"]);
        child.env("KRONWAKE_HOST_GPU_MEMORY", memory.to_string()).env("KRONWAKE_TEST_RESUME", &file);
        if fits {
            child.env("KRONWAKE_TEST_FITS", "1");
        }
        let output = child.output()?;
        let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && words.contains("1 passed"), "{memory} bytes: {words}");
    }
    std::fs::remove_file(&file)?;
    Ok(())
}
