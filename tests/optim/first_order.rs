//! Muon, SOAP and Shampoo beside public implementations in PyTorch; `tests/golden/first_order/make.py` says which and how.

use crate::common::golden;
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::checkpoint::Checkpoint;
use kronwake::optim::{
    FirstOrder, Grafting, Muon, MuonScale, Optimizer, ParamsMuon, ParamsShampoo, ParamsSoap, Shampoo, Soap,
    Update,
};

/// The steps after which the file has the parameters.
const KEPT: [usize; 4] = [1, 2, 5, 12];

fn follows<P: Update>(file: &Checkpoint, run: &str, params: P) -> Result<()> {
    let of = |name: &str| file.tensors[name].clone();
    let (w1, w2) = (Var::from_tensor(&of("w1"))?, Var::from_tensor(&of("w2"))?);
    let mut opt = FirstOrder::new(vec![w1.clone(), w2.clone()], params)?;
    for step in 1..=12 {
        let places: Vec<u32> = (0..4).map(|i| (step as u32 + i) % 8).collect();
        let places = Tensor::new(places, &Device::Cpu)?;
        let (x, y) = (of("x").index_select(&places, 0)?, of("y").index_select(&places, 0)?);
        let out = x.matmul(&w1.t()?)?.tanh()?.matmul(&w2.t()?)?;
        opt.backward_step(&((out - y)?.sqr()?.sum_all()? / 4.0)?)?;
        if KEPT.contains(&step) {
            for (name, w) in [("w1", &w1), ("w2", &w2)] {
                let difference = (w.as_tensor() - of(&format!("{run}.{step}.{name}")))?;
                let far = difference.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                assert!(far < 1e-8, "{run}, step {step}, {name}: {far:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn trajectories_are_those_of_pytorch() -> Result<()> {
    let file = golden("first_order/trajectories.safetensors")?;
    follows(&file, "muon", ParamsMuon { lr: 0.02, weight_decay: 0.1, ..Default::default() })?;
    let original = MuonScale::Original;
    let muon =
        ParamsMuon { lr: 0.02, weight_decay: 0.0, nesterov: false, momentum: 0.8, ..Default::default() };
    follows(&file, "muon_original", ParamsMuon { scale: original, ..muon })?;
    let soap = ParamsSoap { lr: 0.02, weight_decay: 0.0, eps: 1e-16, ..Default::default() };
    for period in [1, 3] {
        follows(&file, &format!("soap_{period}"), ParamsSoap { beta1: 0.9, period, ..soap })?;
    }
    let one_side = ParamsSoap { shampoo_beta: Some(0.8), period: 2, max_dim: 4, ..soap };
    follows(&file, "soap_one_side", one_side)?;
    let shampoo = ParamsShampoo {
        lr: 0.1,
        beta1: 0.0,
        beta2: 1.0,
        eps: 1e-15,
        grafting: Grafting::None,
        weight_decay: 0.0,
        period: 1,
        ..Default::default()
    };
    follows(&file, "shampoo", shampoo)?;
    follows(
        &file,
        "shampoo_grafted",
        ParamsShampoo { lr: 0.02, beta2: 0.9, grafting: Grafting::Sgd, ..shampoo },
    )
}

/// The state of a resumed optimizer is named by parameter: files tell a rule that does not fit.
#[test]
fn files_of_other_rules_are_refused() -> Result<()> {
    let w = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let file = std::env::temp_dir().join(format!("kronwake-rules-{}.safetensors", std::process::id()));
    let muon = Muon::new(vec![w.clone()], ParamsMuon::default())?;
    muon.save(&file)?;
    let mut soap = Soap::new(vec![w.clone()], ParamsSoap::default())?;
    let error = soap.resume(&file).expect_err("refused").to_string();
    assert!(error.contains("average1.0 is missing: another model or optimizer wrote this file"), "{error}");
    soap.save(&file)?;
    let mut shampoo = Shampoo::new(vec![w], ParamsShampoo::default())?;
    let error = shampoo.resume(&file).expect_err("refused").to_string();
    assert!(error.contains("left_root.0 is missing"), "{error}");
    std::fs::remove_file(&file)?;
    Ok(())
}
