//! Blocks: the Vars that share one Kronecker product, as one matrix, with their curvature and wake.

use super::param::Param;
use crate::curvature::{FactorShape, LayerFactors, Preconditioner};
use candle_core::{Result, Tensor};

/// Which of its layer's Vars a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Weight and bias, `[W | b]`.
    Folded,
    /// The weight alone.
    Weight,
    /// The bias alone, `A = [[1]]`.
    Bias,
    /// An embedding's table. Its matrix has a row for each of the table's, so that the factor of the rows, `G`, is the diagonal one of
    /// its inputs, and `A` that of the gradients of its outputs.
    Table,
    /// A weight on its own, `[out, ..]` as `[out, columns]`; no layer records anything, and the factors come from its gradient.
    Gradient,
}

/// What a block carries from step to step. Tensors are shared, so a clone is cheap: a step works on a clone and replaces
/// the original only when all has gone well.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockState {
    /// Averages, `[groups, columns, columns]` and `[groups, rows, rows]`, or in runs, or of sketches.
    pub factor_a: Option<Tensor>,
    pub factor_g: Option<Tensor>,
    pub preconditioner: Option<Preconditioner>,
    /// Means and deviations of the inputs, `[groups, 2, columns]`, where directions are made orthogonal and the inputs are far from
    /// standard ones ([`coordinates`](crate::curvature::standard::coordinates)).
    pub inputs: Option<Tensor>,
    /// The same, where the damping belongs to them.
    pub damping_inputs: Option<Tensor>,
    /// EKFAC's averaged second moments.
    pub moments: Option<Tensor>,
    /// What the next wake gradient looks back at.
    pub carry: Option<Tensor>,
    /// The gradient of the averaged models at the parameters that the last step led to, where models are averaged.
    pub mean: Option<Tensor>,
    /// The averaged quadratic models' factors, where such models are averaged.
    pub model_a: Option<Tensor>,
    pub model_g: Option<Tensor>,
    /// The last step, where its slopes are measured.
    pub step: Option<Tensor>,
    /// Heavy-ball momentum.
    pub velocity: Option<Tensor>,
}

/// A block's factors `A` and `G`.
pub(crate) type Factors = (Tensor, Tensor);

/// One Kronecker block, its gradient a matrix `[groups, rows, columns]`.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub name: String,
    /// Index of the layer on the tape, if there is one.
    pub layer: Option<usize>,
    pub part: Part,
    pub groups: usize,
    /// Output features of one group, and the runs or rank of their factor `G`.
    pub rows: FactorShape,
    /// Input features of one group, the homogeneous 1 included, and the runs or rank of their factor `A`.
    pub columns: FactorShape,
    /// Indices of the params: the weight, the bias.
    pub params: Vec<usize>,
    pub lr_scale: f64,
    pub state: BlockState,
}

impl Block {
    /// The shape of its matrix.
    pub fn shape(&self) -> [usize; 3] {
        [self.groups, self.rows.dim, self.columns.dim]
    }

    /// The shape of its matrix in the coordinates of its eigenvectors, of which there are some more where runs are filled up.
    pub fn inside(&self) -> [usize; 3] {
        [self.groups, self.rows.padded(), self.columns.padded()]
    }

    /// The shape of the scaling of its eigenvectors; of those of two factors where the solve is exact.
    pub fn scale(&self, exact: bool) -> [usize; 3] {
        [self.groups, self.rows.values(exact), self.columns.values(exact)]
    }

    /// How many inputs one of its outputs is a sum of.
    pub fn inputs(&self) -> usize {
        match self.part {
            Part::Table => 1,
            Part::Folded | Part::Weight | Part::Bias | Part::Gradient => self.columns.dim,
        }
    }

    /// Whether the means and variances of its inputs are known.
    pub fn knows_its_inputs(&self) -> bool {
        self.part == Part::Folded && self.columns.is_full()
    }

    /// Whether a factor of it is of low rank.
    pub fn is_low_rank(&self) -> bool {
        self.rows.rank.is_some() || self.columns.rank.is_some()
    }

    /// The block's matrix of something that every param has: values, gradients, decays.
    pub fn matrix(&self, of: impl Fn(usize) -> Result<Tensor>) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(2);
        for &index in &self.params {
            parts.push(of(index)?.reshape((self.groups, self.rows.dim, ()))?);
        }
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            parts => Tensor::cat(parts, 2),
        }
    }

    /// The inverse of [`Block::matrix`]: a tensor per param, in the shapes of `params`.
    pub fn split(&self, matrix: &Tensor, params: &[Param]) -> Result<Vec<(usize, Tensor)>> {
        let mut from = 0;
        let mut parts = Vec::with_capacity(self.params.len());
        for &index in &self.params {
            let shape = params[index].var.shape();
            let width = shape.elem_count() / (self.groups * self.rows.dim).max(1);
            let part =
                if width == self.columns.dim { matrix.clone() } else { matrix.narrow(2, from, width)? };
            parts.push((index, part.contiguous()?.reshape(shape)?));
            from += width;
        }
        Ok(parts)
    }

    /// Copies this block's averages into `layer`; the inverse of [`Block::refreshed`].
    pub fn last_factors(&self, layer: &mut LayerFactors) {
        let (a, g) = (self.state.factor_a.clone(), self.state.factor_g.clone());
        match self.part {
            Part::Folded | Part::Weight | Part::Gradient => (layer.a, layer.g) = (a, g),
            Part::Table => (layer.g, layer.a) = (a, g),
            Part::Bias => layer.g_bias = g,
        }
    }

    /// The factors of one refresh, where there are any; a bias of its own has `A = [[1]]`.
    pub fn refreshed(&self, layer: &LayerFactors) -> Result<Option<Factors>> {
        let (a, g) = match self.part {
            Part::Folded | Part::Weight | Part::Gradient => (layer.a.clone(), layer.g.clone()),
            Part::Table => (layer.g.clone(), layer.a.clone()),
            Part::Bias => {
                let g = layer.g_bias.clone();
                let one = g.as_ref().map(|g| Tensor::ones((1, 1, 1), g.dtype(), g.device())).transpose()?;
                (one, g)
            }
        };
        Ok(a.zip(g))
    }
}
