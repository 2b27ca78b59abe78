//! Estimators of the evidence: which curvature, of which outputs, over which parts of the examples.

use super::data_fit::DataFit;
use super::dense::Dense;
use super::diagonal::Diagonal;
use super::examples::Examples;
use super::extrapolate::Extrapolated;
use super::fit::{Evidence, Fit};
use super::hyper::Hyper;
use super::kron::KronSums;
use super::last_layer::{Sums, sum_up};
use super::log_det::{Complexity, LogDet};
use super::partition::Parts;
use super::pass::{Checked, Pass};
use super::problem::Problem;
use super::rotated::MarginalSums;
use super::rows::{CHUNK, Rows};
use crate::ops::rng::uniform;
use crate::parallel::World;
use crate::tape::Root;
use candle_core::{DType, Result, Tensor, bail};

/// Through what the outputs of an example are told apart where each has a kernel of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Split {
    /// The columns of a square root of the likelihood's Hessian: what follows from them is a proven bound. The default.
    #[default]
    Root,
    /// The outputs themselves, with the diagonal of the Hessian, as in Immer et al.'s code. For a Gaussian likelihood the same; for a
    /// categorical one not a bound in general (two classes with `p = 1/2` and opposite outputs are a counterexample).
    Diagonal,
}

/// The outputs that a kernel's rows are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outputs {
    /// All, together: exact for the examples. The default.
    #[default]
    Joint,
    /// Each in a kernel of its own: as many backward passes, far smaller determinants, a looser bound (Fischer's inequality).
    Independent(Split),
    /// One for all examples, drawn, times their number: one backward pass. In expectation as `Independent`.
    One(Split),
    /// The one of this number for all examples, times their number: a term of `Independent`'s sum.
    Given(Split, usize),
    /// One for every example, drawn for each, times their number: one backward pass. With [`Split::Root`] in expectation a
    /// bound; nearer than `Independent` or not, depending on the model.
    OneEach(Split),
}

/// What stands for the curvature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curvature {
    /// The neural tangent kernel of a part's examples: exact for that part. Over several parts a lower bound of the evidence, the
    /// tighter the larger the parts.
    Kernel(Outputs),
    /// [`Curvature::Kernel`] of all outputs, continued from a batch, its halves and its quarters to all examples by a power law. Not
    /// a bound; much nearer to the value for all examples than that of the batches. Where a tensor's effective number would come out
    /// below zero, since its share falls as examples are added, the batch's own stands in for it, divided by `N / b`.
    Extrapolated,
    /// The generalized Gauss-Newton matrix of all parameters: the same as the kernel, cheaper where there are fewer parameters than
    /// examples times outputs.
    Full,
    /// That matrix with a block a tensor, without what is between blocks: a lower bound of the evidence.
    BlockPerTensor,
    /// With a block a layer, its weight and its bias: a lower bound, tighter than a block a tensor.
    BlockPerLayer,
    /// Kronecker factors of each tensor's block: no bound in either direction.
    Kron,
    /// The diagonal of each tensor's block in a Kronecker basis, that of the marginals of the per-example gradients: a proven lower bound of the
    /// evidence (Hadamard in the rotated basis, Fischer over tensors), mostly tighter than the estimate of `Kron`, at two passes over the
    /// examples. Needs one prior precision a tensor, as `Kron` does.
    Rotated,
    /// The diagonal: a lower bound of the evidence, looser than blocks.
    Diagonal,
}

/// An estimator of the log marginal likelihood of a linearized Laplace approximation.
///
/// Over parts of the examples the complexities of the parts add up. Except for [`Curvature::Kron`], [`Curvature::Extrapolated`]
/// and [`Split::Diagonal`], whatever is chosen gives a lower bound of the evidence, with `draws` in expectation
/// (Immer et al. 2023; that a sum over parts bounds is Fischer's inequality, that larger parts do better in expectation Han's).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimator {
    /// What stands for the curvature.
    pub curvature: Curvature,
    /// How the examples are divided.
    pub parts: Parts,
    /// How many parts to draw; all of them without. The log-likelihood is then estimated from the same examples.
    pub draws: Option<usize>,
    /// The most bytes that a matrix with what is needed to factorize it, or the rows that it is made of, may take. What would take more is
    /// refused before it does.
    pub memory: usize,
}

impl Estimator {
    /// A curvature over parts, all of them; 4 GiB.
    pub fn new(curvature: Curvature, parts: Parts) -> Self {
        Self { curvature, parts, draws: None, memory: 4 << 30 }
    }

