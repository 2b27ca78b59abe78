//! What curvature costs by a plain formula of shapes, and the factors that are affordable by it.

use super::params::{Every, Params};
use super::state::Core;
use super::state::block::{Block, Part};
use super::state::param::Param;
use super::step::{inverts_the_metric, is_one_part};
use super::wake::{Model, QSolve};
use crate::curvature::{Beyond, Damping, DampingKind, FactorLimit, FactorShape, Inverse};
use crate::gpu::Gpu;
use crate::tape::Fisher;
use candle_core::{DType, Device};
use std::fmt;

/// Seconds that training is forecast to take, without a clock: by operations, and rates of a machine.
///
/// | | a CPU's core | a GPU, f32 | a GPU, half types |
/// |---|---|---|---|
/// | the products of a model's forward and backward pass, all that goes with them included | 75 | 12,000 | 150,000 |
/// | products with inverses and factors | 50 | 40,000 | 200,000 |
/// | second moments, `d^2` a row | 50 | 25,000 | 200,000 |
/// | eigenvectors, `18 d^3` | 100 | 1,000 | 1,000 |
/// | the same of factors of low rank, `8 d k^2 + 36 k^3` | 20 | 300 | 300 |
/// | inverses by Cholesky or Newton's iteration, `2 d^3` and `26 d^3` | 40 | 20,000 | 20,000 |
///
/// in 10^9 operations a second. Those of a CPU were measured on one core of a Zen 4 processor in f32, with several cores all are about as many
/// times as fast; those of a GPU are estimates for an H200, not measured. With other machines seconds differ, and shares much less.
///
/// Every layer counts with the same [`Budget::rows`](super::Budget::rows), since how many positions a convolution has is not known before the first
/// step: with rows that count a batch's examples alone, a convolutional net is forecast to take too little time, and curvature too large a share of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Rows of a batch that it assumes: [`Budget::rows`](super::Budget::rows).
    pub rows: usize,
    /// Seconds of a forward and a backward pass.
    pub model: f64,
    /// Seconds of a refresh: the curvature of a batch, and the inverses. The exact Fisher, which takes a pass for each output, counts as one
    /// pass: how many outputs there are is not known yet.
    pub refresh: f64,
    /// Seconds of preconditioning in a step, without the orthogonalization of directions.
    pub preconditioning: f64,
    /// The share of curvature, refreshes and preconditioning, in the time of training, between 0 and 1.
    pub share: f64,
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, model, refresh, preconditioning, share } = self;
        write!(
            f,
            "forecast for {rows} rows: forward and backward {model:.2e} s, a refresh {refresh:.2e} s, preconditioning {preconditioning:.2e} s a \
             step; curvature takes {:.0} % of the time",
            100.0 * share
        )
    }
}

/// Operations a second.
struct Rates {
    model: f64,
    product: f64,
    moment: f64,
    eigen: f64,
    sketch: f64,
    inverse: f64,
}

const CPU: Rates =
    Rates { model: 75e9, product: 50e9, moment: 50e9, eigen: 100e9, sketch: 20e9, inverse: 40e9 };
const GPU: Rates =
    Rates { model: 12e12, product: 40e12, moment: 25e12, eigen: 1e12, sketch: 0.3e12, inverse: 20e12 };
const HALF_ON_GPU: Rates = Rates { model: 150e12, product: 200e12, moment: 200e12, ..GPU };

/// Seconds of all full factors' eigenvectors together up to which they are full in any case.
const SMALL: f64 = 0.05;

/// The rows up to which factors are full, and the rank of larger ones: what is tried, dearest first.
const CHOICES: [(usize, usize); 7] =
    [(usize::MAX, 128), (4096, 128), (2048, 128), (1024, 128), (512, 128), (256, 128), (256, 64)];

/// What is known before any step of what training costs.
pub(super) struct Costs<'a> {
    params: &'a Params,
    rates: Rates,
    /// Whether a divergence is measured among eigenvectors where there are any, without products with factors.
    in_basis: bool,
    /// Operations for a row: of a forward and a backward pass, and of a backward pass to the layers' outputs alone.
    model: f64,
    backward: f64,
}

