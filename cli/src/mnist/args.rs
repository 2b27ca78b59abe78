//! The command line: every option with its default, and which optimizers each option applies to.

use super::defaults;
use super::penalty;
use crate::data::Name;
use crate::model::Spec;
use crate::processes::PlacementKind;
use crate::values::*;
use candle_core::DType;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, error::ErrorKind};
use kronwake::optim::Orthogonal;
use kronwake::penalty::Factor;
use std::path::PathBuf;

/// Train a small network on 28x28 images with the optimizers of kronwake.
///
/// Without arguments: trains the CNN of the KLD-WRM paper on a bundled subset of Fashion-MNIST with KLD-WRM, then with
/// SO-KLD-WRM, K-FAC and AdamW from the same initial parameters on the same batches, and compares them.
#[derive(Parser, Clone, Debug)]
#[command(name = "mnist", allow_negative_numbers = true, after_long_help = format!("{}\n{}\n{LOG_FORMAT}", owners(), defaults::table()))]
pub struct Args {
    /// How to train; `compare` runs kldwrm, so, kfac and adamw from the same start on the same batches
    #[arg(long, value_enum, default_value_t = Choice::Compare)]
    pub optimizer: Choice,

    /// cnn | lenet300 | lenet5 | mlp:784-32-10[:relu|tanh]
    #[arg(long, default_value = "cnn", help_heading = DATA)]
    pub model: Spec,
    /// Full data set: with --data-dir from a folder, else from the cache of Hugging Face or the network, in builds with `--features
    /// datasets` [default: bundled subset of Fashion-MNIST; with --data-dir: mnist]
    #[arg(long, value_enum, help_heading = DATA)]
    pub dataset: Option<Name>,
    /// Folder with the four IDX files of --dataset, gzip or raw
    #[arg(long, value_name = "DIR", help_heading = DATA)]
    pub data_dir: Option<PathBuf>,
    /// Probability that a unit before the last layer is dropped in training
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = fraction, help_heading = DATA)]
    pub dropout: f64,
    /// Element type of parameters and activations: f32 | f64 | bf16 | f16 (the loss is in f32 or f64)
    #[arg(long, default_value = "f32", value_parser = dtype, help_heading = DATA)]
    pub dtype: DType,
    /// cpu | cuda | cuda:N (CUDA needs a build with `--features cuda`; with `--features nccl` it is the default, and of several processes
    /// on a machine each has its own GPU, from the Nth on)
    #[arg(long, default_value = DEVICE, help_heading = DATA)]
    pub device: Place,
    /// Record the training step as a CUDA graph and repeat it while no curvature is renewed; needs --device cuda, no --dropout and
    /// no --penalty
    #[arg(long, help_heading = DATA)]
    pub graph: bool,
    /// Which process computes what, of several; needs a build with `--features mpi` or `nccl`
    #[arg(long, value_enum, default_value_t = PlacementKind::ByCost, help_heading = DATA)]
    pub placement: PlacementKind,
    /// Worker threads [default: one a core; of several processes this one's share of them]
    #[arg(long, value_name = "N", value_parser = count, help_heading = DATA)]
    pub threads: Option<usize>,

    /// Passes over the training set, those before --resume included [default: 10, or as many as --steps needs]
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    pub epochs: Option<usize>,
    /// Stop after this many steps, those before --resume included; each step's loss goes to --log
    #[arg(long, value_name = "N", value_parser = count, help_heading = TRAINING)]
    pub steps: Option<usize>,
    /// Examples a step, of all processes together; an epoch's last batch may be smaller
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count, help_heading = TRAINING)]
    pub batch: usize,
    /// Learning rate; where steps have a fixed KL, the fraction of their length [default: by optimizer, see below]
    #[arg(long, value_parser = positive, help_heading = TRAINING)]
    pub lr: Option<f64>,
    /// How the learning rate falls over all the --epochs: not at all, or by a half cosine to 5 %
    #[arg(long, value_enum, default_value_t = ScheduleKind::Cosine, help_heading = TRAINING)]
    pub schedule: ScheduleKind,
    /// Weight decay: adamw shrinks the parameters by lr times it, sgd adds it to the gradient, the others to the gradient
    /// that the wake has made [default: by optimizer, see below]
    #[arg(long, value_parser = not_negative, help_heading = TRAINING)]
    pub weight_decay: Option<f64>,
    /// Tune a weight decay for every tensor after each epoch by the evidence of the training images, instead of --weight-decay
    #[arg(long, conflicts_with_all = ["weight_decay", "penalty", "graph", "save", "resume"], help_heading = TRAINING)]
    pub tune_decay: bool,
    /// Penalty of the layers' weights (not the biases): l2 | l1 | group | sparse-group:ALPHA | spatial[:KAPPA]. Groups are what
    /// leaves an input unit or channel; ALPHA is L1's part, KAPPA the spatial part (0.5). l1, group and sparse-group are proximal
    /// steps after the optimizer's, in proportion to its learning rate, which make exact zeros (and --average is none then,
    /// if not given); l2 and spatial are terms of the loss. Weight decay stays what --weight-decay says
    #[arg(long, value_name = "SPEC", requires = "factor", help_heading = TRAINING)]
    pub penalty: Option<penalty::Spec>,
    /// Factor of --penalty in the mean loss: a number, or auto[:T], for each layer the one whose prior has the variance
    /// 1 / fan_in, divided by the number of examples, times T (1; 0.01 to 0.1 is often best); auto is for l2, l1 and group
    #[arg(long, value_name = "F", value_parser = factor, requires = "penalty", help_heading = TRAINING)]
    pub factor: Option<Factor>,
    /// Seed of initial parameters, data order, dropout and sampled labels
    #[arg(long, default_value_t = 0, help_heading = TRAINING)]
    pub seed: u64,
    /// Keep the examples in file order (no seed involved), for comparisons with other implementations
    #[arg(long, help_heading = TRAINING)]
    pub no_shuffle: bool,

    /// Damping added to the curvature, above 0; adaptive starts there, and relative takes it as a fraction of the mean
    /// curvature that gradient noise meets
    #[arg(long, value_parser = positive, help_heading = CURVATURE)]
    pub damping: Option<f64>,
    /// Where the damping is added: to the products of eigenvalues or to both factors, or how it is found: from the loss's
    /// decrease, or from the factors
    #[arg(long, value_enum, help_heading = CURVATURE)]
    pub damping_kind: Option<DampingKind>,
    /// A layer's bias in the block of its weight or in a block of its own
    #[arg(long, value_enum, help_heading = CURVATURE)]
    pub bias: Option<BiasKind>,
    /// rho of the factors' exponential average, in [0, 1)
    #[arg(long, value_name = "RHO", value_parser = fraction, help_heading = CURVATURE)]
    pub stat_decay: Option<f64>,
    /// Steps from one refresh of the factors to the next
    #[arg(long, value_name = "N", value_parser = count, help_heading = CURVATURE)]
    pub factor_every: Option<usize>,
    /// Steps from one refresh of the inverses to the next
    #[arg(long, value_name = "N", value_parser = count, help_heading = CURVATURE)]
    pub inverse_every: Option<usize>,
    /// Steps that an update of the inverses may take beside the training; 0 waits for each
    #[arg(long, value_name = "N", value_parser = count_or_none, allow_negative_numbers = true, help_heading = CURVATURE)]
    pub overlap: Option<usize>,
    /// What decides how long a step is: the learning rate, a KL divergence between the models before and after, or one that
    /// follows the slopes before and after each step
    #[arg(long, value_enum, help_heading = CURVATURE)]
    pub step_rule: Option<StepKind>,
    /// That divergence; at the start, where it is adapted
    #[arg(long, value_name = "KL", value_parser = positive, help_heading = CURVATURE)]
    pub kl_target: Option<f64>,
    /// Renew the curvature at steps 1, 2, 4, 8, .. too, until the periods take over
    #[arg(long, value_name = "BOOL", help_heading = CURVATURE)]
    pub early_refresh: Option<bool>,
    /// Evaluate and keep averaged parameters, weighted by this power of the step, or none
    #[arg(long, value_name = "POWER", help_heading = CURVATURE)]
    pub average: Option<Limit>,
    /// How kldwrm makes directions orthogonal: by-device | rational:TERMS, on a CPU alone | polynomials:ITERATIONS [default: by-device]
    #[arg(long, value_name = "WAY", value_parser = orthogonal, help_heading = CURVATURE)]
    pub orthogonal: Option<Orthogonal>,
    /// The longest smaller side of a direction of kldwrm that is made orthogonal as a whole, not in parts [default: 256]
    #[arg(long, value_name = "ROWS", value_parser = count, help_heading = CURVATURE)]
    pub orthogonal_side: Option<usize>,
    /// Bound on a step's squared length in the metric of the curvature, or none
    #[arg(long, value_name = "KL", help_heading = CURVATURE)]
    pub kl_clip: Option<Limit>,
    /// Bound on the root mean square of a block's direction, or none [default: none]
    #[arg(long, value_name = "RMS", help_heading = CURVATURE)]
    pub rms_clip: Option<Limit>,
    /// Labels that the Fisher takes: the data's, sampled from the model, or all of them weighted by the model
    #[arg(long, value_enum, help_heading = CURVATURE)]
    pub fisher: Option<FisherKind>,

    /// rho of the wake of distances, in [0, 1) [default: that of --stat-decay; of kldwrm see below]
    #[arg(long, value_name = "RHO", value_parser = fraction, help_heading = WAKE)]
    pub wake_decay: Option<f64>,
    /// rho of the wake of models, in [0, 1)
    #[arg(long, value_name = "RHO", value_parser = fraction, help_heading = WAKE)]
    pub model_decay: Option<f64>,
    /// How q solves (F_bar + lr F) s = -lr g: factor by factor, or exactly (with --damping-kind pi)
    #[arg(long, value_enum, help_heading = WAKE)]
    pub q_solve: Option<QSolveKind>,
    /// What the wake looks back at: the gradient that a minimizer leaves, or what the step really taken leaves
    #[arg(long, value_enum, help_heading = WAKE)]
    pub carry: Option<CarryKind>,
    /// Inner steps of qe on the exact divergence
    #[arg(long, value_name = "N", value_parser = count, help_heading = WAKE)]
    pub qe_steps: Option<usize>,
    /// Learning rate of the inner steps, in units of --lr
    #[arg(long, value_parser = positive, help_heading = WAKE)]
    pub qe_lr: Option<f64>,
    /// Momentum of the inner steps, in [0, 1)
    #[arg(long, value_parser = fraction, help_heading = WAKE)]
    pub qe_momentum: Option<f64>,
    /// Models in the wake of qe, the current one included
    #[arg(long, value_name = "N", value_parser = count, help_heading = WAKE)]
    pub qe_models: Option<usize>,
    /// Precondition the inner steps as q's step is; then --qe-lr below 1 is stable
    #[arg(long, help_heading = WAKE)]
    pub qe_preconditioned: bool,

    /// Start from these parameters (safetensors with the model's tensor names) instead of random ones
    #[arg(long, value_name = "FILE", help_heading = FILES)]
    pub init: Option<PathBuf>,
    /// Write parameters and optimizer state here at the end
    #[arg(long, value_name = "FILE", help_heading = FILES)]
    pub save: Option<PathBuf>,
    /// Write that file after every N steps too; it is replaced at once, so that a training killed at any moment can go on from it
    #[arg(long, value_name = "N", value_parser = count, requires = "save", help_heading = FILES)]
    pub save_every: Option<usize>,
    /// Go on from the file of --save. With the same other options and the same --epochs, training in parts by --steps is
    /// the uninterrupted training, bit for bit
    #[arg(long, value_name = "FILE", help_heading = FILES)]
    pub resume: Option<PathBuf>,
    /// Write one JSON object a line here; the format is below
    #[arg(long, value_name = "FILE", help_heading = FILES)]
    pub log: Option<PathBuf>,
    /// Folder of curves.svg and model.safetensors, made if missing
    #[arg(long, value_name = "DIR", default_value = ".", help_heading = FILES)]
    pub out: PathBuf,
    /// Print at the end how much time forward, backward, factors, inverse and step took
    #[arg(long, help_heading = FILES)]
    pub trace: bool,
}

