//! Factors of low rank: what is kept of them, what they stand for, and that they are exact where that is all there is.

use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::curvature::{Adaptive, Beyond, Damping, DampingKind, FactorLimit, Inverse, Relative, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    Bias, Carry, Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, QSolve, Qe, So, TwoRate,
    UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood};

const RANK: usize = 18;
const LOW: FactorLimit = FactorLimit { rows: 19, beyond: Beyond::LowRank { rank: RANK } };

/// A table, a convolution with groups and two linear layers, all of them wider than [`RANK`].
fn wide(vb: VarBuilder) -> Result<Forward> {
    let table = nn::embedding(9, 20, vb.pp("table"))?;
    let groups = nn::Conv1dConfig { groups: 2, ..Default::default() };
    let conv = nn::conv1d(20, 40, 2, groups, vb.pp("conv"))?;
    let (fc, last) = (nn::linear(40, 24, vb.pp("fc"))?, nn::linear(24, 3, vb.pp("last"))?);
    Ok(Box::new(move |x| {
        let x = table.forward(&x.to_dtype(DType::U32)?)?.transpose(1, 2)?.contiguous()?;
        last.forward(&fc.forward(&conv.forward(&x)?.tanh()?.mean(2)?)?.tanh()?)
    }))
}

/// Tokens `[2, 3]`: the convolution has two positions an example.
fn batch(step: u64) -> Result<(Tensor, Tensor)> {
    Ok((labels(step, 6, 9)?.reshape((2, 3))?.to_dtype(DType::F64)?, labels(100 + step, 2, 3)?))
}

/// The Vars after three steps, whose averaged factors have rank 18 at most, but for those of the table's rows.
fn trained(
    wake: impl Into<Wake> + Clone,
    step: impl Fn(&mut NaturalGradient, &Tensor, &mut dyn FnMut() -> Result<Tensor>) -> Result<()>,
    change: impl Fn(Params) -> Params,
) -> Result<Vec<Tensor>> {
    let net = Net::of(DType::F64, 3, wide)?;
    let options = Params {
        every: Every { factors: 1, inverses: 1 },
        fisher: Fisher::Sampled { draws: 1, seed: 5 },
        ..Params::of(wake, &net.tape)
    };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, change(options))?;
    for k in 0..3 {
        let (x, y) = batch(k)?;
        let loss = || mean_loss(Likelihood::Categorical, &(net.forward)(&x)?, &y);
        if opt.wants_loss_after() {
            opt.adapt_damping(&loss()?)?;
        }
        opt.observe(&(net.forward)(&x)?, Likelihood::Categorical)?;
        // The tape belongs to the pass that is stepped on.
        let z = (net.forward)(&x)?;
        step(&mut opt, &mean_loss(Likelihood::Categorical, &z, &y)?, &mut || (net.forward)(&x))?;
    }
    net.values()
}

/// Of the curvature alone: only full factors show which inputs are far from standard, for orthogonal directions.
fn check(what: &str, wake: impl Into<Wake> + Clone, change: impl Fn(Params) -> Params) -> Result<()> {
    let plain = |opt: &mut NaturalGradient, loss: &Tensor, _: &mut dyn FnMut() -> Result<Tensor>| {
        opt.backward_step(loss)
    };
    let run = |factor_limit| trained(wake.clone(), plain, |p| change(Params { factor_limit, ..p }));
    for (found, full) in run(LOW)?.iter().zip(run(FactorLimit::NONE)?) {
        assert_close(found, &full, 1e-8, what);
    }
    Ok(())
}

#[test]
fn factors_of_as_low_a_rank_are_exact() -> Result<()> {
    let (eigenvalue, pi) = (Damping::Eigenvalue(0.02), Damping::Pi(0.02));
    for (damping, inverse) in [
        (eigenvalue, Inverse::Eigen),
        (pi, Inverse::Eigen),
        (pi, Inverse::Cholesky),
        (pi, Inverse::Newton),
        (Damping::Relative(Relative::default()), Inverse::Eigen),
    ] {
        let what = format!("{damping:?} {inverse:?}");
        check(&format!("k-fac, {what}"), Wake::KFac, |p| Params { damping, inverse, ..p })?;
        check(&format!("so, {what}"), So::default(), |p| Params {
            damping,
            inverse,
            bias: Bias::Split,
            ..p
        })?;
        check(&format!("kld-wrm, {what}"), TwoRate::default(), |p| Params {
            damping,
            inverse,
            orthogonal: None,
            ..p
        })?;
        check(&format!("literal, {what}"), So::default(), |p| Params {
            damping,
            inverse,
            carry: Carry::Literal,
            sharing: Sharing::Reduce,
            ..p
        })?;
        check(&format!("q, {what}"), Q::default(), |p| Params { damping, inverse, ..p })?;
    }
    for kind in [DampingKind::Eigenvalue, DampingKind::Pi] {
        let damping = Damping::Adaptive(Adaptive { kind, every: 1, ..Adaptive::default() });
        check("k-fac, adaptive", Wake::KFac, |p| Params { damping, ..p })?;
    }
    let groups = Groups(vec![Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("fc.weight") }]);
    check("k-fac, gradient-only", Wake::KFac, |p| Params { groups: groups.clone(), ..p })?;
    let exact = Q { solve: QSolve::Exact, ..Q::default() };
    check("q, exact", exact.clone(), |p| Params { damping: pi, ..p })?;
    check("q, exact, split", exact, |p| Params { damping: pi, bias: Bias::Split, ..p })?;
    let quadratic = TwoRate { model_decay: 0.7, ..TwoRate::q(0.3, QSolve::Factor) };
    check("kld-wrm, quadratic", quadratic, |p| Params { orthogonal: None, ..p })
}

