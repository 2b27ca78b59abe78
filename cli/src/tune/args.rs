//! The command line.

use crate::data::Name;
use crate::finetune::args::Net;
use crate::model::Spec;
use crate::values::{Place, count, positive};
use candle_core::{DType, Result, bail};
use clap::{Parser, ValueEnum};
use kronwake::evidence::{Curvature, Estimator, Outputs, Parts, Split, Structure};
use std::path::PathBuf;

/// Choose weight decay, temperature and noise of a trained net by the evidence of its training data.
///
/// Without arguments: trains the CNN of the KLD-WRM paper on a bundled subset of Fashion-MNIST, then tunes a prior precision for each of its
/// tensors by the stochastic NTK bound. With --checkpoint the net is read from a safetensors file instead. No validation data is used.
///
/// With --model vit or bert, or --tuned, it is a net that was fine-tuned, on the examples of finetune: the prior is about what the net was before, and
/// negative log-likelihood and calibration error of held-out predictions are shown before and after. Without --tuned it is fine-tuned first, by AdamW.
#[derive(Parser, Clone, Debug)]
#[command(name = "tune", allow_negative_numbers = true, after_long_help = JSON_FORMAT)]
pub struct Args {
    /// Parameters to start from: safetensors with the model's names, as the mnist example or PyTorch writes them; of a net that was fine-tuned the base,
    /// as finetune takes it (for bert a folder, with config.json and tokenizer.json) [default: trained first]
    #[arg(long, value_name = "PATH", help_heading = MODEL)]
    pub checkpoint: Option<PathBuf>,
    /// cnn | lenet300 | lenet5 | mlp:784-32-16-10[:relu|tanh], of any widths with --examples | vit | bert, which needs --checkpoint and --data
    #[arg(long, default_value = "cnn", value_parser = model, help_heading = MODEL)]
    pub model: Net,
    /// What finetune wrote from that base, tuned-OPTIMIZER.safetensors, with adapters-OPTIMIZER.safetensors beside it where --lora was used [default:
    /// fine-tuned first]
    #[arg(long, value_name = "FILE", help_heading = MODEL)]
    pub tuned: Option<PathBuf>,
    /// Rank of the adapters where it is fine-tuned first; of a finished fine-tuning the adapters' file has it [default: 8]
    #[arg(long, value_name = "RANK", value_parser = count, conflicts_with = "tuned", help_heading = MODEL)]
    pub lora: Option<usize>,
    /// Likelihood of the labels [default: categorical for whole numbers, gaussian for others]
    #[arg(long, value_enum, help_heading = MODEL)]
    pub likelihood: Option<Kind>,
    /// Element type of parameters and kernels: f32 | f64
    #[arg(long, default_value = "f32", value_parser = dtype, help_heading = MODEL)]
    pub dtype: DType,
    /// cpu | cuda | cuda:N (CUDA needs a build with `--features cuda`)
    #[arg(long, default_value = "cpu", help_heading = MODEL)]
    pub device: Place,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = count, help_heading = MODEL)]
    pub threads: Option<usize>,

    /// Examples instead of a data set: safetensors with `x` [n, ..] and `y` [n] or [n, outputs]; an x of u8 is divided by 255 and not
    /// normalized, others are taken as they are
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dataset", "data_dir"], help_heading = DATA)]
    pub examples: Option<PathBuf>,
    /// Sentences for bert: a sentence, a tab and a label a line; every fifth is held out
    #[arg(long, value_name = "FILE", conflicts_with_all = ["examples", "dataset", "data_dir"], help_heading = DATA)]
    pub data: Option<PathBuf>,
    /// Full data set: with --data-dir from a folder, else from the cache of Hugging Face or the network, in builds with `--features
    /// datasets` [default: bundled subset of Fashion-MNIST; with --data-dir: mnist]
    #[arg(long, value_enum, help_heading = DATA)]
    pub dataset: Option<Name>,
    /// Folder with the four IDX files of --dataset, gzip or raw
    #[arg(long, value_name = "DIR", help_heading = DATA)]
    pub data_dir: Option<PathBuf>,
    /// Use the first N training examples alone
    #[arg(long, value_name = "N", value_parser = count, help_heading = DATA)]
    pub first: Option<usize>,
    /// Passes over the training set where the net is trained or fine-tuned first
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = count, help_heading = DATA)]
    pub epochs: usize,

    /// Estimator of the evidence [default: ntk; rotated for a net that was fine-tuned]
    #[arg(long, value_enum, help_heading = EVIDENCE)]
    pub bound: Option<Bound>,
    /// Tensors that the evidence is of, by name, `*` for any characters; a pattern that begins with ! excludes, and the word `adapters` stands for
    /// those. The others are held fast, as for a last layer [default: all; adapters and the last layer where there are adapters]
    #[arg(long, value_name = "PATTERN[,PATTERN..]", value_delimiter = ',', help_heading = EVIDENCE)]
    pub part: Vec<String>,
    /// Examples of a part. An evaluation adds up all parts in order; a step of the tuning draws one [default: 100 for ntk, indep, single and
    /// extrapolated, all for the others]
    #[arg(long, value_name = "N", value_parser = count, help_heading = EVIDENCE)]
    pub batch: Option<usize>,
    /// Make each part of one class
    #[arg(long, help_heading = EVIDENCE)]
    pub grouped: bool,
    /// How indep and single tell outputs apart: by a root of the likelihood's Hessian (a proven bound) or by its diagonal
    #[arg(long, value_enum, default_value_t = SplitKind::Root, help_heading = EVIDENCE)]
    pub split: SplitKind,
    /// The output that single takes [default: one drawn for each part]
    #[arg(long, value_name = "N", help_heading = EVIDENCE)]
    pub output: Option<usize>,
    /// The most gigabytes that a matrix and its factors may take
    #[arg(long, value_name = "GB", default_value_t = 4.0, value_parser = positive, help_heading = EVIDENCE)]
    pub memory: f64,

    /// Which weights share a prior precision
    #[arg(long, value_enum, default_value_t = Shared::Tensor, help_heading = TUNING)]
    pub prior: Shared,
    /// Prior precision to start from: one number, or one a tensor in the order of the checkpoint (by name without one)
    #[arg(long, value_name = "V[,V..]", default_value = "1", value_delimiter = ',', value_parser = positive, help_heading = TUNING)]
    pub prior_precision: Vec<f64>,
    /// Mean of the prior of a net that was fine-tuned [default: start]
    #[arg(long, value_enum, help_heading = TUNING)]
    pub prior_mean: Option<Mean>,
    /// Temperature to start from: the likelihood enters to the power 1/T
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = positive, help_heading = TUNING)]
    pub temperature: f64,
    /// Tune the temperature too; of classes it rises with every step, as their evidence does
    #[arg(long, help_heading = TUNING)]
    pub tune_temperature: bool,
    /// Standard deviation of a gaussian likelihood's noise, tuned unless --fix-noise
    #[arg(long, value_name = "SIGMA", default_value_t = 1.0, value_parser = positive, help_heading = TUNING)]
    pub noise: f64,
    /// Leave the noise as it is
    #[arg(long, help_heading = TUNING)]
    pub fix_noise: bool,
    /// Steps of Adam; 0 only evaluates
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = TUNING)]
    pub steps: usize,
    /// Rate of the first step on the logarithms; it falls to zero by half a cosine
    #[arg(long, default_value_t = 0.1, value_parser = positive, help_heading = TUNING)]
    pub lr: f64,
    /// Of initial weights, the order of the images, and random parts; of adapters' first values, which finetune's --seed says too
    #[arg(long, default_value_t = 0, help_heading = TUNING)]
    pub seed: u64,

    /// Curvature of the posterior that predicts [default: that of --bound, where it has one; else kron]
    #[arg(long, value_enum, help_heading = FILES)]
    pub posterior: Option<PosteriorKind>,
    /// Which predictions of the tuned posterior for held-out examples are those after; all are shown
    #[arg(long, value_enum, default_value_t = PredictiveKind::Probit, help_heading = FILES)]
    pub predictive: PredictiveKind,
    /// Write the result here as JSON; the format is below
    #[arg(long, value_name = "FILE", help_heading = FILES)]
    pub json: Option<PathBuf>,
    /// Folder of evidence.svg, the evidence over a grid of precisions, not drawn with --steps 0 and of nets that were fine-tuned; and of finetune's
    /// files, where it is fine-tuned first
    #[arg(long, value_name = "DIR", default_value = ".", help_heading = FILES)]
    pub out: PathBuf,
}

