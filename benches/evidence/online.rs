//! Training whose decays follow the evidence, beside the best of fixed decays by validation data.

use super::clock::Clock;
use super::net::{self, Kind, Net};
use candle_core::{Result, bail};
use kronwake::evidence::{
    Curvature, Estimator, Examples, Hyper, Outputs, ParamsTuneDuring, Split, Structure, TuneDuring, TuneRule,
};
use kronwake_cli::data::Data;
use kronwake_cli::values::count;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Options {
    /// Folder of MNIST's four IDX files [default: the bundled part of Fashion-MNIST]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Methods whose names have one of these in them alone
    #[arg(long, default_value = "", value_delimiter = ';')]
    only: Vec<String>,
    /// Besides, fixed points a layer pooled by each of these
    #[arg(long, value_delimiter = ',')]
    pooled: Vec<f64>,
    /// From each of these precisions
    #[arg(long, value_delimiter = ',', default_values_t = [10.0])]
    from: Vec<f64>,
    /// Of these, how many parts a training has, with a round after each from a tenth of the training on
    #[arg(long, value_parser = count, default_value_t = 20)]
    rounds: usize,
    /// Not the fixed decays
    #[arg(long)]
    no_fixed: bool,
    /// Training images; as many again validate, 1,000 at most
    #[arg(long, value_parser = count, default_value_t = 1000)]
    images: usize,
    /// Steps of training, of 100 images each
    #[arg(long, value_parser = count, default_value_t = 1000)]
    steps: usize,
    /// Runs of each kind
    #[arg(long, value_parser = count, default_value_t = 5)]
    seeds: usize,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    first: u64,
}

/// Prior precisions of the fixed decays.
const FIXED: [f64; 6] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

struct Sets {
    train: Examples,
    validation: Examples,
    test: Examples,
    epochs: usize,
}

struct Outcome {
    validation: f64,
    test: f64,
    wrong: f64,
    seconds: f64,
}

pub fn measure(options: &Options) -> Result<()> {
    let data = match &options.data_dir {
        Some(folder) => net::images(folder)?,
        None => Data::bundled()?,
    };
    let (n, held) = (options.images, options.images.min(1000));
    if n + held > data.train.len() || n < 250 {
        bail!("--images {n}: expected 250 to {}", data.train.len() - held)
    }
    let places = |count: usize| (0..count).collect::<Vec<_>>();
    let test = net::examples(&data, &data.test, &places(data.test.len()))?;
    let epochs = (options.steps / (n / 100)).max(1);
    let one = Curvature::Kernel(Outputs::One(Split::Root));
    let steps = epochs * (n / 100);
    let point = ParamsTuneDuring::by_fixed_points(100, steps);
    let by_adam = |estimator| ParamsTuneDuring {
        estimator,
        rule: TuneRule::Adam,
        // 20 rounds of them must not take longer than the training.
        steps: 5,
        lr: 0.15,
        ..point
    };
    let of_one = Estimator { curvature: one, ..Estimator::batch(250) };
    let later = ParamsTuneDuring { burn_in: steps / 5, ..point };
    let half = ParamsTuneDuring { lr: 0.5, ..point };
    let larger = ParamsTuneDuring { estimator: Estimator::extrapolated(200), ..point };
    let batch = ParamsTuneDuring { estimator: Estimator::batch(100), ..point };
    let pooled = |pooled| ParamsTuneDuring { pooled, ..point };
    let (scalar, layer, tensor) = (Structure::Scalar, Structure::PerLayer, Structure::PerTensor);
    let methods = [
        ("evidence, batch 100, a scalar", scalar, 1.0, by_adam(Estimator::batch(100))),
        ("evidence, batch 100, a tensor", tensor, 1.0, by_adam(Estimator::batch(100))),
        ("evidence, one output, batch 250, a tensor", tensor, 1.0, by_adam(of_one)),
        ("evidence, continued 100, a scalar", scalar, 1.0, by_adam(Estimator::extrapolated(100))),
        ("evidence, continued 100, a tensor", tensor, 1.0, by_adam(Estimator::extrapolated(100))),
        ("fixed point, continued 100, a scalar", scalar, 1.0, point),
        ("fixed point, continued 100, a layer", layer, 1.0, point),
        ("fixed point, continued 100, a tensor", tensor, 1.0, point),
        ("fixed point from 10, a layer", layer, 10.0, point),
        ("fixed point later, a layer", layer, 10.0, later),
        ("fixed point by halves, a layer", layer, 10.0, half),
        ("fixed point, batch 100, a layer", layer, 10.0, batch),
        ("fixed point, continued 200, a layer", layer, 10.0, larger),
        ("fixed point from 10, a scalar", scalar, 10.0, point),
        ("fixed point by halves, a scalar", scalar, 10.0, half),
        ("fixed point pooled by 20, a layer", layer, 10.0, pooled(20.0)),
        ("fixed point pooled by 20, a tensor", tensor, 10.0, pooled(20.0)),
        ("fixed point pooled by 100, a layer", layer, 10.0, pooled(100.0)),
        ("fixed point pooled by 100, a tensor", tensor, 10.0, pooled(100.0)),
        ("fixed point from 30, pooled by 100, a layer", layer, 30.0, pooled(100.0)),
        ("fixed point, batch 100, a scalar", scalar, 10.0, batch),
        (
            "fixed point, batch 100, pooled by 100, a layer",
            layer,
            10.0,
            ParamsTuneDuring { pooled: 100.0, ..batch },
        ),
    ];
    let chosen = |name: &str| options.only.iter().any(|part| name.contains(part));
    let named = |(name, structure, from, params): (&str, _, f64, _)| {
        chosen(name).then(|| (name.to_string(), structure, from, params))
    };
    let mut methods: Vec<_> = methods.into_iter().filter_map(named).collect();
    for &amount in &options.pooled {
        for &from in &options.from {
            for (what, params) in [("continued 100", point), ("batch 100", batch)] {
                let params =
                    ParamsTuneDuring { pooled: amount, every: (steps / options.rounds).max(1), ..params };
                methods.push((
                    format!("{what} from {from}, pooled by {amount}, a layer"),
                    layer,
                    from,
                    params,
                ));
            }
        }
    }
    let mut table: Vec<(&str, Vec<Outcome>)> = vec![("none", vec![]), ("best of 6 fixed", vec![])];
    table.extend(methods.iter().map(|(name, ..)| (name.as_str(), vec![])));
    for seed in options.first..options.first + options.seeds as u64 {
        let order = kronwake_cli::data::order(data.train.len(), Some(seed), usize::MAX);
        let train = net::examples(&data, &data.train, &order[..n])?;
        let validation = net::examples(&data, &data.train, &order[n..n + held])?;
        let sets = Sets { train, validation, test: test.clone(), epochs };
        let none = fixed(&sets, seed, 0.0)?;
        println!("  seed {seed}, none: {:.4} test, {:.2} s", none.test, none.seconds);
        table[0].1.push(none);
        let mut best: Option<Outcome> = None;
        for precision in FIXED.into_iter().filter(|_| !options.no_fixed) {
            let run = fixed(&sets, seed, precision)?;
            println!(
                "  seed {seed}, precision {precision}: {:.4} validation, {:.4} test, {:.2} s",
                run.validation, run.test, run.seconds
            );
            if best.as_ref().is_none_or(|best| run.validation < best.validation) {
                best = Some(run);
            }
        }
        table[1].1.extend(best);
        for ((_, structure, start, params), (name, runs)) in methods.iter().zip(&mut table[2..]) {
            let (run, precisions) = tuned(&sets, seed, *structure, *start, params)?;
            let shown: Vec<_> = precisions.iter().map(|p| format!("{p:.2}")).collect();
            println!(
                "  seed {seed}, {name}: {:.4} test, {:.2} s, precisions {}",
                run.test,
                run.seconds,
                shown.join(" ")
            );
            runs.push(run);
        }
    }
    println!("\n{n} images, {epochs} epochs, {} seeds", options.seeds);
    println!("| decay | test NLL | +- | test % wrong | seconds | of a run without |");
    println!("|---|---|---|---|---|---|");
    let mean =
        |runs: &[Outcome], of: fn(&Outcome) -> f64| runs.iter().map(of).sum::<f64>() / runs.len() as f64;
    let plain = mean(&table[0].1, |run| run.seconds);
    for (name, runs) in &table {
        let (nll, seconds) = (mean(runs, |run| run.test), mean(runs, |run| run.seconds));
        let variance =
            runs.iter().map(|run| (run.test - nll).powi(2)).sum::<f64>() / (runs.len().max(2) - 1) as f64;
        let wrong = 100.0 * mean(runs, |run| run.wrong);
        println!(
            "| {name} | {nll:.4} | {:.4} | {wrong:.2} | {seconds:.2} | {:.2} |",
            variance.sqrt(),
            seconds / plain
        );
    }
    Ok(())
}

