//! What several test files share.

pub mod nets;
pub mod wakes;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use faer::{Mat, linalg::solvers::Solve};
pub use kronwake::checkpoint::Checkpoint;
use kronwake::curvature::{Beyond, FactorLimit, Sharing};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{Bias, Every, NaturalGradient, Params};
use kronwake::tape::{Fisher, Likelihood, Tape};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use safetensors::{SafeTensors, tensor::TensorView};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The folder of this package; `KRONWAKE_ROOT` where tests run on another machine than the one that built them.
pub fn root() -> PathBuf {
    std::env::var_os("KRONWAKE_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// A file of `tests/golden`.
pub fn golden(name: &str) -> Result<Checkpoint> {
    Checkpoint::read(root().join("tests/golden").join(name), &Device::Cpu)
}

/// The largest absolute difference, relative to the largest expected element.
pub fn relative(found: &Tensor, expected: &Tensor) -> Result<f64> {
    assert_eq!(found.dims(), expected.dims());
    let largest = |t: &Tensor| t.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    let scale = largest(expected)?.max(1e-300);
    let difference = (found.to_dtype(DType::F64)? - expected.to_dtype(DType::F64)?)?;
    Ok(largest(&difference)? / scale)
}

/// Asserts that `found` is `expected` to `tolerance` of its largest element.
#[track_caller]
pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    let difference = relative(found, expected).unwrap_or(f64::NAN);
    assert!(difference <= tolerance, "{what}: differs by {difference:e}, tolerance {tolerance:e}");
}

/// Numbers in (-1, 1), the same for the same seed.
pub fn random(seed: u64, dims: &[usize]) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu)
}

/// Class numbers below `classes`.
pub fn labels(seed: u64, n: usize, classes: u32) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    Tensor::from_vec((0..n).map(|_| rng.random_range(0..classes)).collect::<Vec<_>>(), n, &Device::Cpu)
}

pub type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// A model on a tape of its own.
pub struct Net {
    pub varmap: VarMap,
    pub tape: Tape,
    pub forward: Forward,
}

impl Net {
    /// Builds a model of `dtype` on the CPU and fills its Vars from `seed`.
    pub fn of(dtype: DType, seed: u64, build: impl FnOnce(VarBuilder) -> Result<Forward>) -> Result<Self> {
        Self::on(&Device::Cpu, dtype, seed, build)
    }

    /// [`Net::of`] on a device: the same values, rounded to `dtype`.
    pub fn on(
        device: &Device,
        dtype: DType,
        seed: u64,
        build: impl FnOnce(VarBuilder) -> Result<Forward>,
    ) -> Result<Self> {
        let (varmap, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&varmap, dtype, device);
        let forward = tape.build(|| build(vb))?;
        let net = Self { varmap, tape, forward };
        for (index, name) in net.names().iter().enumerate() {
            let var = net.var(name);
            let fan_in: usize = var.dims().iter().skip(1).product();
            let value = (random(1000 * seed + index as u64, var.dims())? * (2.0 / (fan_in as f64).sqrt()))?;
            var.set(&value.to_dtype(dtype)?.to_device(device)?)?;
        }
        Ok(net)
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.varmap.data().lock().unwrap().keys().cloned().collect();
        names.sort();
        names
    }

    #[track_caller]
    pub fn var(&self, name: &str) -> Var {
        self.varmap.data().lock().unwrap().get(name).unwrap_or_else(|| panic!("no Var {name}")).clone()
    }

    pub fn has(&self, name: &str) -> bool {
        self.varmap.data().lock().unwrap().contains_key(name)
    }

    /// Copies of all values, in the order of [`Net::names`].
    pub fn values(&self) -> Result<Vec<Tensor>> {
        self.names().iter().map(|n| self.var(n).as_detached_tensor().copy()).collect()
    }

    pub fn set(&self, values: &[Tensor]) -> Result<()> {
        self.names().iter().zip(values).try_for_each(|(n, v)| self.var(n).set(v))
    }

    /// Groups of a block whose layer was tapped; a bias of its own has one.
    pub fn groups(&self, block: &str) -> usize {
        let layer = |l: &&std::sync::Arc<kronwake::tape::Layer>| {
            block == l.name || block == format!("{}.weight", l.name)
        };
        self.tape.layers().iter().find(layer).map_or(1, |l| l.groups)
    }

