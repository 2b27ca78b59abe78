//! The tapped convolution: forward, gradients and the record all speak of the same patches.

use super::{Inputs, Owed, Tap, per_output};
use crate::gpu::{self, Gpu, Operand};
use crate::ops::conv as op;
use crate::ops::conv_device::{gradients, outputs, products};
use crate::ops::patches::ConvShape;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail};
use std::sync::{Mutex, PoisonError};

/// The cross-correlation of `x` `[n, c, h, w]` with `weight` `[o, c / groups, kh, kw]`, plus `bias` `[o]`.
pub(crate) fn conv(
    name: &str,
    shape: ConvShape,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    tap: Option<Tap>,
) -> Result<Tensor> {
    if x.dtype() != weight.dtype() {
        bail!("layer {name}: the weight is {:?}, the input {:?}", weight.dtype(), x.dtype())
    }
    let products = match Gpu::of(x.device()) {
        Some(gpu) => Mutex::new(Some(products(&gpu, x, weight, &shape)?)),
        None => Mutex::default(),
    };
    let op = Conv { tap, shape, products };
    let bias = bias.map(|bias| per_output(name, bias, weight)).transpose()?;
    let bias = bias.as_ref();
    match bias {
        Some(bias) => x.apply_op3(weight, bias, op),
        None => x.apply_op2(weight, op),
    }
}

struct Conv {
    tap: Option<Tap>,
    shape: ConvShape,
    /// On a GPU, what the forward pass makes its values of.
    products: Mutex<Option<Vec<Tensor>>>,
}

impl Conv {
    fn cpu(
        &self,
        (x, x_l): (&CpuStorage, &Layout),
        (w, w_l): (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let Some(gpu) = Gpu::emulated() else { return op::conv_cpu(x, x_l, w, w_l, b, &self.shape) };
        let b = b.map(|(b, layout)| gpu.on_cpu(b, layout, "convolution")).transpose()?;
        let (y, shape) = self.gpu(&gpu, x_l.dims(), x.dtype(), b)?;
        Ok((gpu::into_cpu(y)?, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda(
        &self,
        (x, x_l): (&CudaStorage, &Layout),
        b: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let b = b.map(|(b, layout)| gpu.on_cuda(b, layout, "convolution")).transpose()?;
        let (y, shape) = self.gpu(&gpu, x_l.dims(), x.dtype(), b)?;
        Ok((gpu::into_cuda(y)?, shape))
    }

    fn gpu(&self, gpu: &Gpu, x: &[usize], dtype: DType, bias: Option<Operand>) -> Result<(Storage, Shape)> {
        let n = self.shape.input_batch("convolution", x)?;
        // Taken, so that the graph does not keep them.
        let products = self.products.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(products) = products else {
            bail!("convolution: applied twice, or not on the device it is for")
        };
        let y = outputs(gpu, &products, bias.as_ref(), &self.shape, n, dtype)?;
        let (oh, ow) = self.shape.output;
        Ok((y, Shape::from((n, self.shape.out_channels, oh, ow))))
    }

    /// Gradients of x, W and b, as far as they are owed; the record on the way.
    fn grads(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let owed = Owed::new(self.tap.as_ref(), x, w, b);
        let gy = gy.contiguous()?;
        if let (true, Some(tap)) = (owed.record, &self.tap) {
            let inputs = Inputs::Patches { x: x.detach(), shape: self.shape };
            tap.record(inputs, gy.flatten_from(2)?.transpose(1, 2)?)?;
        }
        if let Some(gpu) = Gpu::of(gy.device()) {
            let (of_x, of_w) = (owed.weight.then_some(x), owed.input.then_some(w));
            let of = (x.dim(0)?, gy.dtype());
            let (dx, dw) = gradients(&gpu, &gy.detach(), of_x, of_w, of, &self.shape)?;
            let db = if owed.bias { Some(op::grad_bias(&gy)?) } else { None };
            return Ok((dx, dw, db));
        }
        let dx = if owed.input { Some(op::grad_input(&gy, &w.detach(), &self.shape)?) } else { None };
        let dw = if owed.weight { Some(op::grad_weight(&x.detach(), &gy, &self.shape)?) } else { None };
        let db = if owed.bias { Some(op::grad_bias(&gy)?) } else { None };
        Ok((dx, dw, db))
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu((x, x_l), (w, w_l), Some((b, b_l)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_l: &Layout,
        _: &CudaStorage,
        _: &Layout,
        b: &CudaStorage,
        b_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda((x, x_l), Some((b, b_l)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.grads(x, w, Some(b), gy)
    }
}

impl CustomOp2 for Conv {
    fn name(&self) -> &'static str {
        "conv-no-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu((x, x_l), (w, w_l), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_l: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda((x, x_l), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.grads(x, w, None, gy)?;
        Ok((dx, dw))
    }
}
