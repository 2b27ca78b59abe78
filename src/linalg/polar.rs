//! The orthogonal factor of matrices, by matrix products alone.

use crate::ops::dense::{mix, product};
use crate::ops::symmetric::symmetric_product;
use candle_core::{D, Result, Tensor};

/// The coefficients `a`, `b`, `c` of an iteration's polynomial `a x + b x^3 + c x^5`.
type Coefficients = (f64, f64, f64);

/// The polynomials of the iterations, and how many there are. Both kinds are steep at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Iterations {
    /// One for all, of matrices in units of their Frobenius norm: within about 0.3 of 1 after five from anywhere in (0.01, 1] (Jordan et al. 2024).
    Alike(usize),
    /// Each is the best of its degree after those before it: their composition is as close to 1 as can be on [0.01, 1] (Amsel et al. 2025). Matrices are in
    /// units of `(sum s^8)^(1/8)` of their singular values `s`, which is near the largest where the Frobenius norm may be many times that; so four of these
    /// take singular values nearer to 1 than five of the others.
    Best(usize),
}

const ALIKE: Coefficients = (3.4445, -4.7750, 2.0315);
/// Remez's algorithm gives them; the error of the last is 0.013, and of whatever follows 1e-5 and less.
const BEST: [Coefficients; 4] = [
    (8.093368513, -23.620430329, 17.446151750),
    (3.636585554, -2.721926747, 0.536546288),
    (2.661299986, -1.977154522, 0.452616407),
    (1.956171639, -1.337507746, 0.383852701),
];
/// The best close to 1.
const NEAR: Coefficients = (1.875, -1.25, 0.375);
/// How much larger than the largest singular value its bound is at least. Near 1 the polynomials rise and fall so fast that rounding, of TF32
/// above all, and other units would move the largest ones to and fro.
const ABOVE: f64 = 1.1;
/// Norms below are taken for this one.
pub(super) const LEAST_NORM: f64 = 1e-20;

/// The smaller side from which on symmetric products are made by halves, and iterations where they are cheapest.
pub(super) const LARGE: usize = 128;
/// Iterations of one Gram matrix; each makes the rounding of its smallest eigenvalues some ten times as much, four that of f32 about 0.001.
const ITERATIONS_OF_A_GRAM: usize = 4;

impl Iterations {
    fn coefficients(self) -> Vec<Coefficients> {
        match self {
            Self::Alike(count) => vec![ALIKE; count],
            Self::Best(count) => BEST.into_iter().chain(std::iter::repeat(NEAR)).take(count).collect(),
        }
    }
}

/// `U p(S) V^T` of every matrix `U S V^T` of `[.., rows, columns]`, where `p`, the composition of the iterations' polynomials, takes singular
/// values close to 1: with enough of them about the orthogonal matrix that is nearest to it. A matrix of zeros stays one.
///
/// The products are those of the smaller side: with `A = X X^T` an iteration is `X <- (a + b A + c A^2) X`, of a tall matrix the same with
/// `A = X^T X` from the right. Where a large matrix has one side twice the other or more, up to four iterations multiply `X` only once.
///
/// # Errors
/// When the tensor has fewer than two dimensions, or a device fails.
pub(crate) fn orthogonalized(matrices: &Tensor, iterations: Iterations) -> Result<Tensor> {
    let (rows, columns) = matrices.dims().split_last_chunk::<2>().map_or((1, 1), |(_, [r, c])| (*r, *c));
    let (tall, small) = (rows > columns, rows.min(columns));
    let symmetric = if small >= LARGE { symmetric_product } else { product };
    let mut x = matrices.broadcast_div(&norm(matrices)?)?;
    let at_once = if small >= LARGE && rows.max(columns) >= 2 * small { ITERATIONS_OF_A_GRAM } else { 1 };
    for (nth, steps) in iterations.coefficients().chunks(at_once).enumerate() {
        let transposed = x.t()?;
        let mut gram = if tall { symmetric(&transposed, &x)? } else { symmetric(&x, &transposed)? };
        let mut square = symmetric(&gram, &gram)?;
        if let (0, Iterations::Best(_)) = (nth, iterations) {
            let bound = (norm(&square)?.sqrt()? * ABOVE.powi(2))?;
            x = x.broadcast_div(&bound.sqrt()?)?;
            gram = gram.broadcast_div(&bound)?;
            square = square.broadcast_div(&bound.sqr()?)?;
        }
        let (kept, function) = by_gram(gram, square, steps, symmetric)?;
        let changed = if tall { product(&x, &function)? } else { product(&function, &x)? };
        x = mix(&x, kept, &changed, 1.0)?;
    }
    Ok(x)
}

