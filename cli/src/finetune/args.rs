//! The command line.

use super::text::Size;
use crate::model::Spec;
use crate::processes::PlacementKind;
use crate::values::{
    Choice, DEVICE, Place, count, dtype, factors, fraction, not_negative, one_of, orthogonal, positive,
};
use candle_core::{DType, Result, bail};
use clap::Parser;
use kronwake::curvature::FactorLimit;
use kronwake::optim::{AdaptiveKl, Orthogonal, StepRule};
use std::path::{Path, PathBuf};

/// Fine-tune a model from a safetensors checkpoint with the optimizers of kronwake.
///
/// Without arguments: trains a small CNN on classes 0 to 4 of a bundled subset of Fashion-MNIST, saves it, reads it back, and fine-tunes it on
/// classes 5 to 9, with a new last layer, by KLD-WRM, SO-KLD-WRM and AdamW from the same parameters on the same batches.
#[derive(Parser, Clone, Debug)]
#[command(name = "finetune", allow_negative_numbers = true)]
pub struct Args {
    /// How to fine-tune; `compare` runs kldwrm, so and adamw
    #[arg(long, default_value = "compare", value_parser = one_of(&CHOICES))]
    pub optimizer: Choice,
    /// cnn | lenet300 | lenet5 | mlp:784-32-10[:relu|tanh] | vit, a vision transformer | decoder[:WIDTH-LAYERS], a small Llama that learns
    /// this project's Rust and is tuned on its CUDA; 64-2 without a size | bert, which needs --checkpoint and --data
    #[arg(long, default_value = "lenet5")]
    pub model: Net,
    /// Parameters to start from (safetensors, an index of several, or a folder with either) [default: a base that is trained first]; for bert the
    /// folder also has config.json and tokenizer.json
    #[arg(long, value_name = "PATH")]
    pub checkpoint: Option<PathBuf>,
    /// Sentences for bert: a sentence, a tab and a label a line; every fifth is a test. A text for decoder in place of the CUDA, read as bytes; every
    /// tenth run of 64 is a test
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Start from random parameters, without a base
    #[arg(long, conflicts_with = "checkpoint")]
    pub scratch: bool,
    /// Element type of parameters and activations: f32 | f64 | bf16 | f16, which is trained with a scaled loss
    #[arg(long, default_value = "f32", value_parser = dtype)]
    pub dtype: DType,
    /// cpu | cuda | cuda:N (CUDA needs a build with `--features cuda`; with `--features nccl` it is the default, and of several processes
    /// on a machine each has its own GPU, from the Nth on)
    #[arg(long, default_value = DEVICE)]
    pub device: Place,
    /// Which process computes what, of several; needs a build with `--features mpi` or `nccl`
    #[arg(long, value_enum, default_value_t = PlacementKind::ByCost)]
    pub placement: PlacementKind,
    /// Worker threads [default: one a core; of several processes this one's share of them]
    #[arg(long, value_name = "N", value_parser = count)]
    pub threads: Option<usize>,

