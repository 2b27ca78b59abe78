//! Every operation and layer, on every device, in every dtype, against the CPU in f64: values, gradients, records.

use crate::common::*;
use crate::device::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::patches::{ConvShape, patches};
use kronwake::ops::sample::{DrawKey, bernoulli, categorical, normal};
use kronwake::ops::{conv, dense, factor, grouped, norm, pool, softmax};
use kronwake::penalty::{
    AugmentedLagrangian, Bound, Constraints, Dual, FeasibleSet, Grouping, Lp, Multiplier, Omega, Penalty,
    Rule, SparseGroupLasso, Spatial, UnitLasso,
};
use kronwake::tape::Keep;

/// The seed of the weights with which values are summed.
const COTANGENT: u64 = 77;

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// A differentiable operation of arguments of these shapes.
struct Case {
    name: &'static str,
    shapes: &'static [&'static [usize]],
    run: fn(&[Tensor]) -> Result<Tensor>,
}

macro_rules! cases {
    ($($name:literal $shapes:tt $run:expr;)*) => {
        &[$(Case { name: $name, shapes: &cases!(@ $shapes), run: $run }),*]
    };
    (@ [$($shape:expr),*]) => { [$(&$shape),*] };
}

fn config(stride: usize, padding: usize, dilation: usize, groups: usize) -> nn::Conv2dConfig {
    nn::Conv2dConfig { stride, padding, dilation, groups, ..Default::default() }
}

fn conv2d(x: &[Tensor], config: nn::Conv2dConfig) -> nn::Conv2d {
    nn::Conv2d::new(x[1].clone(), x.get(2).cloned(), config)
}

/// By angles of 6 positions of 8 features.
fn turned(rope: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>, x: &Tensor) -> Result<Tensor> {
    let angles = Tensor::arange(0f64, 24., &Device::Cpu)?.reshape((6, 4))?;
    let part = |t: Tensor| t.to_dtype(x.dtype())?.to_device(x.device());
    rope(x, &part(angles.cos()?)?, &part(angles.sin()?)?)
}

fn linear(x: &[Tensor]) -> Result<Tensor> {
    nn::Linear::new(x[1].clone(), x.get(2).cloned()).forward(&x[0])
}

/// The uneven shape of a convolution, of images `[.., 4, 9, 7]` with weights `[6, 2, 3, 2]`.
fn uneven() -> Result<ConvShape> {
    ConvShape::new("uneven", &[3, 4, 9, 7], &[6, 2, 3, 2], (2, 1), (1, 0), (1, 2), 2)
}

fn classes(of: &Tensor) -> Result<Tensor> {
    labels(5, of.dim(0)?, of.dim(1)? as u32)?.to_device(of.device())
}

/// A penalty's value in the dtype of the weights.
fn penalty(penalty: impl Penalty, w: &Tensor) -> Result<Tensor> {
    penalty.value(w)?.to_dtype(w.dtype())
}

fn groups(grouping: Grouping, w: &Tensor) -> Result<Tensor> {
    penalty(SparseGroupLasso::new(0.4, grouping, true)?, w)
}

