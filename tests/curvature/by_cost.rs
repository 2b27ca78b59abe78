//! Factors that are chosen by what they cost: which, what is forecast, what a file says of them, and what is refused.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Beyond, Damping, FactorLimit, Inverse};
use kronwake::nn::{self, Module, VarBuilder, VarMap};
use kronwake::optim::{
    Budget, Every, Group, Groups, NaturalGradient, Optimizer, Params, Summary, SummaryBlock, TwoRate, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};

/// Inputs, outputs, and whether there is a bias.
type Dims = (usize, usize, bool);

const LENET: [Dims; 3] = [(784, 300, true), (300, 100, true), (100, 10, true)];

/// A layer of a BERT-like encoder.
fn encoder(width: usize) -> Vec<Dims> {
    let mut dims = vec![(width, width, true); 4];
    dims.extend([(width, 4 * width, true), (4 * width, width, true)]);
    dims
}

/// A layer of a Llama-like decoder with grouped queries.
fn decoder(width: usize, inner: usize) -> Vec<Dims> {
    let narrow = (width, width / 4, false);
    let wide = (width, width, false);
    vec![wide, narrow, narrow, wide, (width, inner, false), (width, inner, false), (inner, width, false)]
}

/// An optimizer of linear layers, with constant weights: what is chosen follows from shapes alone.
fn optimizer(dims: &[Dims], change: impl FnOnce(Params) -> Params) -> Result<NaturalGradient> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    for (index, &(from, to, bias)) in dims.iter().enumerate() {
        let name = |part: &str| format!("fc{index}.{part}");
        vars.get((to, from), &name("weight"), nn::Init::Const(0.01), DType::F32, &Device::Cpu)?;
        if bias {
            vars.get(to, &name("bias"), nn::Init::Const(0.0), DType::F32, &Device::Cpu)?;
        }
    }
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    tape.build(|| {
        for (index, &(from, to, bias)) in dims.iter().enumerate() {
            let vb = vb.pp(format!("fc{index}"));
            match bias {
                true => nn::linear(from, to, vb)?,
                false => nn::linear_no_bias(from, to, vb)?,
            };
        }
        Ok(())
    })?;
    NaturalGradient::from_varmap(&vars, change(Params::kld_wrm(&tape)))
}

fn summary(dims: &[Dims], change: impl FnOnce(Params) -> Params) -> Result<Summary> {
    Ok(optimizer(dims, change)?.summary())
}

