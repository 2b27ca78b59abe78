//! How near estimates from batches come to the evidence of all examples, and the precisions at which they are largest.

use super::clock::Clock;
use super::net::{self, Kind, Net, named};
use candle_core::Result;
use kronwake::evidence::{
    Curvature, Estimator, Evidence, Examples, Fit, Hyper, Outputs, Parts, Problem, Structure,
};
use kronwake_cli::values::{count, positive};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Options {
    /// Folder of MNIST's four IDX files
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Images
    #[arg(long, value_parser = count, default_value_t = 1000)]
    images: usize,
    /// Epochs of training before
    #[arg(long, value_parser = count, default_value_t = 100)]
    epochs: usize,
    /// Prior precision of the training's penalty
    #[arg(long, value_parser = positive, default_value_t = 10.0)]
    precision: f64,
    /// Single batches, for the spread of an estimate
    #[arg(long, value_parser = count, default_value_t = 10)]
    seeds: usize,
    /// Batches up to this size
    #[arg(long, value_parser = count, default_value_t = 500)]
    largest: usize,
}

/// Logarithms to base 10 of the precisions of the table; at that in the middle errors are taken.
const GRID: [f64; 5] = [0.0, 0.666_666_666_666_666_6, 1.333_333_333_333_333_3, 2.0, 2.666_666_666_666_666_5];
const MIDDLE: f64 = GRID[2];

pub fn measure(options: &Options) -> Result<()> {
    let data = net::images(&options.data_dir)?;
    let n = options.images.min(data.train.len());
    let examples = net::examples(&data, &data.train, &(0..n).collect::<Vec<_>>())?;
    let net = Net::new(Kind::Cnn, 0)?;
    let factor = 0.5 * options.precision / n as f64;
    let decayed = |(): &(), loss: candle_core::Tensor| {
        let mut loss = loss;
        for (_, var) in named(&net.vars)? {
            loss = (loss + (var.as_tensor().sqr()?.sum_all()? * factor)?)?;
        }
        Ok(loss)
    };
    net.train(&examples, options.epochs, 0, &mut (), decayed, |()| Ok(()))?;
    let (loss, wrong) = net.test(&examples)?;
    println!("{n} images; after training a mean loss of {loss:.4}, {:.1} % wrong", 100.0 * wrong);
    let problem = net.problem()?;
    let grid = Grid { problem: &problem, examples: &examples, n: n as f64 };
    let heads = GRID.map(|log| format!("| at 10^{log:.2} ")).concat();
    println!("| estimator {heads}| optimum, log10 | there | effective at 10^{MIDDLE:.2} |");
    println!("|---{}|---|---|---|", "|---".repeat(GRID.len()));
    let joint = Curvature::Kernel(Outputs::Joint);
    let full = grid.row("all examples", &Estimator::new(Curvature::Full, Parts::Whole))?;
    for size in [500, 250, 100, 50, 20, 10].into_iter().filter(|&size| size <= options.largest) {
        grid.row(&format!("batches of {size}"), &Estimator::new(joint, Parts::Random(size)))?;
    }
    grid.row("batches of 100 of a label", &Estimator::new(joint, Parts::ByLabel(100)))?;
    for size in [100, 50] {
        let estimator = Estimator::new(Curvature::Extrapolated, Parts::Random(size));
        grid.row(&format!("batches of {size}, continued"), &estimator)?;
    }
    grid.row("Kronecker factors", &Estimator::new(Curvature::Kron, Parts::Whole))?;
    grid.row("diagonal", &Estimator::new(Curvature::Diagonal, Parts::Whole))?;

    println!("\nOne batch: root mean square of the differences to all examples, {} batches", options.seeds);
    println!("| estimator | complexity / N | effective, of it | optimum, log10 | ms a gradient |");
    println!("|---|---|---|---|---|");
    for size in [50, 100, 250].into_iter().filter(|&size| size <= options.largest) {
        for (what, estimator) in
            [("", Estimator::batch(size)), (", continued", Estimator::extrapolated(size))]
        {
            grid.spread(&format!("batch of {size}{what}"), &estimator, &full, options.seeds)?;
        }
    }
    Ok(())
}

struct Grid<'a> {
    problem: &'a Problem<'a>,
    examples: &'a Examples,
    n: f64,
}

/// At [`MIDDLE`] the complexity and the effective number of parameters, and the logarithm of the best precision.
struct Row {
    complexity: f64,
    effective: f64,
    optimum: f64,
}

impl Grid<'_> {
    fn at(&self, fit: &Fit, log: f64) -> Result<Evidence> {
        fit.evidence(&Hyper::new(self.problem, Structure::Scalar, 10f64.powf(log))?)
    }

    /// Where the derivative changes its sign, by the method of the chord (the Illinois variant).
    fn optimum(&self, fit: &Fit) -> Result<f64> {
        let slope = |log| -> Result<f64> { Ok(self.at(fit, log)?.grad_log_precision.iter().sum()) };
        let (mut a, mut b) = (GRID[0], GRID[3]);
        let (mut at_a, mut at_b) = (slope(a)?, slope(b)?);
        for _ in 0..6 {
            let c = (a * at_b - b * at_a) / (at_b - at_a);
            let at_c = slope(c)?;
            if at_c * at_b < 0.0 {
                (a, at_a) = (b, at_b);
            } else {
                at_a *= 0.5;
            }
            (b, at_b) = (c, at_c);
            if (b - a).abs() < 1e-3 || at_b.abs() < 0.05 {
                break;
            }
        }
        Ok(b)
    }

    fn row(&self, what: &str, estimator: &Estimator) -> Result<Row> {
        let fit = estimator.fit(self.problem, self.examples, 0)?;
        let mut line = format!("| {what} ");
        let (mut complexity, mut effective) = (0.0, 0.0);
        for log in GRID {
            let found = self.at(&fit, log)?;
            line += &format!("| {:.3} ", found.log_evidence / self.n);
            if log == MIDDLE {
                (complexity, effective) = (found.log_det / 2.0, found.effective.iter().sum());
            }
        }
        let optimum = self.optimum(&fit)?;
        let best = self.at(&fit, optimum)?.log_evidence / self.n;
        println!("{line}| {optimum:.3} | {best:.3} | {effective:.0} |");
        Ok(Row { complexity, effective, optimum })
    }

    fn spread(&self, what: &str, estimator: &Estimator, full: &Row, seeds: usize) -> Result<()> {
        let (mut squares, mut times) = ([0.0; 3], vec![]);
        for seed in 0..seeds {
            let clock = Clock::start();
            let fit = estimator.fit(self.problem, self.examples, 1000 + seed as u64)?;
            let found = self.at(&fit, MIDDLE)?;
            times.push(clock.seconds().computed);
            let errors = [
                (found.log_det / 2.0 - full.complexity) / self.n,
                found.effective.iter().sum::<f64>() / full.effective - 1.0,
                self.optimum(&fit)? - full.optimum,
            ];
            for (sum, error) in squares.iter_mut().zip(errors) {
                *sum += error * error / seeds as f64;
            }
        }
        times.sort_by(f64::total_cmp);
        let [complexity, effective, optimum] = squares.map(f64::sqrt);
        let ms = 1e3 * times[times.len() / 2];
        println!("| {what} | {complexity:.3} | {:.0} % | {optimum:.3} | {ms:.1} |", 100.0 * effective);
        Ok(())
    }
}
