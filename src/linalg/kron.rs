//! Kronecker products and the split of a damping over their factors.
use candle_core::{D, DType, Result, Tensor, bail};

use super::host::square;
use crate::gpu::{Args, Gpu, Grid, Module, args, typed};

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
    if let Some(gpu) = Gpu::of(a.device()) {
        return gpu_pi(&gpu, &a.detach().contiguous()?, &g.detach().contiguous()?);
    }
    let a_mean = (diagonal(a)?.sum(1)? / a_dim as f64)?;
    let g_mean = (diagonal(g)?.sum(1)? / g_dim as f64)?;
    pi_of_means(&a_mean, &g_mean)
}

/// `pi` from the means of the factors' diagonals.
pub(crate) fn pi_of_means(a_mean: &Tensor, g_mean: &Tensor) -> Result<Tensor> {
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
    if let Some(gpu) = Gpu::of(m.device()) {
        return gpu_shift(&gpu, &m.detach().contiguous()?, &values.detach().contiguous()?, (1.0, false));
    }
    let added = values.unsqueeze(1)?.broadcast_as((groups, dim))?.contiguous()?;
    let flat = m.reshape((groups, dim * dim))?;
    flat.index_add(&diagonal_indices(dim, m)?, &added, 1)?.reshape((groups, dim, dim))
}

/// `a + pi sqrt(damping) I` and `g + sqrt(damping) / pi I`; see [`pi_split`].
pub(crate) fn pi_damped(a: &Tensor, g: &Tensor, damping: f64, name: &str) -> Result<(Tensor, Tensor)> {
    let pi = pi_split(a, g, name)?;
    let root = damping.sqrt();
    if let Some(gpu) = Gpu::of(a.device()) {
        let shift = |m: &Tensor, how| gpu_shift(&gpu, &m.detach().contiguous()?, &pi, how);
        return Ok((shift(a, (root, false))?, shift(g, (root, true))?));
    }
    Ok((add_diagonal_each(a, &(&pi * root)?, name)?, add_diagonal_each(g, &(pi.recip()? * root)?, name)?))
}