/// `[G, A]` of each layer: the rank, where it is low, or else the rows of a run.
fn kept(summary: &Summary) -> Vec<[Kept; 2]> {
    let side = |(run, rank): (usize, Option<usize>)| rank.map_or(Kept::Runs(run), Kept::Rank);
    let of = |block: &SummaryBlock| [0, 1].map(|i| side((block.runs[i], block.ranks[i])));
    summary.blocks.iter().map(of).collect()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kept {
    Runs(usize),
    Rank(usize),
}

/// Full up to so many rows, and beyond of a rank.
fn full_up_to(dims: &[Dims], rows: usize, rank: usize) -> Vec<[Kept; 2]> {
    let side = |dim| if dim <= rows { Kept::Runs(dim) } else { Kept::Rank(rank) };
    dims.iter().map(|&(from, to, bias)| [side(to), side(from + usize::from(bias))]).collect()
}

/// Seconds of model, refresh and preconditioning by the documented rates of a core, KLD-WRM's.
fn forecast(dims: &[Dims], kept: &[[Kept; 2]], rows: f64) -> [f64; 3] {
    let weights: f64 = dims.iter().map(|&(from, to, _)| (from * to) as f64).sum();
    let model = 6.0 * weights * rows / 75e9;
    let (mut refresh, mut preconditioning) = (2.0 * weights * rows / 75e9, 0.0);
    for (&(from, to, bias), &[of_g, of_a]) in dims.iter().zip(kept) {
        let (g, a) = (to as f64, (from + usize::from(bias)) as f64);
        // Where all is full, and the direction is made orthogonal as a whole, a divergence is measured among the eigenvectors.
        let full = [of_g, of_a].iter().all(|kept| matches!(kept, Kept::Runs(_))) && g.min(a) <= 256.0;
        for (d, kept) in [(g, of_g), (a, of_a)] {
            let multiplications = match kept {
                Kept::Runs(run) => {
                    let run = run as f64;
                    refresh += rows * d * run / 50e9 + 18.0 * d * run * run / 100e9;
                    if full { 2.0 * run } else { 3.0 * run }
                }
                Kept::Rank(rank) => {
                    let k = rank as f64;
                    refresh += 4.0 * rows * d * k / 50e9 + 2.0 * (8.0 * d * k * k + 36.0 * k * k * k) / 20e9;
                    4.0 * k
                }
            };
            preconditioning += 2.0 * g * a * multiplications / 50e9;
        }
    }
    [model, refresh, preconditioning]
}

fn share([model, refresh, preconditioning]: [f64; 3], period: f64) -> f64 {
    let curvature = refresh / period + preconditioning;
    curvature / (model + curvature)
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-9 * expected
}

/// Small nets keep full factors, whatever the share; of large ones the choices were computed by hand from the documented formula.
#[test]
fn what_is_chosen() -> Result<()> {
    let with = |rows| move |p| Params { budget: Budget { rows, ..Budget::default() }, ..p };
    let all = usize::MAX;
    let convolutions = [(25, 6, true), (150, 16, true), (400, 120, true), (120, 84, true), (84, 10, true)];
    for small in [&convolutions[..], &decoder(128, 256).repeat(4)] {
        for rows in [1, 2048] {
            assert_eq!(kept(&summary(small, with(rows))?), full_up_to(small, all, 0));
        }
    }
    // LeNet-300-100: 18 % at a rank of 64, 31 % at one of 128; at 8,192 rows 16 % at one of 128 and 22 % full, with twice the rows 17 %.
    for (rows, full, rank) in [(1, 256, 64), (2048, 256, 64), (8192, 512, 128), (16384, all, 0)] {
        assert_eq!(
            kept(&summary(&LENET, with(rows))?),
            full_up_to(&LENET, full, rank),
            "LeNet-300-100, {rows}"
        );
    }
    // A decoder 128 wide: 21 % at a rank of 64, which is the least.
    let larger = decoder(128, 344).repeat(4);
    assert_eq!(kept(&summary(&larger, with(2048))?), full_up_to(&larger, 256, 64));
    // MiniLM: 16 % at a rank of 64, 28 % at one of 128; with twice the rows 16 and 19 %; full up to 1,024 rows at 8,192.
    let minilm = encoder(384);
    for (rows, full, rank) in [(2048, 256, 64), (4096, 256, 128), (8192, 1024, 128), (32768, all, 0)] {
        assert_eq!(kept(&summary(&minilm, with(rows))?), full_up_to(&minilm, full, rank), "MiniLM, {rows}");
    }
    let bert = encoder(768);
    for (rows, full, rank) in [(2048, 256, 64), (4096, 512, 128), (32768, 2048, 128)] {
        assert_eq!(kept(&summary(&bert, with(rows))?), full_up_to(&bert, full, rank), "BERT-base, {rows}");
    }
    let llama = decoder(1024, 2816);
    for (rows, full, rank) in [(2048, 256, 64), (4096, 512, 128), (32768, 2048, 128)] {
        assert_eq!(kept(&summary(&llama, with(rows))?), full_up_to(&llama, full, rank), "Llama, {rows}");
    }
    Ok(())
}

/// What a hand has set stays, and what is left follows from all; EKFAC has blocks.
#[test]
fn by_hand() -> Result<()> {
    let minilm = encoder(384);
    let all = full_up_to(&minilm, usize::MAX, 0);
    assert_eq!(kept(&summary(&minilm, |p| Params { factor_limit: FactorLimit::NONE, ..p })?), all);
    let group = Group { factor_limit: Some(FactorLimit::NONE), ..Group::named("fc4.*") };
    let found = kept(&summary(&minilm, |p| Params { groups: Groups(vec![group]), ..p })?);
    assert_eq!(found[4], all[4]);
    assert_eq!(found[5], [Kept::Rank(64); 2]);
    // No factor of the limit's rows is less than full, however dear.
    let limit = FactorLimit { rows: 385, beyond: Beyond::ByCost };
    let found = summary(&minilm, |p| Params { factor_limit: limit, ..p })?;
    assert_eq!(kept(&found), full_up_to(&minilm, 385, 64));
    assert!(found.forecast.share > 0.2);
    // At 8,192 rows and a period of 1,000 all full factors take 22 %, those of up to 1,024 rows 10 %.
    let every = Every { factors: 1000, inverses: 1000 };
    let rare = |p| Params { budget: Budget { rows: 8192, share: 0.23 }, every, ..p };
    assert_eq!(kept(&summary(&minilm, rare)?), all);
    let pi = |p| Params { damping: Damping::Pi(0.01), inverse: Inverse::Cholesky, ..p };
    let shares = [summary(&minilm, |p| p)?, summary(&minilm, pi)?].map(|found| found.forecast.share);
    assert!(shares.iter().all(|share| *share <= 0.2), "{shares:?}");
    let k_fac = |p: Params| Params { ekfac: true, ..Params::k_fac(&p.tape) };
    let found = kept(&summary(&minilm, k_fac)?);
    assert_eq!(found[4], [Kept::Runs(256), Kept::Runs(193)]);
    Ok(())
}

/// The forecast is the plain formula, block by block and in all; with what is chosen it is within the share, and with the next dearer choice
/// beyond it.
#[test]
fn the_forecast() -> Result<()> {
    for dims in [encoder(384), decoder(1024, 2816), LENET.to_vec()] {
        let found = summary(&dims, |p| p)?;
        let expected = forecast(&dims, &kept(&found), 2048.0);
        let forecasts = [found.forecast.model, found.forecast.refresh, found.forecast.preconditioning];
        for (found, expected) in forecasts.into_iter().zip(expected) {
            assert!(near(found, expected), "{found} {expected}");
        }
        assert!(near(found.forecast.share, share(expected, 10.0)) && found.forecast.share <= 0.2);
        assert!(share(forecast(&dims, &full_up_to(&dims, 256, 128), 2048.0), 10.0) > 0.2);
        for (index, block) in found.blocks.iter().enumerate() {
            let [_, alone, _] = forecast(&dims[index..=index], &kept(&found)[index..=index], 2048.0);
            let (from, to, _) = dims[index];
            let pass = 2.0 * (from * to) as f64 * 2048.0 / 75e9;
            assert!(near(block.refresh_seconds, alone - pass), "{}", block.name);
        }
        let text = found.to_string();
        assert!(text.contains("forecast for 2048 rows") && text.contains("% of the time"), "{text}");
    }
    // Full factors of more rows than a direction's parts have: its divergence is measured by products with them.
    let dims = encoder(384);
    let found = summary(&dims, |p| Params { factor_limit: FactorLimit::NONE, ..p })?;
    let [_, _, by_products] = forecast(&dims, &kept(&found), 2048.0);
    assert!(near(found.forecast.preconditioning, by_products), "{:?}", found.forecast);
    // Without sampled labels there is no pass of its own, without orthogonal directions no divergence to measure, without a relative damping
    // no trace; a quadratic wake makes inverses twice.
    for (name, inversions) in [("kfac", 1.0), ("q-kld-wrm", 2.0)] {
        let wake: Wake = name.parse()?;
        let limit = FactorLimit { rows: 400, beyond: Beyond::LowRank { rank: 32 } };
        let change = |p: Params| Params {
            fisher: Fisher::Empirical,
            factor_limit: limit,
            ..Params::of(wake, &p.tape)
        };
        let found = summary(&dims, change)?;
        let (mut refresh, mut preconditioning) = (0.0, 0.0);
        for &(from, to, bias) in &dims {
            let (g, a) = (to as f64, (from + usize::from(bias)) as f64);
            for d in [g, a] {
                let multiplications = if d <= 400.0 {
                    refresh += 2048.0 * d * d / 50e9 + inversions * 18.0 * d * d * d / 100e9;
                    2.0 * d
                } else {
                    let decomposition = (8.0 * d * 32.0 * 32.0 + 36.0 * 32.0 * 32.0 * 32.0) / 20e9;
                    refresh += 4.0 * 2048.0 * d * 32.0 / 50e9 + inversions * decomposition;
                    64.0
                };
                preconditioning += 2.0 * g * a * multiplications / 50e9;
            }
        }
        assert!(near(found.forecast.refresh, refresh), "{name}");
        assert!(near(found.forecast.preconditioning, preconditioning), "{name}");
    }
    Ok(())
}

/// A classifier large enough for its factors to be too dear, and few enough rows.
fn wide(vb: VarBuilder) -> Result<Forward> {
    let (first, last) = (nn::linear(5, 200, vb.pp("first"))?, nn::linear(200, 3, vb.pp("last"))?);
    Ok(Box::new(move |x| last.forward(&first.forward(x)?.tanh()?)))
}

fn trained(change: impl Fn(Params) -> Params, steps: usize) -> Result<(Net, NaturalGradient)> {
    let net = Net::of(DType::F64, 1, wide)?;
    let options =
        Params { every: Every { factors: 2, inverses: 2 }, ..Params::of(TwoRate::default(), &net.tape) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, change(options))?;
    train(&net, &mut opt, 0..steps)?;
    Ok((net, opt))
}

fn train(net: &Net, opt: &mut NaturalGradient, steps: std::ops::Range<usize>) -> Result<()> {
    for step in steps {
        let x = Tensor::from_vec(
            (0..45).map(|i| ((i * 7 + step * 5) % 11) as f64 / 5.0 - 1.0).collect(),
            (9, 5),
            &Device::Cpu,
        )?;
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&mean_loss(Likelihood::Categorical, &z, &labels(step as u64, 9, 3)?)?)?;
    }
    Ok(())
}

