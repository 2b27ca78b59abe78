//! A step of Adam on the host in one pass over the parameters.

use super::element::Host;
use super::simd::vectorized;
use candle_core::{Device, Result, Tensor, bail};
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

/// What a step leads to.
pub(crate) struct Stepped {
    pub value: Tensor,
    pub mean: Tensor,
    pub square: Tensor,
    /// Whether all values are finite.
    pub finite: bool,
}

impl AdamStep {
    /// The value and both averages after a step on a gradient, from `[value, gradient, mean, square]` in f32 on the CPU; numbers that are too
    /// small to count are zero.
    ///
    /// # Errors
    /// If dtypes differ.
    pub fn one_pass(&self, tensors: [&Tensor; 4]) -> Result<Stepped> {
        let hosts = tensors.map(Host::of);
        let [value, grad, mean, square] = hosts.each_ref().map(|host| host.values::<f32>());
        let (value, grad, mean, square) = (value?, grad?, mean?, square?);
        let len = value.len();
        if [grad.len(), mean.len(), square.len()] != [len; 3] {
            bail!("adam: expected tensors of one shape, got {:?}", tensors.map(Tensor::dims))
        }
        let (b1, b2) = (self.beta1 as f32, self.beta2 as f32);
        let (c1, c2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let [bias1, bias2] = self.bias.map(|bias| (1.0 / bias) as f32);
        let (lr, eps, kept) = (self.lr as f32, self.eps as f32, self.kept as f32);
        let mut new = [(); 3].map(|()| Vec::with_capacity(len));
        let [values, means, squares] =
            new.each_mut().map(|new: &mut Vec<f32>| new.spare_capacity_mut()[..len].par_chunks_mut(CHUNK));
        let old = value.par_chunks(CHUNK).zip(grad.par_chunks(CHUNK));
        let old = old.zip(mean.par_chunks(CHUNK).zip(square.par_chunks(CHUNK)));
        let chunks = values.zip(means.zip(squares)).zip(old);
        let finite = chunks.map(|((values, (means, squares)), ((value, grad), (mean, square)))| {
            vectorized(
                #[inline(always)]
                || {
                    let mut off = false;
                    let new = values.iter_mut().zip(means.iter_mut().zip(squares.iter_mut()));
                    let old = value.iter().zip(grad).zip(mean.iter().zip(square));
                    for ((new_value, (new_mean, new_square)), ((value, grad), (mean, square))) in new.zip(old)
                    {
                        let g = flushed(*grad, LEAST);
                        let mean = flushed(mean * b1 + g * c1, LEAST);
                        let square = flushed(square * b2 + g * g * c2, LEAST * LEAST);
                        let direction = mean * bias1 / ((square * bias2).sqrt() + eps);
                        let value = flushed(value * kept - direction * lr, LEAST);
                        // Nothing finite times 0 is not 0.
                        off |= value * 0.0 != 0.0;
                        new_value.write(value);
                        new_mean.write(mean);
                        new_square.write(square);
                    }
                    !off
                },
            )
        });
        let finite = finite.reduce(|| true, |a, b| a & b);
        let tensor = |mut values: Vec<f32>| {
            // SAFETY: the chunks of all arrays cover `len` elements, and each of them has been written.
            unsafe { values.set_len(len) };
            Tensor::from_vec(values, tensors[0].shape(), &Device::Cpu)
        };
        let [value, mean, square] = new;
        Ok(Stepped { value: tensor(value)?, mean: tensor(mean)?, square: tensor(square)?, finite })
    }
}