    /// The elements of a block's matrix `[out, columns]` of group `group`, column by column: row `i` of column `j` is
    /// element `j out + i`, so that `A (x) G` is the block's Fisher.
    pub fn elements(&self, block: &str, group: usize, groups: usize) -> Vec<(Var, usize)> {
        let is_part = block.ends_with(".weight") || block.ends_with(".bias");
        let weight = if is_part { self.var(block) } else { self.var(&format!("{block}.weight")) };
        let out = weight.dim(0).unwrap() / groups;
        let columns = weight.elem_count() / weight.dim(0).unwrap();
        let mut elements = vec![];
        for column in 0..columns {
            elements.extend((0..out).map(|row| (weight.clone(), (group * out + row) * columns + column)));
        }
        if !is_part && self.has(&format!("{block}.bias")) {
            let bias = self.var(&format!("{block}.bias"));
            elements.extend((0..out).map(|row| (bias.clone(), group * out + row)));
        }
        elements
    }
}

/// A column of the values that `of` has at `elements`.
pub fn column(elements: &[(Var, usize)], of: impl Fn(&Var) -> Tensor) -> Mat<f64> {
    Mat::from_fn(elements.len(), 1, |i, _| flat(&of(&elements[i].0))[elements[i].1])
}

/// A column of the values at `elements`.
pub fn values_at(elements: &[(Var, usize)]) -> Mat<f64> {
    column(elements, |var| var.as_detached_tensor())
}

/// All elements as f64.
pub fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1()).unwrap()
}

/// The derivatives of `f`'s elements with respect to `elements` of Vars, `[elements of f, elements]`, by central
/// differences of width `h` with one Richardson extrapolation: exact but for rounding where `f` is a polynomial of degree
/// 4 in each element, off by `h^4` times a fifth derivative otherwise.
pub fn jacobian(elements: &[(Var, usize)], h: f64, f: &dyn Fn() -> Result<Tensor>) -> Result<Mat<f64>> {
    let mut columns = vec![];
    for (var, index) in elements {
        let before = var.as_detached_tensor().copy()?;
        let values = flat(&before);
        let at = |shift: f64| -> Result<Vec<f64>> {
            let mut values = values.clone();
            values[*index] += shift;
            var.set(&Tensor::from_vec(values, before.dims(), &Device::Cpu)?)?;
            Ok(flat(&f()?))
        };
        let slope = |h: f64| -> Result<Vec<f64>> {
            Ok(at(h)?.iter().zip(at(-h)?).map(|(up, down)| (up - down) / (2.0 * h)).collect())
        };
        let (wide, narrow) = (slope(h)?, slope(h / 2.0)?);
        var.set(&before)?;
        columns.push(wide.iter().zip(narrow).map(|(w, n)| (4.0 * n - w) / 3.0).collect::<Vec<f64>>());
    }
    let rows = columns.first().map_or(0, |c| c.len());
    Ok(Mat::from_fn(rows, columns.len(), |i, j| columns[j][i]))
}

/// A tensor of rank 2 as a matrix.
pub fn matrix(t: &Tensor) -> Mat<f64> {
    let (rows, columns) = t.dims2().unwrap();
    let values = flat(t);
    Mat::from_fn(rows, columns, |i, j| values[i * columns + j])
}

/// A matrix as a tensor of rank 2.
pub fn tensor(m: &Mat<f64>) -> Tensor {
    let values: Vec<f64> = (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)])).collect();
    Tensor::from_vec(values, (m.nrows(), m.ncols()), &Device::Cpu).unwrap()
}

/// Group `group` of factors `[groups, d, d]` as a matrix.
pub fn of_group(factor: &Tensor, group: usize) -> Mat<f64> {
    matrix(&factor.get(group).unwrap())
}

/// The rows of a run when `dim` rows are divided under a limit.
pub fn run_of(dim: usize, limit: FactorLimit) -> usize {
    match limit.beyond {
        _ if dim <= limit.rows => dim,
        Beyond::Diagonal => 1,
        // By cost, those of small nets are full.
        Beyond::LowRank { .. } | Beyond::ByCost => dim,
        Beyond::BlockDiagonal => (1..=dim).find(|run| run * dim.div_ceil(limit.rows) >= dim).unwrap(),
    }
}

/// The rank of a factor of `dim` rows under a limit, where that is low.
pub fn rank_of(dim: usize, limit: FactorLimit) -> Option<usize> {
    match limit.beyond {
        Beyond::LowRank { rank } if dim > limit.rows && rank + 1 < dim => Some(rank),
        _ => None,
    }
}

/// What a factor `m` under a limit stands for: `m` without what couples one run to another, or of low rank.
pub fn kept(m: &Mat<f64>, limit: FactorLimit) -> Mat<f64> {
    if let Some(rank) = rank_of(m.nrows(), limit) {
        return low_rank(m, rank);
    }
    let run = run_of(m.nrows(), limit);
    Mat::from_fn(m.nrows(), m.ncols(), |i, j| if i / run == j / run { m[(i, j)] } else { 0.0 })
}

