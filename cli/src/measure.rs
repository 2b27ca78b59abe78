//! Loss and accuracy of classifiers.

use candle_core::{D, DType, Device, Result, Tensor};
use kronwake::nn::{VarMap, init, loss::cross_entropy};
use kronwake::parallel::World;

/// Examples of an evaluation batch; the result does not depend on it.
const EVALUATION_BATCH: usize = 250;

/// The mean cross-entropy of `logits [.., classes]`, in f32 at least.
pub fn mean_loss(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let rows = logits.reshape(((), logits.dim(D::Minus1)?))?;
    cross_entropy(&rows.to_dtype(wide)?, &labels.flatten_all()?)
}

/// What a batch was, still on its device.
#[derive(Clone)]
pub struct Outcome {
    /// The mean loss, a scalar.
    pub loss: Tensor,
    /// How many logits are largest at their label, a scalar.
    pub right: Tensor,
    pub count: usize,
}

impl Outcome {
    pub fn of(logits: &Tensor, labels: &Tensor, loss: &Tensor) -> Result<Self> {
        let found = logits.detach().argmax(D::Minus1)?.eq(labels)?;
        let right = found.to_dtype(DType::F32)?.sum_all()?;
        Ok(Self { loss: loss.detach(), right, count: labels.elem_count() })
    }

    /// Of no examples.
    pub fn none() -> Result<Self> {
        let zero = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        Ok(Self { loss: zero.clone(), right: zero, count: 0 })
    }

    /// [`Outcome::read`] of batches of which each process has a part.
    pub fn read_together(world: &World, outcomes: &[Self]) -> Result<Vec<(f64, f64)>> {
        let own = Self::read(outcomes)?;
        if world.is_alone() {
            return Ok(own);
        }
        let counts = outcomes.iter().map(|outcome| outcome.count as f64);
        let mut sums: Vec<f64> =
            own.iter().zip(counts).flat_map(|((loss, right), n)| [loss * n, *right, n]).collect();
        world.sum(&mut sums)?;
        Ok(sums.chunks_exact(3).map(|sums| (sums[0] / sums[2], sums[1])).collect())
    }

    /// Losses and how many were right of several batches, read at once.
    pub fn read(outcomes: &[Self]) -> Result<Vec<(f64, f64)>> {
        let read = |of: fn(&Self) -> &Tensor| {
            let scalars: Vec<_> = outcomes.iter().map(of).collect();
            Tensor::stack(&scalars, 0)?.to_dtype(DType::F64)?.to_vec1::<f64>()
        };
        Ok(read(|o| &o.loss)?.into_iter().zip(read(|o| &o.right)?).collect())
    }
}

/// Sums over the examples seen so far.
#[derive(Default)]
pub struct Sums {
    loss: f64,
    right: f64,
    count: f64,
}

impl Sums {
    /// Adds a batch with the mean loss `loss`; `right` of its `count` labels were found.
    pub fn add(&mut self, (loss, right): (f64, f64), count: usize) {
        self.loss += loss * count as f64;
        self.right += right;
        self.count += count as f64;
    }

    /// Mean loss and accuracy.
    pub fn means(&self) -> (f64, f64) {
        (self.loss / self.count, self.right / self.count)
    }
}

/// Mean loss and accuracy of the logits and labels that `pass` gives for the examples at some of the `places`.
pub fn evaluate(places: &[usize], pass: impl Fn(&[usize]) -> Result<(Tensor, Tensor)>) -> Result<(f64, f64)> {
    let outcome = |places: &[usize]| {
        let (logits, labels) = pass(places)?;
        let logits = logits.detach();
        Outcome::of(&logits, &labels, &mean_loss(&logits, &labels)?)
    };
    let outcomes = places.chunks(EVALUATION_BATCH).map(outcome).collect::<Result<Vec<_>>>()?;
    let mut sums = Sums::default();
    Outcome::read(&outcomes)?
        .into_iter()
        .zip(&outcomes)
        .for_each(|(read, batch)| sums.add(read, batch.count));
    Ok(sums.means())
}

/// [`evaluate`] by all processes, each on its part of the places.
pub fn evaluate_together(
    world: &World,
    places: &[usize],
    pass: impl Fn(&[usize]) -> Result<(Tensor, Tensor)>,
) -> Result<(f64, f64)> {
    let own = &places[world.part(places.len())];
    let (loss, right) = if own.is_empty() { (0.0, 0.0) } else { evaluate(own, pass)? };
    let count = own.len() as f64;
    let mut sums = [loss * count, right * count, count];
    world.sum(&mut sums)?;
    Ok((sums[0] / sums[2], sums[1] / sums[2]))
}

/// The number of parameters, all elements counted.
pub fn parameters(vars: &VarMap) -> Result<usize> {
    Ok(init::named(vars)?.iter().map(|(_, var)| var.elem_count()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_accuracy_of_known_logits() -> Result<()> {
        let mut logits = vec![0.0f64; 20];
        logits[3] = 2.0;
        logits[10] = 1.0;
        let logits = Tensor::from_vec(logits, (2, 10), &Device::Cpu)?;
        let labels = Tensor::new(&[3u32, 1], &Device::Cpu)?;
        let expected = ((9.0 + 2f64.exp()).ln() - 2.0 + (9.0 + 1f64.exp()).ln()) / 2.0;
        let near = |(loss, right): (f64, f64), part| (loss - expected).abs() < 1e-12 && right == part;
        let outcome = Outcome::of(&logits, &labels, &mean_loss(&logits, &labels)?)?;
        assert!(Outcome::read(&[outcome.clone(), outcome])?.into_iter().all(|numbers| near(numbers, 1.0)));
        // 1,002 examples in batches of 250: those two, again and again, also as sequences of two.
        let places: Vec<usize> = (0..1002).collect();
        let repeated = |places: &[usize]| {
            let places = places.iter().map(|&i| i as u32 % 2);
            let places = Tensor::from_iter(places, &Device::Cpu)?;
            Ok((logits.index_select(&places, 0)?, labels.index_select(&places, 0)?))
        };
        assert!(near(evaluate(&places, repeated)?, 0.5));
        let sequences = |places: &[usize]| {
            let logits = logits.unsqueeze(0)?.repeat((places.len(), 1, 1))?;
            Ok((logits, labels.unsqueeze(0)?.repeat((places.len(), 1))?))
        };
        assert!(near(evaluate(&places, sequences)?, 0.5));
        Ok(())
    }
}
