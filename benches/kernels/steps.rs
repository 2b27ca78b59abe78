//! Whole training steps: forward, backward and update, on LeNet-300-100 and on a stack of transformer blocks.

use super::Options;
use super::report::Report;
use super::timing::{Times, once};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::AdamW;
use kronwake::curvature::{Damping, Inverse};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::{grouped, pool::relu};
use kronwake::optim::{Every, NaturalGradient, Optimizer as _, Params, Replay};
use kronwake::tape::{Likelihood, Tape};
use serde_json::json;
use std::time::Instant;

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;
type Build = fn(VarBuilder, Sizes) -> Result<Forward>;

/// The sizes of a stack; LeNet-300-100 has its own.
#[derive(Clone, Copy)]
struct Sizes {
    blocks: usize,
    width: usize,
}

struct Model {
    name: &'static str,
    input: Vec<usize>,
    classes: usize,
    sizes: Sizes,
    build: Build,
    dtypes: Vec<DType>,
}

fn models(options: &Options) -> Vec<Model> {
    let batch = if options.quick { 16 } else { 512 };
    let gpu = !options.device.is_cpu();
    // A CPU gets a stack that it finishes.
    let (sizes, examples, positions) = match (options.quick, gpu) {
        (true, _) => (Sizes { blocks: 1, width: 16 }, 2, 4),
        (_, true) => (Sizes { blocks: 12, width: 768 }, 16, 256),
        _ => (Sizes { blocks: 2, width: 128 }, 4, 64),
    };
    let halves = if gpu { vec![DType::F32, DType::BF16] } else { vec![DType::F32] };
    let lenet = Model {
        name: "lenet300",
        input: vec![batch, 784],
        classes: 10,
        sizes,
        build: lenet300,
        dtypes: halves.clone(),
    };
    let input = vec![examples, positions, sizes.width];
    vec![lenet, Model { name: "stack", input, classes: 64, sizes, build: stack, dtypes: halves }]
}

fn lenet300(vb: VarBuilder, _: Sizes) -> Result<Forward> {
    let (a, b) = (nn::linear(784, 300, vb.pp("fc1"))?, nn::linear(300, 100, vb.pp("fc2"))?);
    let c = nn::linear(100, 10, vb.pp("fc3"))?;
    Ok(Box::new(move |x| c.forward(&relu(&b.forward(&relu(&a.forward(x)?)?)?)?)))
}

/// Transformer blocks without the attention itself, whose weights are none: layer norm, projections to queries, keys and values
/// (their sum stands for what attention mixes) and out, and a layer norm and the two layers of an MLP, with residuals.
fn stack(vb: VarBuilder, Sizes { blocks, width }: Sizes) -> Result<Forward> {
    let mut all = vec![];
    for index in 0..blocks {
        let vb = vb.pp(format!("block{index}"));
        let linear = |from, to, name: &str| nn::linear(from, to, vb.pp(name));
        all.push((
            nn::layer_norm(width, 1e-5, vb.pp("norm1"))?,
            linear(width, 3 * width, "qkv")?,
            linear(width, width, "out")?,
            nn::layer_norm(width, 1e-5, vb.pp("norm2"))?,
            linear(width, 4 * width, "up")?,
            linear(4 * width, width, "down")?,
        ));
    }
    let head = nn::linear(width, 64, vb.pp("head"))?;
    Ok(Box::new(move |x| {
        let mut x = x.clone();
        for (norm1, qkv, out, norm2, up, down) in &all {
            let parts = qkv.forward(&norm1.forward(&x)?)?.chunk(3, 2)?;
            let mixed = ((&parts[0] + &parts[1])? + &parts[2])?;
            x = (x + out.forward(&mixed)?)?;
            x = (&x + down.forward(&relu(&up.forward(&norm2.forward(&x)?)?)?)?)?;
        }
        head.forward(&x)
    }))
}

/// A model with a batch to train it on.
struct Setup {
    varmap: VarMap,
    tape: Tape,
    forward: Forward,
    x: Tensor,
    y: Tensor,
}

impl Setup {
    fn new(model: &Model, dtype: DType, device: &Device) -> Result<Self> {
        let (varmap, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&varmap, dtype, device);
        let forward = tape.build(|| (model.build)(vb, model.sizes))?;
        let x = Tensor::randn(0f32, 1.0, model.input.as_slice(), device)?.to_dtype(dtype)?;
        let terms: usize = model.input[..model.input.len() - 1].iter().product();
        let y = Tensor::from_iter((0..terms as u32).map(|i| i % model.classes as u32), device)?;
        Ok(Self { varmap, tape, forward, x, y })
    }

