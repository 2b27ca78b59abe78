//! The last layer of a classifier: seconds of fit, tuning and prediction, beside `benches/peers/torch_last_layer.py`.

use super::clock::Clock;
use candle_core::{DType, Device, Result};
use kronwake::checkpoint::Checkpoint;
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, ParamsTune, Parts, Posterior, Problem, Structure,
};
use kronwake::nn::{self, VarBuilder, VarMap};
use kronwake::tape::{Likelihood, Tape};
use kronwake_cli::values::count;
use serde_json::json;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Options {
    /// Features, labels, inputs and the layer, as torch_last_layer.py writes them
    file: PathBuf,
    /// Repeats of a tenth of a second or more, of which the median counts
    #[arg(long, value_parser = count, default_value_t = 3)]
    repeats: usize,
    /// Where the figures go
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The median of the seconds of all threads together, of so many calls that their time can be measured, and what came of the last.
fn timed<T>(repeats: usize, work: impl Fn() -> Result<T>) -> Result<(f64, T)> {
    let (mut seconds, mut calls) = (Vec::new(), 1);
    loop {
        let clock = Clock::start();
        for _ in 1..calls {
            work()?;
        }
        let found = work()?;
        let passed = clock.seconds().computed;
        // The kernel counts in steps of some milliseconds.
        if passed < 0.1 && calls < 1 << 16 {
            calls *= 4;
            continue;
        }
        seconds.push(passed / calls as f64);
        if seconds.len() == repeats {
            seconds.sort_by(f64::total_cmp);
            return Ok((seconds[repeats / 2], found));
        }
    }
}

pub fn measure(options: &Options) -> Result<()> {
    let file = Checkpoint::read(&options.file, &Device::Cpu)?;
    let get = |name: &str| match file.tensors.get(name) {
        Some(tensor) => Ok(tensor.clone()),
        None => candle_core::bail!("{}: lacks {name}", options.file.display()),
    };
    let (x, inputs) = (get("x")?, get("inputs")?);
    let (classes, features) = get("fc.weight")?.dims2()?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let model = tape.build(|| nn::linear(features, classes, vb.pp("fc")))?;
    file.load_partly(&vars)?;
    let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    let examples = Examples::new(x, get("y")?)?;
    let hyper = Hyper::new(&problem, Structure::Scalar, 2.0)?;
    let estimator = Estimator::new(Curvature::Kron, Parts::Whole);
    let (repeats, memory) = (options.repeats, estimator.memory);
    let (fit, posterior) =
        timed(repeats, || Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, memory))?;
    let of_evidence = estimator.fit(&problem, &examples, 0)?;
    let log_evidence = of_evidence.evidence(&hyper)?.log_evidence;
    let (tune, _) = timed(repeats, || {
        let start = Hyper::new(&problem, Structure::Scalar, 1.0)?;
        of_evidence.tune(&start, &ParamsTune { steps: 100, lr: 0.1, seed: 0 }, |_, _| ())
    })?;
    let count = inputs.dim(0)?;
    let (predict, _) = timed(repeats, || {
        for n in 0..count {
            posterior.marginals(&problem, &inputs.narrow(0, n, 1)?)?.probit()?;
        }
        Ok(())
    })?;
    let found = posterior.marginals(&problem, &inputs)?;
    let flat = |t: &candle_core::Tensor| t.flatten_all()?.to_vec1::<f64>();
    let figures = json!({
        "fit": fit, "tune": tune, "predict": predict / count as f64, "log_evidence": log_evidence,
        "variance": flat(&found.variance)?, "probit": flat(&found.probit()?)?,
    });
    println!(
        "{features} features, {classes} classes: fit {fit:.4} s, 100 steps of tuning {tune:.4} s, {:.3} ms an input, log evidence {log_evidence:.6}",
        1e3 * predict / count as f64
    );
    match &options.json {
        Some(path) => Ok(std::fs::write(path, figures.to_string())?),
        None => Ok(()),
    }
}
