//! What an optimizer does with each Var, and what it costs.

mod together;

pub use together::Together;

use super::cost::Forecast;
use super::state::Core;
use super::state::block::{Block, Part};
use super::wake::{Carry, Model, QSolve};
use crate::curvature::{DampingKind, FactorShape, Inverse, wide_dtype};
use crate::gpu::Gpu;
use crate::linalg::device::BATCH;
use candle_core::{Result, bail};
use std::fmt;

/// One line of a [`Summary`].
#[derive(Debug, Clone, PartialEq)]
pub struct SummaryRow {
    /// The Var's name.
    pub var: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The Kronecker block it belongs to, `adam` or `frozen`.
    pub rule: String,
}

/// One Kronecker block of a [`Summary`].
#[derive(Debug, Clone, PartialEq)]
pub struct SummaryBlock {
    /// The block's name.
    pub name: String,
    /// Groups, rows (outputs) and columns (inputs, with the bias's 1) of its gradient matrix.
    pub dims: [usize; 3],
    /// Rows of the blocks on the diagonals of its factors `G` and `A`: `dims[1]` and `dims[2]` where they are full, 1 where they are diagonal.
    pub runs: [usize; 2],
    /// Ranks of its factors `G` and `A`, where they are of low rank.
    pub ranks: [Option<usize>; 2],
    /// Whether its factors come from its gradient alone.
    pub gradient_only: bool,
    /// Bytes of its averaged factors.
    pub factor_bytes: usize,
    /// Bytes of its damped inverse.
    pub inverse_bytes: usize,
    /// Bytes of its other state in steady operation: carry, averaged models, last step, momentum, second moments. Not counted are the means and
    /// deviations of inputs far from standard ([`Orthogonal`](super::Orthogonal)), two rows of its matrix where there are any.
    pub other_bytes: usize,
    /// About how many bytes the making of its inverse takes beside the factors and the inverse. Blocks take them one after the other; small
    /// ones on a GPU together.
    pub workspace_bytes: usize,
    /// Multiplications of one update of the factors for each row of the batch, a row being an example or a position of one. Where the
    /// gradient alone makes the factors, multiplications in all.
    pub factor_cost: usize,
    /// Multiplications of one update of the inverse, to leading order.
    pub inverse_cost: usize,
    /// Multiplications of preconditioning one gradient.
    pub step_cost: usize,
    /// Seconds that its factors and inverse are forecast to take in a refresh; see [`Forecast`].
    pub refresh_seconds: f64,
}

/// Which Var is in which block, with bytes and cost; its `Display` is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The optimizer's name.
    pub optimizer: &'static str,
    /// A row for each Var.
    pub rows: Vec<SummaryRow>,
    /// The Kronecker blocks.
    pub blocks: Vec<SummaryBlock>,
    /// Bytes of the Adam moments, single-precision masters, averaged parameters and stored models.
    pub other_bytes: usize,
    /// About how many bytes a step needs beside the state: the new inverses until they replace the old ones, the matrices of a step, what
    /// decompositions work with at a time, and copies for inverses that are made in the background. Factors of a batch and records of
    /// layers are not counted.
    pub workspace_bytes: usize,
    /// What curvature is forecast to take of the time.
    pub forecast: Forecast,
    /// What several processes do together, where they share the optimizer.
    pub together: Option<Together>,
}

impl Summary {
    /// The summary of an optimizer, before or after any step.
    pub(super) fn of(core: &Core) -> Self {
        let costs = core.costs();
        let rule = |index: usize| {
            let block = core.blocks.iter().find(|b| b.params.contains(&index));
            block.map_or("adam".to_string(), |b| b.name.clone())
        };
        let mut rows: Vec<SummaryRow> = core
            .vars
            .iter()
            .enumerate()
            .map(|(i, p)| SummaryRow { var: p.name.clone(), shape: p.var.dims().to_vec(), rule: rule(i) })
            .collect();
        rows.extend(core.frozen.iter().map(|(name, var)| SummaryRow {
            var: name.clone(),
            shape: var.dims().to_vec(),
            rule: "frozen".to_string(),
        }));
        rows.sort_by(|a, b| a.var.cmp(&b.var));
        let size = |index: usize| {
            let var = &core.vars[index].var;
            var.elem_count() * wide_dtype(var.dtype()).size_in_bytes()
        };
        let masters: usize = (0..core.vars.len()).filter(|&i| core.vars[i].master.is_some()).map(size).sum();
        let adam: usize = core.adam.iter().map(|a| 2 * size(a.param)).sum();
        // Beside the current one, which the Vars hold.
        let stored = core.params.wake.inner().map_or(0, |inner| inner.models - 1);
        let copies = stored + usize::from(core.params.average.is_some());
        let models: usize = copies * (0..core.vars.len()).map(size).sum::<usize>();
        let blocks: Vec<_> = core.blocks.iter().map(|b| summary_block(core, b, costs.refresh(b))).collect();
        let matrices: usize = core.blocks.iter().flat_map(|b| &b.params).map(|&i| MATRICES * size(i)).sum();
        // Inverses that are made beside the steps have factors of their own: the averages go on, and a second stream has copies.
        let factors: usize = blocks.iter().map(|b| b.factor_bytes).sum();
        let beside = if core.params.overlap > 0 { factors } else { 0 };
        let workspace_bytes = matrices + decomposing(core, &blocks) + beside;
        let other_bytes = masters + adam + models;
        let forecast = costs.forecast(core.blocks.iter());
        Self { optimizer: core.name(), rows, blocks, other_bytes, workspace_bytes, forecast, together: None }
    }