const DIFFERENTIABLE: &[Case] = cases! {
    "relu" [[5, 33]] |x| pool::relu(&x[0]);
    "relu" [[1]] |x| pool::relu(&x[0]);
    "max_pool2d" [[2, 3, 8, 6]] |x| pool::max_pool2d(&x[0], (2, 2), (2, 2));
    "max_pool2d, apart and overlapping" [[3, 2, 9, 7]] |x| pool::max_pool2d(&x[0], (3, 2), (2, 3));
    "max_pool2d, overlapping" [[1, 5, 7, 7]] |x| pool::max_pool2d(&x[0], (3, 3), (1, 2));
    "softmax" [[4, 33]] |x| softmax::softmax_last_dim(&x[0]);
    "softmax" [[2, 3, 1100]] |x| softmax::softmax_last_dim(&x[0]);
    "softmax, one class" [[7, 1]] |x| softmax::softmax_last_dim(&x[0]);
    "softmax, first dimension" [[5, 6]] |x| nn::ops::softmax(&x[0], 0);
    "log_softmax" [[4, 127]] |x| softmax::log_softmax_last_dim(&x[0]);
    "log_softmax, first dimension" [[5, 6]] |x| nn::ops::log_softmax(&x[0], 0);
    "cross_entropy" [[9, 10]] |x| softmax::cross_entropy(&x[0], &classes(&x[0])?);
    "cross_entropy" [[300, 1]] |x| softmax::cross_entropy(&x[0], &classes(&x[0])?);
    "layer_norm" [[6, 4, 33], [33], [33]] |x| norm::layer_norm(&x[0], &x[1], Some(&x[2]), 1e-3);
    "layer_norm" [[300, 64], [64], [64]] |x| norm::layer_norm(&x[0], &x[1], Some(&x[2]), 1e-3);
    "layer_norm, wide" [[3, 4099], [4099]] |x| norm::layer_norm(&x[0], &x[1], None, 1e-3);
    "rms_norm" [[5, 127], [127]] |x| norm::rms_norm(&x[0], &x[1], 1e-3);
    "LayerNorm" [[5, 8], [8], [8]] |x| nn::LayerNorm::new(x[1].clone(), x[2].clone(), 1e-3).forward(&x[0]);
    "RmsNorm" [[5, 8], [8]] |x| nn::RmsNorm::new(x[1].clone(), 1e-3).forward(&x[0]);
    "rope" [[2, 3, 5, 8]] |x| turned(nn::rotary_emb::rope, &x[0]);
    "rope, neighbours" [[2, 3, 5, 8]] |x| turned(nn::rotary_emb::rope_i, &x[0]);
    "rope, heads last" [[2, 5, 3, 8]] |x| turned(nn::rotary_emb::rope_thd, &x[0]);
    "sdpa, grouped heads" [[2, 4, 5, 8], [2, 2, 7, 8], [2, 2, 7, 6]] |x| nn::ops::sdpa(&x[0], &x[1], &x[2], None, true, 0.3, 1.);
    "sdpa, bounded scores" [[1, 2, 5, 8], [1, 2, 5, 8], [1, 2, 5, 8]] |x| nn::ops::sdpa(&x[0], &x[1], &x[2], None, false, 0.3, 2.);
    "Dropout" [[9, 65]] |x| nn::Dropout::seeded(0.4, 3)?.forward(&x[0], true);
    "Linear" [[5, 7], [3, 7], [3]] linear;
    "Linear, positions" [[4, 6, 33], [65, 33], [65]] linear;
    "Linear without bias" [[1, 1], [1, 1]] linear;
    "conv_compose" [[3, 4, 9, 7], [6, 2, 3, 2], [6]] |x| conv::conv_compose(&x[0], &x[1], Some(&x[2]), &uneven()?);
    "Conv2d" [[3, 2, 8, 7], [5, 2, 3, 3], [5]] |x| conv2d(x, config(1, 1, 1, 1)).forward(&x[0]);
    "Conv2d, strided, dilated, grouped" [[2, 4, 11, 10], [6, 2, 3, 3], [6]] |x| conv2d(x, config(2, 1, 2, 2)).forward(&x[0]);
    "Conv2d without bias" [[2, 3, 5, 5], [4, 3, 1, 1]] |x| conv2d(x, config(1, 0, 1, 1)).forward(&x[0]);
    "Conv2d, pooled" [[3, 2, 8, 8], [4, 2, 3, 3], [4]] |x| conv2d(x, config(1, 0, 1, 1)).forward_pooled(&x[0], (2, 2), (2, 2), true);
    "Conv2d, pooled, overlapping" [[2, 2, 9, 8], [4, 2, 2, 2]] |x| conv2d(x, config(1, 1, 1, 1)).forward_pooled(&x[0], (3, 2), (2, 1), false);
    "elastic net" [[20_000]] |x| penalty(Lp::elastic_net(0.3)?, &x[0]);
    "sparse group lasso, rows" [[9, 33]] |x| groups(Grouping::Rows, &x[0]);
    "sparse group lasso, columns" [[300, 5]] |x| groups(Grouping::Columns, &x[0]);
    "sparse group lasso, channels" [[3, 4, 3, 3]] |x| groups(Grouping::InputChannels, &x[0]);
    "sparse group lasso, blocks" [[70, 45]] |x| groups(Grouping::Blocks { rows: 33, columns: 4 }, &x[0]);
    "unit lasso" [[4, 9], [5, 8]] |x| UnitLasso { size_weighted: true }.value(&x[0], &x[1])?.to_dtype(x[0].dtype());
    "spatial" [[20, 300]] |x| penalty(Spatial::default(), &x[0]);
    "spatial, exact" [[3, 4, 3, 3]] |x| penalty(Spatial::new(0.3, 2.)?.exact(), &x[0]);
    "Conv1d" [[3, 2, 12], [4, 1, 3], [4]] |x| {
        let config = nn::Conv1dConfig { stride: 2, padding: 1, groups: 2, ..Default::default() };
        nn::Conv1d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0])
    };
};

