//! Samples from the distribution that a model's outputs describe, drawn on the host, or on the GPU that the outputs are on.
//!
//! Both draw the same: a GPU's sample differs only where the last bits of a sum in f64 decide.
//! Every number is keyed by its global row, so that the micro-batches of a batch together draw what the whole batch would.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::rng;
use super::row_launch::{THREADS, a_team_each};
use crate::gpu::{Gpu, Grid, Module, args, typed};

/// Which draw it is. Equal keys give equal samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrawKey {
    /// Seed of the whole run.
    pub seed: u64,
    /// The optimizer's step, below 2^43.
    pub step: u64,
    /// The number of the draw within the step, below 2^20.
    pub draw: u64,
    /// The row of the whole batch that the first row of the tensor at hand is (0 unless the batch comes in parts).
    pub first_row: u64,
}

impl DrawKey {
    /// The random stream of a step's draw; the upper half of the streams is left to other uses.
    fn stream(&self) -> Result<u64> {
        if self.step >> 43 != 0 || self.draw >> 20 != 0 {
            bail!("a random draw has step {} and draw {}, expected below 2^43 and 2^20", self.step, self.draw)
        }
        Ok(self.step << 20 | self.draw)
    }
}

fn sizes(what: &str, logits: &Tensor) -> Result<(usize, usize)> {
    match *logits.dims() {
        [n, c] => Ok((n, c)),
        ref dims => bail!("{what}: expected logits [rows, classes], got {dims:?}"),
    }
}

/// `[rows, columns]` of `logits`, and its values in f64 in row-major order.
fn rows(what: &str, logits: &Tensor) -> Result<((usize, usize), Vec<f64>)> {
    let (n, c) = sizes(what, logits)?;
    let values = logits.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok(((n, c), values))
}

/// One class a row from softmax(`logits [n, c]`), by inverting the distribution function in f64 at one uniform number a
/// row. A logit of -inf has probability 0.
///
/// # Errors
/// On a logit that is NaN or +inf, and on a row without a finite logit.
pub fn categorical(logits: &Tensor, key: DrawKey) -> Result<Vec<u32>> {
    if let Some(gpu) = Gpu::of(logits.device()) {
        let labels = gpu_labels(&gpu, logits, key)?.to_vec1()?;
        return match labels.iter().position(|&label| label == NO_LABEL) {
            Some(row) => no_distribution(row),
            None => Ok(labels),
        };
    }
    let stream = key.stream()?;
    let ((n, c), values) = rows("categorical", logits)?;
    let mut labels = Vec::with_capacity(n);
    let mut cumulative = Vec::with_capacity(c);
    for row in 0..n {
        let logits = &values[row * c..][..c];
        // NaN is lost in `max` but not in the sum below.
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        cumulative.clear();
        cumulative.extend(logits.iter().scan(0., |sum, &v| {
            *sum += (v - max).exp();
            Some(*sum)
        }));
        let total = cumulative.last().copied().unwrap_or(f64::NAN);
        if !total.is_finite() {
            return no_distribution(row);
        }
        let target = rng::uniform(key.seed, stream, key.first_row + row as u64) * total;
        // The product may round up to the total; the last class that adds to it is then meant.
        let class = cumulative.partition_point(|&sum| sum <= target);
        let class = if class < c { class } else { cumulative.partition_point(|&sum| sum < total) };
        labels.push(class as u32);
    }
    Ok(labels)
}

fn no_distribution<T>(row: usize) -> Result<T> {
    bail!("categorical: row {row} has no distribution: a logit is NaN or +inf, or none is finite")
}

/// Independent 0/1 draws with probabilities sigmoid(`logits [n, c]`), in the shape, dtype and device of `logits`.
///
/// # Errors
/// On a logit that is NaN; on a GPU the draw is NaN there.
pub fn bernoulli(logits: &Tensor, key: DrawKey) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(logits.device()) {
        return gpu_draw(&gpu, "bernoulli", logits, key);
    }
    let stream = key.stream()?;
    let ((n, c), values) = rows("bernoulli", logits)?;
    let first = key.first_row * c as u64;
    let mut draws = Vec::with_capacity(n * c);
    for (at, logit) in values.into_iter().enumerate() {
        if logit.is_nan() {
            bail!("bernoulli: the logit in row {}, column {} is NaN", at / c, at % c)
        }
        let p = 1. / (1. + (-logit).exp());
        draws.push(if rng::uniform(key.seed, stream, first + at as u64) < p { 1f32 } else { 0. });
    }
    Tensor::from_vec(draws, (n, c), &Device::Cpu)?.to_dtype(logits.dtype())?.to_device(logits.device())
}