#[test]
fn inner_steps() -> Result<()> {
    let run = |factor_limit| {
        let step = |opt: &mut NaturalGradient, loss: &Tensor, outputs: &mut dyn FnMut() -> Result<Tensor>| {
            opt.step_with(loss, Likelihood::Categorical, outputs)
        };
        let mut wake = Qe::default();
        (wake.inner.steps, wake.inner.preconditioned, wake.inner.lr) = (2, true, 0.01);
        trained(wake, step, |p| Params { factor_limit, ..p })
    };
    for (found, full) in run(LOW)?.iter().zip(run(FactorLimit::NONE)?) {
        assert_close(found, &full, 1e-8, "qe");
    }
    Ok(())
}

/// What is averaged is the sketch of the averaged factor, by its definition; the summary says which factors these are.
#[test]
fn averages_are_sketches_of_averages() -> Result<()> {
    for sharing in [Sharing::Expand, Sharing::Reduce] {
        let factors = |factor_limit| -> Result<NaturalGradient> {
            let net = Net::of(DType::F64, 3, wide)?;
            // At a rate of 0 both see the same.
            let options = Params {
                lr: 0.0,
                factor_limit,
                sharing,
                every: Every { factors: 1, inverses: 1 },
                fisher: Fisher::Exact,
                stat_decay: 0.6,
                ..Params::k_fac(&net.tape)
            };
            let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
            for k in 0..9 {
                // Micro-batches of one step.
                for half in 0..2 {
                    let (x, y) = batch(2 * k + half)?;
                    let z = (net.forward)(&x)?;
                    opt.observe(&z, Likelihood::Categorical)?;
                    opt.accumulate(&mean_loss(Likelihood::Categorical, &z, &y)?, 2)?;
                }
                opt.step_accumulated()?;
            }
            Ok(opt)
        };
        let (found, full) = (factors(LOW)?, factors(FactorLimit::NONE)?);
        let mut low = 0;
        for block in found.summary().blocks {
            let [(a, g), (full_a, full_g)] = [&found, &full].map(|opt| opt.factors(&block.name).unwrap());
            let table = if block.name == "table" { FactorLimit::DIAGONAL } else { LOW };
            assert_eq!(
                block.ranks,
                [rank_of(block.dims[1], table), rank_of(block.dims[2], LOW)],
                "{}",
                block.name
            );
            for ((found, full), rank) in [(g, full_g), (a, full_a)].iter().zip(block.ranks) {
                let Some(rank) = rank else {
                    assert_close(found, full, 1e-10, &block.name);
                    continue;
                };
                low += 1;
                for group in 0..block.dims[0] {
                    let (found, full) = (of_group(found, group), of_group(full, group));
                    let sketch = omega(full.nrows(), rank).transpose() * &full;
                    assert_same(&found.subrows(0, rank).to_owned(), &sketch, 1e-10, &block.name);
                    let diagonal = full.diagonal().column_vector().transpose();
                    let diagonal = faer::Mat::from_fn(1, full.nrows(), |_, j| diagonal[j]);
                    assert_same(&found.subrows(rank, 1).to_owned(), &diagonal, 1e-10, &block.name);
                }
            }
        }
        assert_eq!(low, 6);
        let text = found.summary().to_string();
        assert!(
            text.contains("1 x 24 rank 18 x 41 rank 18") && text.contains("9 diag x 20 rank 18"),
            "{text}"
        );
    }
    Ok(())
}

/// Chosen by name, and full where a sketch would be no smaller.
#[test]
fn ranks_and_names() -> Result<()> {
    let net = Net::of(DType::F64, 1, wide)?;
    let low = |name: &str, rank| {
        let limit = FactorLimit { rows: 4, beyond: Beyond::LowRank { rank } };
        Group { factor_limit: Some(limit), ..Group::named(name) }
    };
    let groups = Groups(vec![low("fc.*", 23), low("last.*", 3)]);
    let opt = NaturalGradient::from_varmap(&net.varmap, Params { groups, ..Params::k_fac(&net.tape) })?;
    let ranks =
        |name: &str| opt.summary().blocks.into_iter().find(|b| b.name == name).map(|b| (b.runs, b.ranks));
    assert_eq!(ranks("fc"), Some(([24, 41], [None, Some(23)])));
    assert_eq!(ranks("last"), Some(([3, 25], [None, Some(3)])));
    assert_eq!(ranks("conv"), Some(([20, 21], [None, None])));
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let low = |p| Params { factor_limit: LOW, ..p };
    let build = |change: &dyn Fn(Params) -> Params| -> Result<NaturalGradient> {
        let net = Net::of(DType::F64, 1, wide)?;
        NaturalGradient::from_varmap(&net.varmap, change(low(Params::k_fac(&net.tape))))
    };
    assert_says(
        build(&|p| Params { ekfac: true, ..p }),
        &[
            "kfac: ekfac needs all eigenvectors",
            "conv.weight has factors of low rank",
            "Beyond::BlockDiagonal",
        ],
    );
    // A table keeps the scaling of its product anyway.
    let others = Group { factor_limit: Some(FactorLimit::NONE), ..Group::named("*") };
    let table = Group { factor_limit: Some(LOW), ..Group::named("table.*") };
    build(&|p| Params { ekfac: true, groups: Groups(vec![others.clone(), table.clone()]), ..p })?;
    assert_says(
        build(&|p| Params { factor_limit: FactorLimit { beyond: Beyond::LowRank { rank: 0 }, ..LOW }, ..p }),
        &["factor limit: expected a rank of at least one, got 0"],
    );
    Ok(())
}