impl Case {
    /// The value and the gradients of `<value, cotangent>`; the first argument lies in memory as `lie` says.
    fn compute(&self, device: &Device, dtype: DType, of: DType, lie: Lie) -> Result<Vec<Tensor>> {
        let (mut vars, mut arguments) = (vec![], vec![]);
        for (index, dims) in self.shapes.iter().enumerate() {
            let values = rounded(index as u64, dims, of)?.to_dtype(dtype)?.to_device(device)?;
            let (var, view) = if index == 0 { lie } else { Lie::Contiguous }.of(&values)?;
            vars.push(var);
            arguments.push(view);
        }
        let value = (self.run)(&arguments)?;
        let cotangent = rounded(COTANGENT, value.dims(), of)?.to_dtype(dtype)?.to_device(device)?;
        let grads = (&value * cotangent)?.sum_all()?.backward()?;
        let mut all = vec![value.detach()];
        for (index, var) in vars.iter().enumerate() {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{}: no gradient {index}", self.name));
            all.push(grad.clone());
        }
        Ok(all)
    }

    /// `<value, cotangent>` on the CPU in f64, with arguments that are `h` along fixed directions.
    fn along(&self, h: f64) -> Result<f64> {
        let mut arguments = vec![];
        for (index, dims) in self.shapes.iter().enumerate() {
            let values = rounded(index as u64, dims, DType::F64)?;
            arguments.push((values + (random(500 + index as u64, dims)? * h)?)?);
        }
        let value = (self.run)(&arguments)?;
        dense::dot(&value, &rounded(COTANGENT, value.dims(), DType::F64)?)
    }
}

/// What the other tests compare with: the gradients of the CPU in f64 are slopes.
#[test]
fn exact_gradients_are_slopes() -> Result<()> {
    // The spatial entropy's gradient leaves out its normalization, but where it is asked for exactly.
    for case in DIFFERENTIABLE.iter().filter(|case| case.name != "spatial") {
        let all = case.compute(&Device::Cpu, DType::F64, DType::F64, Lie::Contiguous)?;
        let mut found = 0.0;
        for (index, grad) in all.iter().skip(1).enumerate() {
            found += dense::dot(grad, &random(500 + index as u64, grad.dims())?)?;
        }
        let slope = |h: f64| -> Result<f64> { Ok((case.along(h)? - case.along(-h)?) / (2.0 * h)) };
        let (slope, finer) = (slope(1e-6)?, slope(5e-7)?);
        // Where the two differ there is a kink between.
        let off = (slope - finer).abs() + 1e-6 * (1.0 + slope.abs());
        assert!((found - finer).abs() <= 10.0 * off, "{}: {found}, a slope of {finer}", case.name);
        assert!(off < 1e-3 * (1.0 + slope.abs()), "{}: no slope, {slope} or {finer}", case.name);
    }
    Ok(())
}

/// Whether a result would be compared with itself.
fn is_exact(device: &Device, dtype: DType) -> bool {
    device.is_cpu() && dtype == DType::F64
}