impl<'a> Costs<'a> {
    /// Of a model on the tape of `params`, of which `vars` are trained.
    pub fn new(params: &'a Params, vars: &[Param]) -> Self {
        let (device, dtype) =
            vars.first().map_or((&Device::Cpu, DType::F32), |param| (param.var.device(), param.var.dtype()));
        let on_gpu = Gpu::of(device).is_some();
        let rates = match (on_gpu, dtype.size_in_bytes() < 4) {
            (false, _) => CPU,
            (true, false) => GPU,
            (true, true) => HALF_ON_GPU,
        };
        let (mut model, mut backward) = (0.0, 0.0);
        for layer in params.tape.layers().iter().filter(|layer| layer.kind.is_linear()) {
            let product = 2.0 * layer.weight.elem_count() as f64;
            let trained = vars.iter().any(|param| param.var.id() == layer.weight.id());
            model += product * if trained { 3.0 } else { 2.0 };
            backward += product;
        }
        Self { params, rates, in_basis: !on_gpu && inverts_the_metric(params), model, backward }
    }

    /// Seconds with factors as they are in `blocks`.
    pub fn forecast<'b>(&self, blocks: impl Iterator<Item = &'b Block> + Clone) -> Forecast {
        let rows = self.params.budget.rows as f64;
        let draws = match self.params.fisher {
            Fisher::Sampled { draws, .. } => draws,
            // Of all classes there are as many columns of a root; of the loss itself there is a pass in any case.
            Fisher::Exact => 1,
            Fisher::Empirical => 0,
        };
        let model = self.model * rows / self.rates.model;
        let passes = draws as f64 * self.backward * rows / self.rates.model;
        let sum = |what: &dyn Fn(&Block) -> f64| blocks.clone().map(what).sum::<f64>();
        let factors = passes + sum(&|block| self.factors(block));
        let inverses = self.made_a_refresh() * sum(&|block| self.inverse(block));
        let preconditioning = sum(&|block| self.preconditioning(block));
        let Every { factors: every_factors, inverses: every_inverses } = self.params.every;
        let curvature = factors / every_factors as f64 + inverses / every_inverses as f64 + preconditioning;
        let all = model + curvature;
        Forecast {
            rows: self.params.budget.rows,
            model,
            refresh: factors + inverses,
            preconditioning,
            share: if all > 0.0 { curvature / all } else { 0.0 },
        }
    }

    /// Seconds of a block's share in a refresh without the backward pass.
    pub fn refresh(&self, block: &Block) -> f64 {
        self.factors(block) + self.made_a_refresh() * self.inverse(block)
    }

    /// Quadratic wakes make inverses once more.
    fn made_a_refresh(&self) -> f64 {
        match self.params.wake.model() {
            Model::Linear => 1.0,
            Model::Quadratic(_) => 2.0,
        }
    }

    /// Whether eigenvectors are made, and kept.
    fn eigen(&self) -> (bool, bool) {
        let exact = match self.params.wake.model() {
            Model::Quadratic(QSolve::Exact) => true,
            Model::Linear | Model::Quadratic(QSolve::Factor) => false,
        };
        let kept = exact || self.params.damping.kind() == DampingKind::Eigenvalue;
        (kept || self.params.inverse == Inverse::Eigen, kept)
    }

    /// Seconds of a block's factors.
    fn factors(&self, block: &Block) -> f64 {
        let rows = self.params.budget.rows as f64;
        let side = |side: &FactorShape, others: usize| {
            let groups = block.groups as f64;
            // The gradient of a batch is one draw.
            let rows = if block.part == Part::Gradient { others as f64 } else { rows };
            match side.rank {
                Some(rank) => 4.0 * rows * groups * (rank * side.dim) as f64 / self.rates.product,
                None => rows * groups * (side.run * side.dim) as f64 / self.rates.moment,
            }
        };
        side(&block.rows, block.columns.dim) + side(&block.columns, block.rows.dim)
    }

    /// Seconds of a block's inverse.
    fn inverse(&self, block: &Block) -> f64 {
        let (eigen, _) = self.eigen();
        let iterated = if self.params.inverse == Inverse::Newton { NEWTON } else { 1.0 };
        // Traces of sketches need what they stand for, too.
        let sketched = match self.params.damping {
            Damping::Relative(_) => 2.0,
            Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Adaptive(_) => 1.0,
        };
        let side = |side: &FactorShape| {
            if side.run == 1 {
                return 0.0;
            }
            let operations = operations(side, eigen);
            let seconds = match (side.rank, eigen) {
                (Some(_), _) => sketched * operations / self.rates.sketch,
                (None, true) => operations / self.rates.eigen,
                (None, false) => iterated * operations / self.rates.inverse,
            };
            block.groups as f64 * seconds
        };
        side(&block.rows) + side(&block.columns)
    }

    /// Seconds of a step's products with a block's inverse, and with its factors where a direction's divergence is measured.
    fn preconditioning(&self, block: &Block) -> f64 {
        let (_, kept) = self.eigen();
        let elements = block.shape().iter().product::<usize>() as f64;
        let measured = self.params.orthogonal.is_some();
        let in_basis = self.in_basis && kept && !block.is_low_rank() && is_one_part(self.params, block);
        let side = |side: &FactorShape| {
            let factor = if side.rank.is_some() { side.multiplying(true) } else { side.run };
            side.multiplying(kept) + if measured && !in_basis { factor } else { 0 }
        };
        2.0 * elements * (side(&block.rows) + side(&block.columns)) as f64 / self.rates.product
    }

    /// Gives the factors that are chosen by cost the largest affordable shapes.
    pub fn choose(&self, planned: &mut [Planned]) {
        let all = |choice| -> Vec<Block> { planned.iter().map(|one| one.with(choice)).collect() };
        let [full, .., least] = CHOICES;
        let decomposing = all(full).iter().map(eigenvectors).sum::<f64>() / self.rates.eigen;
        let affordable =
            |choice: &&(usize, usize)| self.forecast(all(**choice).iter()).share <= self.params.budget.share;
        let chosen = match decomposing <= SMALL {
            true => full,
            false => CHOICES.iter().find(affordable).copied().unwrap_or(least),
        };
        for one in planned {
            one.block = one.with(chosen);
        }
    }
}

