//! Every optimizer on every device: the same training as the CPU's, state that moves between devices, and errors.

use crate::common::*;
use crate::device::*;
use crate::modules::on_the_host;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::{Adaptive, Beyond, Damping, FactorLimit, Inverse, Sharing};
use kronwake::linalg::cholesky::cholesky;
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{
    Bias, Carry, Every, Group, Groups, Inner, NaturalGradient, NonFinite, Optimizer, Orthogonal, Params,
    ParamsAdamW, Products, Q, QSolve, Qe, Replay, So, TwoRate, UpdateRule, Wake,
};
use kronwake::tape::{Fisher, Likelihood};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A net with convolutions, norms, linear layers over positions, and a Var outside of all layers; for images `[n, 1, 8, 8]`.
fn model(vb: VarBuilder) -> Result<Forward> {
    net(vb, true)
}

/// The same without ReLU and maxima. The rounding of half precision decides at so many of their kinks that two trainings part, on
/// one device as on two.
fn smooth(vb: VarBuilder) -> Result<Forward> {
    net(vb, false)
}

fn net(vb: VarBuilder, kinks: bool) -> Result<Forward> {
    let config = nn::Conv2dConfig { padding: 1, ..Default::default() };
    let conv = nn::conv2d(1, 4, 3, config, vb.pp("conv"))?;
    let grouped = nn::Conv2dConfig { groups: 2, ..Default::default() };
    let pooled = nn::conv2d(4, 6, 3, grouped, vb.pp("pooled"))?;
    let (norm, fc) = (nn::layer_norm(9, 1e-3, vb.pp("norm"))?, nn::linear(9, 5, vb.pp("fc"))?);
    let (gain, head) = (vb.get(30, "gain")?, nn::linear(30, 3, vb.pp("head"))?);
    Ok(Box::new(move |x| {
        let x = conv.forward(x)?.tanh()?;
        let x = match kinks {
            true => pooled.forward_pooled(&x, (2, 2), (2, 2), true)?,
            false => pooled.forward(&x)?.avg_pool2d(2)?.tanh()?,
        };
        let x = x.flatten_from(2)?;
        let x = fc.forward(&norm.forward(&x)?)?.tanh()?.flatten_from(1)?;
        head.forward(&x.broadcast_mul(&gain)?)
    }))
}

const STEPS: usize = 24;

/// A step of any optimizer, given how the outputs are computed.
type Step = fn(&mut NaturalGradient, &Tensor, &dyn Fn() -> Result<Tensor>) -> Result<()>;

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

/// The batch of a step: few of them in turn, so that the loss falls.
fn batch(step: usize, device: &Device, dtype: DType) -> Result<(Tensor, Tensor)> {
    let x = random(300 + step as u64 % 4, &[32, 1, 8, 8])?;
    let y = x.narrow(2, 0, 1)?.flatten_from(1)?.narrow(1, 0, 3)?.argmax(1)?;
    Ok((x.to_dtype(dtype)?.to_device(device)?, y.to_device(device)?))
}

/// A net's outputs and their mean loss, in f32 or f64.
fn loss(net: &Net, x: &Tensor, y: &Tensor) -> Result<(Tensor, Tensor)> {
    let z = (net.forward)(x)?;
    let wide = if z.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let loss = candle_nn::loss::cross_entropy(&z.to_dtype(wide)?, y)?;
    Ok((z, loss))
}

/// Training from one start on one sequence of batches; the class says which of an image's first three pixels is brightest.
struct Run {
    net: Net,
    opt: NaturalGradient,
    device: Device,
    dtype: DType,
    losses: Vec<f64>,
}

impl Run {
    fn new(
        wake: impl Into<Wake>,
        device: &Device,
        dtype: DType,
        change: impl Fn(Params) -> Params,
    ) -> Result<Self> {
        Self::of(wake, model, device, dtype, change)
    }

