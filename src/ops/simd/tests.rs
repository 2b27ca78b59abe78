//! Each level that the processor has gives what plain loops give, and trainings that are the same up to rounding.

use candle_core::{DType, Device, Result, Tensor};

use super::forced::each_level;
use crate::nn::{self, Module, Optimizer, VarBuilder, VarMap, loss};
use crate::ops::testing::{random, values};
use crate::ops::{conv, conv_pool, cross_entropy, dense, norm, patch_moment, softmax};
use crate::optim::{AdamW, NaturalGradient, Params, ParamsAdamW};
use crate::tape::{Likelihood, Tape};

/// The tests of operations against plain loops, at every level.
#[test]
fn levels_agree_with_plain_loops() -> Result<()> {
    let results = each_level(|| -> Result<()> {
        conv::tests::agrees_with_the_definition()?;
        conv_pool::tests::agrees_with_the_three_operations()?;
        patch_moment::tests::moments_of_patches_are_those_of_the_stored_ones()?;
        patch_moment::tests::gradients_are_read_where_they_are()?;
        dense::tests::mixes()?;
        dense::tests::dots()?;
        softmax::tests::other_layouts_and_dtypes()?;
        cross_entropy::tests::values_and_gradients()?;
        norm::tests::values_and_gradients()
    });
    assert!(results.last().is_some_and(|(level, _)| level.starts_with("Baseline")));
    results.into_iter().try_for_each(|(_, result)| result)
}

enum Method {
    AdamW,
    KldWrm,
}

/// The parameters after some steps on a small convolutional net.
fn train(method: &Method, dtype: DType) -> Result<Vec<f64>> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let config = nn::Conv2dConfig { padding: 1, ..Default::default() };
    let (conv, fc) = tape.build(|| {
        Ok((nn::conv2d(1, 7, 3, config, vb.pp("conv"))?, nn::linear(7 * 5 * 5, 10, vb.pp("fc"))?))
    })?;
    let mut named: Vec<_> = match vars.data().lock() {
        Ok(data) => data.iter().map(|(name, var)| (name.clone(), var.clone())).collect(),
        Err(error) => panic!("{error}"),
    };
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (stream, (_, var)) in named.iter().enumerate() {
        var.set(&(random(stream as u64, var.dims())? * 0.2)?.to_dtype(dtype)?)?;
    }
    let x = random(10, &[32, 1, 10, 10])?.to_dtype(dtype)?;
    let labels = Tensor::from_vec((0..32u32).map(|i| i * 7 % 10).collect::<Vec<_>>(), 32, &Device::Cpu)?;
    let forward = |x: &Tensor| fc.forward(&conv.forward_pooled(x, (2, 2), (2, 2), true)?.flatten_from(1)?);
    match method {
        Method::AdamW => {
            let mut opt = AdamW::from_varmap(&vars, ParamsAdamW { lr: 0.01, ..Default::default() })?;
            for _ in 0..5 {
                opt.backward_step(&loss::cross_entropy(&forward(&x)?, &labels)?)?;
            }
        }
        Method::KldWrm => {
            let mut opt = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?;
            for _ in 0..5 {
                let logits = forward(&x)?;
                opt.observe(&logits, Likelihood::Categorical)?;
                opt.backward_step(&loss::cross_entropy(&logits, &labels)?)?;
            }
        }
    }
    named.iter().map(|(_, var)| values(var)).collect::<Result<Vec<_>>>().map(|values| values.concat())
}

#[test]
fn levels_train_alike() -> Result<()> {
    for method in [Method::AdamW, Method::KldWrm] {
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-3)] {
            let mut found = each_level(|| train(&method, dtype)).into_iter();
            let Some((_, widest)) = found.next() else { panic!("no level") };
            let widest = widest?;
            assert!(widest.iter().all(|v| v.is_finite()));
            for (level, other) in found {
                for (a, b) in widest.iter().zip(other?) {
                    assert!((a - b).abs() <= tolerance, "{level} {dtype:?}: {a} {b}");
                }
            }
        }
    }
    Ok(())
}
