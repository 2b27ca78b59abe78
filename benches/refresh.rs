//! What curvature costs: seconds of training steps with and without a refresh, and bytes of state, beside AdamW on the same layers.
//!
//! ```text
//! cargo bench --bench refresh -- MODEL [--factors default|whole|blocks:ROWS|rank:RANK:ROWS ..] [--rows N] [--threads N] [--rounds N]
//! ```
//!
//! AdamW and KLD-WRM with every kind of factors take steps in turn, on copies of one model and on the same batch, in rounds. A JSON object
//! for each: seconds of computing of a step, what new factors and new inverses add to one, and the mean over a period of 10.

#[path = "evidence/clock.rs"]
mod clock;
#[path = "layers/encoder.rs"]
mod encoder;

use candle_core::{D, DType, Device, Result, Tensor};
use clap::{Parser, ValueEnum};
use clock::Clock;
use encoder::encoder;
use kronwake::nn::{self, Module, VarBuilder, VarMap, loss::cross_entropy};
use kronwake::ops::pool::relu;
use kronwake::optim::{AdamW, Every, NaturalGradient, Optimizer, Params, ParamsAdamW};
use kronwake::tape::{Likelihood, Tape};
use kronwake_cli::models::bert;
use kronwake_cli::program;
use kronwake_cli::values::factors;
use serde_json::json;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "refresh")]
struct Options {
    model: Name,
    /// Kinds of factors
    #[arg(long, num_args = 1.., default_values = ["default"])]
    factors: Vec<String>,
    /// Rows of a batch: of tokens in sentences of 128, or of images
    #[arg(long)]
    rows: Option<usize>,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Steps without a refresh
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Refreshes
    #[arg(long, default_value_t = 1)]
    refreshes: usize,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// MiniLM-L6: 6 layers, 384 wide; 16 x 128 tokens
    Minilm,
    /// Two layers of BERT-base: 768 wide; 8 x 128 tokens
    Bert2,
    /// BERT-base's twelve layers: 768 wide; 8 x 128 tokens
    Bert12,
    /// 784-300-100-10; 512 images
    Lenet300,
}

impl Name {
    fn rows(self) -> usize {
        match self {
            Self::Minilm => 2048,
            Self::Bert2 | Self::Bert12 => 1024,
            Self::Lenet300 => 512,
        }
    }
}

const CLASSES: usize = 10;
const POSITIONS: usize = 128;

type Forward = Box<dyn Fn() -> Result<Tensor>>;

fn build(name: Name, rows: usize, vb: &VarBuilder) -> Result<Forward> {
    let (width, layers) = match name {
        Name::Minilm => (384, 6),
        Name::Bert2 => (768, 2),
        Name::Bert12 => (768, 12),
        Name::Lenet300 => return lenet300(rows, vb),
    };
    let model = bert::Bert::new(&bert::Config::parse(&encoder(width, layers))?, vb)?;
    let head = nn::linear(width, CLASSES, vb.pp("head"))?;
    let batch = rows / POSITIONS;
    let draw = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % 30522;
    let tokens =
        Tensor::from_iter((0..batch * POSITIONS).map(draw), &Device::Cpu)?.reshape((batch, POSITIONS))?;
    let types = tokens.zeros_like()?;
    Ok(Box::new(move || head.forward(&model.forward(&tokens, &types, None)?.mean(D::Minus2)?)))
}

fn lenet300(rows: usize, vb: &VarBuilder) -> Result<Forward> {
    let layers = [(784, 300), (300, 100), (100, CLASSES)];
    let layers: Vec<nn::Linear> = layers
        .into_iter()
        .enumerate()
        .map(|(i, (from, to))| nn::linear(from, to, vb.pp(format!("fc{i}"))))
        .collect::<Result<_>>()?;
    let images = Tensor::rand(0f32, 1., (rows, 784), &Device::Cpu)?;
    Ok(Box::new(move || {
        let mut x = layers[0].forward(&images)?;
        for layer in &layers[1..] {
            x = layer.forward(&relu(&x)?)?;
        }
        Ok(x)
    }))
}

enum Rule {
    First(Box<AdamW>),
    Natural(Box<NaturalGradient>),
}

struct Run {
    what: String,
    forward: Forward,
    rule: Rule,
    state: usize,
    /// Seconds of steps of each of [`PHASES`].
    seconds: [Vec<f64>; 3],
}

