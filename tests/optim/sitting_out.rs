//! Vars that take no part in a step, and optimizers that go on with other Vars.

use crate::common::*;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::nn::{self, Linear, Module, VarBuilder, VarMap, loss::cross_entropy};
use kronwake::optim::{
    Average, Every, Group, Groups, NaturalGradient, Optimizer, Params, Q, Qe, So, TwoRate, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};

/// Experts behind a gate that sends a whole batch to one of them.
struct Mixture {
    vars: VarMap,
    tape: Tape,
    experts: Vec<Linear>,
    head: Linear,
}

impl Mixture {
    fn new(seed: u64) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let (experts, head) = tape.build(|| {
            let experts =
                (0..2).map(|i| nn::linear(4, 5, vb.pp(format!("expert{i}")))).collect::<Result<_>>()?;
            Ok((experts, nn::linear(5, 3, vb.pp("head"))?))
        })?;
        let mixture = Self { vars, tape, experts, head };
        for (index, name) in mixture.names().iter().enumerate() {
            let var = mixture.var(name);
            var.set(&random(100 * seed + index as u64, var.dims())?)?;
        }
        Ok(mixture)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.vars.data().lock().unwrap().keys().cloned().collect();
        names.sort();
        names
    }

    fn var(&self, name: &str) -> candle_core::Var {
        self.vars.data().lock().unwrap()[name].clone()
    }

    fn values(&self, of: &str) -> Vec<Vec<f64>> {
        let names = self.names();
        names
            .iter()
            .filter(|name| name.starts_with(of))
            .map(|name| flat(self.var(name).as_tensor()))
            .collect()
    }

    fn forward(&self, expert: usize, x: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.experts[expert].forward(x)?.tanh()?)
    }
}

fn params(wake: Wake, tape: &Tape) -> Params {
    let groups = Groups(vec![Group { optional: true, ..Group::named("expert*") }]);
    let every = Every { factors: 1, inverses: 1 };
    let (fisher, weight_decay) = (Fisher::Exact, 0.01);
    let defaults = Params::of(wake, tape);
    // KLD-WRM's is a share of a length that it finds itself.
    let lr = if defaults.lr == 1.0 { 1.0 } else { defaults.lr.min(0.05) };
    Params { lr, groups, every, fisher, weight_decay, momentum: 0.3, ..defaults }
}

fn step(net: &Mixture, opt: &mut NaturalGradient, expert: usize, k: u64) -> Result<f64> {
    let (x, y) = (random(50 + k, &[7, 4])?, labels(60 + k, 7, 3)?);
    let z = net.forward(expert, &x)?;
    let loss = cross_entropy(&z, &y)?;
    opt.observe(&z, Likelihood::Categorical)?;
    opt.step_with(&loss, Likelihood::Categorical, &mut || net.forward(expert, &x))?;
    loss.to_scalar()
}

fn all() -> [Wake; 5] {
    [Wake::KFac, So::default().into(), Q::default().into(), Qe::default().into(), TwoRate::default().into()]
}

#[test]
fn every_member_trains_a_mixture_of_experts() -> Result<()> {
    for wake in all() {
        let net = Mixture::new(1)?;
        let mut opt = NaturalGradient::from_varmap(&net.vars, params(wake.clone(), &net.tape))?;
        let mut losses = vec![];
        for k in 0..24u64 {
            let expert = (k % 3 == 2) as usize;
            let idle = format!("expert{}", 1 - expert);
            let (before, state) = (net.values(&idle), saved(&opt)?.0);
            losses.push(step(&net, &mut opt, expert, k % 3)?);
            assert_eq!(net.values(&idle), before, "{}, step {k}", wake.name());
            // Nothing of its state has moved but the last step, along which there is no slope now.
            let after = saved(&opt)?.0;
            for (name, value) in &state {
                if name.contains(&idle) && !name.ends_with("/step") && !name.contains("/model") {
                    assert_eq!(after.get(name), Some(value), "{}, step {k}: {name}", wake.name());
                }
            }
        }
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..6]), mean(&losses[18..]));
        assert!(last < 0.9 * first, "{}: {first} to {last}", wake.name());
    }
    Ok(())
}

