//! Small nets with every kind of layer, and their Jacobians a backward pass each.

use candle_core::{D, DType, Device, Result, Tensor};
use kronwake::evidence::{Examples, Problem};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::ops::pool::relu;
use kronwake::tape::{Likelihood, Tape};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const CPU: Device = Device::Cpu;

pub fn random(seed: u64, dims: &[usize]) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &CPU)
}

/// A net with every kind of layer that is counted.
pub struct Net {
    pub vars: VarMap,
    pub tape: Tape,
    pub model: Box<dyn Module>,
    pub x: Tensor,
    pub classes: usize,
    pub positions: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Mlp,
    /// Grouped, strided and padded convolutions.
    Conv,
    /// One layer used twice.
    Shared,
    /// Layers on `[n, t, features]`, a mean over `t`.
    Sequence,
    /// Outputs `[n, t, classes]`.
    Terms,
    /// An embedding and both norms.
    Tokens,
}

pub const KINDS: [Kind; 6] = [Kind::Mlp, Kind::Conv, Kind::Shared, Kind::Sequence, Kind::Terms, Kind::Tokens];

impl Net {
    pub fn new(kind: Kind, seed: u64, n: usize, classes: usize) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        let (dims, positions) = match kind {
            Kind::Mlp | Kind::Shared => (vec![n, 3], 1),
            Kind::Conv => (vec![n, 2, 6, 5], 1),
            Kind::Sequence => (vec![n, 4, 3], 1),
            Kind::Terms => (vec![n, 2, 3], 2),
            Kind::Tokens => (vec![n, 4], 1),
        };
        let model = tape.build(|| {
            let first = |to| nn::linear(3, to, vb.pp("first"));
            Ok(match kind {
                Kind::Mlp => {
                    let (first, last) = (first(4)?, nn::linear_no_bias(4, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?)) as Box<dyn Module>
                }
                Kind::Conv => {
                    let grouped = nn::Conv2dConfig { groups: 2, padding: 1, stride: 2, ..Default::default() };
                    let conv = nn::conv2d(2, 4, 3, grouped, vb.pp("conv"))?;
                    let (second, last) = (
                        nn::conv2d_no_bias(4, 2, 2, Default::default(), vb.pp("second"))?,
                        nn::linear(8, classes, vb.pp("last"))?,
                    );
                    Box::new(move |x: &Tensor| {
                        let x = second.forward(&conv.forward(x)?.tanh()?)?;
                        last.forward(&relu(&x)?.flatten_from(1)?)
                    })
                }
                Kind::Shared => {
                    let (shared, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| {
                        let once = shared.forward(x)?.tanh()?;
                        last.forward(&shared.forward(&once)?.tanh()?)
                    })
                }
                Kind::Sequence => {
                    let (first, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| last.forward(&first.forward(x)?.tanh()?.mean(1)?))
                }
                Kind::Tokens => {
                    let table = nn::embedding(5, 3, vb.pp("table"))?;
                    let (norm, rms) =
                        (nn::layer_norm(3, 1e-5, vb.pp("norm"))?, nn::rms_norm(3, 1e-5, vb.pp("rms"))?);
                    let last = nn::linear(3, classes, vb.pp("last"))?;
                    Box::new(move |x: &Tensor| {
                        let x = norm.forward(&table.forward(x)?)?;
                        last.forward(&rms.forward(&(&x + x.tanh()?)?)?.mean(1)?)
                    })
                }
                Kind::Terms => {
                    let (first, last) = (first(3)?, nn::linear(3, classes, vb.pp("last"))?);
                    Box::new(move |x: &Tensor| {
                        let x = first.forward(x)?.tanh()?;
                        // Positions see each other.
                        last.forward(&x.broadcast_add(&x.mean_keepdim(1)?)?)
                    })
                }
            })
        })?;
        let mut names: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (index, (_, var)) in names.iter().enumerate() {
            var.set(&random(100 * seed + index as u64, var.dims())?)?;
        }
        let x = match kind {
            // Tokens come twice in an example, and one never.
            Kind::Tokens => {
                Tensor::from_iter((0..4 * n as u32).map(|i| (i * i / 3 + i) % 4), &CPU)?.reshape(dims)?
            }
            _ => random(100 * seed + 50, &dims)?,
        };
        Ok(Self { vars, tape, model, x, classes, positions })
    }

    pub fn problem(&self, likelihood: Likelihood) -> Result<Problem<'_>> {
        Problem::new(&self.tape, &self.vars, &*self.model, likelihood)
    }

    pub fn examples(&self, likelihood: Likelihood) -> Result<Examples> {
        let n = self.x.dim(0)?;
        let y = match likelihood {
            Likelihood::Categorical => {
                let labels = (0..n * self.positions).map(|i| (i * i % self.classes) as u32);
                let dims: &[usize] = if self.positions > 1 { &[n, self.positions] } else { &[n] };
                Tensor::from_iter(labels, &CPU)?.reshape(dims)?
            }
            other => {
                let dims: &[usize] =
                    if self.positions > 1 { &[n, self.positions, self.classes] } else { &[n, self.classes] };
                let y = random(7, dims)?;
                if other == Likelihood::Bernoulli { y.gt(0.)?.to_dtype(DType::F64)? } else { y }
            }
        };
        Examples::new(self.x.clone(), y)
    }

    /// `J` `[outputs of all examples, parameters]`, by a backward pass for every output of every example.
    pub fn jacobian(&self, problem: &Problem<'_>) -> Result<Tensor> {
        let outputs = self.model.forward(&self.x)?.flatten_all()?;
        let mut rows = Vec::new();
        for i in 0..outputs.elem_count() {
            let grads = outputs.get(i)?.backward()?;
            let parts = problem.parameters().iter().map(|p| match grads.get(&p.tensor) {
                Some(grad) => grad.flatten_all(),
                None => Tensor::zeros(p.tensor.elem_count(), DType::F64, &CPU),
            });
            rows.push(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?);
        }
        Tensor::stack(&rows, 0)
    }

    /// The Hessian by the outputs of all examples, block by block.
    pub fn hessian(&self, likelihood: Likelihood) -> Result<Tensor> {
        let outputs = self.model.forward(&self.x)?.reshape(((), self.classes))?;
        let (terms, c) = outputs.dims2()?;
        let p = match likelihood {
            Likelihood::Categorical => candle_nn::ops::softmax(&outputs, D::Minus1)?,
            Likelihood::Bernoulli => candle_nn::ops::sigmoid(&outputs)?,
            Likelihood::Gaussian => outputs.ones_like()?,
        };
        let p = p.to_vec2::<f64>()?;
        let mut h = vec![0.0; terms * c * terms * c];
        for (n, p) in p.iter().enumerate() {
            for i in 0..c {
                for j in 0..c {
                    let own = if i == j { 1.0 } else { 0.0 };
                    h[(n * c + i) * terms * c + n * c + j] = match likelihood {
                        Likelihood::Categorical => own * p[i] - p[i] * p[j],
                        Likelihood::Bernoulli => own * p[i] * (1.0 - p[i]),
                        Likelihood::Gaussian => own,
                    };
                }
            }
        }
        Tensor::from_vec(h, (terms * c, terms * c), &CPU)
    }
}

