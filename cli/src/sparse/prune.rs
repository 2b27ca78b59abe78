//! From a trained net to sparser and sparser ones.

use super::net::{Images, Net, Pace};
use super::penalty::Penalized;
use candle_core::{Result, Tensor};
use clap::ValueEnum;
use kronwake::prune::{Surgeon, Weights, cubic, keep_largest};

/// What `--prune` takes: by what the weights are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Their size
    Magnitude,
    /// What they are worth by the Kronecker factors
    Kronecker,
}

/// How weights are removed.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub by: By,
    /// Whether the surgeon corrects the others.
    pub correct: bool,
    pub rounds: usize,
    /// Training afterwards; none if it has no epochs.
    pub tune: Pace,
    pub penalty: Penalized,
}

/// Damping of the factors, times their mean eigenvalue.
const DAMPING: f64 = 1e-3;

/// `net` with `count` of its weights (biases are not counted), without dead units, trained further if so wished.
pub fn prune(net: &Net, images: &Images, how: How, count: usize) -> Result<Net> {
    let mut weights = net.weights()?;
    let surgeons = match how {
        How { by: By::Magnitude, correct: false, .. } => vec![],
        _ => net.factors(images)?.iter().map(|f| Surgeon::new(f, DAMPING)).collect::<Result<Vec<_>>>()?,
    };
    let mut kept = weights.iter().map(|w| w.weight.ne(0f32)).collect::<Result<Vec<_>>>()?;
    let all: usize = kept
        .iter()
        .map(|k| k.to_dtype(candle_core::DType::F64)?.sum_all()?.to_scalar::<f64>())
        .sum::<Result<f64>>()? as usize;
    let mut worth = match how.by {
        By::Magnitude => vec![],
        By::Kronecker => {
            let each = surgeons.iter().zip(&weights).zip(&kept);
            each.map(|((s, w), kept)| s.saliency(&w.weight, w.bias.as_ref(), kept))
                .collect::<Result<Vec<_>>>()?
        }
    };
    for round in 1..=how.rounds {
        if how.by == By::Magnitude {
            worth = weights.iter().map(|w| w.weight.abs()).collect::<Result<_>>()?;
        }
        kept = keep_largest(&worth, &kept, cubic(all, count, round, how.rounds))?;
        for (at, (layer, kept)) in weights.iter_mut().zip(&kept).enumerate() {
            match surgeons.get(at).filter(|_| how.correct) {
                Some(surgeon) => {
                    let operated = surgeon.remove(&layer.weight, layer.bias.as_ref(), kept)?;
                    if how.by == By::Kronecker {
                        worth[at] = operated.saliency;
                    }
                    (layer.weight, layer.bias) = (operated.weight, operated.bias);
                }
                None => layer.weight = masked(layer, kept)?,
            }
        }
    }
    let net = Net::of(&weights, &net.inputs)?.compacted()?;
    if how.tune.epochs > 0 {
        net.train(images, how.tune, how.penalty, true)?;
    }
    Ok(net)
}

fn masked(layer: &Weights, kept: &Tensor) -> Result<Tensor> {
    kept.where_cond(&layer.weight, &layer.weight.zeros_like()?)
}

/// Numbers of weights from `from` down to `to`, each `ratio` of the one before.
pub fn levels(from: usize, to: usize, ratio: f64) -> Vec<usize> {
    let each = std::iter::successors(Some(from as f64), |count| Some(count * ratio));
    each.take_while(|&count| count >= to as f64).map(|count| count.round() as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::super::net::Split;
    use super::super::penalty::Choice;
    use super::*;
    use crate::data::Data;

    #[test]
    fn levels_fall_by_their_ratio() {
        assert_eq!(levels(1000, 500, 0.8), [1000, 800, 640, 512]);
        assert_eq!(levels(10, 11, 0.5), [0; 0]);
    }

    /// Every way leaves as many weights as wanted, and masked training none more; the surgeon's outputs are closer than those of magnitude.
    #[test]
    fn counts_and_closeness() -> Result<()> {
        let split = Split::new(Data::bundled()?)?;
        let net = Net::random(0)?;
        let weights = |net: &Net| {
            net.weights()?
                .iter()
                .map(|w| w.weight.ne(0f32)?.to_dtype(candle_core::DType::F64)?.sum_all()?.to_scalar::<f64>())
                .sum::<Result<f64>>()
        };
        let pace = |epochs| Pace { epochs, lr: 1e-3, batch: 1000, dropout: 0.1, seed: 0 };
        let penalty = Penalized { choice: Choice::L1, factor: 1e-5 };
        let off = |other: &Net| -> Result<f32> {
            let outputs = |net: &Net| net.forward(&split.held.pixels(&net.inputs)?.x);
            (outputs(&net)? - outputs(other)?)?.sqr()?.mean_all()?.to_scalar()
        };
        let mut distances = vec![];
        for (by, correct, rounds, epochs) in
            [(By::Magnitude, false, 1, 1), (By::Magnitude, false, 1, 0), (By::Kronecker, true, 2, 0)]
        {
            let how = How { by, correct, rounds, tune: pace(epochs), penalty };
            let small = prune(&net, &split.train, how, 20_000)?;
            assert!((19_000. ..=20_000.).contains(&weights(&small)?), "{by:?}: {}", weights(&small)?);
            distances.push(off(&small)?);
        }
        assert!(distances[2] < 0.2 * distances[1], "{distances:?}");
        Ok(())
    }
}
