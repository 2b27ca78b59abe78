//! The weights of a unit in two adjacent layers, as one group.

use candle_core::{Result, Tensor, bail};

use crate::ops::group::{Map, Norms, Tiles, sums};
use crate::ops::precomputed;

/// The group lasso of hidden units: a group is what leads into a unit, a row of `inward (units, ..)`, together with what leads
/// out of it, an input channel of `outward (out, channels, ..)`. A proximal step makes both zero at once, and the unit can go.
///
/// `channels` is a multiple of `units`: between a convolution and a linear layer, a unit is a channel, and has as many adjacent
/// columns of the linear layer as its image has pixels.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::penalty::UnitLasso;
///
/// let inward = Tensor::new(&[[3f64, 0.], [0.1, 0.]], &Device::Cpu)?;
/// let outward = Tensor::new(&[[4f64, 0.1]], &Device::Cpu)?;
/// let lasso = UnitLasso { size_weighted: false };
/// let value = lasso.value(&inward, &outward)?.to_scalar::<f64>()?;
/// assert!((value - (5. + 0.02f64.sqrt())).abs() < 1e-12);
/// let (inward, outward) = lasso.prox(&inward, &outward, 1.)?;
/// assert_eq!(inward.to_vec2::<f64>()?[1], [0., 0.]);
/// assert_eq!(outward.to_vec2::<f64>()?[0][1], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitLasso {
    /// Whether a unit's norm is times the root of the number of its weights.
    pub size_weighted: bool,
}

/// The two layers, each with its blocks; unit `i` is block `i` of both.
struct Pair {
    weights: [Tensor; 2],
    tiles: [Tiles; 2],
}

impl Pair {
    fn new(inward: &Tensor, outward: &Tensor) -> Result<Self> {
        let Some(&units) = inward.dims().first() else {
            bail!("unit lasso: expected inward weights (units, ..), got a scalar")
        };
        let (out, columns) = match outward.dims() {
            [out, channels, rest @ ..] if units > 0 && channels % units == 0 => {
                (*out, channels * rest.iter().product::<usize>())
            }
            dims => bail!(
                "unit lasso: outward weights {dims:?}, expected (out, channels, ..) with a multiple of {units} channels"
            ),
        };
        if inward.dtype() != outward.dtype() {
            bail!(
                "unit lasso: outward weights of {:?}, expected {:?} as the inward ones",
                outward.dtype(),
                inward.dtype()
            )
        }
        let fan_in = inward.elem_count() / units;
        if fan_in == 0 || out == 0 || columns == 0 {
            bail!("unit lasso: weights {:?} and {:?}, expected none empty", inward.dims(), outward.dims())
        }
        Ok(Self {
            weights: [inward.detach().contiguous()?, outward.detach().contiguous()?],
            tiles: [
                Tiles::new([units, fan_in], [1, fan_in]),
                Tiles::new([out, columns], [out, columns / units]),
            ],
        })
    }

    /// The sums of both layers.
    fn sums(&self, norms: &Norms) -> Result<Tensor> {
        let [inward, outward] = [0, 1].map(|i| sums(norms.name, &self.weights[i], self.tiles[i], 0.));
        inward? + outward?
    }

    fn map(&self, norms: &Norms, sums: &Tensor, map: Map<'_>) -> Result<[Tensor; 2]> {
        // The other layer's weights of a unit count towards its size.
        let one = |i: usize| {
            norms.map(&self.weights[i], self.tiles[i], Some((sums, self.tiles[1 - i].size(0))), map)
        };
        Ok([one(0)?, one(1)?])
    }
}

impl UnitLasso {
    fn norms(&self) -> Norms {
        Norms { name: "unit lasso", l1: 0., l2: 0., group: 1., sized: self.size_weighted }
    }

    /// The sum of the units' norms as a scalar in f32 (f64 for f64), differentiable in both.
    ///
    /// # Errors
    /// If the layers do not fit each other, or, on the CPU, a weight is NaN or infinite.
    pub fn value(&self, inward: &Tensor, outward: &Tensor) -> Result<Tensor> {
        let (norms, pair) = (self.norms(), Pair::new(inward, outward)?);
        let sums = pair.sums(&norms)?;
        let value = norms.value_of(&sums, pair.tiles[0], pair.tiles[1].size(0), inward.dtype())?;
        precomputed::of_two(norms.name, [inward, outward], value, move |grad| {
            pair.map(&norms, &sums, Map::Gradient(Some(grad)))
        })
    }

