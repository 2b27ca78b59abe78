//! The orthogonal factor of matrices on the host, by a rational function of their Gram matrix.

use super::block_inverse::invert_lower;
use super::host::Real;
use super::polar::{LARGE, LEAST_NORM};
use crate::ops::dense::{dot_slices, offset, par_within, product};
use crate::ops::record_layout::{WORTH_A_THREAD, cpu_slice};
use crate::ops::simd::vectorized;
use crate::ops::symmetric::{mirror_lower, symmetric_product};
use candle_core::{D, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use faer::Par;
use rayon::prelude::*;
use std::f64::consts::FRAC_PI_2;

/// Singular values from this part of their bound on are taken near 1. Smaller ones are noise sooner than signal.
const LEAST: f64 = 0.02;
/// Gram matrices with norms below this, or above its inverse, are made of matrices that are divided by their largest element.
const TINY: f64 = 1e-24;

/// `x (m + sum_j a_j / (x^2 + c_j))`, the odd rational function with so many poles that is closest to 1 on [0.02, 1] (Zolotarev 1877; the form and
/// its use for orthogonal factors are those of Nakatsukasa and Freund 2016, eq. 3.5 to 3.8).
#[derive(Debug, Clone, PartialEq)]
struct Rational {
    m: f64,
    /// `a_j` and `c_j`.
    terms: Vec<(f64, f64)>,
}

impl Rational {
    fn best(terms: usize) -> Self {
        // sn / cn of parts of a quarter period: the zeros' and poles' distances from 0.
        let square = |nth| (LEAST * amplitude(nth as f64 / (2 * terms + 1) as f64).tan()).powi(2);
        let poles: Vec<f64> = (0..terms).map(|j| square(2 * j + 1)).collect();
        let zeros: Vec<f64> = (0..terms).map(|j| square(2 * j + 2)).collect();
        let value =
            |x: f64| zeros.iter().zip(&poles).fold(x, |y, (zero, pole)| y * (x * x + zero) / (x * x + pole));
        // The least and the largest value between are those at the ends.
        let m = 2.0 / (value(LEAST) + value(1.0));
        let numerator = |j: usize| {
            let others = poles.iter().enumerate().filter(|(i, _)| *i != j).map(|(_, pole)| pole - poles[j]);
            zeros.iter().map(|zero| zero - poles[j]).product::<f64>() / others.product::<f64>()
        };
        Self { m, terms: (0..terms).map(|j| (m * numerator(j), poles[j])).collect() }
    }

    fn times(self, factor: f64) -> Self {
        Self { m: factor * self.m, terms: self.terms.iter().map(|(a, c)| (factor * a, *c)).collect() }
    }
}

/// Jacobi's amplitude of this part of the quarter period of the modulus `sqrt(1 - LEAST^2)`, by arithmetic and geometric means.
fn amplitude(part: f64) -> f64 {
    let (mut a, mut b) = (1.0, LEAST);
    let mut ratios = vec![];
    while a - b > 1e-15 * a {
        ratios.push((a - b) / (a + b));
        (a, b) = ((a + b) / 2.0, (a * b).sqrt());
    }
    let start = part * FRAC_PI_2 * 2f64.powi(ratios.len() as i32);
    ratios.iter().rev().fold(start, |angle, ratio| (angle + (ratio * angle.sin()).asin()) / 2.0)
}

/// `length U r(S) V^T` of every matrix `U S V^T` of `[.., rows, columns]` in CPU memory, where `r` is the best rational function with so many poles, and the unit
/// of singular values is `(sum s^4)^(1/4)`, at least the largest: with enough poles about the orthogonal matrix that is nearest. A matrix of
/// zeros stays one.
///
/// With `G = X X^T` (of a tall matrix `X^T X` from the right) it is `(m + sum_j a_j (G + c_j)^-1) X`: of a square matrix a product, half of one and
/// so many inverses, each half of one.
///
/// # Errors
/// When the tensor has fewer than two dimensions.
pub(crate) fn orthogonalized(matrices: &Tensor, terms: usize, length: f64) -> Result<Tensor> {
    let dtype = matrices.dtype();
    match dtype {
        DType::F32 => of_type::<f32>(matrices, terms, length),
        DType::F64 => of_type::<f64>(matrices, terms, length),
        _ => of_type::<f32>(&matrices.to_dtype(DType::F32)?, terms, length)?.to_dtype(dtype),
    }
}

fn of_type<T: Real>(matrices: &Tensor, terms: usize, length: f64) -> Result<Tensor> {
    let Some((_, &[rows, columns])) = matrices.dims().split_last_chunk::<2>() else {
        bail!("orthogonal factor: expected matrices, got {:?}", matrices.dims())
    };
    let tall = rows > columns;
    let function = Rational::best(terms).times(length);
    let mut x = matrices.clone();
    let mut gram = gram_of(&x, tall)?;
    let mut norms = norms::<T>(&gram)?;
    if norms.iter().any(|norm| !(TINY..1.0 / TINY).contains(norm)) {
        x = x.broadcast_div(&largest(&x)?)?;
        gram = gram_of(&x, tall)?;
        norms = self::norms::<T>(&gram)?;
    }
    let found = function.of::<T>(&gram, &norms)?;
    if tall { product(&x, &found) } else { product(&found, &x) }
}

/// The Gram matrices of the smaller side.
fn gram_of(x: &Tensor, tall: bool) -> Result<Tensor> {
    let turned = x.t()?;
    let (a, b) = if tall { (&turned, x) } else { (x, &turned) };
    if a.dims()[a.rank() - 2] >= LARGE { symmetric_product(a, b) } else { product(a, b) }?.contiguous()
}

/// The largest element of every matrix in size, `[.., 1, 1]`, above 0.
fn largest(matrices: &Tensor) -> Result<Tensor> {
    matrices.abs()?.max_keepdim(D::Minus1)?.max_keepdim(D::Minus2)?.maximum(LEAST_NORM)
}

/// The numbers of a contiguous tensor in CPU memory.
fn on_host<'a, T: Real>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    Ok(offset(cpu_slice::<T>(storage, "orthogonal factor")?, layout))
}