/// Independent standard normal draws in the shape `[n, c]`, dtype and device of `like`; its values are not read.
/// `outputs + normal(outputs, key)` is a sample of a model with Gaussian outputs of unit variance.
///
/// # Errors
/// When `like` does not have two dimensions.
pub fn normal(like: &Tensor, key: DrawKey) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(like.device()) {
        return gpu_draw(&gpu, "normal", like, key);
    }
    let stream = key.stream()?;
    let &[n, c] = like.dims() else {
        bail!("normal: expected a tensor [rows, columns], got {:?}", like.dims())
    };
    let first = key.first_row * c as u64;
    let draws: Vec<f64> = (0..(n * c) as u64).map(|at| rng::normal(key.seed, stream, first + at)).collect();
    Tensor::from_vec(draws, (n, c), &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())
}

/// The label of a row without a distribution.
const NO_LABEL: u32 = u32::MAX;

args! {
    /// The argument of `label` in `sample.cu`.
    struct LabelArgs {
        x: u64, labels: u64, rows: u64, d: u64, seed: u64, stream: u64, first: u64, block: u64,
    }
}

args! {
    /// The argument of `bernoulli` and `normal` in `sample.cu`.
    struct DrawArgs { x: u64, y: u64, len: u64, seed: u64, stream: u64, first: u64 }
}

/// [`categorical`] as u32 `[n]` on the logits' GPU, with the largest u32 for a row without a distribution.
pub(crate) fn gpu_labels(gpu: &Gpu, logits: &Tensor, key: DrawKey) -> Result<Tensor> {
    let stream = key.stream()?;
    let (n, c) = sizes("categorical", logits)?;
    if c == 0 || c > u32::MAX as usize {
        bail!("categorical: {c} classes found, expected between 1 and 2^32 - 1")
    }
    let logits = logits.detach().contiguous()?;
    let labels = gpu.tensor(n, DType::U32)?;
    let (x, out) = (gpu.operand(&logits, "categorical")?, gpu.operand(&labels, "categorical")?);
    let (grid, block) = a_team_each(n, c, logits.dtype())?;
    let args = LabelArgs {
        x: x.address(),
        labels: out.address(),
        rows: n as u64,
        d: c as u64,
        seed: key.seed,
        stream,
        first: key.first_row,
        block: block.into(),
    };
    gpu.launch(Module::Sample, &typed("label", logits.dtype())?, grid, &args)?;
    Ok(labels)
}