    /// Bytes of all state in steady operation.
    pub fn bytes(&self) -> usize {
        let blocks: usize =
            self.blocks.iter().map(|b| b.factor_bytes + b.inverse_bytes + b.other_bytes).sum();
        blocks + self.other_bytes
    }

    /// Bytes of all state and the work space of a step.
    pub fn peak_bytes(&self) -> usize {
        self.bytes() + self.workspace_bytes
    }
}

/// Bytes that an update of the inverses takes: the new ones, and what decompositions work with at a time.
fn decomposing(core: &Core, blocks: &[SummaryBlock]) -> usize {
    let inverses = blocks.iter().map(|b| b.inverse_bytes).sum::<usize>();
    let largest = blocks.iter().map(|b| b.workspace_bytes).max().unwrap_or(0);
    let Some(param) = core.vars.first().filter(|param| Gpu::of(param.var.device()).is_some()) else {
        return inverses + largest;
    };
    // Small factors are decomposed together, and what is added to or iterated on is kept until all are done.
    let factors: usize = blocks.iter().map(|b| b.factor_bytes).sum();
    let together = WORKSPACE * factors.min(BATCH * wide_dtype(param.var.dtype()).size_in_bytes());
    let kept = match (core.params.damping.kind(), core.params.inverse) {
        (DampingKind::Eigenvalue, _) => 0,
        (DampingKind::Pi, Inverse::Newton) => 3 * factors,
        (DampingKind::Pi, _) => factors,
    };
    inverses + kept + largest.max(together)
}

/// Bytes that a GPU has for state and work space; nothing where that is not known.
pub(super) fn free_memory(core: &Core) -> Result<Option<usize>> {
    let gpu = core.vars.first().and_then(|param| Gpu::of(param.var.device()));
    Ok(gpu.map(|gpu| gpu.free_memory()).transpose()?.flatten())
}

/// Refuses what takes more than it may, or than a GPU had free before any of it was there, before the first step would find out.
pub(super) fn check_memory(core: &Core, free: Option<usize>) -> Result<()> {
    let limits = [(core.params.memory_limit, "the limit is"), (free, "the GPU has free")];
    for (limit, what) in limits {
        if let Some(limit) = limit {
            fits(core.name(), Summary::of(core).peak_bytes(), limit, what)?;
        }
    }
    Ok(())
}

fn summary_block(core: &Core, block: &Block, refresh_seconds: f64) -> SummaryBlock {
    let [groups, out, columns] = block.shape();
    let element = wide_dtype(core.vars[block.params[0]].var.dtype()).size_in_bytes();
    let (exact, quadratic) = match core.params.wake.model() {
        Model::Linear => (false, false),
        Model::Quadratic(QSolve::Factor) => (false, true),
        Model::Quadratic(QSolve::Exact) => (true, true),
    };
    let eigen = core.params.inverse == Inverse::Eigen
        && core.params.damping.kind() == DampingKind::Eigenvalue
        || exact;
    let sides = [block.rows, block.columns];
    let of = |what: &dyn Fn(&FactorShape) -> usize| sides.iter().map(what).sum::<usize>();
    let squares = of(&|side| side.elements(groups));
    let bases = of(&|side| {
        let root = if exact && side.has_root() { side.elements(groups) } else { 0 };
        root + side.basis(groups, exact).iter().product::<usize>()
    });
    let scale: usize = block.scale(exact).iter().product();
    let (matrix, inside) = (groups * out * columns, block.inside().iter().product::<usize>());
    let wake = core.wake_decay().is_some();
    let averaged = core.params.wake.model_decay() > 0.0;
    // The models' average is the carry itself, unless that is taken literally.
    let mean = averaged && (!wake || core.params.carry == Carry::Literal);
    let step = core.measures_slopes();
    let kept = [wake, mean, step, core.params.momentum > 0.0];
    let matrices: usize = kept.into_iter().map(usize::from).sum();
    let moments = if core.params.ekfac && block.part != Part::Table { inside } else { 0 };
    let quadratic = averaged && quadratic;
    let gradient_only = block.part == Part::Gradient;
    SummaryBlock {
        name: block.name.clone(),
        dims: [groups, out, columns],
        runs: sides.map(|side| side.run),
        ranks: sides.map(|side| side.rank),
        gradient_only,
        factor_bytes: squares * element,
        inverse_bytes: if eigen { bases + scale } else { squares } * element,
        other_bytes: (matrices * matrix + moments + usize::from(quadratic) * squares) * element,
        workspace_bytes: of(&|side| WORKSPACE * side.elements(groups) * side.working(element)),
        factor_cost: match gradient_only {
            true => of(&|side| matrix * side.rank.map_or(side.run, |rank| 4 * rank) / 2),
            false => {
                of(&|side| side.rank.map_or(side.elements(groups) / 2, |rank| 2 * groups * rank * side.dim))
            }
        },
        inverse_cost: groups * of(&|side| side.decomposing(eigen)),
        step_cost: of(&|side| matrix * side.multiplying(eigen)),
        refresh_seconds,
    }
}

