//! Second moments that are gathered and computed together.

use candle_core::{DType, Result, Tensor, bail};

use super::dense::mix;
use super::factor::host_second_moment;
use super::factor_device::Job;
use super::factor_launch::launch;
use super::factor_tiles::Precision;
use super::patch_moment::host_patch_moment;
use super::patches::ConvShape;
use super::record_layout::record_shape;
use crate::gpu::Gpu;

/// How a second moment `M` enters a sum or an average: `decay bar + keep last + weight M`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Average<'a> {
    /// `(bar, decay)`.
    pub bar: Option<(&'a Tensor, f64)>,
    /// `(last, keep)`.
    pub last: Option<(&'a Tensor, f64)>,
    pub weight: f64,
}

impl<'a> Average<'a> {
    /// `M` times a number.
    pub fn times(weight: f64) -> Self {
        Self { bar: None, last: None, weight }
    }

    pub fn terms(&self) -> impl Iterator<Item = (&'a Tensor, f64)> {
        self.bar.into_iter().chain(self.last)
    }

    /// That the average is one of second moments `[groups, size, size]` of `x`.
    fn check(&self, x: &Tensor, groups: usize, size: usize, name: &str) -> Result<()> {
        let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        for (bar, _) in self.terms() {
            if bar.dims() != [groups, size, size]
                || bar.dtype() != dtype
                || !bar.device().same_device(x.device())
            {
                bail!(
                    "{name}: expected an average {dtype:?} [{groups}, {size}, {size}] on {:?}, got {:?} {:?} on {:?}",
                    x.device().location(),
                    bar.dtype(),
                    bar.dims(),
                    bar.device().location()
                )
            }
        }
        Ok(())
    }

    /// The average with a moment that was computed apart.
    pub fn add(&self, moment: Tensor) -> Result<Tensor> {
        let mut terms = self.terms();
        let Some((first, decay)) = terms.next() else {
            return if self.weight == 1.0 { Ok(moment) } else { moment * self.weight };
        };
        terms.try_fold(mix(first, decay, &moment, self.weight)?, |sum, (term, weight)| {
            mix(&sum, 1.0, term, weight)
        })
    }
}

/// Bytes of records that wait to be reduced on a GPU. Inputs are the graph's, which has them in any case, gradients are kept alive by
/// this alone. Records of half a GiB keep any GPU busy for a while, so that more of them in a launch would save nothing; and the number
/// does not depend on what memory is free, or the launches would, and with them the last bits of the factors.
const WAITING: usize = 512 << 20;

/// Second moments, each asked for where its rows are at hand.
///
/// On a CPU they are computed at once. On a GPU they are gathered, and what is returned holds no numbers before [`Moments::run`]. Until
/// then nothing may be written to the rows in place.
#[derive(Default)]
pub(crate) struct Moments {
    /// That of the jobs.
    gpu: Option<Gpu>,
    /// None reads what another one writes.
    waiting: Vec<Job>,
}

impl Moments {
    /// `decay bar + keep last + weight M` for the [`second_moment`](super::factor::second_moment) `M` of `x` `[n, t, features of all groups]`.
    ///
    /// # Errors
    /// As for `second_moment`, and if `bar` or `last` has not the shape and dtype of `M`, or lies on another device.
    pub fn of_rows(
        &mut self,
        average: Average,
        x: &Tensor,
        groups: usize,
        append_one: bool,
        name: &str,
    ) -> Result<Tensor> {
        let (_, _, dim) = record_shape(x, groups, name)?;
        average.check(x, groups, dim + usize::from(append_one), name)?;
        let Some(gpu) = Gpu::of(x.device()) else {
            return average.add(host_second_moment(x, groups, append_one, name)?);
        };
        let job = Job::of_rows(&gpu, average, x, (groups, append_one), Precision::chosen(), name)?;
        self.gather(gpu, job, average)
    }

    /// [`Moments::of_rows`] for the patches of `x` `[n, c, h, w]`, with the [`patch_moment`](super::factor::patch_moment) of `x`.
    ///
    /// # Errors
    /// As for `patch_moment` and [`Moments::of_rows`].
    pub fn of_patches(
        &mut self,
        average: Average,
        x: &Tensor,
        shape: &ConvShape,
        append_one: bool,
        name: &str,
    ) -> Result<Tensor> {
        let n = shape.input_batch(name, x.dims())?;
        average.check(x, shape.groups, shape.group_features() + usize::from(append_one), name)?;
        let Some(gpu) = Gpu::of(x.device()) else {
            return average.add(host_patch_moment(x, n, shape, append_one, name)?);
        };
        let job = Job::of_patches(&gpu, average, x, shape, append_one, Precision::chosen(), name)?;
        self.gather(gpu, job, average)
    }

    fn gather(&mut self, gpu: Gpu, job: Job, average: Average) -> Result<Tensor> {
        let result = job.out.clone();
        let apart = |other: &Job| {
            average.terms().any(|(term, _)| term.id() == other.out.id())
                || !other.out.device().same_device(result.device())
        };
        if self.waiting.iter().any(apart) {
            self.run()?;
        }
        self.gpu = Some(gpu);
        self.waiting.push(job);
        if self.waiting.iter().map(Job::bytes).sum::<usize>() > WAITING {
            self.run()?;
        }
        Ok(result)
    }

    /// Queues what was gathered.
    pub fn run(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        match self.gpu.take() {
            Some(gpu) => launch(&gpu, &waiting),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::{emulate, launches};
    use crate::ops::factor::{patch_moment, second_moment};
    use crate::ops::testing::{assert_close, random, values};

    fn zeros(dims: &[usize]) -> Result<Tensor> {
        Tensor::zeros(dims, DType::F32, &candle_core::Device::Cpu)
    }

    fn alone(average: Average, x: &Tensor, groups: usize, append_one: bool, name: &str) -> Result<Tensor> {
        let mut moments = Moments::default();
        let found = moments.of_rows(average, x, groups, append_one, name)?;
        moments.run()?;
        Ok(found)
    }

    #[test]
    fn nothing_and_too_much() -> Result<()> {
        let bar = (zeros(&[2, 3, 3])? + 1.0)?;
        let half = Average { bar: Some((&bar, 0.5)), ..Average::times(1.0) };
        for empty in [zeros(&[0, 3, 4])?, zeros(&[3, 0, 4])?] {
            assert_eq!(values(&emulate(|| alone(half, &empty, 2, true, "x"))?)?, [0.5; 18]);
        }
        let shape = ConvShape::new("test", &[0, 2, 4, 4], &[2, 2, 3, 3], (1, 1), (1, 1), (1, 1), 1)?;
        let found = emulate(|| patch_moment(&zeros(&[0, 2, 4, 4])?, &shape, false, "x"))?;
        assert_eq!(values(&found)?, [0.0; 324]);
        for (bar, place) in [(zeros(&[2, 2, 2])?, "[2, 2, 2]"), (bar.to_dtype(DType::F64)?, "F64")] {
            let wrong = [
                Average { bar: Some((&bar, 0.5)), ..Average::times(1.0) },
                Average { last: Some((&bar, 0.5)), ..Average::times(1.0) },
            ];
            for (average, on_gpu) in wrong.into_iter().flat_map(|average| [(average, false), (average, true)])
            {
                let run = || alone(average, &zeros(&[1, 3, 4])?, 2, true, "conv1");
                let result = if on_gpu { emulate(run) } else { run() };
                let message = result.expect_err("must fail").to_string();
                assert!(message.contains("conv1") && message.contains(place), "{message}");
            }
        }
        Ok(())
    }

    #[test]
    fn averages() -> Result<()> {
        let (x, bar, last) = (random(0, &[5, 2, 6])?, random(1, &[2, 3, 3])?, random(2, &[2, 3, 3])?);
        let moment = second_moment(&x, 2, false, "x")?;
        let both = Average { bar: Some((&bar, 0.75)), last: Some((&last, 2.0)), weight: 0.5 };
        for (average, exact) in [
            (both, ((&moment * 0.5)? + ((&bar * 0.75)? + (&last * 2.0)?)?)?),
            (Average { bar: None, ..both }, ((&moment * 0.5)? + (&last * 2.0)?)?),
            (Average::times(0.25), (&moment * 0.25)?),
        ] {
            assert_close(&alone(average, &x, 2, false, "x")?, &values(&exact)?, 1e-14);
            assert_close(&emulate(|| alone(average, &x, 2, false, "x"))?, &values(&exact)?, 1e-14);
        }
        Ok(())
    }

    #[test]
    fn what_follows_from_another_moment_comes_after_it() -> Result<()> {
        let x = random(0, &[5, 1, 3])?;
        let (found, kernels) = launches(|| {
            let mut moments = Moments::default();
            let mut sum = moments.of_rows(Average::times(1.0), &x, 1, false, "x")?;
            let other = moments.of_rows(Average::times(2.0), &x, 1, true, "x")?;
            for _ in 0..2 {
                let average = Average { bar: Some((&sum, 1.0)), ..Average::times(1.0) };
                sum = moments.of_rows(average, &x, 1, false, "x")?;
            }
            moments.run()?;
            moments.run()?;
            Ok::<_, candle_core::Error>((sum, other))
        });
        let (sum, other) = found?;
        assert_close(&sum, &values(&(second_moment(&x, 1, false, "x")? * 3.0)?)?, 1e-14);
        assert_close(&other, &values(&(second_moment(&x, 1, true, "x")? * 2.0)?)?, 1e-14);
        assert!(kernels.is_empty() || kernels.len() == 3, "{kernels:?}");
        Ok(())
    }
}