/// A file with factors of other shapes than would be chosen here is gone on from with its own, bit for bit; one with shapes that a hand has
/// ruled out is refused, and nothing has changed.
#[test]
fn a_file_keeps_its_shapes() -> Result<()> {
    let limited = |beyond| move |p| Params { factor_limit: FactorLimit { rows: 50, beyond }, ..p };
    for beyond in [Beyond::BlockDiagonal, Beyond::LowRank { rank: 7 }] {
        let file = std::env::temp_dir()
            .join(format!("kronwake-by-cost-{beyond:?}-{}.safetensors", std::process::id()));
        let (net, mut other) = trained(limited(beyond), 5)?;
        other.save(&file)?;
        train(&net, &mut other, 5..9)?;
        // Here all is full.
        let (fresh, mut opt) = trained(|p| p, 0)?;
        assert_eq!(opt.summary().blocks[0].runs, [200, 6]);
        opt.resume(&file)?;
        let shapes = |opt: &NaturalGradient| -> Vec<_> {
            opt.summary().blocks.into_iter().map(|block| (block.runs, block.ranks)).collect()
        };
        assert_eq!(shapes(&opt), shapes(&other));
        train(&fresh, &mut opt, 5..9)?;
        for name in ["first.weight", "first.bias", "last.weight", "last.bias"] {
            assert_eq!(flat(net.var(name).as_tensor()), flat(fresh.var(name).as_tensor()), "{name}");
        }
        let (_, mut fixed) = trained(|p| Params { factor_limit: FactorLimit::NONE, ..p }, 3)?;
        let before = shapes(&fixed);
        assert_says(fixed.resume(&file), &["does not fit", "first/factor_g", "expected F64 [1, 200, 200]"]);
        assert_eq!(shapes(&fixed), before);
        // A file of something else leaves the chosen shapes too.
        let (_, mut opt) = trained(|p| p, 3)?;
        let before = shapes(&opt);
        let broken = std::fs::read(&file).map_err(candle_core::Error::wrap)?;
        let text = String::from_utf8_lossy(&broken[8..]).find("kld-wrm").map(|at| at + 8);
        let mut broken = broken;
        if let Some(at) = text {
            broken[at..at + 3].copy_from_slice(b"xxx");
        }
        std::fs::write(&file, broken).map_err(candle_core::Error::wrap)?;
        assert!(opt.resume(&file).is_err());
        assert_eq!(shapes(&opt), before);
        let _ = std::fs::remove_file(&file);
    }
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let built = |budget| summary(&LENET, |p| Params { budget, ..p });
    for share in [0.0, 1.0, -0.1, f64::NAN] {
        assert_says(built(Budget { share, ..Budget::default() }), &["share of time between 0 and 1"]);
    }
    assert_says(built(Budget { rows: 0, ..Budget::default() }), &["at least one row, got 0"]);
    let mut opt = optimizer(&LENET, |p| p)?;
    let budget = Budget { rows: 64, ..Budget::default() };
    let changed = Params { budget, ..opt.params().clone() };
    assert_says(opt.set_params(changed), &["budget", "fixed at construction"]);
    Ok(())
}
