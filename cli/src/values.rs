//! The values that options take, and how they are read.

use crate::processes::local_rank;
use crate::sentence::sentence;
use candle_core::{DType, Device, Result, bail};
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kronwake::curvature::{Beyond, FactorLimit};
use kronwake::optim::{Orthogonal, Q, Qe, So, TwoRate, Wake};
use kronwake::penalty::Factor;

/// What `--optimizer` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Gradient descent with momentum 0.9
    Sgd,
    /// AdamW with 0.9, 0.999, 1e-8
    Adamw,
    /// Muon with Nesterov's momentum 0.95; AdamW for vectors, embeddings and the last layer, as with the next three
    Muon,
    /// SOAP with 0.95, 0.95
    Soap,
    /// Shampoo with 0.9, 0.99 and the length of Adam's steps
    Shampoo,
    /// KL-Shampoo with 0.9, 0.99
    KlShampoo,
    /// K-FAC
    Kfac,
    /// SO-KLD-WRM
    So,
    /// Q-KLD-WRM
    Q,
    /// QE-KLD-WRM
    Qe,
    /// KLD-WRM with two rates and steps that find their length, the recommended one
    Kldwrm,
    /// Several, one after the other
    Compare,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScheduleKind {
    Constant,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DampingKind {
    Eigenvalue,
    Pi,
    Adaptive,
    Relative,
}

/// What decides how long a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StepKind {
    Lr,
    FixedKl,
    AdaptiveKl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BiasKind {
    Folded,
    Split,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FisherKind {
    Empirical,
    Sampled,
    Exact,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QSolveKind {
    Factor,
    Exact,
}

/// What the wake looks back at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CarryKind {
    Gradient,
    Literal,
}

/// A bound that can be switched off: what `--kl-clip` takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit(pub Option<f64>);

impl std::str::FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        positive(text).map(|value| Self(Some(value))).map_err(|expected| format!("{expected}, or none"))
    }
}

impl Choice {
    /// The wake, with the defaults of its own; none for what has no curvature.
    pub fn wake(self) -> Option<Wake> {
        match self {
            Self::Kfac => Some(Wake::KFac),
            Self::So => Some(So::default().into()),
            Self::Q => Some(Q::default().into()),
            Self::Qe => Some(Qe::default().into()),
            Self::Kldwrm => Some(TwoRate::default().into()),
            Self::Sgd | Self::Adamw | Self::Compare => None,
            Self::Muon | Self::Soap | Self::Shampoo | Self::KlShampoo => None,
        }
    }

    /// As papers spell it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Sgd => "SGD with momentum",
            Self::Adamw => "AdamW",
            Self::Muon => "Muon",
            Self::Soap => "SOAP",
            Self::Shampoo => "Shampoo",
            Self::KlShampoo => "KL-Shampoo",
            Self::Kfac => "K-FAC",
            Self::So => "SO-KLD-WRM",
            Self::Q => "Q-KLD-WRM",
            Self::Qe => "QE-KLD-WRM",
            Self::Kldwrm => "KLD-WRM",
            Self::Compare => "comparison",
        }
    }

    /// As the command line and the log spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sgd => "sgd",
            Self::Adamw => "adamw",
            Self::Muon => "muon",
            Self::Soap => "soap",
            Self::Shampoo => "shampoo",
            Self::KlShampoo => "kl-shampoo",
            Self::Kfac => "kfac",
            Self::So => "so",
            Self::Q => "q",
            Self::Qe => "qe",
            Self::Kldwrm => "kldwrm",
            Self::Compare => "compare",
        }
    }
}

/// The device of training programs that are not told one.
pub const DEVICE: &str = if cfg!(feature = "nccl") { "cuda" } else { "cpu" };

/// What `--device` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(number)) => {
                number.parse().map(Self::Cuda).map_err(|e| format!("number of the GPU: {e}"))
            }
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}

impl Place {
    /// The candle device, or why there is none.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            // Of several processes on a machine each has its own.
            Self::Cuda(first) => {
                let n = first.saturating_add(local_rank());
                match Device::new_cuda(n) {
                    Ok(device) => Ok(device),
                    Err(e) => bail!("--device cuda:{n}: {}", without_device(&sentence(&e))),
                }
            }
        }
    }
}