/// Matrices of a parameter's size within a step: gradient, wake gradient, its product with one basis, direction.
const MATRICES: usize = 4;

/// Matrices of a factor's size that a decomposition works with: LAPACK's divide and conquer takes two beside its matrix and the result,
/// Newton's iteration as many.
const WORKSPACE: usize = 4;

fn fits(optimizer: &str, needed: usize, limit: usize, what: &str) -> Result<()> {
    if needed > limit {
        bail!(
            "{optimizer}: state and work space take {}, but {what} {}; give large layers smaller factors \
             (Group {{ factor_limit: Some(FactorLimit {{ .. }}), .. }}) or to Adam (Group {{ rule: Some(Rule::Adam), .. }})",
            Bytes(needed),
            Bytes(limit)
        )
    }
    Ok(())
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|r| r.var.len()).chain([3]).max().unwrap_or(3);
        writeln!(
            f,
            "{}: {} Vars, {} of state, {} of work space",
            self.optimizer,
            self.rows.len(),
            Bytes(self.bytes()),
            Bytes(self.workspace_bytes)
        )?;
        writeln!(f, "{:width$}  {:16}  block", "Var", "shape")?;
        for row in &self.rows {
            writeln!(f, "{:width$}  {:16}  {}", row.var, format!("{:?}", row.shape), row.rule)?;
        }
        let width = self.blocks.iter().map(|b| b.name.len()).chain([5]).max().unwrap_or(5);
        writeln!(
            f,
            "{:width$}  {:>16}  {:>10}  {:>10}  {:>10}  {:>12}  {:>12}  {:>9}",
            "block",
            "groups x out x in",
            "factors",
            "inverses",
            "work space",
            "mults/invert",
            "mults/step",
            "s/refresh"
        )?;
        for b in &self.blocks {
            let [groups, out, columns] = b.dims;
            let of = |dim: usize, run: usize, rank: Option<usize>| match (rank, run) {
                (Some(rank), _) => format!("{dim} rank {rank}"),
                _ if run == dim => dim.to_string(),
                (None, 1) => format!("{dim} diag"),
                (None, _) => format!("{dim}/{run}"),
            };
            let by = if b.gradient_only { "grad: " } else { "" };
            let dims = format!(
                "{by}{groups} x {} x {}",
                of(out, b.runs[0], b.ranks[0]),
                of(columns, b.runs[1], b.ranks[1])
            );
            writeln!(
                f,
                "{:width$}  {:>16}  {:>10}  {:>10}  {:>10}  {:>12}  {:>12}  {:>9.2e}",
                b.name,
                dims,
                Bytes(b.factor_bytes).to_string(),
                Bytes(b.inverse_bytes).to_string(),
                Bytes(b.workspace_bytes).to_string(),
                b.inverse_cost,
                b.step_cost,
                b.refresh_seconds
            )?;
        }
        writeln!(f, "{}", self.forecast)?;
        match &self.together {
            Some(together) => writeln!(f, "{together}"),
            None => Ok(()),
        }
    }
}

/// Bytes in the unit that suits them.
struct Bytes(usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b < 1 << 10 => write!(f, "{b} B"),
            b if b < 1 << 20 => write!(f, "{:.1} KiB", b as f64 / 1024.0),
            b if b < 1 << 30 => write!(f, "{:.1} MiB", b as f64 / (1 << 20) as f64),
            b => write!(f, "{:.1} GiB", b as f64 / (1u64 << 30) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit() {
        assert!(fits("K-FAC", 5 << 20, 5 << 20, "the limit is").is_ok());
        let message =
            fits("K-FAC", 3 << 30, 5 << 20, "the limit is").err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("3.0 GiB") && message.contains("5.0 MiB"), "{message}");
    }
}
