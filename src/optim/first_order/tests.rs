use super::*;
use crate::nn;
use candle_core::Device;
use std::path::Path;

mod dense;
mod groups;
mod rules;

/// Two parameters of a type.
struct Problem {
    vars: VarMap,
    w: Var,
    b: Var,
}

impl Problem {
    fn new(dtype: DType) -> Self {
        let vars = VarMap::new();
        let var = |name: &str, values: &[f64]| {
            let values = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let var = Var::from_tensor(&values).unwrap();
            vars.data().lock().unwrap().insert(name.into(), var.clone());
            var
        };
        let (w, b) = (var("w", &[0.5, -1.5, 2.0]), var("b", &[1.0, 0.3, -0.7]));
        Self { vars, w, b }
    }

    /// `sum (w^3 / 3 + w b^2)`, whose gradients are `w^2 + b^2` and `2 w b`.
    fn loss(&self) -> Tensor {
        let cube = (self.w.powf(3.0).unwrap() / 3.0).unwrap();
        (cube + self.w.mul(&self.b.sqr().unwrap()).unwrap()).unwrap().sum_all().unwrap()
    }

    fn grads(&self) -> GradStore {
        self.loss().backward().unwrap()
    }

    fn values(&self) -> Vec<f64> {
        let of = |var: &Var| var.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        [of(&self.w), of(&self.b)].concat()
    }
}

fn assert_near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert!(found.iter().zip(expected).all(|(a, e)| (a - e).abs() < tolerance), "{found:?} {expected:?}");
}

fn says<T>(result: Result<T>, part: &str) {
    let error = result.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains(part), "{part:?} is not in {error:?}");
}

#[test]
fn adamw_is_candles() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
        let (ours, theirs) = (Problem::new(dtype), Problem::new(dtype));
        let params = ParamsAdamW { lr: 0.03, beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
        let mut a = AdamW::from_varmap(&ours.vars, params.clone())?;
        let mut b = nn::AdamW::new(vec![theirs.w.clone(), theirs.b.clone()], params)?;
        for _ in 0..20 {
            a.step(&ours.grads())?;
            b.step(&theirs.grads())?;
        }
        assert_near(&ours.values(), &theirs.values(), tolerance);
    }
    Ok(())
}

#[test]
fn sgd_follows_its_recursion() -> Result<()> {
    let problem = Problem::new(DType::F64);
    let params = ParamsSgd { lr: 0.02, momentum: 0.9, weight_decay: 0.1 };
    let mut opt = Sgd::from_varmap(&problem.vars, params)?;
    let mut p = problem.values();
    let mut v = [0.0; 6];
    for _ in 0..10 {
        opt.step(&problem.grads())?;
        for i in 0..3 {
            let (w, b) = (p[i], p[i + 3]);
            for (at, gradient) in [(i, w * w + b * b), (i + 3, 2.0 * w * b)] {
                v[at] = 0.9 * v[at] + gradient + 0.1 * p[at];
                p[at] -= 0.02 * v[at];
            }
        }
    }
    assert_near(&problem.values(), &p, 1e-13);
    Ok(())
}

/// Steps that are too small for bf16 add up in f32, and what something else sets counts.
#[test]
fn half_types_have_wide_values() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let problem = Problem::new(dtype);
        let mut opt = Sgd::from_varmap(&problem.vars, ParamsSgd { lr: 1e-5, ..Default::default() })?;
        // Values in f32 (24 bytes) and one average (24 bytes).
        assert_eq!(opt.bytes(), 48);
        let loss =
            || problem.w.to_dtype(DType::F32)?.sum_all()? + problem.b.to_dtype(DType::F32)?.sum_all()?;
        let before = problem.values();
        opt.backward_step(&loss()?)?;
        assert_eq!(problem.values(), before, "{dtype:?}: one step is less than half of a last place");
        // With a momentum of 0.9 each of 1,000 steps of a constant gradient is 1e-4 in the end: 0.1 less the start's 9e-4.
        (1..1000).try_for_each(|_| opt.backward_step(&loss()?))?;
        let expected: Vec<f64> = before.iter().map(|v| v - 0.0991).collect();
        assert_near(&problem.values(), &expected, 0.01);
        problem.w.set(&problem.w.zeros_like()?)?;
        opt.backward_step(&loss()?)?;
        assert_near(&problem.values()[..3], &[-1e-4; 3], 1e-6);
    }
    Ok(())
}

