//! Large layers: factors in runs, tables with a diagonal input factor, and what the summary says of their bytes.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use faer::Mat;
use kronwake::curvature::{Beyond, Damping, FactorLimit, Inverse, Sharing};
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    Bias, Carry, Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, QSolve, So, TwoRate,
    UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood};

const DAMPING: f64 = 0.03;
const ROWS: usize = 7;

/// Token numbers `[n, t]` as a float tensor, so that it fits [`Forward`]; the last rows of the table are never picked.
fn tokens(seed: u64, n: usize, t: usize) -> Result<Tensor> {
    labels(seed, n * t, ROWS as u32 - 2)?.reshape((n, t))?.to_dtype(DType::F64)
}

/// An embedding of [`ROWS`] rows, then a linear layer over each position; `tied` multiplies with the table instead.
fn language(vb: VarBuilder, tied: bool) -> Result<Forward> {
    let table = nn::embedding(ROWS, 4, vb.pp("table"))?;
    let head = match tied {
        true => nn::Linear::new(table.embeddings().clone(), None),
        false => nn::linear(4, 3, vb.pp("head"))?,
    };
    Ok(Box::new(move |x| head.forward(&table.forward(&x.to_dtype(DType::U32)?)?.tanh()?)))
}

/// The mean over terms of the products of one-hot rows, and of the gradients of the rows, from their definitions.
fn table_factors(net: &Net, x: &Tensor, likelihood: Likelihood) -> Result<(Mat<f64>, Mat<f64>)> {
    let z = (net.forward)(x)?;
    let (n, terms) = (x.elem_count(), likelihood.terms(&z)?);
    let picked: Vec<usize> = flat(x).iter().map(|&row| row as usize).collect();
    let mut rows = Mat::zeros(ROWS, ROWS);
    for &row in &picked {
        rows[(row, row)] += 1.0 / terms as f64;
    }
    // Outputs depend on the row of their own position alone, so a row's gradient is H_n J_n with J_n the slope of one position.
    let (values, classes) = (flat(&z), z.dim(2)?);
    let mut features = Mat::zeros(4, 4);
    for (position, &row) in picked.iter().enumerate() {
        let elements: Vec<_> = (0..4).map(|f| (net.var("table.weight"), row * 4 + f)).collect();
        let all = jacobian(&elements, 2e-3, &|| (net.forward)(x))?;
        let j = all.subrows(position * classes, classes).to_owned();
        let h = hessian(likelihood, &values[position * classes..][..classes]);
        features += j.transpose() * h * &j * (1.0 / n as f64);
    }
    Ok((rows, features))
}

/// The step of a table is the dense solve with one-hot inputs, under either damping and sharing.
#[test]
fn tables() -> Result<()> {
    let likelihood = Likelihood::Categorical;
    for (damping, sharing) in [
        (Damping::Eigenvalue(DAMPING), Sharing::Expand),
        (Damping::Eigenvalue(DAMPING), Sharing::Reduce),
        (Damping::Pi(DAMPING), Sharing::Expand),
    ] {
        let net = Net::of(DType::F64, 1, |vb| language(vb, false))?;
        let options = Params {
            lr: 1.0,
            damping,
            sharing,
            every: Every { factors: 1, inverses: 1 },
            fisher: Fisher::Exact,
            kl_clip: None,
            ..Params::k_fac(&net.tape)
        };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let x = tokens(3, 5, 6)?;
        let (rows, features) = table_factors(&net, &x, likelihood)?;
        let z = (net.forward)(&x)?;
        let loss = mean_loss(likelihood, &z, &labels(4, 30, 3)?)?;
        let gradient = matrix(loss.backward()?.get(&net.var("table.weight")).unwrap());
        let before = matrix(net.var("table.weight").as_tensor());
        opt.observe(&z, likelihood)?;
        opt.backward_step(&loss)?;
        let (a, g) = opt.factors("table").unwrap();
        assert_eq!((a.dims(), g.dims()), (&[1, 4, 4][..], &[ROWS, 1, 1][..]));
        assert_same(&joined(&g, 0, 1, ROWS), &rows, 1e-12, "frequencies");
        assert_same(&of_group(&a, 0), &features, 1e-8, "gradients of the rows");
        let damped = match damping {
            Damping::Pi(la) => {
                let mean = |m: &Mat<f64>| m.diagonal().column_vector().sum() / m.nrows() as f64;
                let pi = (mean(&features) / mean(&rows)).sqrt();
                kron(&(features + eye(4) * (pi * la.sqrt())), &(rows + eye(ROWS) * (la.sqrt() / pi)))
            }
            _ => kron(&features, &rows) + eye(4 * ROWS) * DAMPING,
        };
        let by_columns = Mat::from_fn(4 * ROWS, 1, |i, _| gradient[(i % ROWS, i / ROWS)]);
        let step = solve(&damped, &by_columns);
        let expected = Mat::from_fn(ROWS, 4, |i, j| -step[(j * ROWS + i, 0)]);
        let found = matrix(net.var("table.weight").as_tensor()) - before;
        assert_same(&found, &expected, 1e-7, &format!("{damping:?} {sharing:?}"));
    }
    Ok(())
}