/// Steps in which a block sits out are those of a model without it, in blocks and averages.
#[test]
fn the_others_step_as_if_it_were_not_there() -> Result<()> {
    for wake in [Wake::KFac, So::default().into(), Q::default().into()] {
        let (net, alone) = (Mixture::new(2)?, Mixture::new(2)?);
        let average = Some(Average::default());
        let with = Params { average, ..params(wake.clone(), &net.tape) };
        let mut opt = NaturalGradient::from_varmap(&net.vars, with)?;
        let frozen = Groups(vec![
            Group { optional: true, ..Group::named("expert0*") },
            Group { frozen: true, ..Group::named("expert1*") },
        ]);
        let without = Params { average, groups: frozen, ..params(wake, &alone.tape) };
        let mut opt_alone = NaturalGradient::from_varmap(&alone.vars, without)?;
        for k in 0..5 {
            step(&net, &mut opt, 0, k)?;
            step(&alone, &mut opt_alone, 0, k)?;
        }
        assert_eq!(net.values(""), alone.values(""));
        let averages = |opt: &NaturalGradient| -> Vec<Vec<f64>> {
            opt.averages()
                .into_iter()
                .filter(|(name, _)| !name.starts_with("expert1"))
                .map(|(_, t)| flat(t))
                .collect()
        };
        assert_eq!(averages(&opt), averages(&opt_alone));
    }
    Ok(())
}

#[test]
fn what_sits_out_is_saved_and_resumed() -> Result<()> {
    let path = scratch("sitting-out");
    let net = Mixture::new(3)?;
    let mut opt = NaturalGradient::from_varmap(&net.vars, params(So::default().into(), &net.tape))?;
    // One expert has not been seen yet.
    for k in 0..3 {
        step(&net, &mut opt, 0, k)?;
    }
    opt.save(&path)?;
    let other = Mixture::new(4)?;
    let mut resumed = NaturalGradient::from_varmap(&other.vars, params(So::default().into(), &other.tape))?;
    resumed.resume(&path)?;
    std::fs::remove_file(&path)?;
    for k in 0..6 {
        step(&net, &mut opt, (k % 2) as usize, k)?;
        step(&other, &mut resumed, (k % 2) as usize, k)?;
    }
    assert_eq!(net.values(""), other.values(""));
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    let net = Mixture::new(1)?;
    let plain = Params { groups: Groups::default(), ..params(Wake::KFac, &net.tape) };
    let mut opt = NaturalGradient::from_varmap(&net.vars, plain)?;
    let before = net.values("");
    assert_says(
        step(&net, &mut opt, 0, 0).map(drop),
        &["no gradient for expert1.bias, expert1.weight", "optional: true"],
    );
    assert_eq!(net.values(""), before);

    let beside = Params { overlap: 2, ..params(Wake::KFac, &net.tape) };
    assert_says(
        NaturalGradient::from_varmap(&net.vars, beside).map(drop),
        &["expert0.bias may sit out steps", "expected overlap 0, got 2"],
    );
    Ok(())
}

