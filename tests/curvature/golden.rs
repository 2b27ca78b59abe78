//! Trajectories of an independent PyTorch implementation in f64 (tests/golden/README.md): every optimizer, every convention.

use crate::common::{Checkpoint, assert_close, golden, root};
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::curvature::Damping;
use kronwake::nn::{self, Conv2d, Linear, Module, VarBuilder, VarMap};
use kronwake::ops::pool::max_pool2d;
use kronwake::optim::{
    Bias, Decay, Every, Inner, Model, NaturalGradient, Optimizer, Params, Q, QSolve, Qe, So, Wake,
};
use kronwake::tape::{Fisher, Likelihood, Tape};
use serde_json::Value;

/// What a model is here: a name for its vars and a forward pass.
struct Net {
    varmap: VarMap,
    tape: Tape,
    forward: Forward,
}

fn net(init: &Checkpoint, build: impl FnOnce(VarBuilder) -> Result<Forward>) -> Result<Net> {
    let varmap = VarMap::new();
    {
        let mut data = varmap.data().lock().unwrap();
        for (name, tensor) in &init.tensors {
            if let Some(name) = name.strip_prefix("init.") {
                data.insert(name.to_string(), Var::from_tensor(tensor)?);
            }
        }
    }
    let tape = Tape::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
    let forward = tape.build(|| build(vb))?;
    Ok(Net { varmap, tape, forward })
}

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

fn mlp(vb: VarBuilder) -> Result<Forward> {
    let layers: Vec<Linear> = [("fc1", 20, 16), ("fc2", 16, 12), ("fc3", 12, 5)]
        .into_iter()
        .map(|(name, i, o)| nn::linear(i, o, vb.pp(name)))
        .collect::<Result<_>>()?;
    Ok(Box::new(move |x| {
        let x = layers[0].forward(x)?.relu()?;
        let x = layers[1].forward(&x)?.relu()?;
        layers[2].forward(&x)
    }))
}

fn params(tape: &Tape, wake: impl Into<Wake> + Clone, config: &Value) -> Params {
    let wake = wake.into();
    let number = |key: &str| config[key].as_f64();
    let every = |key: &str| config[key].as_u64().unwrap() as usize;
    let mut la = number("damping").unwrap();
    if config["wd_in_damping"] == true {
        la += number("weight_decay").unwrap();
    }
    Params {
        lr: number("lr").or(config["lr"]["lr0"].as_f64()).unwrap(),
        damping: if config["damping_mode"] == "pi" { Damping::Pi(la) } else { Damping::Eigenvalue(la) },
        eigenvalue_floor: number("eig_floor").unwrap(),
        stat_decay: number("rho").unwrap(),
        every: Every { factors: every("T_stats"), inverses: every("T_inv") },
        fisher: Fisher::Empirical,
        bias: if config["bias"] == "split" { Bias::Split } else { Bias::Folded },
        weight_decay: number("weight_decay").unwrap(),
        decay: if config["wd_mode"] == "loss" { Decay::Loss } else { Decay::AfterWake },
        kl_clip: number("kl_clip"),
        // The reference clips Q's and QE's directions alone, whatever its options say.
        rms_clip: number("rms_clip").filter(|_| wake.model() != Model::Linear),
        ..Params::of(wake, tape)
    }
}

fn q_solve(config: &Value) -> QSolve {
    if config["q_solve"] == "exact" { QSolve::Exact } else { QSolve::Factor }
}

/// Steps a run and compares all that its file holds.
fn run<W: Into<Wake> + Clone>(
    kind: &str,
    name: &str,
    wake: impl Fn(&Value) -> W,
    mut step: impl FnMut(&mut NaturalGradient, &Tensor, &dyn Fn() -> Result<Tensor>) -> Result<()>,
) -> Result<()> {
    let meta: Value = serde_json::from_str(&std::fs::read_to_string(format!(
        "{}/tests/golden/{kind}_meta.json",
        root().display()
    ))?)
    .unwrap();
    let config = &meta["configs"][name];
    let inputs = golden(&format!("{kind}_inputs.safetensors"))?;
    let expected = golden(&format!("{kind}_{name}.safetensors"))?;
    let net = if kind == "mlp" { net(&inputs, mlp)? } else { net(&inputs, cnn)? };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net.tape, wake(config), config))?;
    let images = (kind == "cnn").then(cnn_batch).transpose()?;
    for k in 0..meta["steps"].as_u64().unwrap() as usize {
        let (x, y) = match &images {
            Some((x, y)) => (x.clone(), y.clone()),
            None => (inputs.tensors["x"].get(k)?, inputs.tensors["y"].get(k)?),
        };
        if config["lr"]["kind"] == "decay" {
            opt.set_learning_rate(config["lr"]["lr0"].as_f64().unwrap() / (1.0 + k as f64 / 10.0));
        }
        let logits = (net.forward)(&x)?;
        if config["fisher"] == "sampled" && opt.curvature_due() {
            opt.observe_labels(&logits, Likelihood::Categorical, &expected.tensors["y_sampled"].get(k)?)?;
        } else {
            opt.observe(&logits, Likelihood::Categorical)?;
        }
        let loss = candle_nn::loss::cross_entropy(&logits, &y)?;
        let wanted = config["loss_per_step"][k].as_f64().unwrap();
        assert!((loss.to_scalar::<f64>()? - wanted).abs() < 1e-9, "{name}: loss at step {k}");
        step(&mut opt, &loss, &|| (net.forward)(&x))?;
        for (key, tensor) in &expected.tensors {
            let Some(key) = key.strip_prefix(&format!("step{}.", k + 1)) else { continue };
            let what = format!("{name} after step {}: {key}", k + 1);
            if let Some(param) = key.strip_prefix("param.") {
                let var = net.varmap.data().lock().unwrap()[param].as_detached_tensor();
                assert_close(&var, tensor, 1e-9, &what);
            } else if let Some(block) = key.strip_prefix("A.") {
                assert_close(&opt.factors(block).unwrap().0.squeeze(0)?, tensor, 1e-9, &what);
            } else if let Some(block) = key.strip_prefix("G.") {
                assert_close(&opt.factors(block).unwrap().1.squeeze(0)?, tensor, 1e-9, &what);
            }
        }
    }
    Ok(())
}

