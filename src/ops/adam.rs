//! A step of Adam on the host in one pass over the parameters.

use super::element::Host;
use super::simd::vectorized;
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// Elements that a thread takes at once.
pub(crate) const CHUNK: usize = 1 << 14;
/// Of averages of gradients the least that is not zero. Without an input a gradient is zero for ever, and below f32's normal range every
/// operation takes many times as long.
pub(crate) const LEAST: f32 = 1e-18;

/// `value`, or zero where it is smaller than `least`.
#[inline(always)]
pub(crate) fn flushed(value: f32, least: f32) -> f32 {
    if value.abs() < least { 0.0 } else { value }
}

/// The numbers of a step.
pub(crate) struct AdamStep {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub lr: f64,
    /// What multiplies the values before: 1 without decay.
    pub kept: f64,
    /// `1 - beta^steps` of both averages.
    pub bias: [f64; 2],
}

impl AdamStep {
    /// The value and both averages after a step on a gradient, from `[value, gradient, mean, square]` in f32 on the CPU; numbers that are too
    /// small to count are zero.
    ///
    /// # Errors
    /// If dtypes differ.
    pub fn one_pass(&self, tensors: [&Tensor; 4]) -> Result<[Tensor; 3]> {
        let shape = tensors[0].shape();
        let read = |t: &Tensor| -> Result<Vec<f32>> { Ok(Host::of(t).values::<f32>()?.into_owned()) };
        let mut value = read(tensors[0])?;
        let (mut mean, mut square) = (read(tensors[2])?, read(tensors[3])?);
        let host = Host::of(tensors[1]);
        let grad = host.values::<f32>()?;
        let (b1, b2) = (self.beta1 as f32, self.beta2 as f32);
        let (c1, c2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let [bias1, bias2] = self.bias.map(|bias| (1.0 / bias) as f32);
        let (lr, eps, kept) = (self.lr as f32, self.eps as f32, self.kept as f32);
        let chunks = value.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
        chunks.zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK))).for_each(
            |((value, grad), (mean, square))| {
                vectorized(
                    #[inline(always)]
                    || {
                        for (((value, grad), mean), square) in
                            value.iter_mut().zip(grad).zip(mean).zip(square)
                        {
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
        Ok([tensor(value)?, tensor(mean)?, tensor(square)?])
    }
}
