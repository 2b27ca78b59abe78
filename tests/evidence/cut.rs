//! Sequences that are cut to the longest of a pass.

use crate::common::nets::CPU;
use candle_core::{DType, Result, Tensor};
use kronwake::evidence::{
    Curvature, Estimator, Examples, HessianStructure, Hyper, Outputs, Parts, Posterior, Problem, Structure,
};
use kronwake::nn::{self, Module, VarBuilder, VarMap, init};
use kronwake::tape::{Likelihood, Tape};

const LONGEST: usize = 9;

/// Tokens `[n, 2, LONGEST]` with which of them are there, shortest first, and labels.
fn sequences(n: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let length = |i: usize| 1 + i * (LONGEST - 1) / (n - 1);
    let at = |i: usize| (i / LONGEST, i % LONGEST);
    let tokens = (0..n * LONGEST).map(|i| match at(i) {
        (example, position) if position < length(example) => (3 * example + 2 * position) as u32 % 7,
        // What stands where nothing is must not count.
        _ => 6,
    });
    let mask = (0..n * LONGEST).map(|i| u32::from(at(i).1 < length(at(i).0)));
    let tokens = Tensor::from_iter(tokens, &CPU)?.reshape((n, LONGEST))?;
    let mask = Tensor::from_iter(mask, &CPU)?.reshape((n, LONGEST))?;
    let labels = Tensor::from_iter((0..n).map(|i| (i * i % 3) as u32), &CPU)?;
    Ok((Tensor::stack(&[&tokens, &mask], 1)?, mask, labels))
}

struct Net {
    vars: VarMap,
    tape: Tape,
    model: Box<dyn Module>,
}

/// An embedding, a layer over the positions, the mean over those that are there, and a last layer; f64.
fn net() -> Result<Net> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
    let model = tape.build(|| {
        let table = nn::embedding(7, 4, vb.pp("table"))?;
        let inner = nn::linear(4, 5, vb.pp("inner"))?;
        let last = nn::linear(5, 3, vb.pp("last"))?;
        Ok(Box::new(move |x: &Tensor| {
            let (tokens, mask) = (x.narrow(1, 0, 1)?.squeeze(1)?, x.narrow(1, 1, 1)?.squeeze(1)?);
            let live = mask.to_dtype(DType::F64)?.unsqueeze(2)?;
            let hidden = inner.forward(&table.forward(&tokens.contiguous()?)?)?.tanh()?;
            last.forward(&hidden.broadcast_mul(&live)?.sum(1)?.broadcast_div(&live.sum(1)?)?)
        }) as Box<dyn Module>)
    })?;
    init::seeded_normal(&init::named(&vars)?, 4)?;
    for (_, var) in init::named(&vars)? {
        var.set(&(var.as_tensor() * 20.0)?.detach())?;
    }
    Ok(Net { vars, tape, model })
}

/// 70 sequences, in passes of 32 whose longest have 4, 8 and 9 positions: every estimate, the posterior and its predictions are what they are of the
/// uncut sequences, to rounding.
#[test]
fn sequences_may_be_cut_to_the_longest_of_a_pass() -> Result<()> {
    let net = net()?;
    let problem = Problem::new(&net.tape, &net.vars, &*net.model, Likelihood::Categorical)?;
    let (x, mask, y) = sequences(70)?;
    let whole = Examples::new(x.clone(), y)?.masked(&mask)?;
    let cut = whole.clone().cut(2)?;
    let first: Vec<usize> = (0..32).collect();
    assert_eq!(
        (whole.select(&first)?.x().dims(), cut.select(&first)?.x().dims()),
        (&[32, 2, 9][..], &[32, 2, 4][..])
    );
    let hyper = Hyper::new(&problem, Structure::PerTensor, 0.7)?;
    for (curvature, parts) in [
        (Curvature::Kernel(Outputs::Joint), Parts::Consecutive(20)),
        (Curvature::Rotated, Parts::Whole),
        (Curvature::Kron, Parts::Whole),
        (Curvature::Diagonal, Parts::Whole),
    ] {
        let of =
            |examples: &Examples| Estimator::new(curvature, parts).evaluate(&problem, examples, &hyper, 0);
        let (expected, found) = (of(&whole)?, of(&cut)?);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9 * b.abs().max(1.0);
        assert!(near(found.log_evidence, expected.log_evidence), "{curvature:?}: {found:?} {expected:?}");
        for (found, expected) in found.grad_log_precision.iter().zip(&expected.grad_log_precision) {
            assert!(near(*found, *expected), "{curvature:?}: {found} {expected}");
        }
    }
    let fitted = |examples| Posterior::fit(&problem, examples, HessianStructure::Rotated, &hyper, 1 << 30);
    let covariance = |posterior: Posterior, x: &Tensor| {
        Ok::<_, candle_core::Error>(posterior.predict(&problem, x)?.covariance)
    };
    let expected = covariance(fitted(&whole)?, &x.narrow(0, 0, 20)?)?;
    let few = cut.select(&(0..20).collect::<Vec<_>>())?;
    assert!(few.x().dim(2)? < LONGEST);
    let apart = (covariance(fitted(&cut)?, few.x())? - &expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(apart < 1e-10 * expected.max_all()?.to_scalar::<f64>()?, "{apart}");
    Ok(())
}

#[test]
fn cuts_that_are_refused() -> Result<()> {
    let (x, mask, y) = sequences(12)?;
    let new = || Examples::new(x.clone(), y.clone());
    let refused = |examples: Result<Examples>| examples.map(drop).expect_err("refused").to_string();
    assert!(refused(new()?.cut(2)).contains("expected a mask of as many positions, got None"));
    for dim in [0, 1, 3] {
        let message = refused(new()?.masked(&mask)?.cut(dim));
        assert!(
            message.contains("examples [12, 2, 9], expected a mask of as many positions, got Some(9)"),
            "{message}"
        );
    }
    let each = Examples::new(x.clone(), mask.clone())?.masked(&mask)?;
    assert!(refused(each.cut(2)).contains("one label each, got labels [12, 9]"));
    Ok(())
}
