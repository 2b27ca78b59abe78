//! Inputs far from standard ones, and the coordinates in which a layer's weights see standard ones.
//!
//! With `T x = (x - m) / d` a layer is `W x + b = W' T x + b'`, `W' = W d` (by columns) and `b' = b + W m`: the same function. A matrix that is
//! made orthogonal in `[W' | b']` moves all inputs alike, whatever their means and deviations; in `[W | b]` an input with a deviation of 300
//! leaves nothing to the others, and a mean of 300 is all that is seen. Ordinary inputs, whose networks train best as they are, have
//! `m = 0` and `d = 1`.

use super::rounding::{ROUNDOFF, unknown_share};
use crate::linalg::sketch::diagonal_of;
use candle_core::{DType, Result, Tensor, bail};

/// A mean is taken out when its square is more than this many variances.
const FAR: f64 = 30.0;
/// An input with a larger variance counts as one with this.
const LARGE: f64 = 10.0;
/// The damping and the length of a step are those of standard inputs where a mean is taken out, all inputs are small, or one has a variance
/// beyond this. Nets whose hidden units go a little beyond `LARGE`, LeNet-5 say, train as well with the damping of the inputs as they are.
const HUGE: f64 = 100.0;
/// The inputs of a layer whose mean variance is smaller count as ones that have this.
const SMALL: f64 = 0.01;
/// A variance below this share of the mean square is rounding, in f32.
const ROUNDING: f64 = 1e-6;
/// Sums of squares in f32 have errors that are alike for all inputs with a large mean: as a matrix, this many roundoffs of its trace and fewer.
const ALIKE: f64 = 5.0;
/// An input's variance need not be known where what rounding leaves open of it is below this share of the mean one, of standard inputs: a
/// pixel that never changes, say. The damping is larger.
const UNSEEN: f64 = 1e-3;

/// The means `m` and deviations `d` of the inputs of a layer with a folded bias, `[groups, 2, columns]`, from its factor `A`,
/// `[groups, columns, columns]`; nothing where all inputs are ordinary ones. The bias's own input keeps 0 and 1.
///
/// With them, whether the damping belongs to them: not where they are hardly beyond ordinary ones, nor where rounding leaves nothing of the
/// factor of standard inputs beside a large mean.
///
/// On a GPU the host waits for the numbers.
pub(crate) fn coordinates(a: &Tensor) -> Result<Option<(Tensor, bool)>> {
    let (groups, columns, _) = a.dims3()?;
    let numbers = |t: Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (squares, means) = (numbers(diagonal_of(a)?)?, numbers(a.narrow(2, columns - 1, 1)?)?);
    let mut found = Vec::with_capacity(2 * groups * columns);
    let (mut ordinary, mut far, mut known) = (true, false, true);
    // The same for f64, so that types train alike.
    let unknown = ALIKE * ROUNDOFF * columns as f64;
    for (squares, means) in squares.chunks(columns).zip(means.chunks(columns)) {
        // Positions are summed, and the bias's input counts them.
        let Some((&count, squares)) = squares.split_last().filter(|(count, _)| **count > 0.0) else {
            found.extend(standard(columns));
            continue;
        };
        let inputs = squares.iter().zip(means).map(|(square, mean)| input(square / count, mean / count));
        let (means, variances): (Vec<f64>, Vec<f64>) = inputs.unzip();
        let average = variances.iter().sum::<f64>() / variances.len().max(1) as f64;
        let all = if average > 0.0 { (average / SMALL).sqrt().min(1.0) } else { 1.0 };
        let deviation = |variance: f64| all * (variance / LARGE).sqrt().max(1.0);
        let inside = variances.iter().map(|variance| variance / deviation(*variance).powi(2));
        let least = UNSEEN * inside.sum::<f64>() / variances.len().max(1) as f64;
        let is_known = |((&square, &mean), &variance): ((&f64, &f64), &f64)| {
            let open = unknown * square / count;
            mean == 0.0 || square / count - mean * mean > open || open / deviation(variance).powi(2) < least
        };
        known &= squares.iter().zip(&means).zip(&variances).all(is_known);
        let largest = variances.iter().copied().fold(0.0, f64::max);
        let shifted = all < 1.0 || means.iter().any(|mean| *mean != 0.0);
        ordinary &= !shifted && largest <= LARGE;
        far |= shifted || largest > HUGE;
        found.extend(means.into_iter().chain([0.0]));
        found.extend(variances.into_iter().map(deviation).chain([1.0]));
    }
    match ordinary {
        true => Ok(None),
        false => {
            let found = Tensor::from_vec(found, (groups, 2, columns), a.device())?.to_dtype(a.dtype())?;
            Ok(Some((found, far && known)))
        }
    }
}

/// Means of 0 and deviations of 1.
fn standard(columns: usize) -> impl Iterator<Item = f64> {
    std::iter::repeat_n(0.0, columns).chain(std::iter::repeat_n(1.0, columns))
}

