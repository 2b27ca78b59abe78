//! AdamW.

use super::update::{At, CHUNK, LEAST, State, Update, decay, flushed, in_range};
use crate::ops::element::Host;
use crate::ops::simd::vectorized;
use crate::optim::ParamsAdamW;
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

impl Update for ParamsAdamW {
    const NAME: &'static str = "adamw";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, beta1, beta2, eps, weight_decay } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("beta1", beta1)?;
        decay("beta2", beta2)?;
        in_range("eps", eps, eps > 0.0, "above 0")?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")
    }

    fn adam(&self) -> Option<ParamsAdamW> {
        Some(self.clone())
    }

    fn state(&self, value: &Tensor) -> Result<State> {
        Ok(vec![("average0", value.zeros_like()?), ("average1", value.zeros_like()?)])
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let &Self { beta1, beta2, eps, .. } = self;
        let bias = |beta: f64| 1.0 - beta.powf(at.step as f64);
        if value.dtype() == DType::F32 && value.device().is_cpu() {
            return one_pass(self, at, bias(beta1), bias(beta2), [value, grad, &state[0], &state[1]]);
        }
        let m = ((&state[0] * beta1)? + (grad * (1.0 - beta1))?)?;
        let v = ((&state[1] * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let mean = (&m / bias(beta1))?;
        let scale = ((&v / bias(beta2))?.sqrt()? + eps)?;
        let kept = (value * (1.0 - at.lr * at.weight_decay))?;
        Ok(((kept - ((mean / scale)? * at.lr)?)?, vec![m, v]))
    }
}

/// A step of AdamW on the host: the same numbers, but those that are too small to count are zero.
fn one_pass(
    params: &ParamsAdamW,
    at: &At,
    bias1: f64,
    bias2: f64,
    tensors: [&Tensor; 4],
) -> Result<(Tensor, Vec<Tensor>)> {
    let shape = tensors[0].shape();
    let read = |t: &Tensor| -> Result<Vec<f32>> { Ok(Host::of(t).values::<f32>()?.into_owned()) };
    let mut value = read(tensors[0])?;
    let (mut mean, mut square) = (read(tensors[2])?, read(tensors[3])?);
    let host = Host::of(tensors[1]);
    let grad = host.values::<f32>()?;
    let (b1, b2) = (params.beta1 as f32, params.beta2 as f32);
    let (c1, c2) = ((1.0 - params.beta1) as f32, (1.0 - params.beta2) as f32);
    let (bias1, bias2) = ((1.0 / bias1) as f32, (1.0 / bias2) as f32);
    let (lr, eps, kept) = (at.lr as f32, params.eps as f32, (1.0 - at.lr * at.weight_decay) as f32);
    let chunks = value.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
    chunks.zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK))).for_each(
        |((value, grad), (mean, square))| {
            vectorized(
                #[inline(always)]
                || {
                    for (((value, grad), mean), square) in value.iter_mut().zip(grad).zip(mean).zip(square) {
                        let g = flushed(*grad, LEAST);
                        *mean = flushed(*mean * b1 + g * c1, LEAST);
                        *square = flushed(*square * b2 + g * g * c2, LEAST * LEAST);
                        let direction = *mean * bias1 / ((*square * bias2).sqrt() + eps);
                        *value = flushed(*value * kept - direction * lr, LEAST);
                    }
                },
            )
        },
    );
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(value)?, vec![tensor(mean)?, tensor(square)?]))
}