#[test]
fn values_and_gradients() -> Result<()> {
    let devices = devices();
    for case in DIFFERENTIABLE {
        for (dtype, lie) in DTYPES.into_iter().flat_map(|dtype| LIES.map(|lie| (dtype, lie))) {
            let exact = case.compute(&Device::Cpu, DType::F64, dtype, lie)?;
            for device in devices.iter().filter(|device| !is_exact(device, dtype)) {
                let what =
                    |part| format!("{} {dtype:?} {lie:?} {:?}, result {part}", case.name, device.location());
                let found = case.compute(device, dtype, dtype, lie);
                let found = found.unwrap_or_else(|error| panic!("{}: {error}", what(0)));
                for (part, (found, exact)) in found.iter().zip(&exact).enumerate() {
                    assert_exact(found, exact, device, 1.0, &what(part));
                }
            }
        }
    }
    Ok(())
}

/// Operations without gradients, of records and images; each gives what it computes.
type Plain = fn(&dyn Fn(u64, &[usize]) -> Result<Tensor>) -> Result<Vec<Tensor>>;

const PLAIN: &[(&str, Plain)] = &[
    ("product", |t| {
        let (a, b) = (t(1, &[3, 17, 9])?, t(2, &[3, 9, 33])?);
        let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        Ok(vec![dense::product(&a, &b)?, dense::product(&turned(&a)?, &turned(&b)?)?])
    }),
    ("grouped products", |t| {
        let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        let (mut all, mut pairs) = (vec![], vec![]);
        for [groups, m, k, n] in [
            [1, 1, 1, 1],
            [3, 7, 33, 65],
            [1, 300, 785, 785],
            [2, 130, 64, 33],
            [1, 10, 101, 101],
            [1, 5, 0, 9],
        ] {
            let (a, b) = (t(1, &[groups, m, k])?, t(2, &[groups, k, n])?);
            let own = [
                (a.clone(), b.clone()),
                (turned(&a)?, b.clone()),
                (a.clone(), turned(&b)?),
                (turned(&a)?, turned(&b)?),
            ];
            // Small tiles for a few, large ones for all.
            all.extend(grouped::products(&own[1..2])?);
            pairs.extend(own);
        }
        all.extend(grouped::products(&pairs)?);
        Ok(all)
    }),
    ("mix", |t| {
        let (a, b) = (t(1, &[7, 301])?, t(2, &[7, 301])?);
        let behind = Tensor::cat(&[&a, &b], 0)?.narrow(0, 7, 7)?;
        Ok(vec![dense::mix(&a, 0.75, &b, -2.5)?, dense::mix(&a, 0.75, &behind, -2.5)?])
    }),
    ("second_moment", |t| {
        let mut all = vec![];
        for (n, positions, d, groups) in
            [(1, 1, 1, 1), (33, 1, 65, 1), (5, 9, 25, 1), (4, 50, 12, 3), (257, 3, 130, 1), (2000, 1, 5, 1)]
        {
            let x = t(1, &[n, positions, groups * d])?;
            let turned = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
            for x in [&x, &turned] {
                for append_one in [false, true] {
                    all.push(factor::second_moment(x, groups, append_one, "x")?);
                }
            }
        }
        Ok(all)
    }),
    ("patches", |t| {
        let x = t(1, &[3, 4, 9, 7])?;
        let shape = uneven()?;
        let moment = |append_one| factor::patch_moment(&x, &shape, append_one, "x");
        Ok(vec![patches(&x, &shape)?, moment(false)?, moment(true)?])
    }),
    ("proximal steps", |t| {
        let lasso = SparseGroupLasso::new(0.4, Grouping::Columns, true)?;
        Ok(vec![lasso.prox(&t(1, &[9, 33])?, 0.1)?, Lp::l1().prox(&t(2, &[5, 4, 3, 3])?, 0.1)?])
    }),
    ("cross_square", |t| {
        let (e, a) = (t(1, &[9, 4, 6])?, t(2, &[9, 4, 10])?);
        let one = |x: &Tensor| x.narrow(1, 0, 1);
        Ok(vec![factor::cross_square(&e, &a, 2, "x")?, factor::cross_square(&one(&e)?, &one(&a)?, 1, "x")?])
    }),
    ("convolution's gradients", |t| {
        let shape = uneven()?;
        let (x, w) = (t(1, &[3, 4, 9, 7])?, t(2, &shape.weight_dims())?);
        let gy = t(3, &[3, 6, shape.output.0, shape.output.1])?;
        Ok(vec![
            conv::grad_input(&gy, &w, &shape)?,
            conv::grad_weight(&x, &gy, &shape)?,
            conv::grad_bias(&gy)?,
        ])
    }),
    ("projections", |t| {
        let (rows, columns, blocks) =
            (Grouping::Rows, Grouping::Columns, Grouping::Blocks { rows: 7, columns: 4 });
        let sets = [
            FeasibleSet::L2 { radius: 4.0 },
            FeasibleSet::Box { bound: 0.5 },
            FeasibleSet::L1 { radius: 30.0 },
            FeasibleSet::GroupBall { grouping: rows, radius: 20.0 },
            FeasibleSet::Simplex { sum: 2.0 },
            FeasibleSet::MaxNorm { grouping: columns, radius: 1.0 },
            FeasibleSet::MaxNorm { grouping: blocks, radius: 1.0 },
            FeasibleSet::Sphere { grouping: rows, radius: 1.0 },
        ];
        let w = t(1, &[40, 33])?;
        sets.iter().map(|set| set.project(&w)).collect()
    }),
    ("multipliers", |t| {
        let (w, next) = (t(1, &[40, 33])?, t(2, &[40, 33])?);
        let plain = Dual { restart: Some(0.2), cap: Some(0.7), augmented: 0.3, ..Dual::nu_pi(0.5, 0.3, 0.4) };
        let growing = AugmentedLagrangian { penalty: 0.1, growth: 1.5, ..Default::default() };
        let (rows, columns) = (Grouping::Rows, Grouping::Columns);
        let mut all = vec![];
        for (omega, bound, dual) in [
            (Omega::Norm(rows), Bound::AtMost(5.5), plain),
            (Omega::SquaredNorm(columns), Bound::AtMost(35.0), Dual::augmented_lagrangian(growing)),
            (Omega::L1(Grouping::Whole), Bound::Equal(1e3), Dual::augmented_lagrangian(growing)),
        ] {
            let mut multiplier = Multiplier::new(omega, bound, dual, w.dims())?;
            multiplier.update(&w)?;
            multiplier.update(&next)?;
            let report = multiplier.report(&w)?;
            let steps = report.stalled.iter().map(|&steps| steps as f64).collect();
            for numbers in [report.alpha, report.excess, report.penalty, steps] {
                all.push(Tensor::new(numbers, w.device())?);
            }
            // Of one gradient each, whatever the multipliers' size.
            let gradient = multiplier.term_and_gradient(&w)?.1;
            let largest = gradient.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
            all.push((gradient / f64::from(largest.max(1.0)))?);
        }
        Ok(all)
    }),
    ("a mask over NaN", |t| {
        let w = t(1, &[40, 33])?;
        let kept = Tensor::arange(0u32, 40 * 33, &Device::Cpu)?.reshape((40, 33))?.to_device(w.device())?;
        let kept = kept.to_dtype(DType::F64)?.affine(0.2, 0.0)?.sin()?.gt(0.0)?;
        // 0 / 0 where the mask is.
        let broken = (&w * kept.to_dtype(w.dtype())?)?.div(&kept.to_dtype(w.dtype())?)?;
        let varmap = VarMap::new();
        varmap.data().lock().expect("a lock").insert("w".into(), Var::from_tensor(&broken)?);
        let mut constraints = Constraints::new(&varmap, &[("w", Rule::Mask { mask: kept })])?;
        constraints.after_step(0.1)?;
        let found = varmap.data().lock().expect("a lock")["w"].as_tensor().copy()?;
        Ok(vec![found])
    }),
];