/// The mean that is taken out of an input, and the variance that is left, or the mean square where none is.
fn input(square: f64, mean: f64) -> (f64, f64) {
    let variance = (square - mean * mean).max(ROUNDING * square);
    if mean * mean > FAR * variance { (mean, variance) } else { (0.0, square) }
}

/// `[W' | b']` of the matrix `[W | b]`, `[groups, rows, columns]`.
pub(crate) fn inside(coordinates: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let (means, deviations) = parts(coordinates)?;
    let shift = matrix.broadcast_mul(&means)?.sum_keepdim(2)?;
    with_bias(&matrix.broadcast_mul(&deviations)?, &shift)
}

/// The matrix `[W | b]` of `[W' | b']`.
pub(crate) fn outside(coordinates: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let (means, deviations) = parts(coordinates)?;
    let matrix = matrix.broadcast_div(&deviations)?;
    let shift = matrix.broadcast_mul(&means)?.sum_keepdim(2)?;
    with_bias(&matrix, &shift.neg()?)
}

/// The gradient by `[W' | b']` of the gradient by `[W | b]`.
pub(crate) fn gradient_inside(coordinates: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let (means, deviations) = parts(coordinates)?;
    let columns = gradient.dim(2)?;
    let bias = gradient.narrow(2, columns.saturating_sub(1), 1)?;
    // The bias's own input has the mean 0 and the deviation 1.
    (gradient - bias.broadcast_mul(&means)?)?.broadcast_div(&deviations)
}

/// The factor `A` of the standard inputs, from that of the inputs as they are. What the rounding of the latter leaves unknown of the former, which
/// may be most of it beside a large mean, counts as curvature: steps there are short.
pub(crate) fn factor_inside(coordinates: &Tensor, a: &Tensor) -> Result<Tensor> {
    let (wide, coordinates) = (a.to_dtype(DType::F64)?, coordinates.to_dtype(DType::F64)?);
    let half = gradient_inside(&coordinates, &wide)?.t()?.contiguous()?;
    let inside = gradient_inside(&coordinates, &half)?;
    if a.dtype() == DType::F64 {
        return Ok(inside);
    }
    let (_, dim, _) = a.dims3()?;
    let (_, deviations) = parts(&coordinates)?;
    let unknown =
        (diagonal_of(&wide)?.unsqueeze(1)?.broadcast_div(&deviations.sqr()?)? * unknown_share(dim))?;
    let identity = Tensor::eye(dim, DType::F64, a.device())?;
    inside.broadcast_add(&identity.broadcast_mul(&unknown)?)?.to_dtype(a.dtype())
}

/// For a symmetric form or a basis of `[W' | b']`, `x` by rows: `S^T x`, with `[W | b] = [W' | b'] S`.
pub(crate) fn basis_outside(coordinates: &Tensor, basis: &Tensor) -> Result<Tensor> {
    outside(coordinates, &basis.t()?.contiguous()?)?.t()?.contiguous()
}

fn parts(coordinates: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((coordinates.narrow(1, 0, 1)?, coordinates.narrow(1, 1, 1)?))
}