const DATA: &str = "Model, data and machine";
const TRAINING: &str = "Training";
const CURVATURE: &str = "Curvature (defaults below)";
const WAKE: &str = "Wake (defaults below)";
const FILES: &str = "Files and reports";

const LOG_FORMAT: &str = "\
Format of --log: one JSON object a line. An epoch gives
  {\"optimizer\":\"so\",\"epoch\":1,\"step\":94,\"lr\":0.01,\"train_loss\":0.93,\"train_accuracy\":0.66,
   \"test_loss\":0.66,\"test_accuracy\":0.75,\"seconds\":0.71}
where step counts from the start of training, train_* are means over the epoch's batches, each before its step and with
dropout if there is any, test_* are measured after the epoch without dropout (at the averaged parameters, where there are such), accuracies are in 0..1 and seconds are
those of training alone. With --steps each step also gives
  {\"optimizer\":\"so\",\"step\":1,\"loss\":2.31}
with the loss of its batch before the step.";

use Choice::{Adamw, Compare, Kfac, KlShampoo, Kldwrm, Muon, Q, Qe, Sgd, Shampoo, So, Soap};
const SINGLE: &[Choice] = &[Sgd, Adamw, Muon, Soap, Shampoo, KlShampoo, Kfac, So, Q, Qe, Kldwrm];
const CURVED: &[Choice] = &[Kfac, So, Q, Qe, Kldwrm, Compare];

/// The options that not every optimizer has, and the optimizers that have them.
const ONLY: &[(&str, &[Choice])] = &[
    ("lr", SINGLE),
    ("save", SINGLE),
    ("resume", SINGLE),
    ("damping", CURVED),
    ("damping_kind", CURVED),
    ("bias", CURVED),
    ("stat_decay", CURVED),
    ("factor_every", CURVED),
    ("inverse_every", CURVED),
    ("kl_clip", CURVED),
    ("rms_clip", CURVED),
    ("step_rule", CURVED),
    ("kl_target", CURVED),
    ("early_refresh", CURVED),
    ("average", CURVED),
    ("fisher", CURVED),
    ("wake_decay", &[So, Q, Qe, Kldwrm, Compare]),
    ("model_decay", &[Kldwrm]),
    ("orthogonal", &[Kldwrm]),
    ("orthogonal_side", &[Kldwrm]),
    ("overlap", &[Kfac, So, Kldwrm]),
    ("q_solve", &[Q, Qe]),
    ("carry", &[So, Q, Qe, Kldwrm]),
    ("qe_steps", &[Qe]),
    ("qe_lr", &[Qe]),
    ("qe_momentum", &[Qe]),
    ("qe_models", &[Qe]),
    ("qe_preconditioned", &[Qe]),
];

/// [`ONLY`] for the user, options of the same optimizers on one line.
fn owners() -> String {
    let mut text = String::from("Options that not every optimizer has:\n");
    for group in ONLY.chunk_by(|a, b| a.1 == b.1) {
        let flags: Vec<_> =
            group.iter().map(|(option, _)| format!("--{}", option.replace('_', "-"))).collect();
        let names: Vec<_> = group[0].1.iter().map(|owner| owner.name()).collect();
        text.push_str(&format!("  {}: {}\n", names.join(", "), flags.join(" ")));
    }
    text
}

impl Args {
    /// The command line of this process; ends the process with a message if it is wrong.
    pub fn from_command_line() -> Self {
        Self::read(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Parses `words` (the program's name first) and refuses options that the optimizer does not have.
    fn read<T: Into<std::ffi::OsString> + Clone>(
        words: impl IntoIterator<Item = T>,
    ) -> clap::error::Result<Self> {
        let matches = Self::command().try_get_matches_from(words)?;
        let args = Self::from_arg_matches(&matches)?;
        if args.graph && (args.device == Place::Cpu || args.dropout > 0.0) {
            let message =
                "--graph needs --device cuda, and no --dropout: a recorded step would repeat its masks";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, message));
        }
        match args.stray_option(&matches).or_else(|| args.stray_penalty()) {
            Some(message) => Err(Self::command().error(ErrorKind::ArgumentConflict, message)),
            None => Ok(args),
        }
    }

    /// The decay that the optimizer is to have: none of its own where it is tuned.
    pub fn decay_or(&self, usual: f64) -> f64 {
        if self.tune_decay { 0.0 } else { self.weight_decay.unwrap_or(usual) }
    }

    /// A sentence about what a penalty cannot be together with.
    fn stray_penalty(&self) -> Option<String> {
        let (penalty, factor) = (self.penalty?, self.factor?);
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        let predicted = penalty.family(&(1, 1).into()).is_some();
        if self.graph {
            Some("--graph does not go with --penalty: a recorded step would not hold it".into())
        } else if matches!(factor, Factor::Auto { .. }) && !predicted {
            Some(format!("--factor {factor} is a prediction for l2, l1 and group alone: give a number"))
        } else if half
            && penalty.proximal()
            && matches!(self.optimizer, Sgd | Adamw | Muon | Soap | Shampoo | KlShampoo | Compare)
        {
            let name = self.optimizer.name();
            Some(format!(
                "--optimizer {name} takes no proximal steps of f16 and bf16 weights: use --dtype f32"
            ))
        } else {
            None
        }
    }

    /// A sentence about the first given option that does not apply to the optimizer.
    fn stray_option(&self, matches: &ArgMatches) -> Option<String> {
        let (option, owners) = ONLY.iter().find(|(option, owners)| {
            matches.value_source(option) == Some(ValueSource::CommandLine)
                && !owners.contains(&self.optimizer)
        })?;
        let owners: Vec<_> = owners.iter().map(|owner| owner.name()).collect();
        let option = option.replace('_', "-");
        Some(format!(
            "--{option} does not apply to --optimizer {}, only to {}",
            self.optimizer.name(),
            owners.join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> std::result::Result<Args, String> {
        Args::read(["mnist"].into_iter().chain(line.split_whitespace())).map_err(|e| e.to_string())
    }

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
        let command = Args::command();
        for (option, _) in ONLY {
            assert!(command.get_arguments().any(|arg| arg.get_id() == option), "{option} is no option");
        }
    }

    /// Optimizer by optimizer, where [`ONLY`] goes by options: three of all single trainings, then those of curvature, then the wake's own.
    #[test]
    fn every_option_is_refused_by_the_optimizers_that_lack_it() {
        let single = "lr=0.5 save=f resume=f";
        let curved = "damping=0.5 damping-kind=pi bias=split stat-decay=0.5 factor-every=2 inverse-every=2 kl-clip=none \
                      rms-clip=2 step-rule=lr kl-target=0.5 early-refresh=true average=none fisher=exact";
        let inner = "q-solve=exact qe-steps=2 qe-lr=0.5 qe-momentum=0.5 qe-models=2 qe-preconditioned";
        let own =
            "overlap=2 wake-decay=0.5 model-decay=0.5 carry=literal orthogonal=rational:2 orthogonal-side=64";
        let all = [single, curved, inner, own].join(" ");
        for (optimizer, kinds, own) in [
            ("sgd", [single, ""], ""),
            ("adamw", [single, ""], ""),
            ("muon", [single, ""], ""),
            ("soap", [single, ""], ""),
            ("shampoo", [single, ""], ""),
            ("kl-shampoo", [single, ""], ""),
            ("kfac", [single, curved], "overlap"),
            ("so", [single, curved], "overlap wake-decay carry"),
            ("q", [single, curved], "wake-decay carry q-solve"),
            (
                "qe",
                [single, curved],
                "wake-decay carry q-solve qe-steps qe-lr qe-momentum qe-models qe-preconditioned",
            ),
            ("kldwrm", [single, curved], "overlap wake-decay carry model-decay orthogonal orthogonal-side"),
            ("compare", ["", curved], "wake-decay"),
        ] {
            let name = |option: &str| option.split('=').next().map(str::to_string);
            let owned: Vec<_> =
                kinds.iter().chain([&own]).flat_map(|k| k.split_whitespace()).map(name).collect();
            for option in all.split_whitespace() {
                let found = read(&format!("--optimizer {optimizer} --{option}"));
                let what = format!("--{option} with {optimizer}: {:?}", found.as_ref().err());
                assert_eq!(found.is_ok(), owned.contains(&name(option)), "{what}");
                let sentence = format!("does not apply to --optimizer {optimizer}, only to ");
                assert!(found.err().is_none_or(|error| error.contains(&sentence)), "{what}");
            }
        }
        assert_eq!(all.split_whitespace().count(), ONLY.len());
    }

    #[test]
    fn wrong_values_are_refused_with_what_was_expected() {
        for (line, message) in [
            ("--lr 0 --optimizer sgd", "expected a number above 0"),
            ("--lr nan --optimizer sgd", "expected a number above 0"),
            ("--weight-decay=-1", "expected a number of at least 0"),
            ("--dropout 1", "expected a number of at least 0 and below 1"),
            ("--batch 0", "expected a whole number of at least 1"),
            ("--overlap x", "expected a whole number of at least 0"),
            ("--overlap -1", "expected a whole number of at least 0"),
            ("--dtype f8", "expected f32, f64, bf16 or f16"),
            ("--device tpu", "expected cpu, cuda or cuda:N"),
            ("--device cuda:x", "number of the GPU: invalid digit"),
            ("--model vgg", "expected cnn, lenet300, lenet5 or mlp"),
            (
                "--optimizer lbfgs",
                "[possible values: sgd, adamw, muon, soap, shampoo, kl-shampoo, kfac, so, q, qe, kldwrm, compare]",
            ),
            ("--penalty l3 --factor 1", "expected l2, l1, group, sparse-group:ALPHA or spatial[:KAPPA]"),
            ("--penalty l1", "--factor <F>"),
            ("--factor 1", "--penalty <SPEC>"),
            ("--penalty l1 --factor x", "expected a number, `auto` or `auto:temperature`, got \"x\""),
            (
                "--penalty spatial --factor auto:0.1",
                "--factor auto:0.1 is a prediction for l2, l1 and group alone",
            ),
            (
                "--penalty l1 --factor 1 --optimizer sgd --dtype bf16",
                "sgd takes no proximal steps of f16 and bf16",
            ),
            ("--penalty l1 --factor 1 --device cuda --graph", "--graph does not go with --penalty"),
            ("--dataset cifar", "[possible values: mnist, fashion-mnist]"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(message), "{line}: {error}");
        }
        assert_eq!(read("--device cuda:3").unwrap().device, Place::Cuda(3));
        assert_eq!(read("--device cuda").unwrap().device, Place::Cuda(0));
    }
}
