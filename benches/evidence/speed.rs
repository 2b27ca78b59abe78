//! Seconds of a gradient by the hyperparameters, with parameters that change in between.

use super::clock::Clock;
use super::net::{self, Kind, Net, named};
use candle_core::{Result, bail};
use kronwake::evidence::{Curvature, Estimator, Evidence, Examples, Hyper, Outputs, Parts, Split, Structure};
use kronwake_cli::values::count;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(clap::Args, Default)]
pub struct Options {
    /// Folder of MNIST's four IDX files; random images without
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Write the figures to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the nets' parameters to NET.safetensors in this folder, for a comparison
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Only what has this in its name, such as "cnn", "batch 100" or "Kronecker"; may be given several times
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Seconds that the repeats of one figure may take together
    #[arg(long, value_parser = count, default_value_t = 5)]
    seconds: usize,
    /// Epochs of training before on 5,000 images: a random net's kernel is better conditioned than any that is tuned
    #[arg(long, default_value_t = 5)]
    epochs: usize,
}

const PRECISION: f64 = 20.0;

pub fn measure(options: &Options) -> Result<()> {
    let all = match &options.data_dir {
        Some(dir) => {
            let data = net::images(dir)?;
            let places: Vec<usize> = (0..data.train.len()).collect();
            net::examples(&data, &data.train, &places)?
        }
        None => net::random(10_000)?,
    };
    println!("{} images, {} threads", all.len(), rayon::current_num_threads());
    let joint = Curvature::Kernel(Outputs::Joint);
    let drawn = |curvature, size| Estimator { curvature, ..Estimator::batch(size) };
    let estimators = [
        ("batch 100", drawn(joint, 100)),
        ("batch 250", drawn(joint, 250)),
        ("one output, batch 250", drawn(Curvature::Kernel(Outputs::One(Split::Root)), 250)),
        ("extrapolated 100", Estimator::extrapolated(100)),
        ("Kronecker, all images", Estimator::new(Curvature::Kron, Parts::Whole)),
    ];
    let mut figures = vec![];
    for kind in [Kind::Mlp, Kind::Cnn] {
        let name = format!("{kind:?}").to_lowercase();
        let net = Net::new(kind, 0)?;
        let some: Vec<usize> = (0..5000.min(all.len())).collect();
        net.train(&all.select(&some)?, options.epochs, 0, &mut (), |(), loss| Ok(loss), |()| Ok(()))?;
        if let Some(dir) = &options.save {
            net.vars.save(dir.join(format!("{name}.safetensors")))?;
        }
        figures.push(check(&net, &all, &name)?);
        for (what, estimator) in &estimators {
            let title = format!("{name}, {what}");
            if options.only.is_empty() || options.only.iter().any(|part| title.contains(part)) {
                figures.push(figure(&net, &all, &name, what, estimator, options.seconds)?);
            }
        }
    }
    let report = json!({
        "threads": rayon::current_num_threads(), "images": all.len(), "mnist": options.data_dir.is_some(),
        "optimized": !cfg!(debug_assertions), "figures": figures,
    });
    match &options.json {
        Some(file) => match std::fs::write(file, format!("{report:#}\n")) {
            Ok(()) => Ok(()),
            Err(e) => bail!("--json {}: cannot be written ({e})", file.display()),
        },
        None => Ok(()),
    }
}

fn figure(
    net: &Net,
    all: &Examples,
    name: &str,
    what: &str,
    estimator: &Estimator,
    seconds: usize,
) -> Result<Value> {
    let problem = net.problem()?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, PRECISION)?;
    let (mut times, mut computed, mut condition) = (vec![], vec![], 0f64);
    let (mut later, mut later_times) = (vec![], vec![]);
    let start = Instant::now();
    while times.len() < 2 || (times.len() < 200 && start.elapsed() < Duration::from_secs(seconds as u64)) {
        for (_, var) in named(&net.vars)? {
            var.set(&(var.as_tensor() * (1.0 + 1e-6))?)?;
        }
        let clock = Clock::start();
        let fit = estimator.fit(&problem, all, times.len() as u64)?;
        let evidence = fit.evidence(&hyper)?;
        evidence.value.backward()?;
        times.push(clock.seconds().wall);
        computed.push(clock.seconds().computed);
        condition = condition.max(evidence.condition);
        let clock = Clock::start();
        fit.evidence(&hyper)?.value.backward()?;
        later.push(clock.seconds().computed);
        later_times.push(clock.seconds().wall);
    }
    let count = times.len();
    times.sort_by(f64::total_cmp);
    later_times.sort_by(f64::total_cmp);
    let later_median = later_times[count / 2];
    let (least, median) = (times[0], times[count / 2]);
    let [computed, again] = [&computed, &later].map(|times| times.iter().sum::<f64>() / count as f64);
    println!(
        "{name}, {what:<24} {:>10.3} ms computed, mean of {count}; {:>10.3} passed, the median, {:>10.3} at the least; {:>9.3} ms computed at the \
         same parameters, {:>9.3} passed; condition {condition:.0e}",
        1e3 * computed,
        1e3 * median,
        1e3 * least,
        1e3 * again,
        1e3 * later_median
    );
    Ok(json!({
        "net": name, "estimator": what, "least_seconds": least, "median_seconds": median,
        "computed_seconds": computed, "again_seconds": again, "again_median_seconds": later_median,
        "repeats": count, "condition": condition,
    }))
}

/// The value for the first 100 images, and its gradient: for a comparison.
fn check(net: &Net, all: &Examples, name: &str) -> Result<Value> {
    let problem = net.problem()?;
    let first = all.select(&(0..100).collect::<Vec<_>>())?;
    let hyper = Hyper::new(&problem, Structure::PerTensor, PRECISION)?;
    let value = |curvature| -> Result<Evidence> {
        Estimator::new(curvature, Parts::Whole).fit(&problem, &first, 0)?.evidence(&hyper)
    };
    let (kernel, kron) = (value(Curvature::Kernel(Outputs::Joint))?, value(Curvature::Kron)?);
    let names: Vec<_> = problem.parameters().iter().map(|p| p.name.clone()).collect();
    Ok(json!({
        "net": name, "estimator": "check", "precision": PRECISION, "names": names,
        "log_det": kernel.log_det, "grad_log_precision": kernel.grad_log_precision, "kron_log_det": kron.log_det,
        "log_likelihood": kernel.log_likelihood,
    }))
}
