//! Kronecker products and the split of a damping over their factors.
use candle_core::{D, DType, Result, Tensor, bail};

use super::host::square;

/// `pi = sqrt((tr a / dim a) / (tr g / dim g))` for each group, `[g]` in the dtype of the factors.
///
/// Damping `la` of `a (x) g` is split as `a + pi sqrt(la) I` and `g + sqrt(la) / pi I` (Martens & Grosse 2015, section
/// 6.3), which scales with the factors: doubling `a` and halving `g` changes nothing. Where a trace is not positive,
/// as for a dead layer whose factor is zero, `pi` is 1. `a` is `[g, da, da]`, `g` `[g, dg, dg]`.
///
/// # Errors
/// If a factor is not square, or the two differ in groups or dtype.
pub fn pi_split(a: &Tensor, g: &Tensor, name: &str) -> Result<Tensor> {
    let (a_dim, g_dim) = pair(a, g, name)?;
    let a_mean = (diagonal(a)?.sum(1)? / a_dim as f64)?;
    let g_mean = (diagonal(g)?.sum(1)? / g_dim as f64)?;
    // The roots first: a mean over a mean may leave the range of f32.
    let pi = (a_mean.sqrt()? / g_mean.sqrt()?)?;
    let defined = (a_mean.gt(0.0)? * g_mean.gt(0.0)?)?;
    defined.where_cond(&pi, &pi.ones_like()?)
}

/// `m + value I` for square `m` `[g, d, d]`.
///
/// # Errors
/// If `m` is not square or not f32 or f64.
pub fn add_diagonal(m: &Tensor, value: f64, name: &str) -> Result<Tensor> {
    let (groups, _) = square(m, name)?;
    add_diagonal_each(m, &Tensor::full(value, groups, m.device())?.to_dtype(m.dtype())?, name)
}

/// `m + values[i] I` for each group `i` of square `m` `[g, d, d]`; `values` is `[g]` of the dtype of `m`.
///
/// # Errors
/// If `m` is not square, not f32 or f64, or `values` does not fit it.
pub fn add_diagonal_each(m: &Tensor, values: &Tensor, name: &str) -> Result<Tensor> {
    let (groups, dim) = square(m, name)?;
    if values.dims() != [groups] || values.dtype() != m.dtype() {
        bail!(
            "{name}: expected {:?} [{groups}] to add to the diagonals, got {:?} {:?}",
            m.dtype(),
            values.dtype(),
            values.dims()
        )
    }
    let added = values.unsqueeze(1)?.broadcast_as((groups, dim))?.contiguous()?;
    let flat = m.reshape((groups, dim * dim))?;
    flat.index_add(&diagonal_indices(dim, m)?, &added, 1)?.reshape((groups, dim, dim))
}

/// The dense Kronecker product of each group, `[g, da dg, da dg]`, for tests and diagnostics.
///
/// Entry `[i dg + k, j dg + l]` is `a[i, j] g[k, l]`. A weight `[out, in]` flattened by rows is thus seen by
/// `kron(G, A)`, by columns by `kron(A, G)`.
///
/// # Errors
/// As [`pi_split`].
pub fn kron(a: &Tensor, g: &Tensor, name: &str) -> Result<Tensor> {
    let (a_dim, g_dim) = pair(a, g, name)?;
    let groups = a.dim(0)?;
    let a = a.reshape((groups, a_dim, 1, a_dim, 1))?;
    let g = g.reshape((groups, 1, g_dim, 1, g_dim))?;
    a.broadcast_mul(&g)?.reshape((groups, a_dim * g_dim, a_dim * g_dim))
}

/// `log det(a (x) g + damping I) = sum_ij log(a_i g_j + damping)` for each group, `[g]` in f64.
///
/// `a` `[g, da]` and `g` `[g, dg]` are the eigenvalues of two positive semi-definite factors. Negative ones, which
/// are rounding, count as zero, so the result is minus infinity only where `damping` is 0 and the product singular. It is
/// differentiable in the eigenvalues.
///
/// # Errors
/// If the shapes or dtypes do not fit each other, or if `damping` is negative or not finite.
pub fn log_det(a: &Tensor, g: &Tensor, damping: f64, name: &str) -> Result<Tensor> {
    match (a.dims(), g.dims()) {
        (&[a_groups, _], &[g_groups, _]) if a_groups == g_groups && a.dtype() == g.dtype() => {}
        (a_dims, g_dims) => bail!(
            "{name}: expected eigenvalues [g, da] and [g, dg], got {:?} {a_dims:?} and {:?} {g_dims:?}",
            a.dtype(),
            g.dtype()
        ),
    }
    if !(0.0..f64::INFINITY).contains(&damping) {
        bail!("{name}: expected a finite damping of at least 0, got {damping}")
    }
    let a = a.to_dtype(DType::F64)?.relu()?.unsqueeze(D::Minus1)?;
    let g = g.to_dtype(DType::F64)?.relu()?.unsqueeze(1)?;
    (a.broadcast_mul(&g)? + damping)?.log()?.sum((1, 2))
}