    /// Passes over the training set of the fine-tuning
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count)]
    pub epochs: usize,
    /// Passes over that of the base, where one is trained
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = count, conflicts_with_all = ["checkpoint", "scratch"])]
    pub base_epochs: usize,
    /// Examples a step, of all processes together
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count)]
    pub batch: usize,
    /// Highest learning rate; for kldwrm the fraction of a step's length [default: kldwrm 1, so, kfac and sgd 0.05, the others 0.004, but for bert
    /// 0.00005 or with --lora 0.001]
    #[arg(long, value_parser = positive)]
    pub lr: Option<f64>,
    /// Divergence of kldwrm's first step, in nats; later ones find theirs [default: 0.02 times the root of a thousandth of a step's loss terms]
    #[arg(long, value_name = "KL", value_parser = positive)]
    pub kl_target: Option<f64>,
    /// Bound on the squared length of so's and kfac's steps in the metric of the curvature [default: none, but for bert 0.001]
    #[arg(long, value_name = "KL", value_parser = positive)]
    pub kl_clip: Option<f64>,
    /// Highest learning rate of AdamW within muon, soap, shampoo and kl-shampoo, which has the embedding tables, the layer that makes the outputs and
    /// all vectors [default: that of --lr]
    #[arg(long, value_parser = positive)]
    pub ends_lr: Option<f64>,
    /// Momentum of sgd and muon, and beta1, the decay of the mean of gradients, of adamw, soap, shampoo and kl-shampoo, of the last three for matrices
    /// alone; in [0, 1) [default: sgd, adamw, shampoo and kl-shampoo 0.9, muon and soap 0.95]
    #[arg(long, value_parser = fraction)]
    pub momentum: Option<f64>,
    /// Decay of the means of squares of adamw, soap, shampoo and kl-shampoo, in [0, 1), for the last three of their matrices alone [default: 0.999,
    /// 0.95, 0.99, 0.99]
    #[arg(long, value_parser = fraction)]
    pub beta2: Option<f64>,
    /// Steps from one renewal of the bases of soap, or of the roots of shampoo and kl-shampoo, to the next [default: 10]
    #[arg(long, value_name = "N", value_parser = count)]
    pub period: Option<usize>,
    /// Eigenvalue damping of so and kfac [default: 0.0033 and 0.011]
    #[arg(long, value_parser = positive)]
    pub damping: Option<f64>,
    /// Kronecker factors of kldwrm, so and kfac: whole | blocks:ROWS, block-diagonal with at most so many rows | rank:RANK:ROWS, of low rank
    /// beyond so many rows [default: by what they cost]
    #[arg(long, value_name = "KIND", value_parser = factors)]
    pub factors: Option<FactorLimit>,
    /// How kldwrm makes directions orthogonal: by-device | rational:TERMS, on a CPU alone | polynomials:ITERATIONS [default: by-device]
    #[arg(long, value_name = "WAY", value_parser = orthogonal)]
    pub orthogonal: Option<Orthogonal>,
    /// The longest smaller side of a direction of kldwrm that is made orthogonal as a whole, not in parts [default: 256]
    #[arg(long, value_name = "ROWS", value_parser = count)]
    pub orthogonal_side: Option<usize>,
    /// Weight decay, decoupled; for sgd added to the gradient
    #[arg(long, default_value_t = 0.01, value_parser = not_negative)]
    pub weight_decay: f64,
    /// Steps in which the learning rate rises to --lr; then it falls by half a cosine to 5 %
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub warmup: usize,
    /// Largest norm of all gradients together
    #[arg(long, value_name = "NORM", value_parser = positive)]
    pub clip: Option<f64>,
    /// Parameters that are not trained: names in which * stands for any run of characters; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub freeze: Vec<String>,
    /// Train adapters of this rank beside the layers, and the new last layer, and nothing else; they are merged at the end
    #[arg(long, value_name = "RANK", value_parser = count)]
    pub lora: Option<usize>,
    /// The adapters' product is multiplied by this / RANK
    #[arg(long, default_value_t = 16.0, value_parser = positive, requires = "lora")]
    pub alpha: f64,
    /// Measure on every fifth training example, which is not trained on, in place of the test set: to choose options by
    #[arg(long)]
    pub hold_out: bool,
    /// Of the new layer's first values, the adapters', the order of the examples and sampled labels
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Folder of base.safetensors, tuned-OPTIMIZER.safetensors and finetune.svg, made if missing
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// Measure every Nth step of kldwrm, so or kfac: the KL divergence that it brings, whole and block by block, beside what the curvature predicted
    #[arg(long, value_name = "N", value_parser = count)]
    pub measure_every: Option<usize>,
    /// Write parameters and state to DIR/state-OPTIMIZER.safetensors after every N steps, replaced at once
    #[arg(long, value_name = "N", value_parser = count)]
    pub save_every: Option<usize>,
    /// Go on from those files, where they are there
    #[arg(long, requires = "save_every")]
    pub resume: bool,
}

/// What `--optimizer` takes.
const CHOICES: [Choice; 10] = [
    Choice::Kldwrm,
    Choice::So,
    Choice::Kfac,
    Choice::Adamw,
    Choice::Muon,
    Choice::Soap,
    Choice::Shampoo,
    Choice::KlShampoo,
    Choice::Sgd,
    Choice::Compare,
];

/// Those that leave the ends of a model to AdamW.
const OF_MATRICES: &[Choice] = &[Choice::Muon, Choice::Soap, Choice::Shampoo, Choice::KlShampoo];

/// What `--model` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    Of(Spec),
    Vit,
    Decoder(Size),
    Bert,
}

impl std::str::FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "vit" => Ok(Self::Vit),
            "decoder" => Ok(Self::Decoder(Size::default())),
            "bert" => Ok(Self::Bert),
            _ => match text.strip_prefix("decoder:") {
                Some(size) => size.parse().map(Self::Decoder),
                None => text.parse().map(Self::Of).map_err(|e| format!("{e}, or vit, decoder, bert")),
            },
        }
    }
}

