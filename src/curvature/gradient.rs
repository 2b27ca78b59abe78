//! Kronecker factors from the gradient of a matrix alone, where its layer records nothing.
//!
//! With `M` the gradient of the mean of `N` loss terms, `N M M^T` and `N M^T M` estimate the two marginals of the second moments of the
//! gradients of single terms: the terms are independent, and with labels drawn from the model each has mean 0 (of weighted terms `N` is their
//! effective number). (The loss's own labels add
//! `N` times the square of the mean gradient.) From their averages `L` and `R`
//!
//! ```text
//! F ~ (R (x) L) / tr L
//! ```
//!
//! which has the trace of `F` and is exact where `F` is a Kronecker product. The statistics are Shampoo's (Gupta, Koren & Singer 2018), the
//! product divided by the trace is one step of the power iteration for the best Kronecker product (Morwani et al. 2024). It is inverted
//! as the factors of a tapped layer are, so damping, clips and steps of fixed KL mean what they mean there.

use super::Runs;
use crate::linalg::sketch::diagonal_of;
use crate::ops::factor::ema;
use crate::ops::moments::{Average, Moments};
use candle_core::{Result, Tensor};

/// `A = N M^T M` and `G = M M^T / tr(M M^T)`, means over draws of gradients `[draws, rows, columns]`; a `G` of zeros where all are zero.
pub(crate) fn gradient_factors(
    gradient: &Tensor,
    rows: Runs,
    columns: Runs,
    terms: f64,
    name: &str,
) -> Result<(Tensor, Tensor)> {
    let weight = terms / gradient.dim(0)?.max(1) as f64;
    let mut moments = Moments::default();
    let a = columns.moment(&mut moments, Average::times(weight), gradient, 1, false, name)?;
    let g = rows.moment(&mut moments, Average::times(1.0), &gradient.transpose(1, 2)?, 1, false, name)?;
    moments.run()?;
    let trace = trace(&g)?.maximum(f64::from(f32::MIN_POSITIVE))?;
    Ok((a, g.broadcast_div(&trace)?))
}

/// The exponential average of products `A (x) G` with `tr G = 1`, as the product of the averaged `A` and of `tr(A) G` over its trace.
pub(crate) fn average_product(
    last: Option<(&Tensor, &Tensor)>,
    (a, g): (&Tensor, &Tensor),
    decay: f64,
) -> Result<(Tensor, Tensor)> {
    let Some((last_a, last_g)) = last else { return Ok((a.clone(), g.clone())) };
    let average = ema(Some(last_a), a, decay)?;
    let share = (trace(a)? * (1.0 - decay))?.div(&trace(&average)?.maximum(f64::from(f32::MIN_POSITIVE))?)?;
    let g = (last_g + (g - last_g)?.broadcast_mul(&share)?)?;
    Ok((average, g))
}

fn trace(m: &Tensor) -> Result<Tensor> {
    diagonal_of(m)?.sum_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::kron::{diagonal, kron};
    use crate::ops::testing::{assert_close, random, values};

    /// Gradients `u_i v_j^T` for all pairs: their second moment is the product of those of `u` and `v`.
    #[test]
    fn a_product_is_found_exactly() -> Result<()> {
        let (u, v) = (random(0, &[5, 3])?, random(1, &[4, 2])?);
        let terms = 7.0;
        for (rows, columns) in [(Runs::full(3), Runs::full(2)), (Runs::of(3, 2), Runs::diagonal(2))] {
            let mut average: Option<(Tensor, Tensor)> = None;
            for k in 0..20 {
                let m = u.get(k / 4)?.unsqueeze(1)?.matmul(&v.get(k % 4)?.unsqueeze(0)?)?.unsqueeze(0)?;
                let (a, g) = gradient_factors(&m, rows, columns, terms, "m")?;
                let last = average.as_ref().map(|(a, g)| (a, g));
                // Decays that make a plain mean.
                average = Some(average_product(last, (&a, &g), k as f64 / (k + 1) as f64)?);
            }
            let (a, g) = average.expect("twenty gradients");
            let moment = |x: &Tensor, n: f64| (x.t()?.matmul(x)? / n)?.unsqueeze(0);
            let expected = kron(&(moment(&v, 4.0)? * terms)?, &moment(&u, 5.0)?, "m")?;
            if rows.is_full() {
                assert_close(&kron(&a, &g, "m")?, &values(&expected)?, 1e-12);
            } else {
                let trace = values(&diagonal(&expected)?)?.iter().sum::<f64>();
                let found =
                    values(&diagonal(&a)?)?.iter().sum::<f64>() * values(&diagonal(&g)?)?.iter().sum::<f64>();
                assert!((found - trace).abs() < 1e-12 * trace, "{found} {trace}");
            }
        }
        Ok(())
    }

    #[test]
    fn no_gradient_leaves_the_average_a_number() -> Result<()> {
        let zero = random(0, &[1, 3, 2])?.zeros_like()?;
        let none = gradient_factors(&zero, Runs::full(3), Runs::full(2), 4.0, "m")?;
        let one = gradient_factors(&random(0, &[1, 3, 2])?, Runs::full(3), Runs::full(2), 4.0, "m")?;
        for (first, second) in [(&none, &none), (&none, &one), (&one, &none)] {
            let (a, g) = average_product(Some((&first.0, &first.1)), (&second.0, &second.1), 0.5)?;
            assert!(values(&a)?.iter().chain(&values(&g)?).all(|v| v.is_finite()));
            let kept = if first.0.id() == one.0.id() { first } else { second };
            assert_close(&g, &values(&kept.1)?, 1e-14);
        }
        Ok(())
    }
}
