//! The cost of penalties for LeNet-300-100: a value, its gradient, both of one evaluation, and a proximal step, of all three weights,
//! beside a step of candle's AdamW on the same net.
//!
//! `cargo bench --bench penalty`; the figures to quote are ratios to `adamw` of the same run. The loss that a penalty is added to has
//! gradients already: `add_gradients` has the addition to these, and `value, backward` candle's, to a gradient of zeros.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use kronwake::nn::{self, Module, Optimizer, VarBuilder, VarMap};
use kronwake::ops::pool::relu;
use kronwake::penalty::{Constraints, GroupLasso, Grouping, Lp, Penalty, Rule, SparseGroupLasso, Spatial};
use kronwake::tape::Tape;
use std::sync::Arc;
use std::time::Duration;

const BATCH: usize = 256;
const WIDTHS: [usize; 4] = [784, 300, 100, 10];

type Group<'a, 'b> = &'a mut BenchmarkGroup<'b, WallTime>;

/// A step of candle's AdamW on a net of the layers in a module.
macro_rules! adamw {
    ($group:expr, $name:expr, $nn:ident, $relu:expr) => {{
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let layer = |i: usize| $nn::linear(WIDTHS[i], WIDTHS[i + 1], vb.pp(i));
        let layers = [layer(0)?, layer(1)?, layer(2)?];
        let x = Tensor::randn(0f32, 1., (BATCH, WIDTHS[0]), &Device::Cpu)?;
        let y = Tensor::from_iter((0..BATCH as u32).map(|i| i % 10), &Device::Cpu)?;
        // A rate at which thousands of steps on one batch change little.
        let mut opt = candle_nn::AdamW::new_lr(varmap.all_vars(), 1e-6)?;
        let mut step = || -> Result<()> {
            let x = $relu(&layers[0].forward(&x)?)?;
            let x = $relu(&layers[1].forward(&x)?)?;
            opt.backward_step(&candle_nn::loss::cross_entropy(&layers[2].forward(&x)?, &y)?)
        };
        $group.bench_function($name, |b| b.iter(|| step().unwrap()));
    }};
}

/// The weights of the net, as they are initialized.
fn weights() -> Result<Vec<Var>> {
    let weight =
        |pair: &[usize]| Var::randn(0f32, (1. / pair[0] as f32).sqrt(), (pair[1], pair[0]), &Device::Cpu);
    WIDTHS.windows(2).map(weight).collect()
}

fn penalty(group: Group, name: &str, penalty: &Arc<dyn Penalty>) -> Result<()> {
    let weights = weights()?;
    let each = |f: &dyn Fn(&Var) -> Result<Tensor>| weights.iter().for_each(|w| drop(f(w).unwrap()));
    let backward =
        |w: &Var| penalty.value(w)?.backward()?.remove(w).ok_or_else(|| candle_core::Error::msg("none"));
    group.bench_function(format!("{name}/value"), |b| b.iter(|| each(&|w| penalty.value(w))));
    group.bench_function(format!("{name}/gradient"), |b| b.iter(|| each(&|w| penalty.gradient(w))));
    group.bench_function(format!("{name}/value, backward"), |b| b.iter(|| each(&backward)));
    let both = |w: &Var| penalty.value_and_gradient(w, 1e-4).map(|both| both.1);
    group.bench_function(format!("{name}/value and gradient"), |b| b.iter(|| each(&both)));
    let varmap = VarMap::new();
    let names = weights.iter().enumerate().map(|(i, w)| (format!("fc{i}.weight"), w.clone()));
    varmap.data().lock().unwrap().extend(names);
    let rule = Rule::Penalize { penalty: penalty.clone(), factor: 1e-4 };
    let constraints = Constraints::new(&varmap, &[("*", rule)])?;
    let add = || -> Result<Tensor> {
        let mut grads = GradStore::default();
        for w in &weights {
            grads.insert(w, w.as_detached_tensor());
        }
        constraints.add_gradients(&mut grads)
    };
    group.bench_function(format!("{name}/add_gradients"), |b| b.iter(|| add().unwrap()));
    if penalty.prox(&weights[0], 1e-6).is_ok() {
        group.bench_function(format!("{name}/prox"), |b| b.iter(|| each(&|w| penalty.prox(w, 1e-6))));
    }
    Ok(())
}

fn arc(penalty: impl Penalty + 'static) -> Arc<dyn Penalty> {
    Arc::new(penalty)
}

fn all(group: Group) -> Result<()> {
    // As in a training by the crate's optimizers, freed memory stays with the process.
    let _tape = Tape::new();
    adamw!(group, "adamw, candle_nn", candle_nn, Tensor::relu);
    adamw!(group, "adamw", nn, relu);
    penalty(group, "L1", &arc(Lp::l1()))?;
    penalty(group, "L2", &arc(Lp::l2()))?;
    for grouping in [Grouping::Rows, Grouping::Columns] {
        let lasso = GroupLasso { grouping, size_weighted: true };
        penalty(group, &format!("group lasso, {grouping}"), &arc(lasso))?;
        let sparse = SparseGroupLasso::new(0.5, grouping, true)?;
        penalty(group, &format!("sparse group lasso, {grouping}"), &arc(sparse))?;
    }
    penalty(group, "spatial", &arc(Spatial::default()))
}

fn penalties(c: &mut Criterion) {
    let mut group = c.benchmark_group("penalty");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    kronwake_cli::program::set_threads(None).unwrap();
    all(&mut group).unwrap();
    group.finish();
}

criterion_group!(benches, penalties);
criterion_main!(benches);