impl Args {
    /// The highest learning rate.
    pub fn lr(&self, choice: Choice) -> f64 {
        let usual = match choice {
            Choice::Kldwrm => 1.0,
            Choice::So | Choice::Kfac | Choice::Sgd => 0.05,
            _ => match (&self.model, self.lora) {
                (Net::Bert, None) => 5e-5,
                (Net::Bert, Some(_)) => 1e-3,
                _ => 4e-3,
            },
        };
        self.lr.unwrap_or(usual)
    }

    /// What is to be run, one after the other.
    pub fn runs(&self) -> &[Choice] {
        match &self.optimizer {
            Choice::Compare => &[Choice::Kldwrm, Choice::So, Choice::Adamw],
            one => std::slice::from_ref(one),
        }
    }

    /// Refuses options that nothing that is run would use.
    pub fn check(&self) -> Result<()> {
        let runs = |choices: &[Choice]| self.runs().iter().any(|choice| choices.contains(choice));
        match self.model {
            Net::Of(_) | Net::Vit if self.data.is_some() => {
                bail!(
                    "--data is for --model bert and decoder; the other models are trained on what is bundled"
                )
            }
            Net::Of(_) | Net::Vit | Net::Decoder(_) | Net::Bert => {}
        }
        if self.measure_every.is_some() && (self.clip.is_some() || self.dtype == DType::F16) {
            bail!(
                "--measure-every does not go with --clip or --dtype f16: what it measures are steps as the optimizer takes them"
            )
        }
        for (option, given) in [
            ("kl-target", self.kl_target.is_some()),
            ("orthogonal", self.orthogonal.is_some()),
            ("orthogonal-side", self.orthogonal_side.is_some()),
        ] {
            if given && !runs(&[Choice::Kldwrm]) {
                bail!("--{option} is for kldwrm, and --optimizer is {}", self.optimizer.name())
            }
        }
        let roots = &OF_MATRICES[1..];
        for (option, given, owners) in [
            ("measure-every", self.measure_every.is_some(), &[Choice::Kldwrm, Choice::So, Choice::Kfac][..]),
            ("kl-clip", self.kl_clip.is_some(), &[Choice::So, Choice::Kfac][..]),
            ("damping", self.damping.is_some(), &[Choice::So, Choice::Kfac]),
            ("factors", self.factors.is_some(), &[Choice::Kldwrm, Choice::So, Choice::Kfac]),
            ("momentum", self.momentum.is_some(), &[OF_MATRICES, &[Choice::Sgd, Choice::Adamw]].concat()),
            ("beta2", self.beta2.is_some(), &[roots, &[Choice::Adamw]].concat()),
            ("period", self.period.is_some(), roots),
            ("ends-lr", self.ends_lr.is_some(), OF_MATRICES),
        ] {
            if given && !runs(owners) {
                let names: Vec<&str> = owners.iter().map(|owner| owner.name()).collect();
                let last = names.len() - 1;
                let names = format!("{} and {}", names[..last].join(", "), names[last]);
                bail!("--{option} is for {names}, and --optimizer is {}", self.optimizer.name())
            }
        }
        Ok(())
    }

    fn for_bert(&self, default: f64) -> Option<f64> {
        (self.model == Net::Bert).then_some(default)
    }

    /// What `rule` has, with the divergence of the first step.
    pub fn step_rule(&self, rule: StepRule) -> StepRule {
        match (rule, self.kl_target) {
            (StepRule::AdaptiveKl(rule), Some(initial)) => {
                StepRule::AdaptiveKl(AdaptiveKl { initial, ..rule })
            }
            (rule, _) => rule,
        }
    }

    /// The bound on steps of rules that have a learning rate.
    pub fn kl_clip(&self, rule: StepRule) -> Option<f64> {
        self.kl_clip.or(self.for_bert(0.001)).filter(|_| rule == StepRule::LearningRate)
    }

    /// The folder and the sentences of `--model bert`.
    pub fn sentences(&self) -> Result<(&Path, &Path)> {
        match (&self.checkpoint, &self.data) {
            (Some(checkpoint), Some(data)) => Ok((checkpoint, data)),
            _ => bail!("--model bert needs --checkpoint DIR and --data FILE"),
        }
    }
}