/// `log det m` by Gaussian elimination.
pub fn log_det(m: &Tensor) -> Result<f64> {
    let mut m = m.to_vec2::<f64>()?;
    let mut sum = 0.0;
    for k in 0..m.len() {
        sum += m[k][k].ln();
        for i in k + 1..m.len() {
            let factor = m[i][k] / m[k][k];
            let row = m[k].clone();
            for (x, r) in m[i].iter_mut().zip(&row).skip(k) {
                *x -= factor * r;
            }
        }
    }
    Ok(sum)
}

/// `s G + P0` and `log det` of it over `P0`, from Jacobians.
pub fn brute(net: &Net, likelihood: Likelihood, s: f64, precisions: &[f64]) -> Result<(Tensor, f64)> {
    let problem = net.problem(likelihood)?;
    let j = net.jacobian(&problem)?;
    let g = j.t()?.matmul(&net.hessian(likelihood)?.matmul(&j)?)?;
    let sizes = problem.parameters().iter().map(|p| p.tensor.elem_count());
    let diagonal: Vec<f64> =
        precisions.iter().zip(sizes).flat_map(|(p, n)| std::iter::repeat_n(*p, n)).collect();
    let p0 = Tensor::new(diagonal.as_slice(), &CPU)?;
    let m = ((g * s)? + Tensor::eye(diagonal.len(), DType::F64, &CPU)?.broadcast_mul(&p0)?)?;
    let value = log_det(&m)? - diagonal.iter().map(|d| d.ln()).sum::<f64>();
    Ok((m, value))
}

pub const LIKELIHOODS: [Likelihood; 3] =
    [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian];

pub fn precisions(count: usize) -> Vec<f64> {
    (0..count).map(|i| 0.3 + 0.4 * i as f64).collect()
}