/// A table that is a linear layer's weight too has one block, the linear layer's; Adam takes a table where that is asked for.
#[test]
fn tied_and_other_tables() -> Result<()> {
    let blocks = |tied, groups| -> Result<Vec<_>> {
        let net = Net::of(DType::F64, 1, |vb| language(vb, tied))?;
        let factor_limit = FactorLimit { rows: 4, beyond: Beyond::BlockDiagonal };
        let mut opt = NaturalGradient::from_varmap(
            &net.varmap,
            Params { factor_limit, groups, ..Params::k_fac(&net.tape) },
        )?;
        for step in 0..2 {
            let z = (net.forward)(&tokens(step, 5, 6)?)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &labels(step, 30, 3)?)?)?;
        }
        Ok(opt.summary().blocks.into_iter().map(|b| (b.name, b.dims, b.runs)).collect())
    };
    assert_eq!(blocks(true, Groups::default())?, [("table".to_string(), [1, ROWS, 4], [1, 4])]);
    let runs = FactorLimit { rows: 4, beyond: Beyond::BlockDiagonal };
    let given = Group { factor_limit: Some(runs), ..Group::named("table.*") };
    assert_eq!(blocks(true, Groups(vec![given]))?, [("table".to_string(), [1, ROWS, 4], [4, 4])]);
    let adam = Group { rule: Some(UpdateRule::Adam), ..Group::named("table.*") };
    assert_eq!(blocks(false, Groups(vec![adam]))?, [("head".to_string(), [1, 3, 5], [3, 3])]);
    let diagonal = Group { factor_limit: Some(FactorLimit::DIAGONAL), ..Group::named("table.*") };
    let found = blocks(false, Groups(vec![diagonal]))?;
    assert_eq!(found[0], ("table".to_string(), [1, ROWS, 4], [1, 1]));
    Ok(())
}

/// Bytes as the summary has them and as they are, for a block and in all.
fn check_bytes(what: &str, wake: impl Into<Wake> + Clone, change: impl Fn(Params) -> Params) -> Result<()> {
    for dtype in [DType::F64, DType::BF16] {
        let net = Net::of(dtype, 1, |vb| {
            let (table, conv) = (
                nn::embedding(5, 4, vb.pp("table"))?,
                nn::conv1d(4, 6, 3, Default::default(), vb.pp("conv"))?,
            );
            let (norm, last) = (nn::layer_norm(6, 1e-5, vb.pp("norm"))?, nn::linear(6, 3, vb.pp("last"))?);
            Ok(Box::new(move |x| {
                let x = table.forward(&x.to_dtype(DType::U32)?)?.transpose(1, 2)?.contiguous()?;
                last.forward(&norm.forward(&conv.forward(&x)?.mean(2)?)?)
            }))
        })?;
        let options =
            Params { every: Every { factors: 1, inverses: 1 }, ..Params::of(wake.clone(), &net.tape) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, change(options))?;
        let promised = opt.summary();
        for step in 0..3 {
            let x = labels(step, 8 * 4, 5)?.reshape((8, 4))?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, Likelihood::Categorical)?;
            let loss = mean_loss(Likelihood::Categorical, &z.to_dtype(DType::F64)?, &labels(step, 8, 3)?)?;
            opt.backward_step(&loss)?;
        }
        assert_eq!(opt.summary(), promised, "{what}");
        let (tensors, _) = saved(&opt)?;
        let bytes = |part: &dyn Fn(&str) -> bool| -> usize {
            let state = tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix("kronwake/")?, t)));
            state.filter(|(name, _)| part(name)).map(|(_, (_, _, bytes))| bytes.len()).sum()
        };
        for block in &promised.blocks {
            let slot = |names: &[&str]| {
                bytes(&|name: &str| names.iter().any(|slot| name == format!("{}/{slot}", block.name)))
            };
            let what = format!("{what}, {dtype:?}, block {}", block.name);
            assert_eq!(block.factor_bytes, slot(&["factor_a", "factor_g"]), "{what}");
            let inverse = ["inv_a", "inv_g", "basis_a", "basis_g", "scale", "root_a", "root_g"];
            assert_eq!(block.inverse_bytes, slot(&inverse), "{what}");
            let other = ["moments", "carry", "mean", "model_a", "model_g", "step", "velocity"];
            // A mean that is the carry is saved twice.
            let shared = if what.starts_with("kld-wrm") { slot(&["mean"]) } else { 0 };
            assert_eq!(block.other_bytes, slot(&other) - shared, "{what}");
        }
        let shared =
            if what.starts_with("kld-wrm") { bytes(&|name: &str| name.ends_with("/mean")) } else { 0 };
        // Means and deviations of inputs far from standard are not counted.
        let inputs = bytes(&|name: &str| name.ends_with("inputs"));
        assert_eq!(promised.bytes(), bytes(&|_| true) - shared - inputs, "{what}, {dtype:?}, in all");
    }
    Ok(())
}