    /// The gradients in both; zero for a unit without weights.
    ///
    /// # Errors
    /// As for [`UnitLasso::value`].
    pub fn gradient(&self, inward: &Tensor, outward: &Tensor) -> Result<(Tensor, Tensor)> {
        let (norms, pair) = (self.norms(), Pair::new(inward, outward)?);
        let [inward, outward] = pair.map(&norms, &pair.sums(&norms)?, Map::Gradient(None))?;
        Ok((inward, outward))
    }

    /// Each unit's weights shorter by `step`, times the root of their number if so weighted, or zero.
    ///
    /// # Errors
    /// As for [`UnitLasso::value`], and for a step that is negative or not finite.
    pub fn prox(&self, inward: &Tensor, outward: &Tensor, step: f64) -> Result<(Tensor, Tensor)> {
        let (norms, pair) = (self.norms(), Pair::new(inward, outward)?);
        norms.check_step(step)?;
        let [inward, outward] = pair.map(&norms, &pair.sums(&norms)?, Map::Prox { step })?;
        Ok((inward, outward))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, check_gradients, random_var, values};

    /// The inward weights of each unit, followed by the outward ones, from the definition.
    fn units(inward: &Tensor, outward: &Tensor) -> Result<Vec<Vec<f64>>> {
        let units = inward.dims()[0];
        (0..units)
            .map(|unit| {
                let pixels = outward.dims()[1] / units;
                let mut all = values(&inward.get(unit)?)?;
                all.extend(values(&outward.narrow(1, unit * pixels, pixels)?)?);
                Ok(all)
            })
            .collect()
    }

    #[test]
    fn as_one_group() -> Result<()> {
        for (inward, outward) in
            [(vec![3, 4], vec![5, 3]), (vec![4, 2, 3, 3], vec![3, 4, 2, 2]), (vec![2, 1, 3, 3], vec![40, 8])]
        {
            let args = [random_var(0, &inward)?, random_var(1, &outward)?];
            for size_weighted in [true, false] {
                let lasso = UnitLasso { size_weighted };
                let all = units(&args[0], &args[1])?;
                let c = if size_weighted { (all[0].len() as f64).sqrt() } else { 1. };
                let norm = |w: &Vec<f64>| w.iter().map(|w| w * w).sum::<f64>().sqrt();
                let run = || -> Result<Vec<Tensor>> {
                    let value = lasso.value(&args[0], &args[1])?;
                    let grads = value.backward()?;
                    let (inward, outward) = lasso.prox(&args[0], &args[1], 1.)?;
                    let grad = |at: usize| grads.get(&args[at]).cloned();
                    let mut all = vec![value, inward, outward];
                    all.extend([grad(0), grad(1)].into_iter().flatten());
                    Ok(all)
                };
                let found = run()?;
                assert_close(&found[0], &[c * all.iter().map(norm).sum::<f64>()], 1e-13);
                check_gradients(&args, |a| lasso.value(&a[0], &a[1]));
                for (found, w) in units(&found[1], &found[2])?.iter().zip(&all) {
                    let factor = (1. - c / norm(w)).max(0.);
                    assert!(found.iter().zip(w).all(|(x, w)| (x - factor * w).abs() < 1e-13));
                }
                let (inward, outward) = lasso.gradient(&args[0], &args[1])?;
                for (found, expected) in [(&inward, &found[3]), (&outward, &found[4])] {
                    assert_close(found, &values(expected)?, 1e-14);
                }
                for (found, expected) in emulate(run)?.iter().zip(&found) {
                    assert_close(found, &values(expected)?, 1e-13);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_layers_are_refused() -> Result<()> {
        let lasso = UnitLasso { size_weighted: true };
        let inward = random_var(0, &[3, 4])?;
        for outward in [vec![5, 4], vec![3], vec![0, 3]] {
            assert!(lasso.value(&inward, random_var(1, &outward)?.as_tensor()).is_err());
        }
        let outward = Var::from_tensor(&random_var(1, &[5, 3])?.to_dtype(DType::F32)?)?;
        assert!(lasso.value(&inward, &outward).is_err());
        assert!(lasso.prox(&inward, random_var(1, &[5, 3])?.as_tensor(), -1.).is_err());
        Ok(())
    }
}