/// Why a CUDA device does not open, in words where `error` has only the driver's name for it.
fn without_device(error: &str) -> String {
    for (name, reason) in [
        ("not been built with cuda", "this build has no CUDA; build with --features cuda"),
        ("CUDA_ERROR_NO_DEVICE", "no NVIDIA GPU is present, or none is visible (CUDA_ERROR_NO_DEVICE)"),
        ("CUDA_ERROR_INVALID_DEVICE", "there is no GPU of this number (CUDA_ERROR_INVALID_DEVICE)"),
    ] {
        if error.contains(name) {
            return reason.to_owned();
        }
    }
    error.to_owned()
}

/// Reads one of some optimizers.
pub fn one_of(choices: &[Choice]) -> impl TypedValueParser<Value = Choice> + use<> {
    let values: Vec<_> = choices.iter().filter_map(ValueEnum::to_possible_value).collect();
    PossibleValuesParser::new(values).try_map(|name| Choice::from_str(&name, false))
}

fn number(text: &str, fits: impl Fn(f64) -> bool, expected: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && fits(value) => Ok(value),
        _ => Err(format!("expected {expected}")),
    }
}

pub fn positive(text: &str) -> std::result::Result<f64, String> {
    number(text, |v| v > 0.0, "a number above 0")
}

pub fn not_negative(text: &str) -> std::result::Result<f64, String> {
    number(text, |v| v >= 0.0, "a number of at least 0")
}

pub fn fraction(text: &str) -> std::result::Result<f64, String> {
    number(text, |v| (0.0..1.0).contains(&v), "a number of at least 0 and below 1")
}

pub fn count(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

pub fn count_or_none(text: &str) -> std::result::Result<usize, String> {
    text.parse().map_err(|_| "expected a whole number of at least 0".into())
}

/// What `--factor` takes.
pub fn factor(text: &str) -> std::result::Result<Factor, String> {
    text.parse().map_err(|error| sentence(&error))
}

pub fn dtype(text: &str) -> std::result::Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f64" => Ok(DType::F64),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        _ => Err("expected f32, f64, bf16 or f16".into()),
    }
}

/// What becomes of large factors: `whole`, `blocks:ROWS`, or `rank:RANK:ROWS` beyond as many rows.
pub fn factors(text: &str) -> std::result::Result<FactorLimit, String> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|&number| number > 0);
    let parts: Vec<&str> = text.split(':').collect();
    let found = match parts[..] {
        ["whole"] => Some(FactorLimit::NONE),
        ["blocks", rows] => number(rows).map(|rows| FactorLimit { rows, beyond: Beyond::BlockDiagonal }),
        ["rank", rank, rows] => number(rank)
            .zip(number(rows))
            .map(|(rank, rows)| FactorLimit { rows, beyond: Beyond::LowRank { rank } }),
        _ => None,
    };
    found.ok_or_else(|| format!("expected whole, blocks:ROWS or rank:RANK:ROWS, got {text:?}"))
}

/// How directions are made orthogonal: `by-device`, `rational:TERMS` or `polynomials:ITERATIONS`.
pub fn orthogonal(text: &str) -> std::result::Result<Orthogonal, String> {
    let found = match text.split_once(':') {
        None if text == "by-device" => Some(Orthogonal::ByDevice),
        Some(("rational", terms)) => terms.parse().ok().map(|terms| Orthogonal::Rational { terms }),
        Some(("polynomials", iterations)) => {
            iterations.parse().ok().map(|iterations| Orthogonal::Polynomials { iterations })
        }
        _ => None,
    };
    found.ok_or_else(|| format!("expected by-device, rational:TERMS or polynomials:ITERATIONS, got {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_orthogonal_directions_are_read() {
        assert_eq!(orthogonal("by-device"), Ok(Orthogonal::ByDevice));
        assert_eq!(orthogonal("rational:3"), Ok(Orthogonal::Rational { terms: 3 }));
        assert_eq!(orthogonal("polynomials:4"), Ok(Orthogonal::Polynomials { iterations: 4 }));
        for wrong in ["", "rational", "rational:", "polynomials:-1", "by-device:2", "other:3"] {
            assert!(orthogonal(wrong).is_err_and(|m| m.contains("rational:TERMS")), "{wrong}");
        }
    }

    #[test]
    fn missing_devices_are_explained() {
        let driver = |name: &str| format!("DriverError({name}, \"no text\")");
        assert!(without_device(&driver("CUDA_ERROR_NO_DEVICE")).starts_with("no NVIDIA GPU is present"));
        assert!(
            without_device(&driver("CUDA_ERROR_INVALID_DEVICE"))
                .starts_with("there is no GPU of this number")
        );
        let other = driver("CUDA_ERROR_OUT_OF_MEMORY");
        assert_eq!(without_device(&other), other);
    }
}
