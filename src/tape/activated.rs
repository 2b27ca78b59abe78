//! A tapped affine map and an activation behind it as one operation of the CPU: between the two lies no tensor of the graph, of which the
//! backward pass would add up gradients.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail, op::BackpropOp,
};

use super::Tap;
use super::affine::{Affine, operands};
use crate::gpu::Gpu;
use crate::ops::activation::Activation;

/// `f(x W^T + b)` for `x` `[.., in]`, `weight` `[out, in]` and `bias` `[out]`, where that is one operation: on the CPU in single or double
/// precision. The record of the layer is that of the map alone.
pub(crate) fn activated(
    name: &str,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    tap: Option<Tap>,
    activation: Activation,
) -> Result<Option<Tensor>> {
    let here = x.device().is_cpu() && Gpu::of(x.device()).is_none();
    if !here || !matches!(x.dtype(), DType::F32 | DType::F64) || bias.dims() != &weight.dims()[..1] {
        return Ok(None);
    }
    let (x, weight) = operands(name, x, weight)?;
    let op = Activated { affine: Affine { tap }, activation, before: OnceLock::new() };
    x.apply_op3(&weight, &bias.contiguous()?, op).map(Some)
}

struct Activated {
    affine: Affine,
    activation: Activation,
    /// The outputs of the map.
    before: OnceLock<Tensor>,
}

impl CustomOp3 for Activated {
    fn name(&self) -> &'static str {
        "affine-activated"
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
        let (before, shape) = CustomOp3::cpu_fwd(&self.affine, x, x_l, w, w_l, b, b_l)?;
        let y = self.activation.of_storage(&before, &Layout::contiguous(&shape))?;
        let before = Tensor::from_storage(Storage::Cpu(before), shape.clone(), BackpropOp::none(), false);
        // Twice only where one operation were applied twice, to the same.
        let _ = self.before.set(before);
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(before) = self.before.get() else {
            bail!("linear layer: a backward pass without a forward pass")
        };
        self.affine.grads(x, w, Some(b), &self.activation.gradient(before, gy)?)
    }
}