/// `Omega` `[dim, rank]`.
pub fn omega(dim: usize, rank: usize) -> Mat<f64> {
    let omega = kronwake::linalg::sketch::test_matrix(dim, rank, DType::F64, &Device::Cpu).unwrap();
    matrix(&omega).transpose().to_owned()
}

/// Nystroem's approximation of `m` with [`omega`], and the trace that it leaves out as a multiple of the identity on what the leading
/// eigenvectors leave: as many as make that multiple the smallest.
pub fn low_rank(m: &Mat<f64>, rank: usize) -> Mat<f64> {
    let dim = m.nrows();
    let omega = omega(dim, rank);
    let y = m * &omega;
    let core = omega.transpose() * &y;
    let eigen = core.self_adjoint_eigen(faer::Side::Lower).unwrap();
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    let mut nystroem = Mat::zeros(dim, dim);
    for k in (0..rank).filter(|&k| values[k] > 1e-12 * values[rank - 1]) {
        let column = &y * vectors.subcols(k, 1);
        nystroem += &column * column.transpose() * (1.0 / values[k]);
    }
    let eigen = nystroem.self_adjoint_eigen(faer::Side::Lower).unwrap();
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    let trace = m.diagonal().column_vector().sum();
    let mut best = (f64::INFINITY, Mat::zeros(dim, dim));
    for count in 0..=rank {
        let of = dim - count..dim;
        let rest = (trace - of.clone().map(|k| values[k]).sum::<f64>()).max(0.0) / (dim - count) as f64;
        if rest < best.0 {
            let mut found = eye(dim) * rest;
            for k in of {
                let u = vectors.subcols(k, 1);
                found += u * u.transpose() * (values[k] - rest);
            }
            best = (rest, found);
        }
    }
    best.1
}

/// Group `group` of factors of `dim` rows in runs, `[groups n, r, r]`, as a dense matrix.
pub fn joined(factor: &Tensor, group: usize, groups: usize, dim: usize) -> Mat<f64> {
    let (count, run) = (factor.dim(0).unwrap() / groups, factor.dim(1).unwrap());
    let runs: Vec<_> = (0..count).map(|i| of_group(factor, group * count + i)).collect();
    Mat::from_fn(dim, dim, |i, j| if i / run == j / run { runs[i / run][(i % run, j % run)] } else { 0.0 })
}

/// `a (x) g` by its definition.
pub fn kron(a: &Mat<f64>, g: &Mat<f64>) -> Mat<f64> {
    let (p, q) = (g.nrows(), g.ncols());
    Mat::from_fn(a.nrows() * p, a.ncols() * q, |i, j| a[(i / p, j / q)] * g[(i % p, j % q)])
}

pub fn eye(n: usize) -> Mat<f64> {
    Mat::identity(n, n)
}

/// `m^-1 b`.
pub fn solve(m: &Mat<f64>, b: &Mat<f64>) -> Mat<f64> {
    m.partial_piv_lu().solve(b)
}

/// The Hessian of one loss term with respect to its outputs `z`.
pub fn hessian(likelihood: Likelihood, z: &[f64]) -> Mat<f64> {
    let c = z.len();
    match likelihood {
        Likelihood::Gaussian => eye(c),
        Likelihood::Categorical => {
            let p = softmax(z);
            Mat::from_fn(c, c, |i, j| if i == j { p[i] - p[i] * p[i] } else { -p[i] * p[j] })
        }
        Likelihood::Bernoulli => {
            Mat::from_fn(c, c, |i, j| if i == j { sigmoid(z[i]) * (1.0 - sigmoid(z[i])) } else { 0.0 })
        }
    }
}

pub fn softmax(z: &[f64]) -> Vec<f64> {
    let total: f64 = z.iter().map(|v| v.exp()).sum();
    z.iter().map(|v| v.exp() / total).collect()
}

pub fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Random targets that suit `outputs`: class numbers, zeros and ones, numbers.
pub fn targets(seed: u64, likelihood: Likelihood, outputs: &Tensor) -> Result<Tensor> {
    let (terms, classes) = (likelihood.terms(outputs)?, outputs.dim(D::Minus1)?);
    match likelihood {
        Likelihood::Categorical => labels(seed, terms, classes as u32),
        Likelihood::Bernoulli => random(seed, outputs.dims())?.gt(0.0)?.to_dtype(outputs.dtype()),
        Likelihood::Gaussian => random(seed, outputs.dims())?.to_dtype(outputs.dtype()),
    }
}