/// The Frobenius norms of square matrices.
fn norms<T: Real>(grams: &Tensor) -> Result<Vec<f64>> {
    let (storage, layout) = grams.storage_and_layout();
    let norm = |gram: &[T]| dot_slices(gram, gram, |sums| sums.iter().map(|&sum| sum.to_f64()).sum()).sqrt();
    Ok(on_host::<T>(&storage, layout)?.chunks(size(grams)).map(norm).collect())
}

/// Elements of one of square matrices.
fn size(matrices: &Tensor) -> usize {
    matrices.dims().last().map_or(1, |n| n * n).max(1)
}

impl Rational {
    /// `m + sum_j a_j (G + c_j)^-1` of every Gram matrix in units of its norm, divided by that norm's root.
    fn of<T: Real>(&self, grams: &Tensor, norms: &[f64]) -> Result<Tensor> {
        let (size, n) = (size(grams), grams.dims()[grams.rank() - 1]);
        let (storage, layout) = grams.storage_and_layout();
        let data = on_host::<T>(&storage, layout)?;
        let mut out = vec![<T as WithDType>::from_f64(0.0); data.len()];
        let large = n * n * n > WORTH_A_THREAD;
        let par = if large { par_within(norms.len()) } else { Par::Seq };
        let one = |((out, gram), &norm): ((&mut [T], &[T]), &f64)| {
            self.write(gram, n, norm.max(LEAST_NORM), par, out)
        };
        match large {
            true => out.par_chunks_mut(size).zip(data.par_chunks(size)).zip(norms).for_each(one),
            false => out.chunks_mut(size).zip(data.chunks(size)).zip(norms).for_each(one),
        }
        Tensor::from_vec(out, grams.dims(), grams.device())
    }