    fn of(
        wake: impl Into<Wake>,
        model: fn(VarBuilder) -> Result<Forward>,
        device: &Device,
        dtype: DType,
        change: impl Fn(Params) -> Params,
    ) -> Result<Self> {
        let net = Net::on(device, dtype, 1, model)?;
        let params = Params {
            every: Every { factors: 2, inverses: 4 },
            fallback_adam: ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() },
            fisher: Fisher::Exact,
            ..Params::of(wake, &net.tape)
        };
        let mut params = change(params);
        if params.orthogonal == Some(Orthogonal::ByDevice) {
            // What a GPU does, on both.
            params.orthogonal = Some(Orthogonal::Polynomials { iterations: 4 });
        }
        // Short steps: longer ones jump over the kinks of ReLU and pooling, and rounding decides which.
        let lr = 0.1 * params.lr;
        let opt = NaturalGradient::from_varmap(&net.varmap, Params { lr, ..params })?;
        Ok(Self { net, opt, device: device.clone(), dtype, losses: vec![] })
    }

    /// The steps from where the optimizer is up to `to`.
    fn train(&mut self, step: Step, to: usize) -> Result<()> {
        while self.opt.steps() < to {
            // Few batches in turn, so that the loss falls.
            let k = self.opt.steps() as u64 % 4;
            let x = random(300 + k, &[32, 1, 8, 8])?;
            let y =
                x.narrow(2, 0, 1)?.flatten_from(1)?.narrow(1, 0, 3)?.argmax(1)?.to_device(&self.device)?;
            let x = x.to_dtype(self.dtype)?.to_device(&self.device)?;
            let z = (self.net.forward)(&x)?;
            let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let loss = candle_nn::loss::cross_entropy(&z.to_dtype(wide)?, &y)?;
            if self.opt.wants_loss_after() {
                self.opt.adapt_damping(&loss)?;
            }
            self.opt.observe(&z, Likelihood::Categorical)?;
            step(&mut self.opt, &loss, &|| (self.net.forward)(&x))?;
            self.losses.push(loss.to_dtype(DType::F64)?.to_scalar()?);
        }
        Ok(())
    }

    /// All that the optimizer would save, on the CPU: parameters, factors, inverses, wakes.
    fn state(&self) -> Result<Checkpoint> {
        let path = scratch("run");
        self.opt.save(&path)?;
        let state = Checkpoint::read(&path, &Device::Cpu);
        std::fs::remove_file(&path)?;
        state
    }

    /// The parameters, one after the other.
    fn parameters(&self) -> Result<Vec<f64>> {
        let mut all = vec![];
        for value in self.net.values()? {
            all.extend(flat(&value.to_device(&Device::Cpu)?));
        }
        Ok(all)
    }
}

/// `|a - b| / |b - start|`: how far two trainings ended apart, in the length of the way.
fn apart(a: &[f64], b: &[f64], start: &[f64]) -> f64 {
    let norm = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
    norm(a, b) / norm(b, start)
}

/// How far from f64 training in a dtype may end, as a share of the way: rounding, grown over the steps.
const WIDE: &[(DType, f64)] = &[(DType::F64, 1e-8), (DType::F32, 1e-3)];
const ALL: &[(DType, f64)] =
    &[(DType::F64, 1e-8), (DType::F32, 1e-3), (DType::F16, 0.05), (DType::BF16, 0.25)];

/// Trains on every device in `dtypes`.
fn check(
    wake: impl Into<Wake> + Clone,
    what: &str,
    dtypes: &[(DType, f64)],
    step: Step,
    change: impl Fn(Params) -> Params,
) -> Result<()> {
    type Model = fn(VarBuilder) -> Result<Forward>;
    let run = |model: Model, device: &Device, dtype: DType| -> Result<Run> {
        let mut run = Run::of(wake.clone(), model, device, dtype, &change)?;
        let name = format!("{what} {dtype:?} {:?}", device.location());
        run.train(step, STEPS).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&run.losses[..4]), mean(&run.losses[STEPS - 4..]));
        assert!(last < 0.9 * first, "{name}: the loss went from {first} to {last}");
        Ok(run)
    };
    let exact = |model| run(model, &Device::Cpu, DType::F64)?.parameters();
    let exact = [(model as Model, exact(model)?), (smooth, exact(smooth)?)];
    let start = Run::new(wake.clone(), &Device::Cpu, DType::F64, &change)?.parameters()?;
    for device in devices() {
        for &(dtype, most) in dtypes {
            let (model, exact) = &exact[usize::from(dtype.size_in_bytes() < 4)];
            let off = apart(&run(*model, &device, dtype)?.parameters()?, exact, &start);
            println!("{what} {dtype:?} {:?}: {off:.1e} of the way from f64", device.location());
            assert!(off < most, "{what} {dtype:?} {:?}: {off:e} of the way from f64", device.location());
        }
    }
    Ok(())
}

