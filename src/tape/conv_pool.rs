//! The tapped convolution whose outputs are pooled, and rectified, in the same operation, on the CPU or an NVIDIA GPU.

use super::{ExampleGrads, Inputs, Owed, Tap, per_output};
use crate::gpu::{self, Gpu, Operand};
use crate::ops::conv_device::{gradients, products};
use crate::ops::conv_pool::{PooledShape, conv_pool_cpu, grad_input, grad_output, grad_weight, sample_grads};
use crate::ops::conv_pool_device::{Unpooled, pooled_outputs};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The maxima of the windows of [`super::conv`]'s outputs, at least 0 with `relu`. The record's
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
    let products = match Gpu::of(x.device()) {
        Some(gpu) => Mutex::new(Some(products(&gpu, x, weight, &shape.conv)?)),
        None => Mutex::default(),
    };
    let op = ConvPool { tap, shape, relu, products, at: OnceLock::new() };
    let bias = bias.map(|bias| per_output(name, bias, weight)).transpose()?;
    let bias = bias.as_ref();
    match bias {
        Some(bias) => x.apply_op3(weight, bias, op),
        None => x.apply_op2(weight, op),
    }
}

struct ConvPool {
    tap: Option<Tap>,
    shape: PooledShape,
    relu: bool,
    /// On a GPU, what the forward pass makes its values of.
    products: Mutex<Option<Vec<Tensor>>>,
    /// The byte of each output, from the forward pass.
    at: OnceLock<Places>,
}

enum Places {
    Host(Vec<u8>),
    /// u8, in the shape of the outputs.
    Device(Tensor),
}

/// Of x, W and b, as far as they are owed.
type Grads = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl ConvPool {
    fn cpu(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(gpu) = Gpu::emulated() {
            let b = b.map(|(b, layout)| gpu.on_cpu(b, layout, "pooled conv2d")).transpose()?;
            let (y, shape) = self.gpu(&gpu, x.1.dims(), x.0.dtype(), b)?;
            return Ok((gpu::into_cpu(y)?, shape));
        }
        let (y, shape, at) = conv_pool_cpu(x, w, b, &self.shape, self.relu)?;
        // Set once: an op is applied to one tensor.
        self.at.get_or_init(|| Places::Host(at));
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda(
        &self,
        (x, x_l): (&CudaStorage, &Layout),
        b: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::Cuda(x.device.clone());
        let b = b.map(|(b, layout)| gpu.on_cuda(b, layout, "pooled conv2d")).transpose()?;
        let (y, shape) = self.gpu(&gpu, x_l.dims(), x.dtype(), b)?;
        Ok((gpu::into_cuda(y)?, shape))
    }

    fn gpu(&self, gpu: &Gpu, x: &[usize], dtype: DType, bias: Option<Operand>) -> Result<(Storage, Shape)> {
        let n = self.shape.conv.input_batch("pooled conv2d", x)?;
        // Taken, so that the graph does not keep them.
        let products = self.products.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(products) = products else {
            bail!("pooled conv2d: applied twice, or not on the device it is for")
        };
        let (y, at) = pooled_outputs(gpu, &products, bias.as_ref(), &self.shape, self.relu, n, dtype)?;
        let shape = at.shape().clone();
        self.at.get_or_init(|| Places::Device(at));
        Ok((y, shape))
    }

    /// Gradients of x, W and b, as far as they are owed; the record on the way.
    fn grads(&self, x: &Tensor, w: &Tensor, b: Option<&Tensor>, gy: &Tensor) -> Result<Grads> {
        let owed = Owed::new(self.tap.as_ref(), x, w, b);
        match (self.at.get(), Gpu::of(x.device())) {
            (Some(Places::Host(at)), _) => self.cpu_grads(&owed, x, w, gy, at),
            (Some(Places::Device(at)), Some(gpu)) => {
                let gy = Unpooled::new(gy, at, &self.shape)?;
                self.record(&owed, x, || gy.record(&gpu))?;
                let (of_x, of_w) = (owed.weight.then_some(x), owed.input.then_some(w));
                let of = (x.dim(0)?, x.dtype());
                let (dx, dw) = gradients(&gpu, &gy, of_x, of_w, of, &self.shape.conv)?;
                let db = if owed.bias { Some(gy.bias(&gpu)?) } else { None };
                Ok((dx, dw, db))
            }
            _ => bail!("pooled conv2d: backward without a forward pass on the same device"),
        }
    }

    fn record(&self, owed: &Owed, x: &Tensor, grads: impl Fn() -> Result<Tensor>) -> Result<()> {
        if let (true, Some(tap)) = (owed.record, &self.tap) {
            let inputs = Inputs::Patches { x: x.detach(), shape: self.shape.conv };
            tap.record(inputs, grads()?)?;
        }
        Ok(())
    }

    fn cpu_grads(&self, owed: &Owed, x: &Tensor, w: &Tensor, gy: &Tensor, at: &[u8]) -> Result<Grads> {
        match self.tap.as_ref().filter(|tap| owed.record && tap.takes_examples(x.dtype())) {
            Some(tap) => {
                // The one gradient of a window that is not 0 is all that an example's sums need.
                let (weight, bias) = sample_grads(x, gy, at, &self.shape)?;
                tap.examples(ExampleGrads { weight, bias })?;
            }
            None => {
                self.record(owed, x, || grad_output(gy, at, &self.shape)?.flatten_from(2)?.transpose(1, 2))?
            }
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