    /// The outputs and the mean loss over their terms, in f32.
    fn loss(&self) -> Result<(Tensor, Tensor)> {
        let z = (self.forward)(&self.x)?;
        let rows = z.reshape(((), z.dim(candle_core::D::Minus1)?))?.to_dtype(DType::F32)?;
        let loss = candle_nn::loss::cross_entropy(&rows, &self.y)?;
        Ok((z, loss))
    }
}

/// Seconds of a step: the mean over whole periods, the first of a period, the others.
struct Steps {
    mean: Times,
    refresh: Times,
    plain: Times,
}

/// A measurement takes about this many seconds at most, but has a period to warm up and one that counts in any case.
const LONGEST: f64 = 5.0;

fn time_steps(options: &Options, period: usize, step: &mut dyn FnMut() -> Result<()>) -> Result<Steps> {
    let start = Instant::now();
    // A whole number of periods, so that the first step of each that follows is the one that renews the curvature.
    for _ in 0..3usize.next_multiple_of(period) {
        once(&options.device, 1, step)?;
    }
    let mut means = vec![];
    // At least 30 steps, or short periods would be noise.
    let steps = if options.quick { period } else { 30usize.next_multiple_of(period) };
    let most = if options.quick { 1 } else { 5 };
    while means.len() < most && start.elapsed().as_secs_f64() < LONGEST / 2.0 {
        means.push(once(&options.device, steps, step)? / steps as f64);
    }
    // One by one, with a wait for the device after each.
    let (mut refreshes, mut plains) = (vec![], vec![]);
    while refreshes.is_empty() || (refreshes.len() < most && start.elapsed().as_secs_f64() < LONGEST) {
        for index in 0..period {
            let seconds = once(&options.device, 1, step)?;
            if index == 0 { &mut refreshes } else { &mut plains }.push(seconds);
        }
    }
    if means.is_empty() {
        let all: f64 = refreshes.iter().chain(&plains).sum();
        means.push(all / (refreshes.len() + plains.len()) as f64);
    }
    Ok(Steps { mean: Times::of(means), refresh: Times::of(refreshes), plain: Times::of(plains) })
}

/// Measures an optimizer and reports it; the mean seconds of a step.
fn one(
    options: &Options,
    report: &mut Report,
    (model, dtype, name): (&Model, DType, &str),
    (period, adamw): (usize, Option<f64>),
    step: &mut dyn FnMut() -> Result<()>,
) -> Option<f64> {
    let dtype_name = format!("{dtype:?}").to_lowercase();
    match time_steps(options, period, step) {
        Ok(steps) => {
            // A period of one step has no other steps.
            let plain = if steps.plain.median.is_nan() { steps.refresh } else { steps.plain };
            report.step(json!({
                "model": model.name, "input": model.input, "dtype": dtype_name, "optimizer": name, "period": period,
                "seconds": steps.mean.median, "least_seconds": steps.mean.least,
                "refresh_seconds": steps.refresh.median, "plain_seconds": plain.median,
                "ratio_to_adamw": adamw.map_or(1.0, |adamw| steps.mean.median / adamw),
            }));
            // What follows may take minutes.
            if let Err(error) = report.write() {
                report.failed(name, &error);
            }
            Some(steps.mean.median)
        }
        Err(error) => {
            report.failed(&format!("step: {} {dtype_name} {name}", model.name), &error);
            None
        }
    }
}

fn natural(
    options: &Options,
    report: &mut Report,
    (model, dtype, name): (&Model, DType, &str),
    adamw: Option<f64>,
    period: usize,
    params: fn(&Tape) -> Params,
) -> Result<()> {
    let s = Setup::new(model, dtype, &options.device)?;
    let every = Every { factors: period, inverses: period };
    // A rate at which many steps on one batch do not leave the region where nothing special happens.
    let params = params(&s.tape);
    let lr = params.lr * 1e-3;
    let mut opt = NaturalGradient::from_varmap(&s.varmap, Params { lr, every, ..params })?;
    let pass = |opt: &mut NaturalGradient| {
        let (z, loss) = s.loss()?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&loss)
    };
    one(options, report, (model, dtype, name), (period, adamw), &mut || pass(&mut opt));
    // Where steps are short, or refreshes: eigendecompositions of a large model take half a minute each time.
    let recorded = model.name == "lenet300" || opt.params().inverse == Inverse::Newton;
    if !options.device.is_cpu() && recorded {
        let mut replay = Replay::new();
        let name = format!("{name}, recorded");
        one(options, report, (model, dtype, &name), (period, adamw), &mut || replay.step(&mut opt, pass));
    }
    Ok(())
}