const MODEL: &str = "Model and machine";
const DATA: &str = "Data";
const EVIDENCE: &str = "Evidence";
const TUNING: &str = "Hyperparameters";
const FILES: &str = "Files";

const JSON_FORMAT: &str = "\
Format of --json: one object. Of the hyperparameters at the end (with --steps 0 those given): log_likelihood; log_prior, which is -1/2 of
the sum of precision times squared parameter; log_det, of which half is the complexity; log_evidence = log_likelihood + log_prior -
log_det / 2; for each parameter tensor, in the order of the checkpoint, tensors (names), prior_precision, grad_log_precision (the derivative of
log_evidence by the logarithm of its precision), effective_parameters, weight_decay (in a mean loss, for the gradient decay * w);
temperature, grad_log_temperature, noise, grad_log_noise; condition, a bound of the condition number of what was factorized. Also bound,
batch, grouped, examples, steps, and before: the same numbers at the hyperparameters given. held_out, where there are test examples and --steps
is not 0: examples; net (the softmax of the net's outputs: before), probit, bridge and sampled (the tuned posterior's predictions), each with
nll, calibration_error (in 15 bins of equal width) and accuracy; after, the name of the one that --predictive says.";

/// What `--bound` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bound {
    /// Neural tangent kernels of batches: a lower bound, in expectation where batches are drawn
    Ntk,
    /// Kernels of batches, continued to all examples: no bound, and nearer
    Extrapolated,
    /// A kernel for each output: a looser bound
    Indep,
    /// The kernel of one output, times their number: in expectation that of indep
    Single,
    /// Kronecker factors: no bound
    Kfac,
    /// The Gauss-Newton matrix with a block a tensor: a lower bound
    Block,
    /// With a block a layer: a tighter one
    BlockLayer,
    /// Its diagonal in the eigenbases of the Kronecker factors: a lower bound, much tighter than the diagonal
    Rotated,
    /// Its diagonal: a loose lower bound
    Diag,
    /// Exact: the whole Gauss-Newton matrix, or the kernel of all examples where that is smaller
    Full,
}

