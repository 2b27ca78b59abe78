//! The tapped convolution whose outputs are pooled, and rectified, in the same CPU operation.

use super::{Inputs, Owed, Record, Tap};
use crate::ops::conv_pool::{PooledShape, conv_pool_cpu, grad_input, grad_output, grad_weight};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use std::sync::OnceLock;

/// The maxima of the windows of [`super::conv`]'s outputs, at least 0 with `relu`; tensors are on the CPU. The record's
/// gradients are those of the convolution's outputs.
pub(crate) fn conv_pool(
    name: &str,
    shape: PooledShape,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    relu: bool,
    tap: Option<Tap>,
) -> Result<Tensor> {
    if x.dtype() != weight.dtype() {
        bail!("layer {name}: the weight is {:?}, the input {:?}", weight.dtype(), x.dtype())
    }
    let op = ConvPool { tap, shape, relu, at: OnceLock::new() };
    match bias {
        Some(bias) => x.apply_op3(weight, bias, op),
        None => x.apply_op2(weight, op),
    }
}

struct ConvPool {
    tap: Option<Tap>,
    shape: PooledShape,
    relu: bool,
    /// The byte of each output, from the forward pass.
    at: OnceLock<Vec<u8>>,
}

impl ConvPool {
    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape, at) = conv_pool_cpu(x, w, b, &self.shape, self.relu)?;
        // Set once: an op is applied to one tensor.
        self.at.get_or_init(|| at);
        Ok((y, shape))
    }

    /// Gradients of x, W and b, as far as they are owed; the record on the way.
    fn grads(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(at) = self.at.get() else { bail!("pooled conv2d: backward without a forward pass") };
        let owed = Owed::new(self.tap.as_ref(), x, w, b);
        if let (true, Some(tap)) = (owed.record, &self.tap) {
            tap.record(&Record {
                inputs: Inputs::Patches { x: x.detach(), shape: self.shape.conv },
                grads: grad_output(gy, at, &self.shape)?.flatten_from(2)?.transpose(1, 2)?,
            })?;
        }
        let (mut dw, mut db) = (None, None);
        if owed.weight || owed.bias {
            let (weight, bias) = grad_weight(x, gy, at, &self.shape)?;
            (dw, db) = (owed.weight.then_some(weight), owed.bias.then_some(bias));
        }
        let dx = if owed.input { Some(grad_input(gy, at, w, &self.shape)?) } else { None };
        Ok((dx, dw, db))
    }
}

impl CustomOp3 for ConvPool {
    fn name(&self) -> &'static str {
        "conv-pool"
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
        self.forward((x, x_l), (w, w_l), Some((b, b_l)))
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

impl CustomOp2 for ConvPool {
    fn name(&self) -> &'static str {
        "conv-pool-no-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_l), (w, w_l), None)
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