fn outcome(net: &Net, sets: &Sets, seconds: f64) -> Result<Outcome> {
    let (test, wrong) = net.test(&sets.test)?;
    Ok(Outcome { validation: net.test(&sets.validation)?.0, test, wrong, seconds })
}

fn fixed(sets: &Sets, seed: u64, precision: f64) -> Result<Outcome> {
    let net = Net::new(Kind::Cnn, seed)?;
    let problem = net.problem()?;
    // The loss of a tuned run, never tuned.
    let hyper = Hyper::new(&problem, Structure::Scalar, precision.max(1e-9))?;
    let never = ParamsTuneDuring { burn_in: usize::MAX, ..ParamsTuneDuring::by_batches(1, 1) };
    let tuning = TuneDuring::new(hyper, never, sets.train.len())?;
    let clock = Clock::start();
    let loss = |_: &(), loss| if precision > 0.0 { tuning.loss(&loss) } else { Ok(loss) };
    net.train(&sets.train, sets.epochs, seed, &mut (), loss, |()| Ok(()))?;
    outcome(&net, sets, clock.seconds().computed)
}

fn tuned(
    sets: &Sets,
    seed: u64,
    structure: Structure,
    start: f64,
    params: &ParamsTuneDuring,
) -> Result<(Outcome, Vec<f64>)> {
    let net = Net::new(Kind::Cnn, seed)?;
    let problem = net.problem()?;
    let params = ParamsTuneDuring { seed: seed << 32, ..*params };
    let hyper = Hyper::new(&problem, structure, start)?;
    let mut tuning = TuneDuring::new(hyper, params, sets.train.len())?;
    let clock = Clock::start();
    net.train(
        &sets.train,
        sets.epochs,
        seed,
        &mut tuning,
        |t, loss| t.loss(&loss),
        |t| {
            t.after_step(&problem, &sets.train)?;
            Ok(())
        },
    )?;
    let seconds = clock.seconds().computed;
    Ok((outcome(&net, sets, seconds)?, tuning.hyper().tensor_precisions()?))
}