impl Bound {
    pub fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SplitKind {
    Root,
    Diagonal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Categorical,
    Bernoulli,
    Gaussian,
}

/// What `--posterior` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PosteriorKind {
    /// The whole Gauss-Newton matrix, exact
    Full,
    /// Its diagonal in the eigenbases of the Kronecker factors
    Rotated,
    /// Kronecker factors
    Kron,
    /// Its diagonal
    Diag,
}

/// What `--predictive` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PredictiveKind {
    /// The outputs divided by what MacKay's probit approximation has of their variances
    Probit,
    /// The mean of the Laplace bridge's Dirichlet distribution
    Bridge,
    /// The mean over draws of the outputs
    Sampled,
}

impl PredictiveKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Probit => "probit",
            Self::Bridge => "bridge",
            Self::Sampled => "sampled",
        }
    }
}

/// What `--prior-mean` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mean {
    /// What the net was before: the base's values, or the first values of its adapters; zero for a new last layer
    Start,
    /// Zero
    Zero,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shared {
    /// All of them
    All,
    /// Those of a layer
    Layer,
    /// Those of a tensor
    Tensor,
    /// None
    None,
}

impl Shared {
    pub fn structure(self) -> Structure {
        match self {
            Self::All => Structure::Scalar,
            Self::Layer => Structure::PerLayer,
            Self::Tensor => Structure::PerTensor,
            Self::None => Structure::Diagonal,
        }
    }
}

fn model(text: &str) -> std::result::Result<Net, String> {
    match text {
        "vit" => Ok(Net::Vit),
        "bert" => Ok(Net::Bert),
        _ => spec(text).map(Net::Of).map_err(|e| format!("{e}, or vit, bert")),
    }
}

fn spec(text: &str) -> std::result::Result<Spec, String> {
    let Some(rest) = text.strip_prefix("mlp:") else { return text.parse() };
    let (widths, activation) = rest.split_once(':').unwrap_or((rest, "relu"));
    let parsed: std::result::Result<Vec<usize>, _> = widths.split('-').map(str::parse).collect();
    match parsed {
        Ok(widths) if widths.len() >= 2 && !widths.contains(&0) && matches!(activation, "relu" | "tanh") => {
            Ok(Spec::Mlp { widths, tanh: activation == "tanh" })
        }
        _ => {
            Err("expected mlp:N-..-N with an optional :relu or :tanh, two widths or more, none of them 0"
                .into())
        }
    }
}