fn pi(params: Params, inverse: Inverse) -> Params {
    Params { damping: Damping::Pi(0.05), inverse, ..params }
}

#[test]
fn kfac_trains_as_on_the_cpu() -> Result<()> {
    check(Wake::KFac, "kfac", ALL, plain, |p| p)?;
    check(Wake::KFac, "kfac, empirical", WIDE, plain, |p| Params { fisher: Fisher::Empirical, ..p })?;
    // Moments along eigenvectors of small eigenvalues, which rounding turns; those of one eigenvalue, 0 say, are any.
    let turned = &[(DType::F64, 1e-2), (DType::F32, 1e-2)];
    check(Wake::KFac, "kfac, ekfac, split bias", turned, plain, |p| Params {
        ekfac: true,
        bias: Bias::Split,
        ..p
    })?;
    check(Wake::KFac, "kfac, reduce, momentum, decay, clip", WIDE, plain, |p| Params {
        sharing: Sharing::Reduce,
        momentum: 0.5,
        weight_decay: 0.01,
        rms_clip: Some(1.0),
        ..p
    })?;
    for inverse in [Inverse::Eigen, Inverse::Cholesky, Inverse::Newton] {
        check(Wake::KFac, &format!("kfac, pi, {inverse:?}"), WIDE, plain, |p| pi(p, inverse))?;
        let overlapped = |p| pi(Params { overlap: 3, ..p }, inverse);
        check(Wake::KFac, &format!("kfac, pi, {inverse:?}, overlap"), WIDE, plain, overlapped)?;
    }
    check(Wake::KFac, "kfac, adaptive damping", WIDE, plain, |p| Params {
        damping: Damping::Adaptive(Adaptive { every: 5, ..Adaptive::default() }),
        ..p
    })
}

#[test]
fn the_wake_optimizers_train_as_on_the_cpu() -> Result<()> {
    let exact =
        |p| Params { wake: Q { solve: QSolve::Exact, ..Q::default() }.into(), ..pi(p, Inverse::Eigen) };
    let inner = Inner { steps: 2, models: 3, ..Inner::default() };
    check(So::default(), "so", ALL, plain, |p| Params { lr: 0.1, ..p })?;
    check(So::default(), "so, literal", WIDE, plain, |p| Params { lr: 0.1, carry: Carry::Literal, ..p })?;
    check(Q::default(), "q", ALL, plain, |p| Params { lr: 0.1, ..p })?;
    check(Q::default(), "q, exact", WIDE, plain, |p| exact(Params { lr: 0.2, ..p }))?;
    // Its inner steps are dropped where they do not lead down: rounding may decide.
    check(Qe::default(), "qe", &[(DType::F64, 1e-8), (DType::F32, 1e-2)], with_closure, |p| Params {
        wake: Qe { inner: inner.clone(), ..Qe::default() }.into(),
        ..p
    })?;
    // Half types round gradients, and small singular values with them.
    for (overlap, orthogonal, types) in [
        (0, None, ALL),
        (2, None, ALL),
        (0, Some(Orthogonal::default()), WIDE),
        (2, Some(Orthogonal::default()), WIDE),
    ] {
        let what = format!("kld-wrm, overlap {overlap}, {orthogonal:?}");
        check(TwoRate::default(), &what, types, plain, |p| Params { overlap, orthogonal, ..p })?;
    }
    Ok(())
}

#[test]
fn rational_directions_are_for_a_cpu() -> Result<()> {
    let rational = |p| Params { orthogonal: Some(Orthogonal::Rational { terms: 3 }), ..p };
    for device in devices() {
        let error = Run::new(TwoRate::default(), &device, DType::F32, rational).err();
        let message = error.map(|error| error.to_string()).unwrap_or_default();
        let refused = message.contains("Polynomials") && message.contains("Vars on the CPU");
        assert_eq!(refused, !device.is_cpu(), "{message}");
        let mut run = Run::new(TwoRate::default(), &device, DType::F32, |p| p)?;
        assert_eq!(run.opt.set_params(rational(run.opt.params().clone())).is_err(), !device.is_cpu());
    }
    Ok(())
}

