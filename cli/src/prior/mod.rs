//! Whether a penalty stands for a prior, and for which; `cargo run --release --example prior -- --help` lists what can be chosen.

mod plot;

use crate::program;
use crate::values::{count, not_negative, positive};
use candle_core::{Result, Shape};
use clap::{Parser, ValueEnum};
use kronwake::penalty::{Admissibility, Family, Grid, Init, PosteriorFamily, deconvolve};
use std::f64::consts::{E, TAU};
use std::path::PathBuf;
use std::process::ExitCode;

/// The prior of a penalty, if it has one.
///
/// A penalty r(mu, s) of the mean mu and the deviation s of a posterior is the divergence from a prior, up to a constant, only if its
/// deconvolution by the posterior is a function, the same for all s, whose exponential has an integral (Wolinski, Charpiat, Ollivier,
/// arXiv 2002.00178). Prints which of this fails, or plots the prior's density to DIR/prior.svg; and, for l2 and l1, the factor
/// at which the prior has the variance 1 / fan_in of a layer's initial weights.
#[derive(Parser, Clone, Debug)]
#[command(name = "prior", allow_negative_numbers = true)]
struct Args {
    /// The penalty of one weight
    #[arg(long, value_enum, default_value_t = Named::Cos)]
    penalty: Named,
    /// dirac: the posterior is one point, and mu the weight; gaussian: N(mu, s^2) for three s, WIDTH / 160, / 80 and / 40
    #[arg(long, value_enum, default_value_t = Posteriors::Gaussian)]
    posterior: Posteriors,
    /// Factor b of the penalty
    #[arg(long, value_name = "B", default_value_t = 1.0, value_parser = positive)]
    factor: f64,
    /// Frequency f of cos
    #[arg(long, value_name = "F", default_value_t = 4.0, value_parser = positive)]
    frequency: f64,
    /// Factor d of the squares beside cos; without them its prior has no integral
    #[arg(long, value_name = "D", default_value_t = 0.5, value_parser = not_negative)]
    decay: f64,
    /// The prior is looked for from -WIDTH to WIDTH
    #[arg(long, value_name = "WIDTH", default_value_t = 8.0, value_parser = positive)]
    width: f64,
    /// Layer whose factor is predicted: output and input units
    #[arg(long, value_name = "OUTxIN", default_value = "300x784", value_parser = layer)]
    layer: (usize, usize),
    /// Examples of the mean loss that the predicted factor is for
    #[arg(long, value_name = "N", default_value_t = 60_000, value_parser = count)]
    examples: usize,
    /// Folder of the plot, made if missing
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Named {
    /// b (mu^2 + s^2) less the posterior's entropy
    L2,
    /// b |mu| less the entropy
    L1,
    /// b exp(-s^2 f^2 / 2) cos(f mu) + d (mu^2 + s^2) less the entropy
    Cos,
    /// b ln(1 + mu^2) less the entropy
    Cauchy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Posteriors {
    Dirac,
    Gaussian,
}

fn layer(text: &str) -> std::result::Result<(usize, usize), String> {
    let read = |text: &str| text.split_once('x').and_then(|(m, n)| Some((count(m).ok()?, count(n).ok()?)));
    read(text).ok_or_else(|| "expected OUTxIN, such as 300x784".into())
}

impl Args {
    fn penalty(&self, mu: f64, s: f64) -> f64 {
        let &Self { factor: b, frequency: f, decay: d, .. } = self;
        let entropy = if s > 0.0 { 0.5 * (TAU * E).ln() + s.ln() } else { 0.0 };
        let penalty = match self.penalty {
            Named::L2 => b * (mu * mu + s * s),
            Named::L1 => b * mu.abs(),
            Named::Cos => b * (-0.5 * (s * f).powi(2)).exp() * (f * mu).cos() + d * (mu * mu + s * s),
            Named::Cauchy => b * (mu * mu).ln_1p(),
        };
        penalty - entropy
    }

    fn admissibility(&self) -> Result<Admissibility> {
        let scales = [160.0, 80.0, 40.0].map(|part| self.width / part);
        let posterior = match self.posterior {
            Posteriors::Dirac => PosteriorFamily::Dirac,
            Posteriors::Gaussian => PosteriorFamily::Gaussian(&scales),
        };
        deconvolve(|mu, s| self.penalty(mu, s), posterior, Grid::new(self.width))
    }

    /// The predicted factor in words.
    fn prediction(&self) -> Result<String> {
        let family = match self.penalty {
            Named::L2 => Family::L2,
            Named::L1 => Family::L1,
            Named::Cos | Named::Cauchy => return Ok("no factor is predicted but for l2 and l1".into()),
        };
        let variance = Init::LeCun.variance(&Shape::from(self.layer))?;
        let factor = family.factor(variance)?;
        Ok(format!(
            "predicted factor for a layer of {} x {} weights: {factor:.4}, in a mean loss over {} examples {:.4e}; 0.01 to 0.1 of it \
             is often best",
            self.layer.0,
            self.layer.1,
            self.examples,
            factor / self.examples as f64
        ))
    }
}

/// What was found, in sentences.
fn report(admissibility: &Admissibility) -> String {
    if !admissibility.admissible() {
        let reasons: Vec<_> = admissibility.failures.iter().map(ToString::to_string).collect();
        return format!("no prior: {}", reasons.join("; "));
    }
    format!(
        "a prior: {:.1e} of its mass or less lies outside, scales of the posterior change it by {:.1e}, the regularization by {:.1e}",
        admissibility.outside, admissibility.deviation, admissibility.change
    )
}

fn work(args: &Args) -> Result<()> {
    let admissibility = args.admissibility()?;
    println!("{}", report(&admissibility));
    if admissibility.admissible() {
        program::make_folder("--out", &args.out)?;
        let path = args.out.join("prior.svg");
        plot::density(&path, &admissibility)?;
        println!("density: {}", path.display());
    }
    println!("{}", args.prediction()?);
    Ok(())
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    program::start(None, || work(&args))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn read(line: &str) -> Args {
        Args::try_parse_from(["prior"].into_iter().chain(line.split_whitespace())).unwrap()
    }

    #[test]
    fn verdicts() -> Result<()> {
        Args::command().debug_assert();
        for (line, found) in [
            ("", "a prior: "),
            ("--decay 0", "no prior: the prior has no integral"),
            ("--penalty l2", "a prior: "),
            ("--penalty l1", "no prior: its deconvolution is not a function"),
            ("--penalty l1 --posterior dirac", "a prior: "),
            ("--penalty cauchy --posterior dirac", "a prior: "),
            ("--penalty cauchy --posterior dirac --factor 0.4", "no prior: the prior has no integral"),
        ] {
            let report = report(&read(line).admissibility()?);
            assert!(report.starts_with(found), "{line}: {report}");
        }
        // The normal density at its middle: precision 2 b.
        let admissibility = read("--penalty l2 --factor 2").admissibility()?;
        let middle = admissibility.log_density[admissibility.x.len() / 2].exp();
        assert!((middle - (4.0 / TAU).sqrt()).abs() < 1e-4, "{middle}");
        Ok(())
    }

    #[test]
    fn predictions() -> Result<()> {
        // fan_in / 2 and sqrt(2 fan_in).
        assert!(read("--penalty l2").prediction()?.contains("300 x 784 weights: 392.0000, "));
        let l1 = read("--penalty l1 --layer 10x50 --examples 100").prediction()?;
        assert!(l1.contains("10 x 50 weights: 10.0000, in a mean loss over 100 examples 1.0000e-1"), "{l1}");
        assert!(layer("3").is_err() && layer("0x2").is_err() && layer("ax2").is_err());
        Ok(())
    }
}
