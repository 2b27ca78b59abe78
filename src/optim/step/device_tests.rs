//! The step on a GPU, under emulation, against the general path.

use crate::curvature::{Beyond, Damping, FactorLimit, Relative};
use crate::gpu::emulate::emulate;
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::optim::{
    AdaptiveKl, Average, Decay, Every, Group, Groups, Model, NaturalGradient, NonFinite, Optimizer, Params,
    Q, QSolve, Replay, So, StepRule, TwoRate, UpdateRule, Wake,
};
use crate::tape::{Fisher, Likelihood, Tape};
use candle_core::{DType, Device, Result, Tensor};

const STEPS: usize = 8;

/// Four linear layers, two of one shape and one without a bias, and a layer norm among them.
fn model(tape: &Tape, vars: &VarMap, dtype: DType) -> Result<impl Fn(&Tensor) -> Result<Tensor> + use<>> {
    let vb = VarBuilder::from_varmap(vars, dtype, &Device::Cpu);
    let (first, second, third, norm, last) = tape.build(|| {
        Ok((
            nn::linear(5, 7, vb.pp("first"))?,
            nn::linear(7, 7, vb.pp("second"))?,
            nn::linear(7, 7, vb.pp("third"))?,
            nn::layer_norm(7, 1e-5, vb.pp("norm"))?,
            nn::linear_no_bias(7, 3, vb.pp("last"))?,
        ))
    })?;
    Ok(move |x: &Tensor| {
        let x = second.forward(&first.forward(x)?.tanh()?)?.tanh()?;
        last.forward(&norm.forward(&third.forward(&x)?)?)
    })
}

/// The Vars by name, filled with fixed values.
fn named(vars: &VarMap, dtype: DType) -> Result<Vec<(String, candle_core::Var)>> {
    let data = vars.data().lock().expect("not poisoned");
    let mut named: Vec<_> = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (_, var)) in named.iter().enumerate() {
        var.set(&crate::ops::testing::random(index as u64, var.dims())?.to_dtype(dtype)?)?;
    }
    Ok(named)
}

/// Parameters and averages after some steps from fixed values on fixed data.
fn train(wake: Wake, dtype: DType, change: impl Fn(&mut Params)) -> Result<Vec<(String, Vec<f64>)>> {
    let (tape, vars) = (Tape::new(), VarMap::new());
    let forward = model(&tape, &vars, dtype)?;
    let names = named(&vars, dtype)?;
    let mut params = Params::of(wake, &tape);
    params.every = Every { factors: 3, inverses: 3 };
    params.fisher = Fisher::Exact;
    change(&mut params);
    let mut optimizer = NaturalGradient::from_varmap(&vars, params)?;
    let x = crate::ops::testing::random(90, &[6, 5])?.to_dtype(dtype)?;
    let labels = Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?;
    for step in 0..STEPS {
        let outputs = forward(&x)?;
        optimizer.observe(&outputs, Likelihood::Categorical)?;
        if step == 5 {
            optimizer.set_learning_rate(optimizer.learning_rate() * 0.5);
        }
        optimizer.backward_step(&nn::loss::cross_entropy(&outputs, &labels)?)?;
    }
    optimizer.settle()?;
    let mut found = Vec::new();
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    for (name, var) in &names {
        found.push((name.clone(), wide(var)?));
    }
    for (name, average) in optimizer.averages() {
        found.push((format!("average of {name}"), wide(average)?));
    }
    found.push(("kl target".into(), optimizer.kl_target().into_iter().collect()));
    Ok(found)
}

/// Element types with how far results may be apart.
const TYPES: [(DType, f64); 4] =
    [(DType::F64, 1e-9), (DType::F32, 2e-4), (DType::BF16, 0.05), (DType::F16, 0.01)];

fn agree(wake: impl Into<Wake>, what: &str, change: impl Fn(&mut Params)) -> Result<()> {
    agree_in(&TYPES, wake, what, change)
}