/// Measures the steps that are asked for, as `step: MODEL`: what tells most first, of all dtypes, since the time may end.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    for model in models(options) {
        if !options.wants(&format!("step: {}", model.name)) {
            continue;
        }
        let (first, then) = optimizers(&model);
        let (long, short) = if options.quick { (3, None) } else { (30, Some(10)) };
        let short = short.filter(|_| model.name == "lenet300").map(|period| (period, first));
        let mut adamw = vec![];
        for &dtype in &model.dtypes {
            adamw.push(step_of_adamw(options, report, &model, dtype));
        }
        for (period, optimizers) in [(long, first), (long, then)].into_iter().chain(short) {
            for (&dtype, &adamw) in model.dtypes.iter().zip(&adamw) {
                for (name, params) in optimizers {
                    let name = format!("{name}, {period}");
                    if let Err(error) =
                        natural(options, report, (&model, dtype, &name), adamw, period, *params)
                    {
                        report.failed(&format!("step: {} {dtype:?} {name}", model.name), &error);
                    }
                    report.write()?;
                }
            }
        }
    }
    Ok(())
}

/// The seconds of a step of candle's AdamW.
fn step_of_adamw(options: &Options, report: &mut Report, model: &Model, dtype: DType) -> Option<f64> {
    const NAME: &str = "AdamW, candle's";
    let prepared = || -> Result<_> {
        let s = Setup::new(model, dtype, &options.device)?;
        // Raises the threshold of the device's pool, which a natural gradient does for itself: AdamW is not to pay for the order.
        grouped::products(&[(
            Tensor::zeros((1, 1, 1), DType::F32, &options.device)?,
            Tensor::zeros((1, 1, 1), DType::F32, &options.device)?,
        )])?;
        let opt = AdamW::new_lr(s.varmap.all_vars(), 1e-5)?;
        Ok((s, opt))
    };
    match prepared() {
        Ok((s, mut opt)) => {
            one(options, report, (model, dtype, NAME), (1, None), &mut || opt.backward_step(&s.loss()?.1))
        }
        Err(error) => {
            report.failed(&format!("step: {} {dtype:?} {NAME}", model.name), &error);
            None
        }
    }
}

type Optimizer = (&'static str, fn(&Tape) -> Params);

/// What is measured on a model first, and then. Eigendecompositions of the stack's factors, as they are without a word, take a quarter of
/// a minute a refresh.
fn optimizers(model: &Model) -> (&'static [Optimizer], &'static [Optimizer]) {
    fn pi(params: Params, inverse: Inverse) -> Params {
        Params { damping: Damping::Pi(0.003), inverse, ..params }
    }
    const OWN: [Optimizer; 4] = [
        ("SO", Params::so_kld_wrm),
        ("K-FAC", Params::k_fac),
        ("KLD-WRM", Params::kld_wrm),
        ("SO, overlap", |tape| Params { overlap: usize::MAX, ..Params::so_kld_wrm(tape) }),
    ];
    const INVERSES: [Optimizer; 3] = [
        ("SO, pi and Cholesky", |tape| pi(Params::so_kld_wrm(tape), Inverse::Cholesky)),
        ("K-FAC, pi and Cholesky", |tape| pi(Params::k_fac(tape), Inverse::Cholesky)),
        ("KLD-WRM, pi and Cholesky", |tape| pi(Params::kld_wrm(tape), Inverse::Cholesky)),
    ];
    const FOUR: [Optimizer; 4] = [INVERSES[0], INVERSES[1], INVERSES[2], NEWTON];
    const NEWTON: Optimizer = ("SO, pi and Newton", |tape| pi(Params::so_kld_wrm(tape), Inverse::Newton));
    const LAST: [Optimizer; 2] = [NEWTON, OWN[0]];
    if model.name == "lenet300" { (&OWN, &FOUR) } else { (&INVERSES, &LAST) }
}