/// A head is trained, then the rest with it.
#[test]
fn the_state_of_a_head_goes_on_in_the_whole_model() -> Result<()> {
    let path = scratch("head");
    let net = Net::of(DType::F64, 1, small)?;
    let every = Every { factors: 2, inverses: 4 };
    let options = |groups| Params { every, groups, fisher: Fisher::Exact, ..Params::kld_wrm(&net.tape) };
    let frozen = ["conv*", "gain", "fc1*"].map(|name| Group { frozen: true, ..Group::named(name) });
    let mut head = NaturalGradient::from_varmap(&net.varmap, options(Groups(frozen.to_vec())))?;
    let train = |opt: &mut NaturalGradient, from: u64, to: u64| -> Result<f64> {
        let mut last = 0.0;
        for k in from..to {
            let (x, y) = small_batch(k % 2, 9, DType::F64)?;
            let z = (net.forward)(&x)?;
            let loss = mean_loss(Likelihood::Categorical, &z, &y)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&loss)?;
            last = loss.to_scalar()?;
        }
        Ok(last)
    };
    let first = train(&mut head, 0, 7)?;
    head.save(&path)?;

    let mut whole = NaturalGradient::from_varmap(&net.varmap, options(Groups::default()))?;
    assert_says(whole.resume(&path), &["missing kronwake/conv/factor_a"]);
    let resumed = whole.resume_partly(&path)?;
    assert_eq!(resumed.fresh, ["conv", "fc1"]);
    assert!(resumed.unused.is_empty(), "{:?}", resumed.unused);
    assert_eq!(whole.steps(), 7);
    let (a, b) = (head.factors("fc2").unwrap(), whole.factors("fc2").unwrap());
    assert_eq!((flat(&a.0), flat(&a.1)), (flat(&b.0), flat(&b.1)));
    assert!(whole.factors("fc1").is_none());
    // Step 7 is between two refreshes; the new blocks have theirs all the same.
    let conv = flat(net.var("conv.weight").as_tensor());
    let last = train(&mut whole, 7, 31)?;
    assert_ne!(flat(net.var("conv.weight").as_tensor()), conv);
    assert!(last < first, "{first} to {last}");

    // And back: what the file has of others is not taken.
    whole.save(&path)?;
    let again = head.resume_partly(&path)?;
    std::fs::remove_file(&path)?;
    assert!(again.fresh.is_empty(), "{:?}", again.fresh);
    assert!(again.unused.contains(&"kronwake/conv/factor_a".to_string()), "{:?}", again.unused);
    Ok(())
}

/// An expert that is called with no rows has a gradient of zeros and no statistics.
#[test]
fn a_layer_called_without_rows() -> Result<()> {
    let net = Mixture::new(5)?;
    let mut opt = NaturalGradient::from_varmap(&net.vars, params(So::default().into(), &net.tape))?;
    let split = |x: &Tensor, first: usize| -> Result<Tensor> {
        let rest = x.dim(0)? - first;
        let (a, b) = (x.narrow(0, 0, first)?, x.narrow(0, first, rest)?);
        let hidden = [net.experts[0].forward(&a)?.tanh()?, net.experts[1].forward(&b)?.tanh()?];
        net.head.forward(&Tensor::cat(&hidden, 0)?)
    };
    for (k, first) in [7, 4, 7, 0, 3].into_iter().enumerate() {
        let (x, y) = (random(80 + k as u64, &[7, 4])?, labels(90 + k as u64, 7, 3)?);
        let z = split(&x, first)?;
        opt.observe(&z, Likelihood::Categorical)?;
        let grads = cross_entropy(&z, &y)?.backward()?;
        if first == 7 {
            let grad = grads.get(&net.var("expert1.weight")).expect("it was called");
            assert!(flat(grad).iter().all(|g| *g == 0.0));
        }
        let known = opt.factors("expert1");
        opt.step(&grads)?;
        if first == 7 {
            let before = known.map(|(a, g)| (flat(&a), flat(&g)));
            assert_eq!(opt.factors("expert1").map(|(a, g)| (flat(&a), flat(&g))), before);
        }
    }
    assert!(opt.factors("expert1").is_some());
    Ok(())
}

/// An embedding that is asked for nothing.
#[test]
fn an_embedding_of_no_ids() -> Result<()> {
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let (table, head) =
        tape.build(|| Ok((nn::embedding(6, 4, vb.pp("table"))?, nn::linear(4, 3, vb.pp("head"))?)))?;
    let groups = Groups(vec![Group { optional: true, ..Group::named("table*") }]);
    let every = Every { factors: 1, inverses: 1 };
    let mut opt = NaturalGradient::from_varmap(&vars, Params { groups, every, ..Params::k_fac(&tape) })?;
    for (k, count) in [3, 0, 2].into_iter().enumerate() {
        let ids = Tensor::from_vec((0..count as u32).collect::<Vec<_>>(), count, &Device::Cpu)?;
        let others = random(k as u64, &[4, 4])?;
        let x = Tensor::cat(&[table.forward(&ids)?, others], 0)?;
        let z = head.forward(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&cross_entropy(&z, &labels(k as u64, 4 + count, 3)?)?)?;
    }
    Ok(())
}