fn agree_in(
    types: &[(DType, f64)],
    wake: impl Into<Wake>,
    what: &str,
    change: impl Fn(&mut Params),
) -> Result<()> {
    let wake = wake.into();
    for &(dtype, tolerance) in types {
        let expected = train(wake.clone(), dtype, &change)?;
        let found = emulate(|| train(wake.clone(), dtype, &change))?;
        assert_eq!(expected.len(), found.len());
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            for (e, f) in expected.iter().zip(found) {
                let near = (e - f).abs() <= tolerance * (1.0 + e.abs());
                assert!(near, "{what}, {dtype:?}, {name}: {found:?}, expected {expected:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn steps_as_the_general_path_does() -> Result<()> {
    agree(Wake::KFac, "k-fac", |_| ())?;
    agree(Wake::KFac, "momentum, decoupled decay, rms clip", |p| {
        (p.momentum, p.weight_decay, p.decay, p.rms_clip) = (0.9, 0.01, Decay::Decoupled, Some(0.02));
    })?;
    agree(So::default(), "so", |p| (p.weight_decay, p.kl_clip) = (0.01, Some(1e-3)))?;
    agree(So::default(), "so, pi, decay in the loss", |p| {
        (p.weight_decay, p.decay, p.damping) = (0.01, Decay::Loss, Damping::Pi(0.01));
    })?;
    agree(So::default(), "so, split, groups", |p| {
        p.bias = crate::optim::Bias::Split;
        let slow = Group { lr_scale: 0.3, ..Group::named("first.*") };
        p.groups = Groups(vec![slow]);
    })?;
    agree(So::default(), "so, gradient-only", |p| {
        let by_gradient = Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("s*.weight") };
        p.groups = Groups(vec![by_gradient]);
    })?;
    let runs = |beyond| FactorLimit { rows: 4, beyond };
    agree(So::default(), "so, runs", |p| p.factor_limit = runs(Beyond::BlockDiagonal))?;
    agree(So::default(), "so, diagonal", |p| {
        (p.factor_limit, p.damping) = (runs(Beyond::Diagonal), Damping::Pi(0.01))
    })?;
    let exact = Q { solve: QSolve::Exact, ..Q::default() };
    agree(exact.clone(), "q, exact, runs", |p| {
        p.damping = Damping::Pi(0.01);
        p.factor_limit = runs(Beyond::BlockDiagonal);
    })?;
    let low = runs(Beyond::LowRank { rank: 2 });
    agree(So::default(), "so, low rank", |p| p.factor_limit = low)?;
    agree(So::default(), "so, low rank, pi, rms clip", |p| {
        (p.factor_limit, p.damping, p.rms_clip) = (low, Damping::Pi(0.01), Some(0.02))
    })?;
    agree(Q::default(), "q, low rank", |p| p.factor_limit = low)?;
    agree(exact.clone(), "q, low rank, exact", |p| {
        p.damping = Damping::Pi(0.01);
        p.factor_limit = runs(Beyond::LowRank { rank: 1 });
    })?;
    for overlap in [1, 2, 9] {
        agree(So::default(), "so, overlap", |p| p.overlap = overlap)?;
        agree(Wake::KFac, "k-fac, overlap, newton", |p| {
            (p.overlap, p.inverse, p.damping) =
                (overlap, crate::curvature::Inverse::Newton, Damping::Pi(0.01));
        })?;
    }
    agree(Q::default(), "q", |_| ())?;
    agree(exact, "q, exact", |p| p.damping = Damping::Pi(0.01))?;
    agree(Q::default(), "q, fixed divergence", |p| {
        (p.step_rule, p.kl_clip) = (StepRule::FixedKl { target: 0.01 }, None);
    })
}

#[test]
fn steps_with_two_rates_as_the_general_path_does() -> Result<()> {
    // Half types round the gradients of the two paths apart, and small singular values with them: orthogonal directions are compared in
    // single and double precision.
    let both = |wake: TwoRate, what: &str, change: &dyn Fn(&mut Params)| -> Result<()> {
        agree(wake.clone(), &format!("{what}, not orthogonal"), |p| {
            p.orthogonal = None;
            change(p);
        })?;
        agree_in(&TYPES[..2], wake, what, change)
    };
    both(TwoRate::default(), "kld-wrm", &|_| ())?;
    both(TwoRate::default(), "kld-wrm, diagonal", &|p| p.factor_limit = FactorLimit::DIAGONAL)?;
    let low = FactorLimit { rows: 4, beyond: Beyond::LowRank { rank: 2 } };
    both(TwoRate::default(), "kld-wrm, low rank", &|p| p.factor_limit = low)?;
    both(TwoRate::default(), "kld-wrm, directions in parts", &|p| p.orthogonal_side = 3)?;
    let quadratic = TwoRate { model: Model::Quadratic(QSolve::Factor), ..TwoRate::default() };
    both(quadratic, "kld-wrm, quadratic", &|p| {
        (p.step_rule, p.lr, p.damping) = (StepRule::LearningRate, 0.1, Damping::Eigenvalue(0.01));
    })?;
    both(TwoRate::default(), "kld-wrm, fixed damping, no average", &|p| {
        (p.average, p.damping) = (None, Damping::Eigenvalue(0.01));
        p.step_rule = StepRule::AdaptiveKl(AdaptiveKl { initial: 0.3, ..AdaptiveKl::default() });
    })?;
    agree(So::default(), "so, ekfac, averaged", |p| {
        (p.ekfac, p.average) = (true, Some(Average::default()));
        p.damping = Damping::Relative(Relative::default());
    })
}

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// An optimizer on the model, with data to train it on.
struct Run {
    vars: Vec<(String, candle_core::Var)>,
    optimizer: NaturalGradient,
    forward: Forward,
}

impl Run {
    fn new(non_finite: NonFinite) -> Result<Self> {
        Self::with(non_finite, FactorLimit::default(), 0)
    }

    fn with(non_finite: NonFinite, factor_limit: FactorLimit, overlap: usize) -> Result<Self> {
        let (tape, vars) = (Tape::new(), VarMap::new());
        let forward = Box::new(model(&tape, &vars, DType::F64)?);
        let named = named(&vars, DType::F64)?;
        let every = Every { factors: 4, inverses: 4 };
        let params = Params { every, non_finite, factor_limit, overlap, ..Params::so_kld_wrm(&tape) };
        Ok(Self { vars: named, optimizer: NaturalGradient::from_varmap(&vars, params)?, forward })
    }

    fn step(&mut self, poison: Option<f64>) -> Result<()> {
        let x = crate::ops::testing::random(90, &[6, 5])?;
        let labels = Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?;
        let outputs = (self.forward)(&x)?;
        self.optimizer.observe(&outputs, Likelihood::Categorical)?;
        let mut loss = nn::loss::cross_entropy(&outputs, &labels)?;
        if let Some(poison) = poison {
            let (_, norm) = self.vars.iter().find(|(name, _)| name == "norm.bias").expect("built");
            loss = (loss + (norm.as_tensor() * poison)?.sum_all()?)?;
        }
        self.optimizer.backward_step(&loss)
    }

    fn values(&self) -> Result<Vec<Vec<f64>>> {
        self.vars.iter().map(|(_, var)| crate::ops::testing::values(var)).collect()
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() -> Result<()> {
    (0..3).try_for_each(check_not_finite)
}

fn check_not_finite(overlap: usize) -> Result<()> {
    emulate(|| -> Result<()> {
        let new = || Run::with(NonFinite::Error, FactorLimit::default(), overlap);
        let (mut run, mut clean) = (new()?, new()?);
        for _ in 0..2 {
            run.step(None)?;
            clean.step(None)?;
        }
        let before = run.values()?;
        // Nobody asks, so nobody is told; but nothing moves either.
        run.step(Some(f64::NAN))?;
        run.step(None)?;
        assert_eq!(run.values()?, before);
        let message = run.optimizer.settle().expect_err("must fail").to_string();
        assert!(message.contains("step 2") && message.contains("norm.bias"), "{message}");
        for _ in 0..4 {
            run.step(None)?;
            clean.step(None)?;
        }
        assert_eq!(run.values()?, clean.values()?);
        // Where curvature is renewed, the host asks by itself.
        let message = (0..4).find_map(|_| run.step(Some(f64::INFINITY)).err()).expect("must fail");
        assert!(message.to_string().contains("norm.bias"), "{message}");
        Ok(())
    })
}

#[test]
fn a_step_that_is_not_finite_is_skipped() -> Result<()> {
    emulate(|| -> Result<()> {
        let mut run = Run::new(NonFinite::Skip)?;
        run.step(None)?;
        let before = run.values()?;
        run.step(Some(f64::NAN))?;
        assert_eq!(run.values()?, before);
        run.step(None)?;
        assert_ne!(run.values()?, before);
        run.optimizer.settle()?;
        assert_eq!(run.optimizer.skipped(), 1);
        run.optimizer.settle()?;
        assert_eq!(run.optimizer.skipped(), 1);
        Ok(())
    })
}

#[test]
fn state_passes_from_device_to_device() -> Result<()> {
    let folder = tempfile()?;
    let path = folder.join("state.safetensors");
    let (mut run, mut resumed) = (Run::new(NonFinite::Error)?, Run::new(NonFinite::Error)?);
    emulate(|| (0..6).try_for_each(|_| run.step(None)))?;
    run.optimizer.save(&path)?;
    resumed.optimizer.resume(&path)?;
    emulate(|| (0..6).try_for_each(|_| run.step(None)))?;
    emulate(|| (0..6).try_for_each(|_| resumed.step(None)))?;
    assert_eq!(run.values()?, resumed.values()?);
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

fn tempfile() -> Result<std::path::PathBuf> {
    let folder = std::env::temp_dir().join(format!("kronwake-device-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

#[test]
fn replayed_steps_are_the_steps() -> Result<()> {
    let low = FactorLimit { rows: 4, beyond: Beyond::LowRank { rank: 2 } };
    check_replay(FactorLimit::default(), 0)?;
    check_replay(low, 0)?;
    (1..4).try_for_each(|overlap| check_replay(FactorLimit::default(), overlap))
}

fn check_replay(limit: FactorLimit, overlap: usize) -> Result<()> {
    emulate(|| -> Result<()> {
        let new = || Run::with(NonFinite::Error, limit, overlap);
        let (mut run, mut plain) = (new()?, new()?);
        let x = crate::ops::testing::random(90, &[6, 5])?;
        let labels = Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?;
        let mut replay = Replay::new();
        for step in 0..14 {
            let rate = 0.3 / (1.0 + step as f64);
            run.optimizer.set_learning_rate(rate);
            plain.optimizer.set_learning_rate(rate);
            plain.step(None)?;
            let Run { optimizer, forward, .. } = &mut run;
            replay.step(optimizer, |optimizer| {
                let outputs = forward(&x)?;
                optimizer.observe(&outputs, Likelihood::Categorical)?;
                let loss = nn::loss::cross_entropy(&outputs, &labels)?;
                optimizer.backward_step(&loss)?;
                Ok(loss.detach())
            })?;
            assert_eq!(run.optimizer.steps(), step + 1);
            assert_eq!(run.values()?, plain.values()?, "step {step}");
        }
        Ok(())
    })
}
