//! Directions made orthogonal: whole or in parts, as they are or among the eigenvectors of their block's factors.

use crate::curvature::{Damping, Preconditioner, standard};
use crate::linalg::polar::{self, Iterations};
use crate::linalg::rational;
use crate::ops::dense::dot;
use crate::optim::params::{Orthogonal, Params};
use crate::optim::state::Core;
use crate::optim::state::block::{Block, BlockState};
use crate::optim::wake::Model;
use candle_core::{Result, Tensor};

/// The directions as the options want them, of what was solved for; `inputs` are the block's coordinates, where it has such.
pub(super) fn shaped(params: &Params, inputs: Option<&Tensor>, directions: Tensor) -> Result<Tensor> {
    let Some(orthogonal) = params.orthogonal else { return Ok(directions) };
    match inputs {
        None => in_parts(orthogonal, params.orthogonal_side, &directions),
        Some(inputs) => {
            let inside = standard::inside(inputs, &directions)?;
            standard::outside(inputs, &in_parts(orthogonal, params.orthogonal_side, &inside)?)
        }
    }
}

/// The directions, of which parts of at most `side` rows, or columns where they are tall, are made orthogonal. The parts are alike, but that the last may
/// be smaller.
fn in_parts(orthogonal: Orthogonal, side: usize, directions: &Tensor) -> Result<Tensor> {
    let (count, rows, columns) = directions.dims3()?;
    let (tall, small, large) = (rows > columns, rows.min(columns), rows.max(columns));
    let parts = small.div_ceil(side);
    if parts <= 1 {
        return made_orthogonal(orthogonal, directions, large);
    }
    let turned = |x: &Tensor| if tall { x.t()?.contiguous() } else { Ok(x.clone()) };
    // All parts as one stack. Rows of zeros, which the last part may need, stay so and change nothing.
    let each = small.div_ceil(parts);
    let stack = turned(directions)?.pad_with_zeros(1, 0, parts * each - small)?;
    let stack = stack.reshape((count * parts, each, large))?;
    let found = made_orthogonal(orthogonal, &stack, large)?.reshape((count, parts * each, large))?;
    turned(&found.narrow(1, 0, small)?)?.contiguous()
}

/// The orthogonal matrices nearest to directions whose longer side is `large`, so long that their elements have a root mean square of
/// [`Orthogonal::RMS`]; directions among eigenvectors may have more rows and columns, of zeros.
fn made_orthogonal(orthogonal: Orthogonal, directions: &Tensor, large: usize) -> Result<Tensor> {
    let length = Orthogonal::RMS * (large as f64).sqrt();
    let by_polynomials =
        |iterations| polar::orthogonalized(directions, Iterations::Best(iterations))? * length;
    match orthogonal {
        Orthogonal::ByDevice if directions.device().is_cpu() => {
            rational::orthogonalized(directions, Orthogonal::TERMS, length)
        }
        Orthogonal::ByDevice => by_polynomials(Orthogonal::ITERATIONS),
        Orthogonal::Rational { terms } => rational::orthogonalized(directions, terms, length),
        Orthogonal::Polynomials { iterations } => by_polynomials(iterations),
    }
}

/// Whether each step's inverse is that of the present average with the present damping, and so of what measures a divergence. (Where a new one
/// failed, or options change between two, it is that of the average and damping of its time, with which the direction is made too.)
pub(in crate::optim) fn inverts_the_metric(params: &Params) -> bool {
    let linear = match params.wake.model() {
        Model::Linear => true,
        Model::Quadratic(_) => false,
    };
    let kept = match params.damping {
        Damping::Eigenvalue(_) | Damping::Pi(_) | Damping::Relative(_) => true,
        Damping::Adaptive(_) => false,
    };
    let at_once = params.every.factors == params.every.inverses && params.overlap == 0;
    // Eigenvalues below a floor count as 0 in an inverse alone.
    linear && kept && at_once && !params.ekfac && params.eigenvalue_floor == 0.0
}

/// Whether a block's direction is made orthogonal as a whole.
pub(in crate::optim) fn is_one_part(params: &Params, block: &Block) -> bool {
    block.rows.dim.min(block.columns.dim) <= params.orthogonal_side
}

/// Eigenvectors of `A` and of `G`, and the scaling of both: [`Preconditioner::Basis`].
type Basis<'a> = (&'a Tensor, &'a Tensor, &'a Tensor);

/// What [`orthogonal_in_basis`] needs, where it gives what [`shaped`] and a length by products with the factors do: one set of coordinates,
/// orthogonal eigenvectors, and a direction in one part.
pub(super) fn in_basis<'a>(
    core: &Core,
    block: &Block,
    state: &'a BlockState,
) -> Option<(Orthogonal, Basis<'a>)> {
    let one_set = state.inputs.is_some() == state.damping_inputs.is_some();
    let one_part = is_one_part(&core.params, block);
    match (core.params.orthogonal, &state.preconditioner) {
        (Some(orthogonal), Some(Preconditioner::Basis { basis_a, basis_g, scale }))
            if one_set && one_part && inverts_the_metric(&core.params) =>
        {
            Some((orthogonal, (basis_a, basis_g, scale)))
        }
        _ => None,
    }
}

/// The orthogonal direction of a wake gradient, and its squared length in the damped metric. The orthogonal factor of `Kg X Ka^T` is that of `X`
/// between the same eigenvectors, among which the metric is a number an element: neither the way out and back in nor products with the factors
/// are needed.
pub(super) fn orthogonal_in_basis(
    orthogonal: Orthogonal,
    (basis_a, basis_g, scale): Basis<'_>,
    wake: &Tensor,
) -> Result<(Tensor, f64)> {
    let (_, rows, columns) = wake.dims3()?;
    let inside = (Preconditioner::inside(basis_a, basis_g, scale, wake)? * scale)?;
    let inside = made_orthogonal(orthogonal, &inside, rows.max(columns))?;
    let length = dot(&inside, &(&inside / scale)?)?;
    Ok((Preconditioner::outside(basis_a, basis_g, &inside, wake)?, length))
}
