//! Seconds of training steps of whole models, from this crate's layers or from candle's: forward, backward and AdamW, a JSON object a step.
//!
//! ```text
//! cargo bench --bench layers -- MODEL SIDE [--threads N] [--steps N]
//! ```
//!
//! `benches/peers/layers.sh` runs this and `torch_layers.py` in turn and makes the table.

#[path = "../evidence/clock.rs"]
mod clock;
mod encoder;
mod plain;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
use clap::{Parser, ValueEnum};
use clock::Clock;
use encoder::encoder;
use kronwake::optim::{AdamW, ParamsAdamW};
use kronwake::tape::Tape;
use kronwake_cli::models::{bert, llama};
use kronwake_cli::program;
use serde_json::{Value, json};
use std::process::ExitCode;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "layers")]
struct Options {
    /// Which model
    model: Name,
    /// Whose layers and optimizer
    side: Side,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Steps that are reported; two more come before
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// MiniLM-L6: 6 layers, 384 wide, 12 heads; 16 x 128 tokens, padded
    Minilm,
    /// Two layers of BERT-base: 768 wide, 12 heads; 8 x 128 tokens, padded
    Bert2,
    /// A decoder: 4 layers, 512 wide, 8 heads, 4 of keys; 8 x 256 tokens
    Decoder,
}

#[derive(Clone, Copy, ValueEnum)]
enum Side {
    /// kronwake::nn and this crate's AdamW
    Kronwake,
    /// candle_nn, with what has a gradient there
    Candle,
}

pub fn decoder() -> Value {
    json!({
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
    })
}

/// Token numbers `[batch, positions]` that only look random, the same in PyTorch's program.
fn tokens(batch: usize, positions: usize, vocabulary: u32) -> Result<Tensor> {
    let draw = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocabulary;
    Tensor::from_iter((0..batch * positions).map(draw), &Device::Cpu)?.reshape((batch, positions))
}

/// 1 for tokens and 0 for padding: lengths from half of the positions to all.
fn padding(batch: usize, positions: usize) -> Result<Tensor> {
    let length = |row: usize| positions - row * positions / 2 / batch;
    let live = (0..batch * positions).map(|i| u32::from(i % positions < length(i / positions)));
    Tensor::from_iter(live, &Device::Cpu)?.reshape((batch, positions))
}

type Loss = Box<dyn Fn() -> Result<Tensor>>;

fn encoder_loss(
    config: &Value,
    batch: usize,
    forward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'static,
) -> Result<Loss> {
    let vocabulary = config["vocab_size"].as_u64().unwrap_or(0) as u32;
    let (tokens, mask) = (tokens(batch, 128, vocabulary)?, padding(batch, 128)?);
    let types = tokens.zeros_like()?;
    Ok(Box::new(move || {
        let embedded = bert::sentence_embedding(&forward(&tokens, &types, &mask)?, &mask)?;
        // What a pair of sentences is trained by: the cosine of each with the next.
        let (a, b) = (embedded.narrow(0, 0, batch / 2)?, embedded.narrow(0, batch / 2, batch / 2)?);
        (a * b)?.sum(1)?.affine(1., -0.5)?.sqr()?.mean_all()
    }))
}

fn decoder_loss(
    batch: usize,
    forward: impl Fn(&Tensor) -> Result<Tensor> + 'static,
    cross_entropy: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Loss> {
    let all = tokens(batch, 257, 8192)?;
    let (tokens, next) = (all.narrow(1, 0, 256)?.contiguous()?, all.narrow(1, 1, 256)?.flatten_all()?);
    Ok(Box::new(move || cross_entropy(&forward(&tokens)?.flatten_to(1)?, &next)))
}

fn kronwakes(name: Name, vb: VarBuilder) -> Result<Loss> {
    Tape::new().build(|| match name {
        Name::Decoder => {
            let model = llama::Llama::new(&llama::Config::parse(&decoder())?, &vb)?;
            decoder_loss(8, move |tokens| model.forward(tokens), kronwake::nn::loss::cross_entropy)
        }
        Name::Minilm | Name::Bert2 => {
            let (config, batch) = sizes(name);
            let model = bert::Bert::new(&bert::Config::parse(&config)?, &vb)?;
            encoder_loss(&config, batch, move |tokens, types, mask| model.forward(tokens, types, Some(mask)))
        }
    })
}

fn candles(name: Name, vb: VarBuilder) -> Result<Loss> {
    match name {
        Name::Decoder => {
            let model = plain::Decoder::new(&llama::Config::parse(&decoder())?, &vb)?;
            decoder_loss(8, move |tokens| model.forward(tokens), candle_nn::loss::cross_entropy)
        }
        Name::Minilm | Name::Bert2 => {
            let (config, batch) = sizes(name);
            let model = plain::Encoder::new(&bert::Config::parse(&config)?, &vb)?;
            encoder_loss(&config, batch, move |tokens, types, mask| model.forward(tokens, types, mask))
        }
    }
}

fn sizes(name: Name) -> (Value, usize) {
    if matches!(name, Name::Minilm) { (encoder(384, 6), 16) } else { (encoder(768, 2), 8) }
}

enum Rule {
    Kronwakes(Box<AdamW>),
    Candles(candle_nn::AdamW),
}

fn work(options: &Options) -> Result<()> {
    program::set_threads(Some(options.threads))?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let params = ParamsAdamW { lr: 1e-4, weight_decay: 0.01, ..Default::default() };
    let loss = match options.side {
        Side::Kronwake => kronwakes(options.model, vb)?,
        Side::Candle => candles(options.model, vb)?,
    };
    let mut rule = match options.side {
        Side::Kronwake => Rule::Kronwakes(Box::new(AdamW::from_varmap(&vars, params)?)),
        Side::Candle => Rule::Candles(candle_nn::AdamW::new(vars.all_vars(), params)?),
    };
    for step in 0..options.steps + 2 {
        let whole = Clock::start();
        let clock = Clock::start();
        let value = loss()?;
        let forward = clock.seconds();
        let clock = Clock::start();
        let grads = value.backward()?;
        let backward = clock.seconds();
        let clock = Clock::start();
        match &mut rule {
            Rule::Kronwakes(rule) => rule.step(&grads)?,
            Rule::Candles(rule) => rule.step(&grads)?,
        }
        drop(grads);
        let update = clock.seconds();
        let value: f32 = value.to_scalar()?;
        let all = whole.seconds();
        if !value.is_finite() {
            bail!("the loss of step {step} is {value}")
        }
        if step >= 2 {
            let parts = [forward, backward, update].map(|s| s.computed);
            println!(
                "{}",
                json!({"cpu": all.computed, "wall": all.wall, "forward": parts[0], "backward": parts[1], "update": parts[2],
                    "loss": value})
            );
        }
    }
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
