//! What the tests of the operations share.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::rng;
use crate::gpu::emulate::emulate;

/// Standard normal numbers in f64, from the random stream `stream`.
pub(crate) fn random(stream: u64, dims: &[usize]) -> Result<Tensor> {
    let values = (0..dims.iter().product::<usize>() as u64).map(|i| rng::normal(1, stream, i));
    Tensor::from_vec(values.collect::<Vec<_>>(), dims, &Device::Cpu)
}

/// The same, as a variable.
pub(crate) fn random_var(stream: u64, dims: &[usize]) -> Result<Var> {
    Var::from_tensor(&random(stream, dims)?)
}

/// [`random`] rows, with large, infinite and NaN numbers in every row of five but the last.
pub(crate) fn extreme(dims: [usize; 2]) -> Result<Tensor> {
    let [n, d] = dims;
    let mut x = values(&random(0, &dims)?)?;
    for row in 0..n {
        let at = |i: usize| row * d + i;
        match row % 5 {
            0 => (0..d).for_each(|i| x[at(i)] = if i % 3 == 0 { -1e4 } else { 1e4 }),
            1 => (1..d).for_each(|i| x[at(i)] = f64::NEG_INFINITY),
            2 => (0..d / 2).for_each(|i| x[at(i)] = f64::NEG_INFINITY),
            3 => x[at(d - 1)] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][row / 5 % 3],
            _ => {}
        }
    }
    Tensor::from_vec(x, &dims, &Device::Cpu)
}

/// The elements in f64, in row-major order.
pub(crate) fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Panics unless all elements lie within `tolerance`, relative to the largest expected number and at least to 1, and are NaN
/// where NaN is expected.
#[track_caller]
pub(crate) fn assert_close(x: &Tensor, expected: &[f64], tolerance: f64) {
    let x = values(x).expect("readable");
    assert_eq!(x.len(), expected.len());
    let scale = expected.iter().fold(1f64, |m, v| m.max(v.abs()));
    for (at, (a, b)) in x.iter().zip(expected).enumerate() {
        let near = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance * scale;
        assert!(near, "element {at} is {a}, expected {b} at scale {scale}");
    }
}

/// Compares the gradients of `sum_i c_i f(args)_i`, for fixed random `c`, with central differences in f64.
#[track_caller]
pub(crate) fn check_gradients(args: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let loss = |args: &[Tensor]| -> Result<Tensor> {
        let y = f(args)?;
        y.mul(&random(99, y.dims())?)?.sum_all()
    };
    let tensors: Vec<Tensor> = args.iter().map(|a| a.as_tensor().clone()).collect();
    let grads = loss(&tensors).and_then(|l| l.backward()).expect("a gradient");
    for (at, arg) in args.iter().enumerate() {
        let flat = values(arg).expect("readable");
        let h = 1e-5;
        let moved = |i: usize, h: f64| -> Result<f64> {
            let mut flat = flat.clone();
            flat[i] += h;
            let mut tensors = tensors.clone();
            tensors[at] = Tensor::from_vec(flat, arg.dims(), &Device::Cpu)?;
            loss(&tensors)?.to_scalar()
        };
        let differences: Result<Vec<f64>> =
            (0..flat.len()).map(|i| Ok((moved(i, h)? - moved(i, -h)?) / (2. * h))).collect();
        assert_close(grads.get(arg).expect("a gradient"), &differences.expect("finite"), 1e-8);
    }
}

/// The gradient of `sum(weights * f(x))` for weights 1, 2, ...
pub(crate) fn gradient(x: &Var, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<f64>> {
    let y = f(x)?;
    let weights = Tensor::arange(1., 1. + y.elem_count() as f64, &Device::Cpu)?.reshape(y.shape())?;
    let grads = (y.to_dtype(DType::F64)? * weights)?.sum_all()?.backward()?;
    match grads.get(x) {
        Some(grad) => values(grad),
        None => candle_core::bail!("no gradient"),
    }
}

/// Panics unless `run` gives the same under emulation as on the CPU.
#[track_caller]
pub(crate) fn assert_emulated(run: impl Fn() -> Result<Vec<Tensor>>, tolerance: f64) -> Result<()> {
    let (found, expected) = (emulate(&run)?, run()?);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found.dims(), expected.dims());
        assert_close(found, &values(expected)?, tolerance);
    }
    Ok(())
}