fn dtype(text: &str) -> std::result::Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f64" => Ok(DType::F64),
        _ => Err("expected f32 or f64".into()),
    }
}

/// The estimators of a run.
pub struct Estimators {
    /// All parts in order.
    pub evaluate: Estimator,
    /// One part, drawn, where there are several.
    pub tune: Estimator,
    pub batch: usize,
    /// In all.
    pub examples: usize,
}

impl Args {
    /// Whether it is a net that was fine-tuned.
    pub fn is_finetuned(&self) -> bool {
        self.tuned.is_some() || matches!(self.model, Net::Vit | Net::Bert)
    }

    pub fn bound(&self) -> Bound {
        self.bound.unwrap_or(if self.is_finetuned() { Bound::Rotated } else { Bound::Ntk })
    }

    /// Refuses options that nothing would use.
    pub fn check(&self) -> Result<()> {
        if self.data.is_some() && self.model != Net::Bert {
            bail!("--data is for --model bert")
        }
        let of_finetuned = [("prior-mean", self.prior_mean.is_some()), ("lora", self.lora.is_some())];
        if let (false, Some((name, _))) = (self.is_finetuned(), of_finetuned.iter().find(|(_, given)| *given))
        {
            bail!("--{name} is for a net that was fine-tuned: --model vit or bert, or --tuned")
        }
        let of_images = [("examples", &self.examples), ("data-dir", &self.data_dir)];
        let of_images = of_images.into_iter().filter(|(_, given)| given.is_some()).map(|(name, _)| name);
        if let (true, Some(name)) =
            (self.is_finetuned(), of_images.chain(self.dataset.map(|_| "dataset")).next())
        {
            bail!("--{name} does not apply to a net that was fine-tuned: its examples are those of finetune")
        }
        Ok(())
    }

    /// For `examples` examples, a model of `parameters` parameters and `outputs` outputs an example.
    pub fn estimators(&self, examples: usize, parameters: usize, outputs: usize) -> Result<Estimators> {
        let parted = matches!(self.bound(), Bound::Ntk | Bound::Extrapolated | Bound::Indep | Bound::Single);
        let usual = if parted { examples.min(100) } else { examples };
        let batch = self.batch.unwrap_or(usual);
        if batch > examples {
            bail!("--batch {batch} is more than the {examples} examples there are")
        }
        if self.output.is_some() && self.bound() != Bound::Single {
            bail!("--output applies to --bound single alone")
        }
        if self.grouped && self.bound() == Bound::Extrapolated {
            bail!(
                "--grouped does not apply to --bound extrapolated: a class does not tell how all examples go on"
            )
        }
        let split = if self.split == SplitKind::Root { Split::Root } else { Split::Diagonal };
        let curvature = match self.bound() {
            Bound::Ntk => Curvature::Kernel(Outputs::Joint),
            Bound::Extrapolated => Curvature::Extrapolated,
            Bound::Indep => Curvature::Kernel(Outputs::Independent(split)),
            Bound::Single => {
                let drawn = Outputs::One(split);
                Curvature::Kernel(self.output.map_or(drawn, |index| Outputs::Given(split, index)))
            }
            Bound::Kfac => Curvature::Kron,
            Bound::Block => Curvature::BlockPerTensor,
            Bound::BlockLayer => Curvature::BlockPerLayer,
            Bound::Rotated => Curvature::Rotated,
            Bound::Diag => Curvature::Diagonal,
            Bound::Full if parameters <= batch * outputs => Curvature::Full,
            Bound::Full => Curvature::Kernel(Outputs::Joint),
        };
        let parts = match (batch == examples, self.grouped) {
            (_, true) => Parts::ByLabel(batch),
            (true, false) => Parts::Whole,
            (false, false) => Parts::Consecutive(batch),
        };
        // In gigabytes of 1e9 bytes.
        let evaluate = Estimator { memory: (self.memory * 1e9) as usize, ..Estimator::new(curvature, parts) };
        let drawn = match parts {
            Parts::Whole => evaluate,
            Parts::ByLabel(_) => Estimator { draws: Some(1), ..evaluate },
            _ => Estimator { parts: Parts::Random(batch), draws: Some(1), ..evaluate },
        };
        Ok(Estimators { evaluate, tune: drawn, batch, examples })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }
}
