//! A scalar that has been computed, with its gradient.

use std::sync::{Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};

/// `dL/dw` of `dL/dvalue`, one for each argument.
pub(crate) type Backward = dyn Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync;

/// Gives a value that is known its place in candle's graph.
///
/// The value and its gradient have passes over the weights in common, more than the storages that candle hands to an operation
/// let it keep: so the value is computed first, and the operation only passes it on.
struct Known {
    name: &'static str,
    value: Mutex<Option<Storage>>,
    backward: Box<Backward>,
}

impl Known {
    fn take(&self) -> Result<Storage> {
        match self.value.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(value) => Ok(value),
            None => bail!("{}: the operation was run a second time", self.name),
        }
    }

    fn take_cpu(&self) -> Result<(CpuStorage, Shape)> {
        Ok((crate::gpu::into_cpu(self.take()?)?, Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn take_cuda(&self) -> Result<(CudaStorage, Shape)> {
        Ok((crate::gpu::into_cuda(self.take()?)?, Shape::from(())))
    }
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok((self.backward)(grad)?.pop())
    }
}

impl CustomOp2 for Known {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = (self.backward)(grad)?.into_iter();
        Ok((grads.next(), grads.next()))
    }
}

/// The scalar `value` as a function of `w`.
pub(crate) fn of_one(
    name: &'static str,
    w: &Tensor,
    value: Storage,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward = Box::new(move |grad: &Tensor| Ok(vec![backward(grad)?]));
    w.apply_op1(Known { name, value: Mutex::new(Some(value)), backward })
}

/// The scalar `value` as a function of two tensors.
pub(crate) fn of_two(
    name: &'static str,
    [a, b]: [&Tensor; 2],
    value: Storage,
    backward: impl Fn(&Tensor) -> Result<[Tensor; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward = Box::new(move |grad: &Tensor| Ok(Vec::from(backward(grad)?)));
    a.apply_op2(b, Known { name, value: Mutex::new(Some(value)), backward })
}