    /// The stochastic bound: the kernel of one random batch of `size` examples an estimate.
    pub fn batch(size: usize) -> Self {
        Self { draws: Some(1), ..Self::new(Curvature::Kernel(Outputs::Joint), Parts::Random(size)) }
    }

    /// [`Estimator::batch`] with [`Curvature::Extrapolated`].
    pub fn extrapolated(size: usize) -> Self {
        Self { curvature: Curvature::Extrapolated, ..Self::batch(size) }
    }

    /// Evaluates what depends on the parameters: outputs, kernels, factors. The evidence is then a function of the hyperparameters,
    /// [`Fit::evidence`]. Random parts and outputs are functions of `seed`.
    ///
    /// A fit keeps the rows of all its parts: layer inputs, and the gradients of layer outputs once a class.
    ///
    /// Labels, weights and masks of all examples are checked first, and outputs of a few examples alone are compared with those among
    /// up to 256, since the curvature of a model that mixes examples is not what is computed here.
    ///
    /// # Errors
    /// When parts do not fit the examples, a matrix or the rows that are kept would take more than `memory` bytes (the message says how
    /// many), labels or outputs are wrong or not finite, the model mixes examples, or its forward fails.
    pub fn fit(&self, problem: &Problem<'_>, examples: &Examples, seed: u64) -> Result<Fit> {
        self.fit_part(problem, examples, seed, (0, 1))
    }

    /// [`Estimator::fit`] by all processes of a world, each of which reads every `size`th part. All have the same model and examples, and make
    /// the same calls of this and of [`Fit::evidence`], which adds up what they have found.
    ///
    /// # Errors
    /// As [`Estimator::fit`], on all processes, with the rank of the one that it is of.
    pub fn fit_together(
        &self,
        world: &World,
        problem: &Problem<'_>,
        examples: &Examples,
        seed: u64,
    ) -> Result<Fit> {
        let fit = self.fit_part(problem, examples, seed, (world.rank(), world.size()));
        if world.is_alone() { fit } else { Fit::shared(fit, world) }
    }

    /// Of all parts those whose numbers leave the remainder `turn.0` when they are divided by `turn.1`.
    fn fit_part(
        &self,
        problem: &Problem<'_>,
        examples: &Examples,
        seed: u64,
        turn: (usize, usize),
    ) -> Result<Fit> {
        let mut terms = Vec::new();
        let data = self.each_term(problem, examples, seed, (true, turn), |weight, term| {
            terms.push((weight, term));
            Ok(())
        })?;
        Fit::new(problem, data, terms)
    }

    /// The evidence at `hyper`, part by part: as [`Estimator::fit`] and [`Fit::evidence`], with one part in memory at a time.
    ///
    /// # Errors
    /// As [`Estimator::fit`] and [`Fit::evidence`].
    pub fn evaluate(
        &self,
        problem: &Problem<'_>,
        examples: &Examples,
        hyper: &Hyper,
        seed: u64,
    ) -> Result<Evidence> {
        let (s, precisions) = (hyper.scale()?, hyper.precisions()?);
        let mut total = LogDet::zero(problem.parameters().len());
        let data = self.each_term(problem, examples, seed, (false, (0, 1)), |weight, term| {
            total.add(term.log_det(s, &precisions)?, weight)
        })?;
        Fit::new(problem, data, vec![])?.with(total, hyper)
    }