impl Core {
    /// What its curvature costs.
    pub fn costs(&self) -> Costs<'_> {
        Costs::new(&self.params, &self.vars)
    }
}

/// Operations of the eigenvectors of a block's factors that are not of low rank.
fn eigenvectors(block: &Block) -> f64 {
    let decomposed = [block.rows, block.columns].into_iter().filter(FactorShape::is_decomposed);
    block.groups as f64 * decomposed.map(|side| operations(&side, true)).sum::<f64>()
}

/// Operations of a factor's decomposition: a multiplication and an addition each.
fn operations(side: &FactorShape, eigen: bool) -> f64 {
    2.0 * side.decomposing(eigen) as f64
}

/// Newton's iteration takes some 13 products from the last inverse.
const NEWTON: f64 = 13.0;

/// A block whose factors are not yet chosen.
pub(super) struct Planned {
    pub block: Block,
    /// The limits of `G` and `A`, where their shapes follow from what they cost.
    pub by_cost: [Option<FactorLimit>; 2],
}

impl Planned {
    /// What is kept of factors that are too dear.
    pub const LESSER: Beyond = Beyond::LowRank { rank: 128 };

    /// A limit by what a factor costs, if it is one; `lesser` is what is kept of a factor that is too dear.
    pub fn by_cost(limit: FactorLimit, lesser: Beyond) -> Option<FactorLimit> {
        (limit.beyond == Beyond::ByCost).then_some(FactorLimit { beyond: lesser, ..limit })
    }

    /// The block as one of [`CHOICES`] has it, with the limit's own rows where there are more of them.
    fn with(&self, (rows, rank): (usize, usize)) -> Block {
        let side = |side: FactorShape, limit: Option<FactorLimit>| match limit {
            None => side,
            Some(limit) => {
                let beyond = match limit.beyond {
                    Beyond::LowRank { .. } => Beyond::LowRank { rank },
                    lesser => lesser,
                };
                FactorShape::limited(side.dim, FactorLimit { rows: limit.rows.max(rows), beyond })
            }
        };
        let [of_rows, of_columns] = self.by_cost;
        let (rows, columns) = (side(self.block.rows, of_rows), side(self.block.columns, of_columns));
        Block { rows, columns, ..self.block.clone() }
    }
}