/// What is renewed in every step of a phase: nothing, the factors, both.
const PHASES: [Every; 3] = [
    Every { factors: NEVER, inverses: NEVER },
    Every { factors: 1, inverses: NEVER },
    Every { factors: 1, inverses: 1 },
];
const NEVER: usize = 1 << 40;

impl Run {
    fn new(options: &Options, kind: Option<&str>) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let rows = options.rows.unwrap_or(options.model.rows());
        let forward = tape.build(|| build(options.model, rows, &vb))?;
        let (rule, state) = match kind {
            None => {
                let adamw = AdamW::from_varmap(&vars, ParamsAdamW { lr: 1e-4, ..Default::default() })?;
                let elements: usize = vars.all_vars().iter().map(|var| var.elem_count()).sum();
                (Rule::First(Box::new(adamw)), 2 * elements * DType::F32.size_in_bytes())
            }
            Some(kind) => {
                let mut params = Params::kld_wrm(&tape);
                params.early_refresh = false;
                params.lr = 0.1;
                if kind != "default" {
                    params.factor_limit = factors(kind).map_err(candle_core::Error::msg)?;
                }
                let natural = NaturalGradient::from_varmap(&vars, params)?;
                let summary = natural.summary();
                eprintln!("{kind}\n{summary}");
                (Rule::Natural(Box::new(natural)), summary.bytes())
            }
        };
        let what = kind.map_or("AdamW".to_string(), |kind| format!("KLD-WRM, {kind}"));
        Ok(Self { what, forward, rule, state, seconds: Default::default() })
    }

    /// Has what `every` says renewed.
    fn begin(&mut self, every: Every) -> Result<()> {
        match &mut self.rule {
            Rule::First(_) => Ok(()),
            Rule::Natural(rule) => rule.set_params(Params { every, ..rule.params().clone() }),
        }
    }

    fn step(&mut self, phase: usize) -> Result<()> {
        let clock = Clock::start();
        let logits = (self.forward)()?;
        let labels = (0..logits.dim(0)?).map(|i| (i % CLASSES) as u32);
        let loss = cross_entropy(&logits, &Tensor::from_iter(labels, &Device::Cpu)?)?;
        match &mut self.rule {
            Rule::First(rule) => rule.backward_step(&loss)?,
            Rule::Natural(rule) => {
                rule.observe(&logits, Likelihood::Categorical)?;
                rule.backward_step(&loss)?;
            }
        }
        self.seconds[phase].push(clock.seconds().computed);
        Ok(())
    }

    fn medians(&self) -> [f64; 3] {
        [0, 1, 2].map(|phase| {
            let mut all = self.seconds[phase].clone();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
        })
    }
}

/// Steps from one refresh to the next.
const PERIOD: f64 = 10.0;

fn work(options: &Options) -> Result<()> {
    let whole = Clock::start();
    program::set_threads(Some(options.threads))?;
    let kinds = [None].into_iter().chain(options.factors.iter().map(|kind| Some(kind.as_str())));
    let mut runs = kinds.map(|kind| Run::new(options, kind)).collect::<Result<Vec<_>>>()?;
    // The first step renews everything, and all is new.
    for run in &mut runs {
        run.begin(PHASES[0])?;
        run.step(2)?;
        run.step(0)?;
        run.seconds = Default::default();
    }
    for (phase, (every, rounds)) in
        PHASES.into_iter().zip([options.rounds, options.refreshes, options.refreshes]).enumerate()
    {
        for _ in 0..rounds {
            for run in &mut runs {
                run.begin(every)?;
                run.step(phase)?;
            }
        }
    }
    let Some(adamw) = runs.first().map(|run| run.seconds.concat()) else { return Ok(()) };
    let mut adamw: Vec<f64> = adamw;
    adamw.sort_by(f64::total_cmp);
    let adamw = adamw[adamw.len() / 2];
    let bytes = runs.first().map_or(1, |run| run.state);
    for run in &runs {
        let [plain, observing, renewing] = run.medians();
        let mean = match run.rule {
            Rule::First(_) => adamw,
            Rule::Natural(_) => (plain * (PERIOD - 1.0) + renewing) / PERIOD,
        };
        println!(
            "{}",
            json!({"what": run.what, "step": plain, "factors": observing - plain, "inverses": renewing - observing,
                "mean": mean, "to_adamw": mean / adamw, "state": run.state, "state_to_adamw": run.state as f64 / bytes as f64})
        );
    }
    eprintln!("all in {:.0} s", whole.seconds().wall);
    Ok(())
}

fn main() -> ExitCode {
    match work(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