/// The sizes of two factors with the same groups and dtype.
fn pair(a: &Tensor, g: &Tensor, name: &str) -> Result<(usize, usize)> {
    let ((a_groups, a_dim), (g_groups, g_dim)) = (square(a, name)?, square(g, name)?);
    if a_groups != g_groups || a.dtype() != g.dtype() {
        bail!(
            "{name}: expected two factors of one dtype and as many groups, got {:?} {:?} and {:?} {:?}",
            a.dtype(),
            a.dims(),
            g.dtype(),
            g.dims()
        )
    }
    Ok((a_dim, g_dim))
}

/// `[g, d]` of a `[g, d, d]` tensor.
pub(crate) fn diagonal(m: &Tensor) -> Result<Tensor> {
    let (groups, dim, _) = m.dims3()?;
    m.reshape((groups, dim * dim))?.index_select(&diagonal_indices(dim, m)?, 1)
}

/// Where the diagonal lies in a flattened `[d, d]` matrix.
fn diagonal_indices(dim: usize, like: &Tensor) -> Result<Tensor> {
    Tensor::from_iter((0..dim as u32).map(|i| i * (dim as u32 + 1)), like.device())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::eigh::eigh;
    use crate::linalg::testing::{max_abs, random_symmetric, spd};

    #[test]
    fn product_and_log_determinant() -> Result<()> {
        let (a, g) = (spd(2, 3, 10.0, 1)?, spd(2, 4, 50.0, 2)?);
        let product = kron(&a, &g, "m")?;
        let (av, gv, pv) = (a.to_vec3::<f64>()?, g.to_vec3::<f64>()?, product.to_vec3::<f64>()?);
        for n in 0..2 {
            for (row, values) in pv[n].iter().enumerate() {
                for (column, value) in values.iter().enumerate() {
                    assert_eq!(*value, av[n][row / 4][column / 4] * gv[n][row % 4][column % 4]);
                }
            }
        }
        let damped = eigh(&add_diagonal(&product, 0.3, "m")?, "m")?.values;
        let exact = damped.log()?.sum(1)?;
        let (a, g) = (eigh(&a, "m")?.values, eigh(&g, "m")?.values);
        assert!(max_abs(&(log_det(&a, &g, 0.3, "m")? - exact)?)? < 1e-12);
        assert_eq!(log_det(&(&a * 0.0)?, &g, 0.0, "m")?.to_vec1::<f64>()?, [f64::NEG_INFINITY; 2]);
        Ok(())
    }

    #[test]
    fn diagonals() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let m = random_symmetric(3, 5, 1)?.to_dtype(dtype)?;
            let values = Tensor::new(&[1.0, -2.0, 0.5], &Device::Cpu)?.to_dtype(dtype)?;
            let eye = Tensor::eye(5, dtype, &Device::Cpu)?.unsqueeze(0)?;
            let naive = (&m + eye.broadcast_mul(&values.reshape((3, 1, 1))?)?)?;
            assert_eq!(max_abs(&(add_diagonal_each(&m, &values, "m")? - &naive)?)?, 0.0);
            let naive = m.broadcast_add(&(&eye * 0.25)?)?;
            assert_eq!(max_abs(&(add_diagonal(&m, 0.25, "m")? - naive)?)?, 0.0);
        }
        Ok(())
    }

    #[test]
    fn pi() -> Result<()> {
        let eye = |d: usize, scales: &[f32]| -> Result<Tensor> {
            let scales = Tensor::new(scales, &Device::Cpu)?.reshape((scales.len(), 1, 1))?;
            Tensor::eye(d, DType::F32, &Device::Cpu)?.unsqueeze(0)?.broadcast_mul(&scales)
        };
        let (a, g) = (eye(3, &[4.0, 0.0, 1.0, 1e30, -1.0])?, eye(7, &[1.0, 1.0, 0.0, 1e-30, 1.0])?);
        let found = pi_split(&a, &g, "m")?.to_vec1::<f32>()?;
        for (found, exact) in found.iter().zip([2.0, 1.0, 1.0, 1e30, 1.0]) {
            assert!((found / exact - 1.0).abs() < 1e-5, "{found} {exact}");
        }
        Ok(())
    }

    #[test]
    fn refuses() -> Result<()> {
        let cpu = &Device::Cpu;
        let m = Tensor::zeros((2, 3, 3), DType::F32, cpu)?;
        let one = m.narrow(0, 0, 1)?;
        let wide = m.to_dtype(DType::F64)?;
        let values = Tensor::ones((2, 3), DType::F32, cpu)?;
        for (result, part) in [
            (pi_split(&m, &one, "fc"), "groups"),
            (kron(&m, &wide, "fc"), "dtype"),
            (pi_split(&m, &m.narrow(1, 0, 2)?, "fc"), "square"),
            (add_diagonal_each(&m, &values, "fc"), "[2]"),
            (add_diagonal(&m.narrow(2, 0, 1)?, 1.0, "fc"), "square"),
            (log_det(&values, &values.narrow(0, 0, 1)?, 0.1, "fc"), "[g, da]"),
            (log_det(&values, &values, -0.1, "fc"), "damping"),
        ] {
            let message = result.expect_err("must fail").to_string();
            assert!(message.contains("fc") && message.contains(part), "{message}");
        }
        Ok(())
    }
}
