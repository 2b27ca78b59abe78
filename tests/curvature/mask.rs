//! Padded sequences under a mask: the step is that of the sequences one by one, each of its own length.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Damping, Sharing};
use kronwake::nn::{self, Linear, Module, VarBuilder, VarMap};
use kronwake::optim::{Bias, Every, NaturalGradient, Optimizer, Params};
use kronwake::tape::{Fisher, Likelihood, Tape};

const LENGTHS: [usize; 4] = [5, 2, 3, 1];
const LIKELIHOOD: Likelihood = Likelihood::Categorical;

/// Two layers over positions, the first used twice, and a head.
struct Net {
    map: VarMap,
    tape: Tape,
    layers: Vec<Linear>,
    /// One loss term for every position, or one for their mean.
    each: bool,
}

impl Net {
    fn new(each: bool) -> Result<Self> {
        let (map, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
        let layers = tape.build(|| {
            [("a", 3), ("b", 3), ("head", 2)]
                .map(|(name, out)| nn::linear(3, out, vb.pp(name)))
                .into_iter()
                .collect()
        })?;
        let net = Self { map, tape, layers, each };
        for (seed, var) in net.vars().into_iter().enumerate() {
            var.set(&random(seed as u64, var.dims())?)?;
        }
        Ok(net)
    }

    fn vars(&self) -> Vec<candle_core::Var> {
        let data = self.map.data().lock().unwrap();
        let mut named: Vec<_> = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named.into_iter().map(|(_, var)| var).collect()
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let [a, b, head] = &self.layers[..] else { candle_core::bail!("three layers") };
        let x = a.forward(&a.forward(x)?.tanh()?)?.tanh()?;
        // All positions as examples.
        let x = b.forward(&x.flatten(0, 1)?)?.tanh()?.reshape(x.shape())?;
        if self.each {
            let live = mask.flatten_all()?.to_vec1::<f64>()?;
            let live = live.iter().enumerate().filter(|(_, live)| **live > 0.).map(|(i, _)| i as u32);
            let rows = Tensor::from_iter(live, &Device::Cpu)?;
            return head.forward(&x)?.flatten(0, 1)?.index_select(&rows, 0);
        }
        let mask = mask.unsqueeze(2)?;
        head.forward(&x.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?)
    }
}

#[test]
fn a_padded_batch_is_its_examples() -> Result<()> {
    // What stands in the padding must not matter.
    let x = random(50, &[4, 5, 3])?;
    let live = LENGTHS.iter().flat_map(|&n| (0..5).map(move |t| f64::from(t < n))).collect::<Vec<_>>();
    let mask = Tensor::from_vec(live, (4, 5), &Device::Cpu)?;
    for each in [false, true] {
        for (fisher, sharing, bias, ekfac) in [
            (Fisher::Exact, Sharing::Expand, Bias::Folded, false),
            (Fisher::Empirical, Sharing::Expand, Bias::Split, false),
            (Fisher::Sampled { draws: 2, seed: 1 }, Sharing::Expand, Bias::Folded, true),
            (Fisher::Empirical, Sharing::Expand, Bias::Folded, true),
            (Fisher::Exact, Sharing::Reduce, Bias::Folded, false),
            (Fisher::Empirical, Sharing::Reduce, Bias::Split, false),
        ] {
            let (padded, single) = (Net::new(each)?, Net::new(each)?);
            let optimizer = |net: &Net| {
                let every = Every { factors: 1, inverses: 1 };
                let damping = Damping::Eigenvalue(0.1);
                let params =
                    Params { fisher, sharing, bias, ekfac, every, damping, ..Params::k_fac(&net.tape) };
                NaturalGradient::from_varmap(&net.map, params)
            };
            let (mut whole, mut parts) = (optimizer(&padded)?, optimizer(&single)?);
            for step in 0..2 {
                padded.tape.mask(Some(&mask))?;
                let z = padded.forward(&x, &mask)?;
                let y = labels(step, z.dim(0)?, 2)?;
                whole.observe(&z, LIKELIHOOD)?;
                whole.backward_step(&mean_loss(LIKELIHOOD, &z, &y)?)?;
                let mut first = 0;
                for (example, length) in LENGTHS.into_iter().enumerate() {
                    let x = x.narrow(0, example, 1)?.narrow(1, 0, length)?;
                    let z = single.forward(&x, &Tensor::ones((1, length), DType::F64, &Device::Cpu)?)?;
                    let terms = z.dim(0)?;
                    parts.observe(&z, LIKELIHOOD)?;
                    parts.accumulate(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, first, terms)?)?, terms)?;
                    first += terms;
                }
                parts.step_accumulated()?;
                let what =
                    format!("{fisher:?}, {sharing:?}, {bias:?}, ekfac {ekfac}, each {each}, step {step}");
                for block in whole.block_names() {
                    let (found, expected) = (whole.factors(block).unwrap(), parts.factors(block).unwrap());
                    assert_close(&found.0, &expected.0, 1e-12, &format!("{what}: A of {block}"));
                    assert_close(&found.1, &expected.1, 1e-12, &format!("{what}: G of {block}"));
                }
                for (found, expected) in padded.vars().iter().zip(single.vars()) {
                    assert_close(found, &expected, 1e-11, &what);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn masks_that_do_not_fit_are_refused() -> Result<()> {
    let net = Net::new(false)?;
    let mask = |dims: &[usize]| Tensor::ones(dims, DType::U32, &Device::Cpu);
    assert_says(net.tape.mask(Some(&mask(&[4])?)), &["[batch, positions]", "[4]"]);
    assert_says(
        net.tape.mask(Some(&Tensor::new(&[[1u8, 0], [0, 0]], &Device::Cpu)?)),
        &["no position of example 1"],
    );
    let mut opt = NaturalGradient::from_varmap(&net.map, Params::k_fac(&net.tape))?;
    let z = net.forward(&random(0, &[4, 5, 3])?, &Tensor::ones((4, 5), DType::F64, &Device::Cpu)?)?;
    net.tape.mask(Some(&mask(&[4, 6])?))?;
    assert_says(opt.observe(&z, LIKELIHOOD), &["4 examples of 6 positions"]);
    net.tape.mask(Some(&mask(&[4, 5])?))?;
    opt.observe(&z, LIKELIHOOD)?;
    net.tape.mask(None)?;
    opt.observe(&z, LIKELIHOOD)
}