    /// Writes the function of a Gram matrix of this norm over `out`.
    fn write<T: Real>(&self, gram: &[T], n: usize, norm: f64, par: Par, out: &mut [T]) {
        let scale = <T as WithDType>::from_f64(1.0 / norm);
        let inverse = |&(a, c): &(f64, f64)| {
            let mut shifted: Vec<T> = vectorized(
                #[inline(always)]
                || gram.iter().map(|&g| g * scale).collect(),
            );
            let c = <T as WithDType>::from_f64(c);
            shifted.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += c);
            invert_lower(&mut shifted, n, n, par);
            (a, shifted)
        };
        let inverses: Vec<(f64, Vec<T>)> = match par {
            Par::Rayon(_) => self.terms.par_iter().map(inverse).collect(),
            Par::Seq => self.terms.iter().map(inverse).collect(),
        };
        let root = norm.sqrt();
        for (a, inverse) in &inverses {
            let a = <T as WithDType>::from_f64(a / root);
            vectorized(
                #[inline(always)]
                || out.iter_mut().zip(inverse).for_each(|(out, &value)| *out += a * value),
            );
        }
        let m = <T as WithDType>::from_f64(self.m / root);
        out.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += m);
        mirror_lower(out, n, n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::eigh::{Eigh, eigh_all};
    use crate::linalg::testing::{max_abs, random_symmetric};
    use crate::ops::testing::random;
    use candle_core::Device;

    impl Rational {
        fn at(&self, x: f64) -> f64 {
            x * (self.m + self.terms.iter().map(|(a, c)| a / (x * x + c)).sum::<f64>())
        }
    }

    /// No odd rational function with `r` such terms is closer to 1 on an interval than one whose error is largest, with signs in turn, at `2 r + 2`
    /// points (Zolotarev).
    #[test]
    fn each_function_is_the_best_with_its_poles() {
        for (terms, least, most) in [
            (1, 0.24, 0.25),
            (2, 0.03, 0.04),
            (3, 0.005, 0.006),
            (4, 0.0009, 0.001),
            (5, 1.4e-4, 1.5e-4),
            (8, 5e-7, 6e-7),
        ] {
            let function = Rational::best(terms);
            let points = 20_000;
            let off = |i: i32| function.at(LEAST.powf(1.0 - f64::from(i) / f64::from(points))) - 1.0;
            let errors: Vec<f64> = (0..=points).map(off).collect();
            let largest = errors.iter().fold(0f64, |largest, error| largest.max(error.abs()));
            assert!((least..most).contains(&largest), "{terms}: {largest}");
            // The ends, and where the error turns between.
            let mut extremes = vec![errors[0]];
            let turns = errors.windows(3).filter(|e| (e[1] - e[0]) * (e[2] - e[1]) < 0.0);
            extremes.extend(turns.map(|e| e[1]));
            extremes.extend(errors.last());
            assert_eq!(extremes.len(), 2 * terms + 2);
            for (nth, error) in extremes.into_iter().enumerate() {
                let sign = if nth % 2 == 0 { -1.0 } else { 1.0 };
                assert!((error - sign * largest).abs() < 1e-4 * largest, "{terms} {nth}: {error} {largest}");
            }
        }
    }

    /// From the values of the function at singular values, wide, tall and square, small and large.
    #[test]
    fn singular_values_go_through_the_function() -> Result<()> {
        for (rows, columns) in [(1, 1), (4, 3), (20, 33), (130, 260), (150, 140), (300, 129)] {
            // The smallest pole makes up to 3,600 times as much of a Gram matrix's rounding, which is some 2e-7.
            for (terms, dtype, tolerance) in [
                (1, DType::F64, 1e-11),
                (3, DType::F64, 1e-11),
                (8, DType::F64, 1e-10),
                (3, DType::F32, 3e-3),
            ] {
                // Singular values fall to a thousandth of the largest.
                let x = random(3, &[2, rows, columns])?;
                let fall = (0..columns).map(|i| 1e-3f64.powf(i as f64 / columns as f64));
                let x = x.broadcast_mul(&Tensor::from_iter(fall, &Device::Cpu)?)?;
                let small = if rows > columns { x.t()?.contiguous()? } else { x.clone() };
                let gram = small.matmul(&small.t()?)?;
                let Eigh { values, vectors } =
                    crate::linalg::next(&mut eigh_all(&[(&gram, "gram")]).into_iter())?;
                let function = Rational::best(terms);
                let mut factors = vec![];
                for values in values.to_vec2::<f64>()? {
                    let s: Vec<f64> = values.iter().map(|g| g.max(1e-30).sqrt()).collect();
                    let unit = s.iter().map(|s| s.powi(4)).sum::<f64>().powf(0.25);
                    factors.extend(s.iter().map(|s| 2.0 * function.at(s / unit) / s));
                }
                let factors = Tensor::from_vec(factors, (2, 1, small.dim(1)?), &Device::Cpu)?;
                let expected = vectors.broadcast_mul(&factors)?.matmul(&vectors.t()?)?.matmul(&small)?;
                let expected = if rows > columns { expected.t()?.contiguous()? } else { expected };
                for x in [x.clone(), x.t()?.contiguous()?.t()?] {
                    let found = orthogonalized(&x.to_dtype(dtype)?, terms, 2.0)?;
                    assert_eq!(found.dtype(), dtype);
                    let off = max_abs(&(found.to_dtype(DType::F64)? - &expected)?)?;
                    assert!(off < tolerance, "{rows} x {columns}, {terms} terms, {dtype:?}: {off}");
                }
            }
        }
        Ok(())
    }

    /// An orthogonal matrix is where it belongs already, up to the function's error.
    #[test]
    fn orthogonal_matrices_stay() -> Result<()> {
        let basis = eigh_all(&[(&random_symmetric(1, 40, 5)?, "m")]);
        let basis = crate::linalg::next(&mut basis.into_iter())?.vectors;
        let found = orthogonalized(&(&basis * 17.0)?, 8, 1.0)?;
        assert!(max_abs(&(found - basis)?)? < 1e-5);
        Ok(())
    }

    /// Numbers of any size, whose squares f32 does not have, zeros, and what is not finite.
    #[test]
    fn matrices_of_any_size() -> Result<()> {
        let m = random(5, &[2, 6, 9])?.to_dtype(DType::F32)?;
        let expected = orthogonalized(&m, 3, 1.0)?;
        for scale in [1e-18, 1e-12, 1e12, 1e36] {
            let found = orthogonalized(&(&m * scale)?, 3, 1.0)?;
            assert!(max_abs(&(found - &expected)?)? < 1e-5, "{scale}");
        }
        assert_eq!(max_abs(&orthogonalized(&m.zeros_like()?, 3, 1.0)?)?, 0.0);
        let half = orthogonalized(&m.to_dtype(DType::BF16)?, 3, 1.0)?;
        assert_eq!(half.dtype(), DType::BF16);
        assert!(max_abs(&(half.to_dtype(DType::F32)? - &expected)?)? < 0.05);
        for wrong in [f32::NAN, f32::INFINITY] {
            let m = (m.narrow(0, 0, 1)? + f64::from(wrong))?;
            let sum = orthogonalized(&m, 3, 1.0)?.sum_all()?.to_scalar::<f32>()?;
            assert!(!sum.is_finite());
        }
        assert!(orthogonalized(&m.flatten_all()?, 3, 1.0).is_err());
        Ok(())
    }
}
