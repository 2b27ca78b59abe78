//! Where the `cuda_*` tests run, and how near to f64 a result has to be there.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor, Var, bail};

/// The first GPU. Without one the tests say so and pass, unless `KRONWAKE_REQUIRE_CUDA` is 1.
pub fn cuda() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var("KRONWAKE_REQUIRE_CUDA").is_ok_and(|value| value == "1");
            assert!(!required, "KRONWAKE_REQUIRE_CUDA=1, but there is no CUDA device: {error}");
            eprintln!("skipped: no CUDA device");
            None
        }
    }
}

/// The CPU, and the first GPU: what is said of every dtype holds on both. With `KRONWAKE_CUDA_ONLY=1` the GPU alone, where its time is short.
pub fn devices() -> Vec<Device> {
    let only = std::env::var("KRONWAKE_CUDA_ONLY").is_ok_and(|value| value == "1");
    std::iter::once(Device::Cpu).filter(|_| !only).chain(cuda()).collect()
}

/// What a result of `dtype` may differ from its exact value, relative to the largest element: sums of some hundred terms,
/// and in half types a handful of roundings.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

/// Asserts that `found` lies on `device` and is `exact`, of the CPU in f64, to `loose` times its dtype's tolerance.
#[track_caller]
pub fn assert_exact(found: &Tensor, exact: &Tensor, device: &Device, loose: f64, what: &str) {
    assert!(found.device().same_device(device), "{what}: lies on {:?}", found.device().location());
    let found_here = found.to_device(&Device::Cpu).unwrap();
    assert_eq!(found.dims(), exact.dims(), "{what}");
    if found.elem_count() > 0 {
        assert_close(&found_here, exact, loose * tolerance(found.dtype()), what);
    }
}

/// Random numbers as `dtype` rounds them, on the CPU in f64: what the exact result is computed from.
pub fn rounded(seed: u64, dims: &[usize], dtype: DType) -> Result<Tensor> {
    random(seed, dims)?.to_dtype(dtype)?.to_dtype(DType::F64)
}

/// A layout in memory of tensors that hold the same numbers.
#[derive(Debug, Clone, Copy)]
pub enum Lie {
    Contiguous,
    /// The first two dimensions swapped in memory.
    Turned,
    /// The second half of a tensor twice as long.
    Behind,
}

pub const LIES: [Lie; 3] = [Lie::Contiguous, Lie::Turned, Lie::Behind];

impl Lie {
    /// A Var with `values` in it, and the view of it that they are, `[n, ..]`.
    pub fn of(self, values: &Tensor) -> Result<(Var, Tensor)> {
        let (var, view) = match self {
            Lie::Turned if values.rank() > 1 => {
                let var = Var::from_tensor(&values.transpose(0, 1)?.contiguous()?)?;
                let view = var.transpose(0, 1)?;
                (var, view)
            }
            Lie::Behind => {
                let n = values.dim(0)?;
                let var = Var::from_tensor(&Tensor::cat(&[values, values], 0)?)?;
                let view = var.narrow(0, n, n)?;
                (var, view)
            }
            _ => {
                let var = Var::from_tensor(values)?;
                let view = var.as_tensor().clone();
                (var, view)
            }
        };
        if view.dims() != values.dims() {
            bail!("{self:?}: {:?} became {:?}", values.dims(), view.dims())
        }
        Ok((var, view))
    }
}