    /// Hands the complexities of the parts whose turn it is to `take`, with their weights. Whether it keeps them says how much memory there is
    /// for each.
    fn each_term(
        &self,
        problem: &Problem<'_>,
        examples: &Examples,
        seed: u64,
        (kept, (turn, turns)): (bool, (usize, usize)),
        mut take: impl FnMut(f64, Box<dyn Complexity>) -> Result<()>,
    ) -> Result<DataFit> {
        if matches!((self.curvature, self.parts), (Curvature::Extrapolated, Parts::ByLabel(_))) {
            bail!(
                "evidence: a batch of one class does not tell how all examples go on; extrapolate from random batches"
            )
        }
        let Checked { examples, columns } = problem.checked(examples)?;
        let parts = self.parts.of(&examples, self.draws, seed)?;
        let mut data = DataFit::zero(problem.likelihood);
        let own = parts.iter().enumerate().skip(turn).step_by(turns);
        for (index, (weight, numbers)) in own {
            let whole = numbers.len() == examples.len() && numbers.is_sorted();
            let part = if whole { examples.clone() } else { examples.select(numbers)? };
            let mut read = Reader {
                problem,
                part: &part,
                data: &mut data,
                weight: *weight,
                columns,
                memory: self.memory,
                for_rows: self.memory / if kept { parts.len().div_ceil(turns) } else { 1 },
            };
            match self.curvature {
                Curvature::Kernel(outputs) => {
                    let draw = |n| uniform(seed, index as u64, n);
                    for (factor, rows) in read.kernels(outputs, draw)? {
                        take(weight * factor, Box::new(rows))?;
                    }
                }
                Curvature::Extrapolated => {
                    let rows = read.joint()?;
                    // Every part speaks for all examples.
                    take(1.0 / parts.len() as f64, Box::new(Extrapolated::new(rows, examples.len())?))?;
                }
                Curvature::Full => take(*weight, Box::new(read.dense()?))?,
                Curvature::BlockPerTensor => read.blocks(true, &mut take)?,
                Curvature::BlockPerLayer => read.blocks(false, &mut take)?,
                Curvature::Kron => {
                    let mut sums = KronSums::default();
                    read.sum(&mut sums)?;
                    take(*weight, Box::new(sums.finish()?))?;
                }
                Curvature::Rotated => {
                    let mut marginals = MarginalSums::default();
                    read.sum(&mut marginals)?;
                    let mut sums = marginals.bases()?;
                    read.again(&mut sums)?;
                    take(*weight, Box::new(sums.finish()?))?;
                }
                Curvature::Diagonal => {
                    let mut sums = Diagonal::default();
                    read.sum(&mut sums)?;
                    take(*weight, Box::new(sums))?;
                }
            }
        }
        Ok(data)
    }
}

/// Reads one part of the examples.
struct Reader<'a, 'p> {
    problem: &'a Problem<'p>,
    part: &'a Examples,
    data: &'a mut DataFit,
    weight: f64,
    /// Of the root of an example's Hessian.
    columns: usize,
    memory: usize,
    /// What the rows of this part may take.
    for_rows: usize,
}

