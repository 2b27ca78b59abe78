//! Dropout, random as in candle_nn or reproducible from a seed and a step.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use candle_core::{ModuleT, Result, Tensor, bail};

use crate::ops::dropout::dropout;

/// Sets each element to 0 with probability `p` in training and divides the others by `1 - p`; the identity otherwise.
///
/// Built by [`Dropout::seeded`], the mask is a function of the seed, the step and the element's place: two passes in one
/// step drop the same elements, and a resumed run drops what the uninterrupted one would.
#[derive(Clone, Debug)]
pub struct Dropout {
    drop_p: f32,
    seed: Option<u64>,
    /// Shared by the clones of a layer.
    step: Arc<AtomicU64>,
    first_row: Arc<AtomicU64>,
}

impl Dropout {
    /// candle_nn's: the mask comes from the device's random numbers, which candle cannot seed on the CPU. `forward` fails in
    /// training unless `drop_p` is in [0, 1).
    pub fn new(drop_p: f32) -> Self {
        Self { drop_p, seed: None, step: Arc::default(), first_row: Arc::default() }
    }

    /// The reproducible kind, at step 0. Layers of equal seed drop equal places: give each its own.
    ///
    /// # Errors
    /// Unless `drop_p` is in [0, 1).
    pub fn seeded(drop_p: f32, seed: u64) -> Result<Self> {
        let layer = Self { seed: Some(seed), ..Self::new(drop_p) };
        layer.check()?;
        Ok(layer)
    }

    /// Moves a seeded layer, and its clones, to the mask of `step`, below 2^63. Without effect on other layers.
    pub fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// The step last set.
    pub fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// Says to a seeded layer, and its clones, which row of the whole batch the first row of what comes next is; 0 at first. Rows are along
    /// the first dimension. So the parts of a batch, of several processes or micro-batches, lose together what the whole batch would.
    pub fn set_first_row(&self, row: u64) {
        self.first_row.store(row, Ordering::Relaxed);
    }

    fn check(&self) -> Result<()> {
        if !(0. ..1.).contains(&self.drop_p) {
            bail!("dropout: expected a probability in [0, 1), got {}", self.drop_p)
        }
        Ok(())
    }

    /// Drops elements of `xs` if `train`.
    ///
    /// # Errors
    /// In training unless `drop_p` is in [0, 1), and for a tensor that is not of a floating point type.
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if !train {
            return Ok(xs.clone());
        }
        self.check()?;
        let Some(seed) = self.seed else { return candle_nn::ops::dropout(xs, self.drop_p) };
        // The lower half of the streams belongs to the samples of labels.
        let elements_of_a_row = xs.elem_count() / xs.dims().first().copied().unwrap_or(1).max(1);
        let first = self.first_row.load(Ordering::Relaxed).wrapping_mul(elements_of_a_row as u64);
        dropout(xs, self.drop_p.into(), seed, self.step() | 1 << 63, first)
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(xs, train)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    fn mask(layer: &Dropout, n: usize) -> Result<Vec<f32>> {
        layer.forward(&Tensor::ones(n, DType::F32, &Device::Cpu)?, true)?.to_vec1()
    }

    #[test]
    fn frequencies_and_scale() -> Result<()> {
        let n = 100_001;
        for p in [0f32, 0.1, 0.5, 0.9] {
            for layer in [Dropout::seeded(p, 3)?, Dropout::new(p)] {
                let mask = mask(&layer, n)?;
                let kept = mask.iter().filter(|&&m| m != 0.).count() as f64 / n as f64;
                let expected = 1. - f64::from(p);
                let deviation = (expected * (1. - expected) / n as f64).sqrt();
                assert!((kept - expected).abs() <= 5. * deviation, "{kept} {expected}");
                assert!(mask.iter().all(|&m| m == 0. || (f64::from(m) * expected - 1.).abs() < 1e-6));
            }
        }
        Ok(())
    }

    #[test]
    fn the_mask_follows_seed_and_step() -> Result<()> {
        let layer = Dropout::seeded(0.5, 3)?;
        let first = mask(&layer, 1000)?;
        assert_eq!(mask(&layer, 1000)?, first);
        assert_ne!(mask(&Dropout::seeded(0.5, 4)?, 1000)?, first);
        layer.clone().set_step(1);
        assert_eq!(layer.step(), 1);
        assert_ne!(mask(&layer, 1000)?, first);
        layer.set_step(0);
        assert_eq!(mask(&layer, 1000)?, first);
        Ok(())
    }

    #[test]
    fn parts_lose_what_the_whole_batch_does() -> Result<()> {
        // Rows of 5 elements do not begin where the random words do.
        for columns in [4, 5] {
            let layer = Dropout::seeded(0.4, 3)?;
            let of = |from: u64, rows: usize| -> Result<Vec<f32>> {
                layer.set_first_row(from);
                let x = Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?;
                layer.forward(&x, true)?.flatten_all()?.to_vec1()
            };
            let whole = of(0, 3000)?;
            assert_eq!([of(0, 1)?, of(1, 1707)?, of(1708, 1292)?].concat(), whole);
            assert_ne!(of(1, 3000)?, whole);
        }
        Ok(())
    }

    #[test]
    fn evaluation_gradients_and_refusals() -> Result<()> {
        let x = Var::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu)?;
        let layer = Dropout::seeded(0.5, 3)?;
        assert_eq!(layer.forward_t(&x, false)?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        let y = layer.forward_t(&x, true)?;
        let grads = y.sum_all()?.backward()?;
        let from_grad = grads.get(&x).map(|g| g * x.as_tensor()).transpose()?;
        assert_eq!(from_grad.map(|g| g.to_vec2::<f32>()).transpose()?, Some(y.to_vec2::<f32>()?));
        assert_eq!(layer.forward(&x.to_dtype(DType::BF16)?, true)?.dtype(), DType::BF16);
        for p in [-0.1, 1., f32::NAN] {
            assert!(Dropout::seeded(p, 0).is_err());
            assert!(Dropout::new(p).forward(&x, true).is_err());
        }
        Ok(())
    }
}
