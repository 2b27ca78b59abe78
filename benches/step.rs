//! The cost of training steps: forward, backward and update, for every optimizer beside candle's AdamW on the same model
//! and batch. One iteration is one whole period, so that factors and inverses weigh as in training.
//!
//! `cargo bench --bench step`; the figures to quote are ratios, a step each, to `adamw` of the same model and run.

use candle_core::{DType, Device, Result, Tensor};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use kronwake::curvature::{Damping, Inverse};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::pool::relu;
use kronwake::optim::{Every, NaturalGradient, Optimizer, Params};
use kronwake::tape::{Likelihood, Tape};
use std::time::Duration;

const BATCH: usize = 512;
const PERIODS: [usize; 3] = [1, 10, 30];

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

struct Case {
    name: &'static str,
    input: &'static [usize],
    build: fn(VarBuilder) -> Result<Forward>,
    /// The same from candle_nn's layers and candle's operations, for candle's AdamW.
    candle: fn(VarBuilder) -> Result<Forward>,
}

const CASES: [Case; 3] = [
    Case { name: "cnn", input: &[1, 28, 28], build: cnn, candle: candle_cnn },
    Case { name: "lenet5", input: &[1, 28, 28], build: lenet5, candle: candle_lenet5 },
    Case { name: "lenet300", input: &[784], build: lenet300, candle: candle_lenet300 },
];

/// Linear layers of the widths, with ReLU between them.
macro_rules! dense {
    ($nn:ident, $relu:expr, $vb:expr, $($width:expr),*) => {{
        let widths = [$($width),*];
        let layers: Vec<$nn::Linear> = (1..widths.len())
            .map(|i| $nn::linear(widths[i - 1], widths[i], $vb.pp(format!("fc{i}"))))
            .collect::<Result<_>>()?;
        move |x: &Tensor| -> Result<Tensor> {
            let mut x = layers[0].forward(x)?;
            for layer in &layers[1..] {
                x = layer.forward(&$relu(&x)?)?;
            }
            Ok(x)
        }
    }};
}

fn lenet300(vb: VarBuilder) -> Result<Forward> {
    Ok(Box::new(dense!(nn, relu, vb, 784, 300, 100, 10)))
}

fn candle_lenet300(vb: VarBuilder) -> Result<Forward> {
    Ok(Box::new(dense!(candle_nn, Tensor::relu, vb, 784, 300, 100, 10)))
}

fn convs(vb: &VarBuilder, channels: (usize, usize), padding: usize) -> Result<[nn::Conv2d; 2]> {
    let config = nn::Conv2dConfig { padding, ..Default::default() };
    Ok([
        nn::conv2d(1, channels.0, 5, config, vb.pp("conv1"))?,
        nn::conv2d(channels.0, channels.1, 5, Default::default(), vb.pp("conv2"))?,
    ])
}

fn candle_convs(vb: &VarBuilder, channels: (usize, usize), padding: usize) -> Result<[candle_nn::Conv2d; 2]> {
    let config = candle_nn::Conv2dConfig { padding, ..Default::default() };
    Ok([
        candle_nn::conv2d(1, channels.0, 5, config, vb.pp("conv1"))?,
        candle_nn::conv2d(channels.0, channels.1, 5, Default::default(), vb.pp("conv2"))?,
    ])
}

fn pooled(convs: &[nn::Conv2d], x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for conv in convs {
        x = conv.forward_pooled(&x, (2, 2), (2, 2), true)?;
    }
    x.flatten_from(1)
}

fn candle_pooled(convs: &[candle_nn::Conv2d], x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for conv in convs {
        x = conv.forward(&x)?.max_pool2d(2)?.relu()?;
    }
    x.flatten_from(1)
}

fn cnn(vb: VarBuilder) -> Result<Forward> {
    let convs = convs(&vb, (5, 7), 0)?;
    let head = dense!(nn, relu, vb, 112, 30, 10);
    Ok(Box::new(move |x| head(&pooled(&convs, x)?)))
}

fn candle_cnn(vb: VarBuilder) -> Result<Forward> {
    let convs = candle_convs(&vb, (5, 7), 0)?;
    let head = dense!(candle_nn, Tensor::relu, vb, 112, 30, 10);
    Ok(Box::new(move |x| head(&candle_pooled(&convs, x)?)))
}