/// The Frobenius norm of every matrix, `[.., 1, 1]`, above 0.
fn norm(matrices: &Tensor) -> Result<Tensor> {
    matrices.sqr()?.sum_keepdim((D::Minus2, D::Minus1))?.sqrt()?.maximum(LEAST_NORM)
}

/// `s` and `M` of the `s + M` that multiplies `X` in all of `steps`, from `A = X X^T` and its square alone: the product of the factors
/// `a + P = a + b A + c A^2` of the iterations, with `A <- (a + P) A (a + P)`. All are functions of the first `A`: they are symmetric, and
/// their order does not matter.
fn by_gram(
    mut gram: Tensor,
    mut square: Tensor,
    steps: &[Coefficients],
    symmetric: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<(f64, Tensor)> {
    let mut all: Option<(f64, Tensor)> = None;
    for (nth, &(a, b, c)) in steps.iter().enumerate() {
        if nth > 0 {
            square = symmetric(&gram, &gram)?;
        }
        let power = mix(&gram, b, &square, c)?;
        if nth + 1 < steps.len() {
            let half = mix(&gram, a, &symmetric(&power, &gram)?, 1.0)?;
            gram = mix(&half, a, &symmetric(&half, &power)?, 1.0)?;
        }
        all = Some(match all {
            None => (a, power),
            Some((kept, function)) => {
                let sum = mix(&function, a, &power, kept)?;
                (a * kept, mix(&sum, 1.0, &symmetric(&power, &function)?, 1.0)?)
            }
        });
    }
    all.map_or_else(|| Ok((1.0, gram.zeros_like()?)), Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::testing::{max_abs, random_symmetric};
    use candle_core::{DType, Device};

    /// The composition of the polynomials, by plain numbers.
    fn polynomial(x: f64, iterations: Iterations) -> f64 {
        let step = |x: f64, (a, b, c): Coefficients| a * x + b * x.powi(3) + c * x.powi(5);
        iterations.coefficients().into_iter().fold(x, step)
    }

    /// The unit of singular values `s`.
    fn unit(s: &[f64], iterations: Iterations) -> f64 {
        match iterations {
            Iterations::Alike(_) => s.iter().map(|s| s.powi(2)).sum::<f64>().sqrt(),
            Iterations::Best(_) => ABOVE * s.iter().map(|s| s.powi(8)).sum::<f64>().powf(0.125),
        }
    }

    /// No polynomial of degree 5 is closer to 1 on an interval than one whose error is as large at both ends and twice between, with signs in turn
    /// (Chebyshev). The interval of the next one is what this makes of it.
    #[test]
    fn each_polynomial_is_the_best_of_its_degree() {
        let (mut low, mut high) = (0.01f64, 1.0f64);
        for (a, b, c) in BEST {
            let p = |x: f64| a * x + b * x.powi(3) + c * x.powi(5);
            // Where a + 3 b x^2 + 5 c x^4 is 0.
            let root = (9.0 * b * b - 20.0 * a * c).sqrt();
            let [first, second] = [-root, root].map(|root| ((root - 3.0 * b) / (10.0 * c)).sqrt());
            assert!(low < first && first < second && second < high);
            let error = 1.0 - p(low);
            for (x, sign) in [(first, -1.0), (second, 1.0), (high, -1.0)] {
                assert!((1.0 - p(x) - sign * error).abs() < 1e-7, "{x}: {} {error}", 1.0 - p(x));
            }
            (low, high) = (1.0 - error, 1.0 + error);
        }
        for (iterations, error) in [(3, 0.27), (4, 0.0126), (5, 1e-5), (6, 1e-7)] {
            for i in 0..=2000 {
                let x = 0.01 * 100f64.powf(f64::from(i) / 2000.0);
                let off = (polynomial(x, Iterations::Best(iterations)) - 1.0).abs();
                assert!(off < error, "{iterations} iterations, {x}: {off}");
            }
        }
    }

    /// Large matrices, wide, tall and square, in several groups: from the polynomial of their Gram matrices' eigenvalues.
    #[test]
    fn large_matrices() -> Result<()> {
        use crate::linalg::eigh::{Eigh, eigh_all};
        use crate::ops::testing::random;
        use Iterations::{Alike, Best};
        for (rows, columns) in [(320, 330), (130, 260), (1000, 320)] {
            for (iterations, dtype, tolerance) in [
                (Alike(3), DType::F64, 1e-11),
                (Alike(4), DType::F64, 1e-11),
                (Alike(5), DType::F64, 1e-10),
                (Alike(5), DType::F32, 5e-5),
                (Best(1), DType::F64, 1e-11),
                (Best(4), DType::F64, 1e-10),
                (Best(5), DType::F64, 1e-10),
                // Four of these make 20,000 times as much of a Gram matrix's rounding, which is 6e-8.
                (Best(4), DType::F32, 1e-3),
                (Best(7), DType::F32, 1e-3),
            ] {
                // Singular values fall to a thousandth of the largest.
                let x = random(3, &[2, rows, columns])?;
                let fall = Tensor::from_iter(
                    (0..columns).map(|i| 1e-3f64.powf(i as f64 / columns as f64)),
                    &Device::Cpu,
                )?;
                let x = x.broadcast_mul(&fall)?;
                let small = if rows > columns { x.t()?.contiguous()? } else { x.clone() };
                let gram = small.matmul(&small.t()?)?;
                let Eigh { values, vectors } =
                    crate::linalg::next(&mut eigh_all(&[(&gram, "gram")]).into_iter())?;
                // p(s) / s for each singular value s.
                let mut factors = vec![];
                for values in values.to_vec2::<f64>()? {
                    let s: Vec<f64> = values.iter().map(|g| g.max(1e-30).sqrt()).collect();
                    let unit = unit(&s, iterations);
                    factors.extend(s.iter().map(|s| polynomial(s / unit, iterations) / s));
                }
                let factors = Tensor::from_vec(factors, (2, 1, small.dim(1)?), &Device::Cpu)?;
                let function = vectors.broadcast_mul(&factors)?.matmul(&vectors.t()?)?;
                let expected = function.matmul(&small)?;
                let expected = if rows > columns { expected.t()?.contiguous()? } else { expected };
                let found = orthogonalized(&x.to_dtype(dtype)?, iterations)?.to_dtype(DType::F64)?;
                let off = max_abs(&(found - expected)?)?;
                assert!(off < tolerance, "{rows} x {columns}, {iterations:?}, {dtype:?}: {off}");
            }
        }
        Ok(())
    }

    #[test]
    fn singular_values_go_through_the_polynomial() -> Result<()> {
        // Two orthogonal bases, and a matrix whose singular vectors and values are therefore known.
        let basis = |seed| -> Result<Tensor> {
            let found = crate::linalg::eigh::eigh_all(&[(&random_symmetric(1, 4, seed)?, "m")]);
            crate::linalg::next(&mut found.into_iter())?.vectors.to_dtype(DType::F64)
        };
        let (u, v) = (basis(1)?, basis(2)?.narrow(1, 0, 4)?);
        let kinds =
            [1, 3, 5].into_iter().flat_map(|count| [Iterations::Alike(count), Iterations::Best(count)]);
        for (iterations, columns) in kinds.flat_map(|kind| [(kind, 4), (kind, 3)]) {
            let values: Vec<f64> = vec![3.0, 0.7, 0.02, 0.4][..columns].to_vec();
            let unit = unit(&values, iterations);
            let scaled = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
                let f = Tensor::from_iter(values.iter().map(|&s| f(s)), &Device::Cpu)?;
                let left = u.narrow(2, 0, columns)?.broadcast_mul(&f)?;
                left.matmul(&v.narrow(1, 0, columns)?.narrow(2, 0, columns)?.contiguous()?)
            };
            // With a part of a basis alone, the right side is no orthogonal matrix: only square ones are compared so.
            if columns == 4 {
                let expected = scaled(&|s| polynomial(s / unit, iterations))?;
                let found = orthogonalized(&scaled(&|s| s)?, iterations)?;
                assert!(max_abs(&(found - expected)?)? < 1e-11, "{iterations:?}");
            }
            let wide = scaled(&|s| s)?;
            let tall = wide.transpose(1, 2)?.contiguous()?;
            let off =
                (orthogonalized(&wide, iterations)?.transpose(1, 2)? - orthogonalized(&tall, iterations)?)?;
            assert!(max_abs(&off)? < 1e-11);
            assert_eq!(max_abs(&orthogonalized(&u.zeros_like()?, iterations)?)?, 0.0);
        }
        Ok(())
    }

    /// Numbers of any size, whose squares f32 does not have.
    #[test]
    fn matrices_of_any_size() -> Result<()> {
        let m = crate::ops::testing::random(5, &[1, 6, 9])?.to_dtype(DType::F32)?;
        for iterations in [Iterations::Alike(5), Iterations::Best(3)] {
            let expected = orthogonalized(&m, iterations)?;
            for scale in [1e-12, 1e12] {
                let found = orthogonalized(&(&m * scale)?, iterations)?;
                assert!(max_abs(&(found - &expected)?.to_dtype(DType::F64)?)? < 1e-5, "{scale}");
            }
        }
        Ok(())
    }
}