fn plain(opt: &mut NaturalGradient, loss: &Tensor, _: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    opt.backward_step(loss)
}

fn with_closure(
    opt: &mut NaturalGradient,
    loss: &Tensor,
    outputs: &dyn Fn() -> Result<Tensor>,
) -> Result<()> {
    opt.step_with(loss, Likelihood::Categorical, &mut || outputs())
}

fn qe(config: &Value) -> Qe {
    Qe {
        wake_decay: None,
        solve: q_solve(config),
        inner: Inner {
            steps: config["qe_steps"].as_u64().unwrap() as usize,
            lr: config["qe_lr"].as_f64().unwrap(),
            momentum: config["qe_momentum"].as_f64().unwrap(),
            models: config["qe_cap"].as_u64().unwrap() as usize,
            scale: config["qe_kl_scale"].as_f64().unwrap(),
            ..Inner::default()
        },
    }
}

#[test]
fn kfac_mlp() -> Result<()> {
    for name in ["kfac_folded_pi", "kfac_sampled_T5_decay", "kfac_split_clip"] {
        run("mlp", name, |_| Wake::KFac, plain)?;
    }
    Ok(())
}

#[test]
fn so_mlp() -> Result<()> {
    for name in ["so_folded_pi", "so_sampled_T5_decay", "so_split_clip", "so_Ts2_Ti6_wdloss"] {
        run("mlp", name, |_| So::default(), plain)?;
    }
    Ok(())
}

#[test]
fn q_mlp() -> Result<()> {
    for name in ["q_folded_pi", "q_sampled_T5_decay", "q_split_clip", "q_exact"] {
        run("mlp", name, |c| Q { wake_decay: None, solve: q_solve(c) }, plain)?;
    }
    Ok(())
}

#[test]
fn qe_mlp() -> Result<()> {
    for name in ["qe_folded_pi", "qe_sampled_T5_decay"] {
        run("mlp", name, qe, with_closure)?;
    }
    Ok(())
}

fn cnn(vb: VarBuilder) -> Result<Forward> {
    let conv1: Conv2d = nn::conv2d(1, 5, 5, Default::default(), vb.pp("conv1"))?;
    let conv2: Conv2d = nn::conv2d(5, 7, 5, Default::default(), vb.pp("conv2"))?;
    let fc1 = nn::linear(112, 30, vb.pp("fc1"))?;
    let fc2 = nn::linear(30, 10, vb.pp("fc2"))?;
    Ok(Box::new(move |x| {
        let x = max_pool2d(&conv1.forward(x)?, (2, 2), (2, 2))?.relu()?;
        let x = max_pool2d(&conv2.forward(&x)?, (2, 2), (2, 2))?.relu()?;
        fc2.forward(&fc1.forward(&x.flatten_from(1)?)?.relu()?)
    }))
}

fn cnn_batch() -> Result<(Tensor, Tensor)> {
    let images = golden("cnn_images.safetensors")?;
    let x = images.tensors["images_u8"].to_dtype(DType::F64)?;
    Ok(((((x / 255.0)? - 0.1307)? / 0.3081)?, images.tensors["y"].clone()))
}

#[test]
fn all_cnn() -> Result<()> {
    run("cnn", "kfac_folded_eig", |_| Wake::KFac, plain)?;
    run("cnn", "so_folded_pi", |_| So::default(), plain)?;
    run("cnn", "q_folded_eig", |_| Q::default(), plain)?;
    run("cnn", "qe_split_eig_clip", qe, with_closure)
}
