//! Decompositions, inverses and Kronecker products on every device: what defines them holds, and their values are the CPU's.

use crate::common::*;
use crate::device::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::linalg::cholesky::{cholesky, inverse_spd};
use kronwake::linalg::eigh::{eigh, generalized_eigh};
use kronwake::linalg::kron;
use kronwake::linalg::newton::{NewtonOptions, newton_inverse};

/// Sizes `(groups, d)`.
const SIZES: [(usize, usize); 7] = [(1, 1), (3, 2), (2, 5), (5, 33), (1, 64), (1, 129), (1, 300)];

/// `[groups, d, d]` f64 with condition number around 10: `I + x x^T / d`.
fn spd(seed: u64, groups: usize, d: usize) -> Result<Tensor> {
    let x = random(seed, &[groups, d, d])?;
    (x.matmul(&x.transpose(1, 2)?.contiguous()?)? * (3.0 / d as f64))?.broadcast_add(&Tensor::eye(
        d,
        DType::F64,
        &Device::Cpu,
    )?)
}

/// `spd` as `dtype` rounds it, in f64.
fn rounded_spd(seed: u64, groups: usize, d: usize, dtype: DType) -> Result<Tensor> {
    spd(seed, groups, d)?.to_dtype(dtype)?.to_dtype(DType::F64)
}

/// A result on the CPU in f64, having checked its dtype and place.
fn back(found: &Tensor, like: &Tensor) -> Result<Tensor> {
    assert_eq!(found.dtype(), like.dtype());
    assert!(found.device().same_device(like.device()));
    found.to_device(&Device::Cpu)?.to_dtype(DType::F64)
}

fn transposed(m: &Tensor) -> Result<Tensor> {
    m.transpose(1, 2)?.contiguous()
}

fn identity(groups: usize, d: usize) -> Result<Tensor> {
    Tensor::eye(d, DType::F64, &Device::Cpu)?.broadcast_as((groups, d, d))?.contiguous()
}