fn lenet5(vb: VarBuilder) -> Result<Forward> {
    let convs = convs(&vb, (6, 16), 2)?;
    let head = dense!(nn, relu, vb, 400, 120, 84, 10);
    Ok(Box::new(move |x| head(&pooled(&convs, x)?)))
}

fn candle_lenet5(vb: VarBuilder) -> Result<Forward> {
    let convs = candle_convs(&vb, (6, 16), 2)?;
    let head = dense!(candle_nn, Tensor::relu, vb, 400, 120, 84, 10);
    Ok(Box::new(move |x| head(&candle_pooled(&convs, x)?)))
}

/// A model with a batch to train it on.
struct Setup {
    varmap: VarMap,
    tape: Tape,
    forward: Forward,
    x: Tensor,
    y: Tensor,
}

fn setup(case: &Case, build: fn(VarBuilder) -> Result<Forward>) -> Result<Setup> {
    let varmap = VarMap::new();
    let tape = Tape::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let forward = tape.build(|| build(vb))?;
    let mut dims = vec![BATCH];
    dims.extend(case.input);
    let x = Tensor::randn(0f32, 1.0, dims, &Device::Cpu)?;
    let y = Tensor::from_iter((0..BATCH as u32).map(|i| i % 10), &Device::Cpu)?;
    Ok(Setup { varmap, tape, forward, x, y })
}

impl Setup {
    fn loss(&self) -> Result<(Tensor, Tensor)> {
        let logits = (self.forward)(&self.x)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &self.y)?;
        Ok((logits, loss))
    }
}

type Group<'a, 'b> = &'a mut BenchmarkGroup<'b, WallTime>;

fn adamw(group: Group, case: &Case, name: &str, build: fn(VarBuilder) -> Result<Forward>) -> Result<()> {
    let s = setup(case, build)?;
    let mut opt = candle_nn::AdamW::new_lr(s.varmap.all_vars(), 1e-4)?;
    group.throughput(Throughput::Elements(10));
    group.bench_function(format!("{}/{name}/10", case.name), |b| {
        b.iter(|| (0..10).for_each(|_| opt.backward_step(&s.loss().unwrap().1).unwrap()))
    });
    Ok(())
}

fn natural(group: Group, case: &Case, name: &str, options: impl Fn(&Tape) -> Params) -> Result<()> {
    for period in PERIODS {
        let s = setup(case, case.build)?;
        let every = Every { factors: period, inverses: period };
        // A rate at which thousands of steps on one batch do not leave the region where nothing special happens.
        let params = options(&s.tape);
        let lr = params.lr * 1e-3;
        let mut opt = NaturalGradient::from_varmap(&s.varmap, Params { lr, every, ..params })?;
        group.throughput(Throughput::Elements(period as u64));
        group.bench_function(format!("{}/{name}/{period}", case.name), |b| {
            b.iter(|| {
                for _ in 0..period {
                    let (logits, loss) = s.loss().unwrap();
                    opt.observe(&logits, Likelihood::Categorical).unwrap();
                    let outputs = &mut || (s.forward)(&s.x);
                    opt.step_with(&loss, Likelihood::Categorical, outputs).unwrap();
                }
            })
        });
    }
    Ok(())
}

fn pi(params: Params) -> Params {
    Params { damping: Damping::Pi(0.003), inverse: Inverse::Cholesky, ..params }
}

fn all(group: Group, case: &Case) -> Result<()> {
    adamw(group, case, "adamw", case.candle)?;
    adamw(group, case, "adamw on kronwake's layers", case.build)?;
    natural(group, case, "kfac", Params::k_fac)?;
    natural(group, case, "so", Params::so_kld_wrm)?;
    natural(group, case, "so, pi", |tape| pi(Params::so_kld_wrm(tape)))?;
    natural(group, case, "q", Params::q_kld_wrm)?;
    natural(group, case, "q, pi", |tape| pi(Params::q_kld_wrm(tape)))?;
    natural(group, case, "qe", Params::qe_kld_wrm)?;
    natural(group, case, "kld-wrm", Params::kld_wrm)
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("steps");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    kronwake_cli::program::set_threads(None).unwrap();
    for case in &CASES {
        all(&mut group, case).unwrap();
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