/// The loss of every term, `[terms]`, from candle's own operations.
pub fn term_losses(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let z = outputs.reshape(((), outputs.dim(D::Minus1)?))?;
    match likelihood {
        Likelihood::Categorical => {
            let picked = z.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
            z.log_sum_exp(1)? - picked
        }
        Likelihood::Bernoulli => {
            let y = targets.reshape(z.shape())?;
            ((z.exp()? + 1.0)?.log()? - (y * z)?)?.sum(1)
        }
        Likelihood::Gaussian => ((z.clone() - targets.reshape(z.shape())?)?.sqr()? * 0.5)?.sum(1),
    }
}

/// The mean over terms of [`term_losses`].
pub fn mean_loss(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
    term_losses(likelihood, outputs, targets)?.mean_all()
}

/// Asserts that `found` is `expected` to `tolerance` of its largest element.
#[track_caller]
pub fn assert_same(found: &Mat<f64>, expected: &Mat<f64>, tolerance: f64, what: &str) {
    assert_close(&tensor(found), &tensor(expected), tolerance, what)
}

/// An optimizer that observes every step and moves nothing; its factors are those of the last batch alone.
pub fn observer(net: &Net, fisher: Fisher, sharing: Sharing, bias: Bias) -> Result<NaturalGradient> {
    let every = Every { factors: 1, inverses: 1 };
    let params =
        Params { lr: 0.0, stat_decay: 0.0, every, fisher, sharing, bias, ..Params::k_fac(&net.tape) };
    NaturalGradient::from_varmap(&net.varmap, params)
}

/// `[n, c, ..]` as `[n, positions, c]`.
pub fn positions(z: &Tensor) -> Result<Tensor> {
    z.flatten_from(2)?.transpose(1, 2)?.contiguous()
}

/// A path for a file of this test run.
pub fn scratch(name: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("kronwake-{}-{count}-{name}", std::process::id()))
}

/// All that an optimizer would save: tensors as dtype, shape and bytes, then the metadata.
pub type Saved = (BTreeMap<String, (String, Vec<usize>, Vec<u8>)>, BTreeMap<String, String>);

pub fn saved(opt: &NaturalGradient) -> Result<Saved> {
    let path = scratch("state");
    opt.save(&path)?;
    let bytes = std::fs::read(&path)?;
    std::fs::remove_file(&path)?;
    let file = SafeTensors::deserialize(&bytes).map_err(candle_core::Error::wrap)?;
    let tensor = |(name, view): (String, TensorView)| {
        (name, (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(candle_core::Error::wrap)?;
    let text = header.metadata().as_ref().and_then(|m| m.get("kronwake")).cloned().unwrap_or_default();
    let line = |l: &str| l.split_once(" = ").map(|(name, value)| (name.to_string(), value.to_string()));
    let metadata = text.lines().filter_map(line).collect();
    Ok((file.tensors().into_iter().map(tensor).collect(), metadata))
}

/// Asserts that two states are the same to the last bit, but for metadata that `except` names.
#[track_caller]
pub fn assert_same_state(found: &Saved, expected: &Saved, except: &[&str], what: &str) {
    let names = |s: &Saved| s.0.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    let differing: Vec<_> =
        found.0.iter().filter(|(name, tensor)| expected.0[*name] != **tensor).map(|t| t.0).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ");
    let rest = |s: &Saved| {
        s.1.iter()
            .filter(|(k, _)| !except.contains(&k.as_str()))
            .map(|e| format!("{e:?}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(rest(found), rest(expected), "{what}");
}

/// A small convolution net with three classes for images `[n, 1, 3, 3]`, with a Var `gain` that belongs to no layer.
pub fn small(vb: VarBuilder) -> Result<Forward> {
    let conv = nn::conv2d(1, 2, 2, Default::default(), vb.pp("conv"))?;
    let gain = vb.get(8, "gain")?;
    let (fc1, fc2) = (nn::linear(8, 4, vb.pp("fc1"))?, nn::linear(4, 3, vb.pp("fc2"))?);
    Ok(Box::new(move |x| {
        let x = conv.forward(x)?.tanh()?.flatten_from(1)?.broadcast_mul(&gain)?;
        fc2.forward(&fc1.forward(&x)?.tanh()?)
    }))
}

/// Batch `k` for [`small`]: `n` images of `dtype` and their classes.
pub fn small_batch(k: u64, n: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
    Ok((random(700 + k, &[n, 1, 3, 3])?.to_dtype(dtype)?, labels(900 + k, n, 3)?))
}

/// Asserts that `result` is an error whose message, without a backtrace, says all of `parts`.
#[track_caller]
pub fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().map(|e| e.to_string()).unwrap_or_default();
    let message = message.lines().next().unwrap_or_default();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}
