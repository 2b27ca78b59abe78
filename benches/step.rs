//! The cost of training steps: forward, backward and update, for every optimizer beside candle's AdamW on the same model
//! and batch. One iteration is one whole period of ten steps, so that factors and inverses weigh as in training.
//!
//! `cargo bench --bench step`; the figures to quote are ratios to `adamw` of the same run.

use candle_core::{DType, Device, Result, Tensor};
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::pool::max_pool2d;
use kronwake::optim::{Every, KFacRule, Natural, Optimizer, Params, Q, QeKldWrm, So, WakeRule};
use kronwake::tape::{Likelihood, Tape};

const BATCH: usize = 512;
const PERIOD: usize = 10;

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

struct Case {
    name: &'static str,
    input: &'static [usize],
    build: fn(VarBuilder) -> Result<Forward>,
}

const CASES: [Case; 2] = [
    Case { name: "lenet300", input: &[784], build: lenet300 },
    Case { name: "cnn", input: &[1, 28, 28], build: cnn },
];

fn lenet300(vb: VarBuilder) -> Result<Forward> {
    let fc1 = nn::linear(784, 300, vb.pp("fc1"))?;
    let fc2 = nn::linear(300, 100, vb.pp("fc2"))?;
    let fc3 = nn::linear(100, 10, vb.pp("fc3"))?;
    Ok(Box::new(move |x| fc3.forward(&fc2.forward(&fc1.forward(x)?.relu()?)?.relu()?)))
}

fn cnn(vb: VarBuilder) -> Result<Forward> {
    let conv1 = nn::conv2d(1, 5, 5, Default::default(), vb.pp("conv1"))?;
    let conv2 = nn::conv2d(5, 7, 5, Default::default(), vb.pp("conv2"))?;
    let fc1 = nn::linear(112, 30, vb.pp("fc1"))?;
    let fc2 = nn::linear(30, 10, vb.pp("fc2"))?;
    Ok(Box::new(move |x| {
        let x = max_pool2d(&conv1.forward(x)?, (2, 2), (2, 2))?.relu()?;
        let x = max_pool2d(&conv2.forward(&x)?, (2, 2), (2, 2))?.relu()?;
        fc2.forward(&fc1.forward(&x.flatten_from(1)?)?.relu()?)
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

fn setup(case: &Case) -> Result<Setup> {
    let varmap = VarMap::new();
    let tape = Tape::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let forward = tape.build(|| (case.build)(vb))?;
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

fn natural<R: WakeRule>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    case: &Case,
    step: impl Fn(&mut Natural<R>, &Setup, &Tensor) -> Result<()>,
) -> Result<()> {
    let s = setup(case)?;
    // Rates at which 10,000 steps on one batch do not leave the region where nothing special happens.
    let every = Every { factors: PERIOD, inverses: PERIOD };
    let mut opt = Natural::from_varmap(&s.varmap, Params::<R> { lr: 1e-4, every, ..Params::on(&s.tape) })?;
    group.bench_function(format!("{}/{}", case.name, R::NAME), |b| {
        b.iter(|| {
            for _ in 0..PERIOD {
                let (logits, loss) = s.loss().unwrap();
                opt.observe(&logits, Likelihood::Categorical).unwrap();
                step(&mut opt, &s, &loss).unwrap();
            }
        })
    });
    Ok(())
}

fn plain<R: WakeRule>(opt: &mut Natural<R>, _: &Setup, loss: &Tensor) -> Result<()> {
    opt.backward_step(loss)
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("ten steps");
    group.sample_size(10);
    for case in &CASES {
        let s = setup(case).unwrap();
        let mut opt = candle_nn::AdamW::new_lr(s.varmap.all_vars(), 1e-4).unwrap();
        group.bench_function(format!("{}/adamw", case.name), |b| {
            b.iter(|| {
                for _ in 0..PERIOD {
                    opt.backward_step(&s.loss().unwrap().1).unwrap();
                }
            })
        });
        natural::<KFacRule>(&mut group, case, plain).unwrap();
        natural::<So>(&mut group, case, plain).unwrap();
        natural::<Q>(&mut group, case, plain).unwrap();
        natural(&mut group, case, |opt: &mut QeKldWrm, s, loss| {
            opt.step_with(loss, Likelihood::Categorical, &mut || (s.forward)(&s.x))
        })
        .unwrap();
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