#[test]
fn bytes_are_those_of_the_tensors() -> Result<()> {
    for factor_limit in [
        FactorLimit::NONE,
        FactorLimit { rows: 4, beyond: Beyond::BlockDiagonal },
        FactorLimit { rows: 3, beyond: Beyond::Diagonal },
        FactorLimit { rows: 3, beyond: Beyond::LowRank { rank: 2 } },
    ] {
        let low = matches!(factor_limit.beyond, Beyond::LowRank { .. });
        let pi = Damping::Pi(0.01);
        check_bytes("kfac", Wake::KFac, |p| Params { factor_limit, momentum: 0.5, ..p })?;
        check_bytes("so, split", So::default(), |p| Params { factor_limit, bias: Bias::Split, ..p })?;
        check_bytes("so, ekfac", So::default(), |p| Params { factor_limit, ekfac: !low, ..p })?;
        for inverse in [Inverse::Cholesky, Inverse::Newton] {
            check_bytes("so, pi", So::default(), |p| Params { factor_limit, damping: pi, inverse, ..p })?;
        }
        let q = Q { solve: QSolve::Exact, ..Q::default() };
        check_bytes("q", q, |p| Params { factor_limit, damping: pi, ..p })?;
        check_bytes("kld-wrm", TwoRate::default(), |p| Params { factor_limit, ..p })?;
        check_bytes("literal", TwoRate::default(), |p| Params { factor_limit, carry: Carry::Literal, ..p })?;
    }
    Ok(())
}

/// A layer of 400,000 inputs, whose full factor would take 640 GB.
#[test]
fn never_forms_what_is_left_out() -> Result<()> {
    let (wide, f32) = (400_000, DType::F32);
    let (eigen, pi) = ((Inverse::Eigen, Damping::Eigenvalue(0.1)), (Inverse::Cholesky, Damping::Pi(0.1)));
    let low = Beyond::LowRank { rank: 4 };
    for ((inverse, damping), beyond, shown) in [
        (eigen, Beyond::Diagonal, "400001 diag"),
        (pi, Beyond::Diagonal, "400001 diag"),
        (eigen, low, "400001 rank 4"),
        (pi, low, "400001 rank 4"),
    ] {
        let net = Net::of(f32, 1, |vb| {
            let layer = nn::linear(wide, 2, vb.pp("fc"))?;
            Ok(Box::new(move |x| layer.forward(x)))
        })?;
        let limit = Group { factor_limit: Some(FactorLimit { rows: 64, beyond }), ..Group::named("fc.*") };
        let options = Params { damping, inverse, groups: Groups(vec![limit]), ..Params::k_fac(&net.tape) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
        let z = (net.forward)(&Tensor::ones((2, wide), f32, &Device::Cpu)?)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &labels(1, 2, 2)?)?)?;
        assert!(opt.summary().to_string().contains(shown), "{}", opt.summary());
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let build = |change: fn(&mut Params)| -> Result<NaturalGradient> {
        let net = Net::of(DType::F64, 1, small)?;
        let mut options = Params::k_fac(&net.tape);
        change(&mut options);
        NaturalGradient::from_varmap(&net.varmap, options)
    };
    assert_says(build(|p| p.factor_limit.rows = 0), &["expected at least one row, got 0"]);
    let group = |p: &mut Params| {
        let limit = FactorLimit { rows: 0, beyond: Beyond::Diagonal };
        p.groups = Groups(vec![Group { factor_limit: Some(limit), ..Group::named("fc*") }]);
    };
    assert_says(build(group), &["expected at least one row, got 0"]);
    assert_says(
        build(|p| p.memory_limit = Some(1000)),
        &["state and work space take", "the limit is 1000 B"],
    );
    build(|p| p.memory_limit = Some(1 << 20))?;
    let mut built = build(|_| ())?;
    let changed = Params { factor_limit: FactorLimit::DIAGONAL, ..built.params().clone() };
    assert_says(built.set_params(changed), &["limits", "fixed at construction"]);
    Ok(())
}
