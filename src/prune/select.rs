//! Which weights are kept, over all layers.

use candle_core::{DType, Device, Result, Tensor, bail};

/// How many weights are kept after round `round` (from 1) of `rounds`, on the way from `from` to `to`: most go in the first rounds,
/// when many are worth little, by the cubic schedule of Zhu & Gupta, "To prune, or not to prune", 2017, equation 1.
///
/// ```
/// use kronwake::prune::cubic;
///
/// let kept: Vec<usize> = (1..=4).map(|round| cubic(1000, 200, round, 4)).collect();
/// assert_eq!(kept, [538, 300, 213, 200]);
/// ```
pub fn cubic(from: usize, to: usize, round: usize, rounds: usize) -> usize {
    let left = 1.0 - round.min(rounds) as f64 / rounds.max(1) as f64;
    to + (from.saturating_sub(to) as f64 * left.powi(3)).round() as usize
}

/// Masks that keep the `count` weights whose `scores` are largest over all layers, among those that `kept` has; of equal scores the
/// first. Fewer where `kept` has fewer.
///
/// A score is a weight's size or its [`saliency`](super::Surgeon::saliency); a mask is u8 in its layer's shape, 1 for a weight that is
/// kept.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::prune::keep_largest;
///
/// let scores = [Tensor::new(&[[1f32, 4.]], &Device::Cpu)?, Tensor::new(&[3f32, 2.], &Device::Cpu)?];
/// let kept = [Tensor::new(&[[1u8, 1]], &Device::Cpu)?, Tensor::new(&[1u8, 0], &Device::Cpu)?];
/// let masks = keep_largest(&scores, &kept, 2)?;
/// assert_eq!(masks[0].to_vec2::<u8>()?, [[0, 1]]);
/// assert_eq!(masks[1].to_vec1::<u8>()?, [1, 0]);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// If scores and masks do not fit each other, or a score is NaN.
pub fn keep_largest(scores: &[Tensor], kept: &[Tensor], count: usize) -> Result<Vec<Tensor>> {
    if scores.len() != kept.len() {
        bail!("masks: scores of {} layers, but masks of {}", scores.len(), kept.len())
    }
    let mut candidates: Vec<(f64, usize)> = vec![];
    let mut length = 0;
    for (index, (scores, kept)) in scores.iter().zip(kept).enumerate() {
        if scores.dims() != kept.dims() || kept.dtype() != DType::U8 {
            bail!(
                "masks: expected a mask of U8 {:?} for layer {index}, got {:?} {:?}",
                scores.dims(),
                kept.dtype(),
                kept.dims()
            )
        }
        let values = flat(scores)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let keeps = flat(kept)?.to_vec1::<u8>()?;
        if let Some(at) = values.iter().position(|score| score.is_nan()) {
            bail!("masks: score {at} of layer {index} is NaN")
        }
        candidates.extend(
            values
                .iter()
                .zip(&keeps)
                .enumerate()
                .filter(|(_, (_, keep))| **keep != 0)
                .map(|(at, (score, _))| (*score, length + at)),
        );
        length += values.len();
    }
    let order = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        candidates.truncate(count);
    }
    let mut chosen = vec![0u8; length];
    candidates.iter().for_each(|&(_, at)| chosen[at] = 1);
    let mut from = 0;
    let mask = |scores: &Tensor| {
        let part = &chosen[from..from + scores.elem_count()];
        from += part.len();
        Tensor::from_slice(part, scores.shape(), &Device::Cpu)?.to_device(scores.device())
    };
    scores.iter().map(mask).collect()
}

fn flat(t: &Tensor) -> Result<Tensor> {
    t.detach().to_device(&Device::Cpu)?.flatten_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{random, values};

    #[test]
    fn the_largest_are_kept_and_of_equals_the_first() -> Result<()> {
        let scores = [random(0, &[5, 7])?.abs()?, Tensor::full(0.5f64, (4,), &Device::Cpu)?];
        let kept: Vec<Tensor> =
            scores.iter().map(|s| Tensor::ones(s.shape(), DType::U8, s.device())).collect::<Result<_>>()?;
        let larger = values(&scores[0])?.iter().filter(|s| **s > 0.5).count();
        for count in [0, 3, larger, larger + 2, 38, 39, 100] {
            let masks = keep_largest(&scores, &kept, count)?;
            let chosen: Vec<f64> =
                masks.iter().flat_map(|m| values(&m.to_dtype(DType::F64).unwrap()).unwrap()).collect();
            assert_eq!(chosen.iter().sum::<f64>() as usize, count.min(39));
            let all = [values(&scores[0])?, values(&scores[1])?].concat();
            let least = all.iter().zip(&chosen).filter(|c| *c.1 == 1.).fold(f64::MAX, |m, c| m.min(*c.0));
            assert!(all.iter().zip(&chosen).all(|(s, c)| *c == 1. || *s <= least), "{count}");
            if count == larger + 2 {
                assert_eq!(chosen[35..], [1., 1., 0., 0.]);
            }
            // Again among these: what is gone stays away.
            let again = keep_largest(&scores, &masks, 1)?;
            assert!(
                again
                    .iter()
                    .zip(&masks)
                    .all(|(a, m)| (a.gt(m).unwrap().sum_all().unwrap()).to_scalar::<u8>().unwrap() == 0)
            );
        }
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        let (scores, mask) = (random(0, &[2, 3])?, Tensor::ones((2, 3), DType::U8, &Device::Cpu)?);
        let short = mask.narrow(1, 0, 2)?;
        let nan = (&scores / 0.)?.log()?;
        for (scores, kept, part) in [
            (vec![scores.clone()], vec![], "scores of 1 layers, but masks of 0"),
            (vec![scores.clone()], vec![short], "a mask of U8 [2, 3] for layer 0, got U8 [2, 2]"),
            (vec![scores.clone()], vec![scores.clone()], "got F64"),
            (vec![nan], vec![mask], "is NaN"),
        ] {
            let message = keep_largest(&scores, &kept, 1).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        Ok(())
    }
}