#[test]
fn large_layers_train_as_on_the_cpu() -> Result<()> {
    const LOOSE: &[(DType, f64)] = &[(DType::F64, 1e-8), (DType::F32, 5e-3)];
    let limit = |beyond| FactorLimit { rows: 4, beyond };
    for beyond in [Beyond::BlockDiagonal, Beyond::Diagonal, Beyond::LowRank { rank: 2 }] {
        let factor_limit = limit(beyond);
        let what = format!("{beyond:?}");
        check(TwoRate::default(), &what, LOOSE, plain, |p| Params { factor_limit, ..p })?;
        check(So::default(), &format!("{what}, pi"), LOOSE, plain, |p| {
            pi(Params { factor_limit, ..p }, Inverse::Cholesky)
        })?;
        let exact =
            |p| Params { wake: Q { solve: QSolve::Exact, ..Q::default() }.into(), ..pi(p, Inverse::Eigen) };
        check(Q::default(), &format!("{what}, exact"), LOOSE, plain, |p| {
            exact(Params { lr: 0.2, factor_limit, ..p })
        })?;
    }
    let by_gradient = Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("*c*.weight") };
    let groups = Groups(vec![by_gradient]);
    // Single gradients leave most directions without curvature, where only damping keeps steps short.
    let damping = Damping::Eigenvalue(0.1);
    check(So::default(), "gradient-only", LOOSE, plain, |p| Params { groups: groups.clone(), damping, ..p })
}

#[test]
fn sampled_labels_are_the_same() -> Result<()> {
    let sampled = |p| Params { fisher: Fisher::Sampled { draws: 2, seed: 3 }, ..p };
    let run = |device: &Device| -> Result<Run> {
        let mut run = Run::new(Wake::KFac, device, DType::F64, sampled)?;
        run.train(plain, 9)?;
        Ok(run)
    };
    let expected = run(&Device::Cpu)?.state()?;
    for device in devices() {
        assert_state(&run(&device)?.state()?, &expected, 1e-8, "sampled");
    }
    Ok(())
}

/// Asserts that two states have the same tensors, to `tolerance` of each one's largest element.
#[track_caller]
fn assert_state(found: &Checkpoint, expected: &Checkpoint, tolerance: f64, what: &str) {
    let names = |state: &Checkpoint| state.tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, tensor) in &found.tensors {
        // The signs of eigenvectors are free.
        if !name.contains("basis_") {
            assert_close(tensor, &expected.tensors[name], tolerance, &format!("{what}: {name}"));
        }
    }
}

/// Half a run on one device, saved and resumed on another: the state arrives to the last bit, and the run goes on as it would have.
fn moves(wake: impl Into<Wake> + Clone, what: &str, step: Step, change: fn(Params) -> Params) -> Result<()> {
    for there in devices() {
        for (from, to) in [(&Device::Cpu, &there), (&there, &Device::Cpu)] {
            let mut whole = Run::new(wake.clone(), from, DType::F64, change)?;
            whole.train(step, 9)?;
            let path = scratch("half");
            whole.opt.save(&path)?;
            let mut resumed = Run::new(wake.clone(), to, DType::F64, change)?;
            resumed.opt.resume(Path::new(&path))?;
            std::fs::remove_file(&path)?;
            assert_same_state(&saved(&resumed.opt)?, &saved(&whole.opt)?, &[], what);
            for value in resumed.net.values()? {
                assert!(value.device().same_device(to), "{what}: a Var left its device");
            }
            whole.train(step, 18)?;
            resumed.train(step, 18)?;
            assert_state(&resumed.state()?, &whole.state()?, 1e-7, what);
        }
    }
    Ok(())
}

#[test]
fn state_moves_between_devices() -> Result<()> {
    moves(Wake::KFac, "kfac", plain, |p| p)?;
    moves(Wake::KFac, "kfac, Newton", plain, |p| pi(p, Inverse::Newton))?;
    moves(So::default(), "so", plain, |p| p)?;
    // Saved with inverses on their way.
    moves(So::default(), "so, overlap", plain, |p| Params { overlap: 3, ..p })?;
    moves(Q::default(), "q", plain, |p| p)?;
    moves(Qe::default(), "qe", with_closure, |p| p)?;
    moves(TwoRate::default(), "kld-wrm", plain, |p| p)
}