/// Calls `check` for all devices, sizes and dtypes, with a tolerance that grows with the size.
fn everywhere(check: impl Fn(&Device, DType, (usize, usize), f64, &str) -> Result<()>) -> Result<()> {
    for device in devices() {
        for dtype in [DType::F64, DType::F32] {
            for (groups, d) in SIZES {
                let what = format!("{groups} of {d} x {d}, {dtype:?} {:?}", device.location());
                check(&device, dtype, (groups, d), tolerance(dtype) * (d as f64).sqrt(), &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn eigendecompositions() -> Result<()> {
    everywhere(|device, dtype, (groups, d), close, what| {
        let m = rounded_spd(1, groups, d, dtype)?;
        let here = m.to_dtype(dtype)?.to_device(device)?;
        let found = eigh(&here, "m")?;
        let (values, q) = (back(&found.values, &here)?, back(&found.vectors, &here)?);
        assert_close(&values, &eigh(&m, "m")?.values, close, &format!("eigenvalues, {what}"));
        let product = q.broadcast_mul(&values.unsqueeze(1)?)?.matmul(&transposed(&q)?)?;
        assert_close(&product, &m, close, &format!("Q D Q^T, {what}"));
        assert_close(&transposed(&q)?.matmul(&q)?, &identity(groups, d)?, close, &format!("Q^T Q, {what}"));

        let other = rounded_spd(2, groups, d, dtype)?;
        let found = generalized_eigh(&here, &other.to_dtype(dtype)?.to_device(device)?, "m")?;
        let (values, k) = (back(&found.values, &here)?, back(&found.vectors, &here)?);
        let within = |m: &Tensor| transposed(&k)?.matmul(m)?.matmul(&k);
        assert_close(&within(&m)?, &identity(groups, d)?, 10.0 * close, &format!("K^T B K, {what}"));
        let diagonal = identity(groups, d)?.broadcast_mul(&values.unsqueeze(1)?)?;
        assert_close(&within(&other)?, &diagonal, 10.0 * close, &format!("K^T C K, {what}"));
        Ok(())
    })
}

#[test]
fn inverses() -> Result<()> {
    everywhere(|device, dtype, (groups, d), close, what| {
        let m = rounded_spd(1, groups, d, dtype)?;
        let here = m.to_dtype(dtype)?.to_device(device)?;
        let lower = back(&cholesky(&here, "m")?, &here)?;
        assert_close(&lower, &cholesky(&m, "m")?, 10.0 * close, &format!("Cholesky factor, {what}"));
        let exact = inverse_spd(&m, "m")?;
        let inverse = back(&inverse_spd(&here, "m")?, &here)?;
        assert_close(&inverse, &exact, 10.0 * close, &format!("inverse, {what}"));
        assert_close(&transposed(&inverse)?, &inverse, 0.0, &format!("symmetry, {what}"));

        let first = newton_inverse(&here, None, NewtonOptions::new(dtype), "m")?;
        let found = back(&first.inverse, &here)?;
        assert_close(&found, &exact, 30.0 * close, &format!("Newton's inverse, {what}"));
        let moved = rounded_spd(3, groups, d, dtype)?;
        let near = ((&m * 0.95)? + (moved * 0.05)?)?;
        let start = Some(&first.inverse);
        let next =
            newton_inverse(&near.to_dtype(dtype)?.to_device(device)?, start, NewtonOptions::new(dtype), "m")?;
        let found = back(&next.inverse, &here)?;
        assert_close(&found, &inverse_spd(&near, "m")?, 30.0 * close, &format!("from a start, {what}"));
        Ok(())
    })
}

#[test]
fn kronecker_products() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F64, DType::F32] {
            let (a, g) = (rounded_spd(1, 3, 5, dtype)?, rounded_spd(2, 3, 4, dtype)?);
            let dead = Tensor::zeros((3, 4, 4), DType::F64, &Device::Cpu)?;
            let shifts = rounded(4, &[3], dtype)?;
            let all = |here: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Vec<Tensor>> {
                let (a, g) = (here(&a)?, here(&g)?);
                let (values_a, values_g) = (eigh(&a, "a")?.values, eigh(&g, "g")?.values);
                Ok(vec![
                    kron::pi_split(&a, &g, "x")?,
                    kron::pi_split(&a, &here(&dead)?, "x")?,
                    kron::add_diagonal(&a, 0.25, "x")?,
                    kron::add_diagonal_each(&g, &here(&shifts)?, "x")?,
                    kron::kron(&a, &g, "x")?,
                    kron::log_det(&values_a, &values_g, 0.1, "x")?.to_dtype(dtype)?,
                ])
            };
            let exact = all(&|t| Ok(t.clone()))?;
            let found = all(&|t| t.to_dtype(dtype)?.to_device(&device))?;
            for (part, (found, exact)) in found.iter().zip(&exact).enumerate() {
                let what = format!("result {part} {dtype:?} {:?}", device.location());
                assert_exact(found, exact, &device, 1.0, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn what_has_no_decomposition_is_refused() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F64, DType::F32] {
            let cpu = &Device::Cpu;
            let indefinite = Tensor::new(&[[[1f64, 2.0], [2.0, 1.0]]], cpu)?.to_dtype(dtype)?;
            let indefinite = indefinite.to_device(&device)?;
            assert_says(cholesky(&indefinite, "block fc1"), &["block fc1"]);
            assert_says(inverse_spd(&indefinite, "block fc1"), &["block fc1"]);
            let broken = Tensor::full(f64::NAN, (1, 3, 3), cpu)?.to_dtype(dtype)?.to_device(&device)?;
            assert_says(eigh(&broken, "block fc1"), &["block fc1"]);
            assert_says(inverse_spd(&broken, "block fc1"), &["block fc1"]);
        }
    }
    Ok(())
}