#[test]
fn operations_without_gradients() -> Result<()> {
    let devices = devices();
    for (name, run) in PLAIN {
        for dtype in DTYPES {
            let exact = run(&|seed, dims| rounded(seed, dims, dtype))?;
            for device in devices.iter().filter(|device| !is_exact(device, dtype)) {
                let what = format!("{name} {dtype:?} {:?}", device.location());
                let found = run(&|seed, dims| rounded(seed, dims, dtype)?.to_dtype(dtype)?.to_device(device));
                let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
                for (part, (found, exact)) in found.iter().zip(&exact).enumerate() {
                    assert_exact(found, exact, device, 1.0, &format!("{what}, result {part}"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn dot_and_exponential_average() -> Result<()> {
    for device in devices() {
        for (dtype, n) in DTYPES.into_iter().flat_map(|dtype| [0, 1, 33, 5000].map(|n| (dtype, n))) {
            let (a, b) = (rounded(1, &[n], dtype)?, rounded(2, &[n], dtype)?);
            let here = |t: &Tensor| t.to_dtype(dtype)?.to_device(&device);
            let (found, exact) = (dense::dot(&here(&a)?, &here(&b)?)?, dense::dot(&a, &b)?);
            // Products are in the operands' dtype or f32, and their sum is far smaller than the sum of their sizes.
            let unit = tolerance(if dtype == DType::F64 { dtype } else { DType::F32 });
            let what = format!("dot {dtype:?} {n} {:?}: {found} {exact}", device.location());
            assert!((found - exact).abs() <= unit * (1.0 + n as f64).sqrt(), "{what}");
            if dtype == DType::F32 && n > 0 {
                let average = factor::ema(Some(&here(&a)?), &here(&b)?, 0.9)?;
                assert_exact(&average, &factor::ema(Some(&a), &b, 0.9)?, &device, 1.0, "ema");
            }
        }
    }
    Ok(())
}

/// What a function returns draws in, as numbers.
trait Draws {
    fn numbers(&self) -> Vec<f64>;
}

impl Draws for Vec<u32> {
    fn numbers(&self) -> Vec<f64> {
        self.iter().map(|&v| v.into()).collect()
    }
}

impl Draws for Tensor {
    fn numbers(&self) -> Vec<f64> {
        flat(&self.to_device(&Device::Cpu).unwrap())
    }
}

#[test]
fn samples_are_those_of_the_cpu() -> Result<()> {
    let key = DrawKey { seed: 5, step: 1 << 33, draw: 2, first_row: 1 << 40 };
    for device in devices() {
        for (dtype, classes) in DTYPES.into_iter().flat_map(|dtype| [1, 10, 33, 300].map(|c| (dtype, c))) {
            let logits = (rounded(1, &[1000, classes], dtype)? * 4.0)?;
            let here = logits.to_dtype(dtype)?.to_device(&device)?;
            // A draw at the edge of two outcomes may go the other way.
            let differing = |found: &dyn Draws, exact: &dyn Draws| {
                let pairs = found.numbers().into_iter().zip(exact.numbers());
                pairs.filter(|(a, b)| (a - b).abs() > 0.01 * (1.0 + b.abs())).count()
            };
            let what = format!("{dtype:?} {classes} {:?}", device.location());
            let (found, exact) = (categorical(&here, key)?, categorical(&logits, key)?);
            assert_eq!(found.numbers().len(), 1000);
            assert!(differing(&found, &exact) <= 3, "categorical {what}");
            let (found, exact) = (bernoulli(&here, key)?, bernoulli(&logits, key)?);
            assert!(differing(&found, &exact) <= 3 * classes, "bernoulli {what}");
            assert_exact(
                &normal(&here, key)?,
                &normal(&logits, key)?,
                &device,
                1.0,
                &format!("normal {what}"),
            );
        }
    }
    Ok(())
}

/// A net of every kind of layer, for images `[n, 2, 8, 8]`.
fn every_layer(vb: VarBuilder) -> Result<Forward> {
    let conv = nn::conv2d(2, 4, 3, config(1, 1, 1, 2), vb.pp("conv"))?;
    let pooled = nn::conv2d_no_bias(4, 6, 3, config(1, 0, 1, 1), vb.pp("pooled"))?;
    let row = nn::conv1d(6, 3, 2, Default::default(), vb.pp("row"))?;
    let (wide, head) = (nn::linear_no_bias(8, 9, vb.pp("wide"))?, nn::linear(27, 5, vb.pp("head"))?);
    let (norm, rms) = (nn::layer_norm(9, 1e-3, vb.pp("norm"))?, nn::rms_norm(27, 1e-3, vb.pp("rms"))?);
    Ok(Box::new(move |x| {
        let x = conv.forward(x)?.tanh()?;
        let x = pooled.forward_pooled(&x, (2, 2), (2, 2), true)?.flatten_from(2)?;
        let x = nn::ops::relu(&row.forward(&x)?)?;
        let x = norm.forward(&wide.forward(&x)?)?.flatten_from(1)?;
        head.forward(&nn::ops::softmax(&rms.forward(&x)?, 1)?)
    }))
}

#[test]
fn records_and_gradients_of_a_net() -> Result<()> {
    let all = |device: &Device, dtype, of: DType| -> Result<Vec<(String, Tensor)>> {
        let net = Net::on(device, dtype, 1, every_layer)?;
        for name in net.names() {
            let var = net.var(&name);
            // A copy: a conversion to the same type is the Var itself.
            var.set(&var.copy()?.to_dtype(of)?.to_dtype(dtype)?)?;
        }
        let here = |t: Tensor| t.to_dtype(dtype)?.to_device(device);
        let z = (net.forward)(&here(rounded(3, &[7, 2, 8, 8], of)?)?)?;
        let cotangent = here(rounded(4, z.dims(), of)?)?;
        let mut all = vec![("outputs".to_string(), z.clone())];
        let kept = net.tape.reduce(&z, &cotangent, Keep::default())?;
        for (layer, record) in kept.0 {
            all.push((format!("inputs of layer {layer}"), record.inputs.rows()?));
            all.push((format!("gradients of layer {layer}"), record.grads));
        }
        let grads = (z * cotangent)?.sum_all()?.backward()?;
        for name in net.names() {
            let grad = grads.get(&net.var(&name)).unwrap_or_else(|| panic!("no gradient of {name}"));
            all.push((name, grad.clone()));
        }
        Ok(all)
    };
    for device in devices() {
        for dtype in [DType::F64, DType::F32] {
            let (found, exact) = (all(&device, dtype, dtype)?, all(&Device::Cpu, DType::F64, dtype)?);
            assert_eq!(found.len(), exact.len());
            for ((name, found), (_, exact)) in found.iter().zip(&exact) {
                assert_exact(
                    found,
                    exact,
                    &device,
                    5.0,
                    &format!("{name} {dtype:?} {:?}", device.location()),
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_tensor_on_the_wrong_device_is_named() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let here = rounded(1, &[3, 3], DType::F32)?.to_dtype(DType::F32)?;
    let there = here.to_device(&device)?;
    let vector = there.get(0)?;
    let net = Net::on(&device, DType::F32, 1, small)?;
    for (name, result) in [
        ("mix", dense::mix(&there, 1.0, &here, 1.0)),
        ("product", dense::product(&there, &here)),
        ("product", dense::product(&here, &there)),
        ("cross", factor::cross_square(&there.unsqueeze(0)?, &here.unsqueeze(0)?, 1, "cross")),
        ("norm", norm::layer_norm(&here, &vector, None, 1e-3)),
        ("affine", linear(&[here.clone(), there.clone()])),
        ("affine", linear(&[there.clone(), here.clone()])),
        ("conv", (net.forward)(&random(1, &[2, 1, 3, 3])?.to_dtype(DType::F32)?)),
    ] {
        let message = result.err().map(|e| e.to_string().to_lowercase()).unwrap_or_default();
        let message = message.lines().next().unwrap_or_default();
        let known = [name, "device", "gpu", "cpu"].iter().any(|part| message.contains(part));
        assert!(known && !message.is_empty(), "{name}: {message:?}");
    }
    Ok(())
}