#[test]
fn a_scaled_loss_is_the_loss_and_an_overflow_is_counted() -> Result<()> {
    let (plain, scaled) = (Problem::new(DType::F64), Problem::new(DType::F64));
    let mut a = AdamW::from_varmap(&plain.vars, ParamsAdamW::default())?;
    let mut b = AdamW::from_varmap(&scaled.vars, ParamsAdamW::default())?;
    let mut scale = LossScale::default();
    for _ in 0..3 {
        a.backward_step(&plain.loss())?;
        assert!(b.backward_step_scaled(&scaled.loss(), &mut scale)?);
    }
    assert_near(&scaled.values(), &plain.values(), 1e-15);
    let before = scaled.values();
    assert!(!b.backward_step_scaled(&(scaled.loss() * f64::MAX)?, &mut scale)?);
    assert_eq!((scaled.values(), b.steps(), scale.scale), (before, 4, 32_768.0));
    Ok(())
}

/// Numbers that a penalty drives below the normal range end at zero.
#[test]
fn weights_that_vanish_are_zero() -> Result<()> {
    let var = Var::new(&[1e-3f32, 0.0], &Device::Cpu)?;
    let mut opt =
        AdamW::new(vec![var.clone()], ParamsAdamW { lr: 0.5, weight_decay: 1.0, ..Default::default() })?;
    for _ in 0..60 {
        let mut grads = var.sum_all()?.backward()?;
        grads.insert(&var, var.zeros_like()?);
        opt.step(&grads)?;
    }
    assert_eq!(var.to_vec1::<f32>()?, [0.0, 0.0]);
    Ok(())
}

fn resumes<P: Update>(params: P, path: &Path) -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let (first, second) = (Problem::new(dtype), Problem::new(dtype));
        let mut straight = FirstOrder::from_varmap(&first.vars, params.clone())?;
        (0..5).try_for_each(|_| straight.step(&first.grads()))?;
        straight.save(path)?;
        let mut resumed = FirstOrder::from_varmap(&second.vars, params.clone())?;
        resumed.resume(path)?;
        assert_eq!(resumed.steps(), 5);
        for _ in 0..5 {
            straight.step(&first.grads())?;
            resumed.step(&second.grads())?;
        }
        assert_eq!(first.values(), second.values());
    }
    Ok(())
}

#[test]
fn it_resumes_exactly_and_refuses_what_does_not_fit() -> Result<()> {
    let path = std::env::temp_dir().join(format!("kronwake-first-order-{}.safetensors", std::process::id()));
    resumes(ParamsSgd { lr: 0.02, momentum: 0.9, weight_decay: 0.1 }, &path)?;
    resumes(ParamsAdamW { lr: 0.02, ..Default::default() }, &path)?;
    let problem = Problem::new(DType::BF16);
    let before = problem.values();
    let mut sgd = Sgd::from_varmap(&problem.vars, ParamsSgd::default())?;
    says(sgd.resume(&path), "average1.b has no place here: another model or optimizer wrote this file");
    let wide = Problem::new(DType::F64);
    says(AdamW::from_varmap(&wide.vars, ParamsAdamW::default())?.resume(&path), "expected (F64, [3])");
    sgd.save(&path)?;
    says(
        AdamW::from_varmap(&problem.vars, ParamsAdamW::default())?.resume(&path),
        "average1.b is missing: another model or optimizer wrote this file",
    );
    assert_eq!((problem.values(), sgd.steps()), (before, 0));
    std::fs::remove_file(&path)?;
    Ok(())
}

#[test]
fn wrong_options_and_missing_gradients_change_nothing() -> Result<()> {
    let problem = Problem::new(DType::F64);
    let sgd = |change: fn(&mut ParamsSgd)| {
        let mut params = ParamsSgd::default();
        change(&mut params);
        Sgd::from_varmap(&problem.vars, params)
    };
    says(sgd(|p| p.lr = -1.0), "expected lr of at least 0, got -1");
    says(sgd(|p| p.momentum = 1.0), "expected momentum in [0, 1), got 1");
    says(sgd(|p| p.weight_decay = f64::NAN), "expected weight_decay of at least 0, got NaN");
    let adamw = |change: fn(&mut ParamsAdamW)| {
        let mut params = ParamsAdamW::default();
        change(&mut params);
        AdamW::from_varmap(&problem.vars, params)
    };
    says(adamw(|p| p.beta1 = 1.0), "expected beta1 in [0, 1), got 1");
    says(adamw(|p| p.beta2 = -0.1), "expected beta2 in [0, 1), got -0.1");
    says(adamw(|p| p.eps = 0.0), "expected eps above 0, got 0");
    let counts = Var::new(&[1u32], &Device::Cpu)?;
    says(
        AdamW::new(vec![counts], ParamsAdamW::default()),
        "0: expected a parameter of f64, f32, f16 or bf16, got U32",
    );
    let before = problem.values();
    let mut opt = sgd(|_| ())?;
    says(opt.backward_step(&problem.b.sum_all()?), "w got no gradient");
    assert_eq!((problem.values(), opt.steps()), (before, 0));
    Ok(())
}