#[test]
fn two_runs_on_a_device_are_the_same_to_the_last_bit() -> Result<()> {
    for device in devices() {
        let run = |overlap| -> Result<Saved> {
            let mut run = Run::new(TwoRate::default(), &device, DType::F32, |p| Params { overlap, ..p })?;
            run.train(plain, 12)?;
            saved(&run.opt)
        };
        for overlap in [0, 1, 3] {
            let what = format!("{:?}, overlap {overlap}", device.location());
            assert_same_state(&run(overlap)?, &run(overlap)?, &[], &what);
        }
    }
    Ok(())
}

/// The losses of 22 steps on tensors that stay where they are, and the state after them.
fn on_fixed_tensors(
    wake: impl Into<Wake>,
    device: &Device,
    recorded: bool,
    overlap: usize,
) -> Result<(Vec<f64>, Checkpoint)> {
    let every = Every { factors: 7, inverses: 7 };
    let mut run = Run::new(wake, device, DType::F64, |p| Params { every, overlap, ..p })?;
    let (x, y) = batch(0, device, DType::F64)?;
    let (mut replay, mut losses) = (Replay::new(), vec![]);
    for step in 0..22 {
        let (images, classes) = batch(step, device, DType::F64)?;
        x.slice_set(&images, 0, 0)?;
        y.slice_set(&classes, 0, 0)?;
        let Run { net, opt, .. } = &mut run;
        let pass = |opt: &mut NaturalGradient| {
            let (z, loss) = loss(net, &x, &y)?;
            opt.observe(&z, Likelihood::Categorical)?;
            opt.backward_step(&loss)?;
            Ok(loss.detach())
        };
        let loss = if recorded { replay.step(opt, pass)? } else { pass(opt)? };
        losses.push(loss.to_scalar()?);
    }
    Ok((losses, run.state()?))
}

#[test]
fn recorded_steps_are_plain_ones() -> Result<()> {
    fn check(wake: impl Into<Wake> + Clone, what: &str, device: &Device, overlap: usize) -> Result<()> {
        let run = |recorded| on_fixed_tensors(wake.clone(), device, recorded, overlap);
        let (expected, found) = (run(false)?, run(true)?);
        for (step, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
            assert!((found - expected).abs() < 1e-9, "{what}, step {step}: loss {found}, plainly {expected}");
        }
        assert_state(&found.1, &expected.1, 1e-9, what);
        Ok(())
    }
    for device in devices() {
        check(Wake::KFac, "kfac", &device, 0)?;
        check(So::default(), "so", &device, 0)?;
        check(So::default(), "so, overlap", &device, 3)?;
        check(TwoRate::default(), "kld-wrm", &device, 0)?;
        check(Q::default(), "q", &device, 0)?;
    }
    if cuda().is_some() {
        // Not recorded, but right.
        check(So::default(), "so, a stream of its own", &Device::new_cuda_with_stream(0)?, 3)?;
    }
    Ok(())
}

#[test]
fn steps_are_recorded_beside_decompositions() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let expected = on_fixed_tensors(So::default(), &device, false, 0)?;
    let done = AtomicBool::new(false);
    let decompose = || -> Result<()> {
        let m = Tensor::eye(24, DType::F64, &Device::new_cuda(0)?)?.unsqueeze(0)?;
        while !done.load(Ordering::Relaxed) {
            cholesky(&m, "beside")?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    let (found, beside) = std::thread::scope(|threads| {
        let beside = threads.spawn(decompose);
        let found = on_fixed_tensors(So::default(), &device, true, 0);
        done.store(true, Ordering::Relaxed);
        (found, beside.join().expect("no panic"))
    });
    beside?;
    let found = found?;
    assert_state(&found.1, &expected.1, 1e-9, "beside decompositions");
    Ok(())
}

#[test]
fn products_are_as_exact_as_is_asked_for() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let run = |dtype, products| -> Result<Run> {
        let factor_limit = FactorLimit { rows: 4, beyond: Beyond::BlockDiagonal };
        let change = |p| pi(Params { products, factor_limit, ..p }, Inverse::Cholesky);
        let mut run = Run::of(So::default(), smooth, &device, dtype, change)?;
        run.train(plain, 6)?;
        Ok(run)
    };
    let same = |a: Run, b: Run, what: &str| -> Result<()> {
        assert_same_state(&saved(&a.opt)?, &saved(&b.opt)?, &[], what);
        Ok(())
    };
    same(run(DType::F32, None)?, run(DType::F32, Some(Products::Exact))?, "f32")?;
    same(run(DType::BF16, None)?, run(DType::BF16, Some(Products::Tf32))?, "bf16")?;
    same(run(DType::F64, Some(Products::Tf32))?, run(DType::F64, Some(Products::Exact))?, "f64")?;
    let start = Run::of(So::default(), smooth, &device, DType::F32, |p| p)?.parameters()?;
    let [exact, rounded] = [Products::Exact, Products::Tf32].map(|products| run(DType::F32, Some(products)));
    let off = apart(&rounded?.parameters()?, &exact?.parameters()?, &start);
    // A real GPU may leave so small products in f32.
    let least = if on_the_host() { 1e-6 } else { 0.0 };
    assert!((least..1e-2).contains(&off), "{off:e} of the way from exact products");
    Ok(())
}