/// [`bernoulli`] or [`normal`] by the kernel of that name.
fn gpu_draw(gpu: &Gpu, name: &str, logits: &Tensor, key: DrawKey) -> Result<Tensor> {
    let stream = key.stream()?;
    let (_, c) = sizes(name, logits)?;
    let logits = logits.detach().contiguous()?;
    let draws = gpu.tensor(logits.shape(), logits.dtype())?;
    let (x, y) = (gpu.operand(&logits, name)?, gpu.operand(&draws, name)?);
    let first = key.first_row * c as u64;
    let args = DrawArgs { x: x.address(), y: y.address(), len: x.len as u64, seed: key.seed, stream, first };
    let grid = Grid::line(x.len.div_ceil(THREADS as usize), THREADS)?;
    gpu.launch(Module::Sample, &typed(name, logits.dtype())?, grid, &args)?;
    Ok(draws)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};

    const KEY: DrawKey = DrawKey { seed: 5, step: 3, draw: 1, first_row: 0 };
    const N: usize = 60_000;

    /// `N` equal rows.
    fn repeated(row: &[f64]) -> Result<Tensor> {
        Tensor::new(row, &Device::Cpu)?.broadcast_as((N, row.len()))
    }

    fn near(count: f64, p: f64) {
        let deviation = (p * (1. - p) / N as f64).sqrt();
        assert!((count / N as f64 - p).abs() <= 5. * deviation, "{count} of {N} for probability {p}");
    }

    #[test]
    fn categorical_frequencies() -> Result<()> {
        let p = [0.1, 0.0, 0.6, 0.25, 0.05, 0.0];
        let logits: Vec<f64> = p.iter().map(|p: &f64| p.ln() + 700.).collect();
        let labels = categorical(&repeated(&logits)?, KEY)?;
        for (class, &p) in p.iter().enumerate() {
            near(labels.iter().filter(|&&l| l as usize == class).count() as f64, p);
        }
        Ok(())
    }

    #[test]
    fn bernoulli_frequencies() -> Result<()> {
        let draws = bernoulli(&repeated(&[-2., 0., 800., -800., 1.5])?, KEY)?;
        assert_eq!((draws.dims(), draws.dtype()), ([N, 5].as_slice(), DType::F64));
        let sums = draws.sum(0)?.to_vec1::<f64>()?;
        for (sum, logit) in sums.into_iter().zip([-2f64, 0., 800., -800., 1.5]) {
            near(sum, 1. / (1. + (-logit).exp()));
        }
        Ok(())
    }

    #[test]
    fn normal_moments() -> Result<()> {
        let draws = normal(&Tensor::zeros((N / 2, 2), DType::F64, &Device::Cpu)?, KEY)?;
        let mean = draws.mean_all()?.to_scalar::<f64>()?;
        let square = draws.sqr()?.mean_all()?.to_scalar::<f64>()?;
        let error = 5. / (N as f64).sqrt();
        assert!(mean.abs() < error && (square - 1.).abs() < error * 2f64.sqrt(), "{mean} {square}");
        Ok(())
    }

    #[test]
    fn parts_draw_what_the_whole_does() -> Result<()> {
        let logits = Tensor::randn(0f32, 2f32, (13, 4), &Device::Cpu)?;
        let (head, tail) = (logits.narrow(0, 0, 5)?, logits.narrow(0, 5, 8)?);
        let late = DrawKey { first_row: 5, ..KEY };
        assert_eq!(
            categorical(&logits, KEY)?,
            [categorical(&head, KEY)?, categorical(&tail, late)?].concat()
        );
        for draw in [bernoulli, normal] {
            let parts = Tensor::cat(&[draw(&head, KEY)?, draw(&tail, late)?], 0)?;
            assert_eq!(draw(&logits, KEY)?.to_vec2::<f32>()?, parts.to_vec2::<f32>()?);
        }
        let other = categorical(&repeated(&[0.; 10])?, DrawKey { draw: 2, ..KEY })?;
        assert_ne!(categorical(&repeated(&[0.; 10])?, KEY)?, other);
        Ok(())
    }

    #[test]
    fn kernels_draw_what_the_cpu_does() -> Result<()> {
        let key = DrawKey { first_row: 1 << 33, seed: u64::MAX - 1, ..KEY };
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for (n, c) in [(0, 3), (50, 1), (50, 3), (40, 31), (40, 33), (9, 127), (40, 1000), (20, 4099)] {
                let mut x = values(&(random(1, &[n, c])? * 2.)?)?;
                // Classes of probability 0 at the ends and between.
                x.iter_mut().step_by(3).skip(1).for_each(|x| *x = f64::NEG_INFINITY);
                x.iter_mut().take(c).step_by(7).for_each(|x| *x *= 1e3);
                x.chunks_mut(c).for_each(|row| row[c / 2] = 1.);
                let x = Tensor::from_vec(x, (n, c), &Device::Cpu)?.to_dtype(dtype)?;
                assert_eq!(emulate(|| categorical(&x, key))?, categorical(&x, key)?, "{n} {c} {dtype:?}");
                for draw in [bernoulli, normal] {
                    let (found, expected) = (emulate(|| draw(&x, key))?, draw(&x, key)?);
                    assert_eq!((found.dims(), found.dtype()), (x.dims(), dtype));
                    // A kernel rounds to f32 on the way to half precision.
                    let tolerance = match dtype {
                        DType::F64 => 1e-14,
                        DType::F32 => 1e-6,
                        _ => 4e-3,
                    };
                    assert_close(&found, &values(&expected)?, tolerance);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn kernels_draw_every_class_as_often_as_its_probability() -> Result<()> {
        // One long row again and again: every part of it is drawn, and nothing of probability 0.
        let (rows, c) = (1000, 700);
        let row: Vec<f64> = (0..c).map(|i| if i % 100 < 10 { 0. } else { f64::NEG_INFINITY }).collect();
        let x = Tensor::new(row, &Device::Cpu)?.broadcast_as((rows, c))?.to_dtype(DType::BF16)?;
        let labels = emulate(|| categorical(&x, KEY))?;
        let mut counts = [0; 7];
        for label in labels {
            assert!(label % 100 < 10);
            counts[label as usize / 100] += 1;
        }
        assert!(counts.iter().all(|&count| (85..=200).contains(&count)), "{counts:?}");
        Ok(())
    }

    #[test]
    fn refusals_name_the_row() -> Result<()> {
        refuse()?;
        emulate(refuse)
    }

    fn refuse() -> Result<()> {
        let inf = f64::INFINITY;
        for bad in [[0., f64::NAN], [inf, 0.], [-inf, -inf]] {
            let logits = Tensor::new(&[[0., 0.], bad], &Device::Cpu)?;
            let message = categorical(&logits, KEY).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains("row 1"), "{message}");
        }
        let one = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
        assert!(
            categorical(&one, KEY).is_err() && bernoulli(&one, KEY).is_err() && normal(&one, KEY).is_err()
        );
        let row = Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?;
        assert!(categorical(&row, DrawKey { draw: 1 << 20, ..KEY }).is_err());
        assert_eq!(categorical(&Tensor::zeros((0, 2), DType::F32, &Device::Cpu)?, KEY)?, Vec::<u32>::new());
        Ok(())
    }
}