/// The matrix with `shift` added to its last column.
fn with_bias(matrix: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let Some(weights) = matrix.dim(2)?.checked_sub(1) else {
        bail!("coordinates of inputs: a matrix without columns has no bias")
    };
    let bias = (matrix.narrow(2, weights, 1)? + shift)?;
    Tensor::cat(&[&matrix.narrow(2, 0, weights)?, &bias], 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::testing::max_abs;
    use crate::ops::testing::values;
    use candle_core::Device;

    /// The factor of inputs `[n, features]`, each row counted `positions` times.
    fn factor(inputs: &[[f64; 2]], positions: f64) -> Result<Tensor> {
        let rows = inputs.iter().flat_map(|[x, y]| [*x, *y, 1.0]);
        let x = Tensor::from_iter(rows, &Device::Cpu)?.reshape((inputs.len(), 3))?;
        (x.t()?.matmul(&x)? * (positions / inputs.len() as f64))?.unsqueeze(0)
    }

    #[test]
    fn what_is_far_from_standard_is_taken_out() -> Result<()> {
        let ordinary = [[1.0, 0.5], [-1.0, 2.5], [0.5, 0.2], [-0.5, 0.0]];
        for positions in [1.0, 9.0] {
            let of = |change: fn(f64) -> f64| -> Result<Option<Vec<f64>>> {
                let inputs: Vec<[f64; 2]> = ordinary.iter().map(|[x, y]| [*x, change(*y)]).collect();
                coordinates(&factor(&inputs, positions)?)?.map(|(found, _)| values(&found)).transpose()
            };
            let close = |found: Option<Vec<f64>>, expected: [f64; 6]| {
                let off = found.unwrap_or_default();
                assert_eq!(off.len(), 6, "expected {expected:?}");
                off.iter()
                    .zip(expected)
                    .for_each(|(a, b)| assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{a} {b}"));
            };
            assert_eq!(of(|y| y)?, None);
            // Values 0.5, 2.5, 0.2, 0: mean 0.8, mean square 1.635, variance 0.995.
            close(of(|y| 100.0 * y)?, [0.0, 0.0, 0.0, 1.0, 1635.0f64.sqrt(), 1.0]);
            close(of(|y| 300.0 + y)?, [0.0, 300.8, 0.0, 1.0, 1.0, 1.0]);
            close(of(|y| 300.0 + 10.0 * y)?, [0.0, 308.0, 0.0, 1.0, 9.95f64.sqrt(), 1.0]);
        }
        // All small: mean squares 0.625e-6 and 1.635e-6.
        let small: Vec<[f64; 2]> = ordinary.iter().map(|[x, y]| [1e-3 * x, 1e-3 * y]).collect();
        let found = coordinates(&factor(&small, 1.0)?)?.map(|(found, _)| values(&found)).transpose()?;
        let scale = (1.13e-6f64 / 0.01).sqrt();
        let expected = [0.0, 0.0, 0.0, scale, scale, 1.0];
        assert!(found.is_some_and(|found| found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9)));
        // Variances of 1 beside a mean of 3,000 are rounding in f32.
        for (mean, known) in [(300.0, true), (3000.0, false)] {
            let a = factor(&ordinary.map(|[x, y]| [x, y + mean]), 1.0)?;
            assert_eq!(coordinates(&a)?.map(|(_, damped)| damped), Some(known), "{mean}");
        }
        let damped = |y: f64| -> Result<_> {
            let inputs = ordinary.map(|[x, _]| [x, x * y]);
            Ok(coordinates(&factor(&inputs, 1.0)?)?.map(|(_, damped)| damped))
        };
        assert_eq!([damped(3.0)?, damped(10.0)?, damped(20.0)?], [None, Some(false), Some(true)]);
        // The same of a constant that is no larger than what else there is.
        for (constant, known) in [(-0.4, true), (300.0, false)] {
            let a = factor(&ordinary.map(|[x, _]| [x, constant]), 1.0)?;
            let (found, damped) = coordinates(&a)?.ok_or_else(|| candle_core::Error::msg("ordinary"))?;
            assert!((values(&found)?[1] - constant).abs() < 1e-6 * constant.abs(), "{constant}");
            assert_eq!(damped, known, "{constant}");
        }
        // An input that dwarfs the others is one of them among standard ones.
        let a = factor(&ordinary.map(|[x, y]| [1e4 * x, y * 1e-3 + 300.0]), 1.0)?;
        assert_eq!(coordinates(&a)?.map(|(_, damped)| damped), Some(false));
        // Without any input there is nothing to know.
        assert!(coordinates(&Tensor::zeros((2, 3, 3), DType::F32, &Device::Cpu)?)?.is_none());
        Ok(())
    }

    #[test]
    fn the_function_stays() -> Result<()> {
        let given = Tensor::new(&[[[300.0, 0.0, 0.0], [3.0, 0.5, 1.0]]], &Device::Cpu)?;
        let matrix = Tensor::new(&[[[0.2, -0.4, 0.7], [1.1, 0.3, -2.0]]], &Device::Cpu)?;
        let x = Tensor::new(&[[310.0, -0.7, 1.0]], &Device::Cpu)?;
        let standard = Tensor::new(&[[10.0 / 3.0, -1.4, 1.0]], &Device::Cpu)?;
        let of = |matrix: &Tensor, x: &Tensor| matrix.squeeze(0)?.matmul(&x.t()?);
        let within = inside(&given, &matrix)?;
        assert!(max_abs(&(of(&matrix, &x)? - of(&within, &standard)?)?)? < 1e-12);
        assert!(max_abs(&(outside(&given, &within)? - &matrix)?)? < 1e-12);
        Ok(())
    }

    /// A gradient and a factor by `S`, the matrix of the coordinates.
    #[test]
    fn gradients_and_factors_follow() -> Result<()> {
        let given = Tensor::new(&[[[300.0, 0.0, 0.0], [3.0, 0.5, 1.0]]], &Device::Cpu)?;
        let s = Tensor::new(&[[[1.0 / 3.0, 0.0, -100.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]], &Device::Cpu)?;
        let a = factor(&[[301.0, 0.2], [297.0, -0.4], [306.0, 0.1]], 1.0)?.to_dtype(DType::F64)?;
        let gradient = Tensor::new(&[[[0.2, -0.4, 0.7], [1.1, 0.3, -2.0]]], &Device::Cpu)?;
        let close = |found: Tensor, expected: Tensor| -> Result<()> {
            let off = max_abs(&(found - &expected)?)?;
            assert!(off < 1e-12 * max_abs(&expected)?, "{off}");
            Ok(())
        };
        close(gradient_inside(&given, &gradient)?, gradient.matmul(&s.t()?)?)?;
        close(factor_inside(&given, &a)?, s.matmul(&a)?.matmul(&s.t()?)?)?;
        close(basis_outside(&given, &a)?, s.t()?.matmul(&a)?)
    }
}