/// Of a block with a folded bias, 769 columns: rows are copied to where each begins at a multiple of 16 bytes.
#[test]
fn products_that_are_aligned_first() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let wide = |vb: VarBuilder| -> Result<Forward> {
        let fc = nn::linear(768, 513, vb.pp("fc"))?;
        Ok(Box::new(move |x| fc.forward(x)))
    };
    let run = |products| -> Result<[Vec<f64>; 2]> {
        let net = Net::on(&device, DType::F32, 1, wide)?;
        let parameters = || -> Result<Vec<f64>> {
            let values = net.values()?;
            values
                .iter()
                .map(|value| Ok(flat(&value.to_device(&Device::Cpu)?)))
                .collect::<Result<Vec<_>>>()
                .map(|all| all.concat())
        };
        let params = Params {
            products: Some(products),
            damping: Damping::Pi(0.01),
            inverse: Inverse::Cholesky,
            fisher: Fisher::Empirical,
            factor_limit: FactorLimit::NONE,
            ..Params::k_fac(&net.tape)
        };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
        let on = |t: Tensor| t.to_dtype(DType::F32)?.to_device(&device);
        let start = parameters()?;
        let z = (net.forward)(&on(random(5, &[8, 768])?)?)?;
        opt.observe(&z, Likelihood::Gaussian)?;
        opt.backward_step(&(z - on(random(6, &[8, 513])?)?)?.sqr()?.mean_all()?)?;
        Ok([start, parameters()?])
    };
    let [start, exact] = run(Products::Exact)?;
    let [_, rounded] = run(Products::Tf32)?;
    let off = apart(&rounded, &exact, &start);
    assert!((1e-7..1e-2).contains(&off), "{off:e} of the way from exact products");
    Ok(())
}

#[test]
fn a_step_that_is_not_finite() -> Result<()> {
    for device in devices() {
        for non_finite in [NonFinite::Error, NonFinite::Skip] {
            let mut run = Run::new(So::default(), &device, DType::F32, |p| Params { non_finite, ..p })?;
            run.train(plain, 3)?;
            let before = run.parameters()?;
            let (x, y) = batch(3, &device, DType::F32)?;
            let (_, loss) = loss(&run.net, &(x * f64::NAN)?, &y)?;
            // A GPU tells when it is asked.
            let outcome = run.opt.backward_step(&loss).and_then(|()| run.opt.settle());
            match non_finite {
                NonFinite::Error => assert_says(outcome, &["so-kld-wrm: step 3"]),
                NonFinite::Skip => {
                    outcome?;
                    assert_eq!(run.opt.skipped(), 1);
                }
            }
            assert_eq!(run.parameters()?, before);
            run.train(plain, 6)?;
            assert!(run.losses.iter().all(|loss| loss.is_finite()));
        }
    }
    Ok(())
}

#[test]
fn outputs_and_labels_of_another_device() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let net = Net::on(&device, DType::F32, 1, model)?;
    let mut opt = NaturalGradient::from_varmap(&net.varmap, Params::k_fac(&net.tape))?;
    let x = random(1, &[4, 1, 8, 8])?.to_dtype(DType::F32)?;
    let message = (net.forward)(&x).err().map(|e| e.to_string().to_lowercase()).unwrap_or_default();
    assert!(!message.is_empty(), "an input on the CPU was taken by a model on the GPU");
    // Labels are few and may lie anywhere.
    let z = (net.forward)(&x.to_device(&device)?)?;
    opt.observe_labels(&z, Likelihood::Categorical, &labels(1, 4, 3)?)
}