impl<'a> Reader<'a, '_> {
    /// A pass over some examples, whose fit to the labels is counted.
    fn pass<'e>(&mut self, examples: &'e Examples) -> Result<Pass<'e>>
    where
        'a: 'e,
    {
        let pass = self.problem.pass(examples)?;
        self.data.add(&pass.fit()?, self.weight);
        Ok(pass)
    }

    /// The rows of all examples of the part, for one kernel of them all.
    fn joint(&mut self) -> Result<Rows> {
        let pass = self.pass(self.part)?;
        self.check(self.part.len() * self.columns, pass.outputs.dtype())?;
        pass.gather_written(pass.columns(Root::Reduced)?, self.for_rows)
    }

    /// Refuses a matrix of so many rows that would not fit.
    fn check(&self, rows: usize, dtype: DType) -> Result<()> {
        let element = if dtype == DType::F64 { 8 } else { 4 };
        // The matrix, its factor, its inverse and a product.
        let bytes = 4u128 * element * (rows as u128).pow(2);
        if bytes > self.memory as u128 {
            bail!(
                "evidence: a matrix of {rows} x {rows} and its inverse would take {bytes} bytes, and {} are allowed: take smaller \
                 batches or another estimator",
                self.memory
            )
        }
        Ok(())
    }

    /// Adds all examples to `sums`, a few at a time.
    fn sum(&mut self, sums: &mut dyn Sums) -> Result<()> {
        sum_up(self.problem, self.part, self.memory, sums, |pass| {
            self.data.add(&pass.fit()?, self.weight);
            Ok(())
        })
    }

    /// [`Reader::sum`] of examples whose fit to the labels has been counted.
    fn again(&self, sums: &mut dyn Sums) -> Result<()> {
        sum_up(self.problem, self.part, self.memory, sums, |_| Ok(()))
    }

    /// The kernels of the part, each with its weight; `draw(n)` is a uniform number.
    fn kernels(&mut self, outputs: Outputs, draw: impl Fn(u64) -> f64) -> Result<Vec<(f64, Rows)>> {
        let split = match outputs {
            Outputs::Joint => return Ok(vec![(1.0, self.joint()?)]),
            Outputs::Independent(split)
            | Outputs::One(split)
            | Outputs::Given(split, _)
            | Outputs::OneEach(split) => split,
        };
        let root = if split == Split::Root { Root::PerOutput } else { Root::Diagonal };
        let pass = self.pass(self.part)?;
        self.check(self.part.len(), pass.outputs.dtype())?;
        let mut columns = pass.columns(root)?;
        let count = columns.len();
        let pick = |n| ((draw(n) * count as f64) as usize).min(count - 1);
        let column = match outputs {
            Outputs::One(_) => columns.nth(pick(0)),
            Outputs::Given(_, index) if index >= count => {
                bail!("evidence: output {index} of {count}")
            }
            Outputs::Given(_, index) => columns.nth(index),
            Outputs::OneEach(_) => {
                let picks: Vec<usize> = (0..self.part.len()).map(|n| pick(n as u64)).collect();
                Some(one_of_each(columns, &picks))
            }
            _ => {
                let rows = pass.gather_written(columns, self.for_rows)?;
                return (0..count).map(|c| Ok((1.0, rows.one_of_each(c)?))).collect();
            }
        };
        let Some(column) = column else { bail!("evidence: no outputs") };
        let rows = pass.gather_written(std::iter::once(column), self.for_rows)?;
        Ok(vec![(count as f64, rows)])
    }

    fn dense(&mut self) -> Result<Dense> {
        let parameters = self.problem.parameters().iter().map(|p| p.tensor.elem_count()).sum();
        check_dense(parameters, self.memory)?;
        let mut sums = Dense::new();
        self.sum(&mut sums)?;
        Ok(sums)
    }

    /// A block a tensor or a layer: the matrix where it has no more rows than the kernel of the same rows, else that.
    fn blocks(
        &mut self,
        per_tensor: bool,
        take: &mut impl FnMut(f64, Box<dyn Complexity>) -> Result<()>,
    ) -> Result<()> {
        let parameters = self.problem.parameters();
        let mut blocks: Vec<(Vec<usize>, usize)> = Vec::new();
        for (tensor, p) in parameters.iter().enumerate() {
            let size = p.tensor.elem_count();
            let joins = !per_tensor && tensor > 0 && parameters[tensor - 1].of_layer == p.of_layer;
            match blocks.last_mut() {
                Some((tensors, sum)) if joins => {
                    tensors.push(tensor);
                    *sum += size;
                }
                _ => blocks.push((vec![tensor], size)),
            }
        }
        // All that is refused is refused before anything is gathered.
        let count = self.part.len() * self.columns;
        for (tensors, size) in &blocks {
            match *size <= count {
                true => check_dense(*size, self.memory)?,
                false => self.check(count, parameters[tensors[0]].tensor.dtype())?,
            }
        }
        let pass = self.pass(self.part)?;
        let rows = pass.gather(pass.columns(Root::Reduced)?, self.for_rows)?;
        for (tensors, size) in blocks {
            let Some(block) = rows.of_tensors(|tensor| tensors.contains(&tensor)) else { continue };
            if size == 0 {
                continue;
            }
            if size <= count {
                let mut sums = Dense::new();
                sums.add(&block)?;
                take(self.weight, Box::new(sums))?;
            } else {
                take(self.weight, Box::new(block.write_out(CHUNK)?))?;
            }
        }
        Ok(())
    }
}

/// Refuses the matrix of so many parameters if it would not fit.
pub(crate) fn check_dense(parameters: usize, memory: usize) -> Result<()> {
    let bytes = 4u128 * 8 * (parameters as u128).pow(2);
    if bytes > memory as u128 {
        bail!(
            "evidence: a matrix of {parameters} x {parameters} parameters would take {bytes} bytes with its inverse, and {memory} are \
             allowed: take blocks, Kronecker factors or a kernel"
        )
    }
    Ok(())
}

/// Of every example the column that `picks` says.
pub(crate) fn one_of_each(columns: impl Iterator<Item = Result<Tensor>>, picks: &[usize]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (index, column) in columns.enumerate() {
        let column = column?;
        let chosen: Vec<f64> = picks.iter().map(|&pick| f64::from(u8::from(pick == index))).collect();
        let mut shape = vec![1; column.rank()];
        shape[0] = picks.len();
        let chosen = Tensor::from_vec(chosen, shape, column.device())?.to_dtype(column.dtype())?;
        let part = column.broadcast_mul(&chosen)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    match sum {
        Some(sum) => Ok(sum),
        None => bail!("evidence: no outputs"),
    }
}

#[cfg(test)]
mod tests;
