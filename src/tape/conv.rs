//! The tapped convolution: forward, gradients and the record all speak of the same patches.

use super::{Inputs, Owed, Record, Tap};
use crate::ops::conv as op;
use crate::ops::patches::ConvShape;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};

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
    // Other devices compute the value from candle's own ops; the op below then only carries it into the graph.
    let value = if x.device().is_cpu() {
        None
    } else {
        Some(op::conv_compose(&x.detach(), &weight.detach(), bias.map(|b| b.detach()).as_ref(), &shape)?)
    };
    let op = Conv { tap, shape, value };
    match bias {
        Some(bias) => x.apply_op3(weight, bias, op),
        None => x.apply_op2(weight, op),
    }
}

struct Conv {
    tap: Option<Tap>,
    shape: ConvShape,
    value: Option<Tensor>,
}

impl Conv {
    fn carried(&self) -> Result<(CudaStorage, Shape)> {
        let Some(value) = &self.value else { bail!("convolution: no value for this device") };
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            _ => bail!("convolution: expected a CUDA tensor, found one on {:?}", value.device().location()),
        }
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
            tap.record(&Record { inputs, grads: gy.flatten_from(2)?.transpose(1, 2)? })?;
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
        op::conv_cpu(x, x_l, w, w_l, Some((b, b_l)), &self.shape)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.carried()
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
        op::conv_cpu(x, x_l, w, w_l, None, &self.shape)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.carried()
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