/// `1 / (factor dg da^T + offset)`, `[groups, dg, da]`, of two spectra `[groups, da]` and `[groups, dg]`; values at or below
/// `floor` count as 0, and rounding may have made a zero eigenvalue negative.
pub(crate) fn inverse_spectrum(
    (a, g): (&Tensor, &Tensor),
    floor: f64,
    factor: f64,
    offset: f64,
) -> Result<Tensor> {
    let floor = floor.max(0.0);
    if let Some(gpu) = Gpu::of(a.device()) {
        let range = Range { floor, factor, offset };
        return gpu_spectrum(&gpu, &a.detach().contiguous()?, &g.detach().contiguous()?, range);
    }
    let clean = |v: &Tensor| -> Result<Tensor> { v.gt(floor)?.to_dtype(v.dtype())?.mul(v) };
    let products = clean(g)?.unsqueeze(2)?.broadcast_mul(&clean(a)?.unsqueeze(1)?)?;
    let products = if factor == 1.0 { products } else { (products * factor)? };
    (products + offset)?.recip()
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

args! {
    struct PiArgs { a: u64, g: u64, pi: u64, groups: u32, a_dim: u32, g_dim: u32, pad: u32 }
}
args! {
    struct ShiftArgs {
        m: u64,
        values: u64,
        out: u64,
        factor: f64,
        groups: u32,
        dim: u32,
        inverse: u32,
        pad: u32,
    }
}
args! {
    struct SpectrumArgs {
        a: u64,
        g: u64,
        out: u64,
        floor: f64,
        factor: f64,
        offset: f64,
        total: u64,
        a_dim: u32,
        g_dim: u32,
    }
}

const THREADS: u32 = 256;

/// Launches over `elements`, or as many blocks of one task each; the kernels take up what is left over.
fn launch<A: Args>(gpu: &Gpu, kernel: &str, blocks: usize, dtype: DType, args: &A) -> Result<()> {
    gpu.launch(Module::Kron, &typed(kernel, dtype)?, Grid::line(blocks.min(1 << 20), THREADS)?, args)
}

fn gpu_pi(gpu: &Gpu, a: &Tensor, g: &Tensor) -> Result<Tensor> {
    let groups = a.dim(0)?;
    let out = gpu.tensor(groups, a.dtype())?;
    let [left, right, target] = [gpu.operand(a, "pi")?, gpu.operand(g, "pi")?, gpu.operand(&out, "pi")?];
    let args = PiArgs {
        a: left.address(),
        g: right.address(),
        pi: target.address(),
        groups: groups as u32,
        a_dim: a.dim(1)? as u32,
        g_dim: g.dim(1)? as u32,
        pad: 0,
    };
    launch(gpu, "pi", groups, a.dtype(), &args)?;
    Ok(out)
}

/// `m + factor values I`, or with the reciprocal values.
fn gpu_shift(gpu: &Gpu, m: &Tensor, values: &Tensor, (factor, inverse): (f64, bool)) -> Result<Tensor> {
    let out = gpu.tensor(m.shape(), m.dtype())?;
    let [from, added, target] =
        [gpu.operand(m, "shift")?, gpu.operand(values, "shift")?, gpu.operand(&out, "shift")?];
    let args = ShiftArgs {
        m: from.address(),
        values: added.address(),
        out: target.address(),
        factor,
        groups: m.dim(0)? as u32,
        dim: m.dim(1)? as u32,
        inverse: u32::from(inverse),
        pad: 0,
    };
    launch(gpu, "shift", m.elem_count().div_ceil(THREADS as usize * 4), m.dtype(), &args)?;
    Ok(out)
}

struct Range {
    floor: f64,
    factor: f64,
    offset: f64,
}

fn gpu_spectrum(gpu: &Gpu, a: &Tensor, g: &Tensor, range: Range) -> Result<Tensor> {
    let ((groups, a_dim), g_dim) = (a.dims2()?, g.dim(1)?);
    let out = gpu.tensor((groups, g_dim, a_dim), a.dtype())?;
    let Range { floor, factor, offset } = range;
    let [left, right, target] =
        [gpu.operand(a, "spectrum")?, gpu.operand(g, "spectrum")?, gpu.operand(&out, "spectrum")?];
    let args = SpectrumArgs {
        a: left.address(),
        g: right.address(),
        out: target.address(),
        floor,
        factor,
        offset,
        total: out.elem_count() as u64,
        a_dim: a_dim as u32,
        g_dim: g_dim as u32,
    };
    launch(gpu, "spectrum", out.elem_count().div_ceil(THREADS as usize * 4), a.dtype(), &args)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::linalg::eigh::eigh;
    use crate::linalg::testing::{here_and_on_a_device, max_abs, random_symmetric, spd};

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
        here_and_on_a_device(|| {
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
        })
    }

    #[test]
    fn pi() -> Result<()> {
        here_and_on_a_device(|| {
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
        })
    }

    #[test]
    fn damped_factors_and_spectra() -> Result<()> {
        for (groups, a_dim, g_dim) in [(1, 1, 1), (3, 40, 2), (2, 17, 300)] {
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-13)] {
                let [a, g] = [(a_dim, 5), (g_dim, 6)].map(|(dim, seed)| random_symmetric(groups, dim, seed));
                let [a, g] = [a?.sqr()?.to_dtype(dtype)?, g?.sqr()?.to_dtype(dtype)?];
                let [da, dg] = [a.narrow(1, 0, 1)?.squeeze(1)?, g.narrow(1, 0, 1)?.squeeze(1)?];
                let run = || -> Result<[Tensor; 4]> {
                    let (damped_a, damped_g) = pi_damped(&a, &g, 0.3, "m")?;
                    let damped = inverse_spectrum((&da, &dg), 0.1, 1.0, 0.2)?;
                    Ok([damped_a, damped_g, damped, inverse_spectrum((&da, &dg), -1.0, 0.7, 1.0)?])
                };
                for (found, wanted) in emulate(run)?.iter().zip(run()?) {
                    assert_eq!(found.dims(), wanted.dims());
                    let off = (found / &wanted)?.to_dtype(DType::F64)?.affine(1.0, -1.0)?;
                    let zeros = wanted.eq(0.0)?;
                    assert!(max_abs(&zeros.where_cond(&off.zeros_like()?, &off)?)? < tolerance);
                }
            }
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
