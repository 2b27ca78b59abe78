//! A rank, with a GPU of its own, of the checks that `scripts/check-nccl.sh` starts on GPUs on the host: `nccl SCENARIO [ARGUMENT..]`.

#![allow(dead_code)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../parallel/harness.rs"]
mod harness;

use candle_core::{DType, Device, Result, Tensor, bail};
use common::*;
use half::bf16;
use harness::{ROWS, apart, rows};
use kronwake::curvature::Damping;
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::optim::{AdamW, Every, NaturalGradient, NonFinite, Optimizer, Params, ParamsAdamW, So, Wake};
use kronwake::parallel::{Nccl, Placement, World};
use kronwake::tape::{Fisher, Likelihood};
use std::path::Path;
use std::time::Duration;

const STEPS: u64 = 6;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = run(&arguments);
    if let Err(error) = &outcome {
        let rank = std::env::var("RANK").unwrap_or_default();
        println!("rank {rank} says: {}", error.to_string().lines().next().unwrap_or_default());
    }
    std::process::exit(outcome.is_err().into());
}

fn run(arguments: &[&str]) -> Result<()> {
    let device = Device::new_cuda(Nccl::local_rank())?;
    #[cfg(feature = "mpi")]
    if arguments == ["over-mpi"] {
        let mpi = kronwake::parallel::Mpi::init()?;
        let world = Nccl::over(&mpi, &device)?;
        world.set_time_limit(Duration::from_secs(20));
        verbs(&world)?;
        return equal(&world, &device, DType::F64);
    }
    // Faults are to be found soon.
    let limit = if arguments == ["init"] { 3 } else { 20 };
    let world = Nccl::from_env_within(&device, Duration::from_secs(limit))?;
    match arguments {
        [] => Ok(()),
        ["equal"] => {
            verbs(&world)?;
            stays(&world, &device)?;
            equal(&world, &device, DType::F64)?;
            equal(&world, &device, DType::F32)
        }
        ["bf16"] => half(&world, &device),
        ["train", file, first, steps] => {
            let number = |text: &str| text.parse::<u64>().map_err(candle_core::Error::wrap);
            train(&world, &device, Path::new(file), number(first)?, number(steps)?)
        }
        [fault] => fail(&world, &device, fault),
        _ => bail!("unknown arguments {arguments:?}"),
    }
}

/// Factors of 33 and more rows, which are divided, and smaller ones.
fn net(vb: VarBuilder) -> Result<Forward> {
    let conv = nn::conv2d(1, 2, 2, Default::default(), vb.pp("conv"))?;
    let gain = vb.get(8, "gain")?;
    let (fc1, fc2) = (nn::linear(8, 33, vb.pp("fc1"))?, nn::linear(33, 3, vb.pp("fc2"))?);
    Ok(Box::new(move |x| {
        let x = conv.forward(x)?.tanh()?.flatten_from(1)?.broadcast_mul(&gain)?;
        fc2.forward(&fc1.forward(&x)?.tanh()?)
    }))
}

/// An optimizer that trains.
trait Trained {
    fn share(&mut self, world: &World, placement: Placement) -> Result<()>;
    fn count(&mut self, outputs: &Tensor) -> Result<()>;
    fn descend(&mut self, loss: &Tensor) -> Result<()>;
    fn step_without_rows(&mut self) -> Result<()>;
}

impl Trained for NaturalGradient {
    fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        self.share(world, placement)
    }

    fn count(&mut self, outputs: &Tensor) -> Result<()> {
        self.observe(outputs, Likelihood::Categorical)
    }

    fn descend(&mut self, loss: &Tensor) -> Result<()> {
        self.backward_step(loss)
    }

    fn step_without_rows(&mut self) -> Result<()> {
        self.step_without_rows()
    }
}

impl Trained for AdamW {
    fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        self.share(world, placement)
    }

    fn count(&mut self, outputs: &Tensor) -> Result<()> {
        self.count_terms(outputs.dim(0)? as f64);
        Ok(())
    }

    fn descend(&mut self, loss: &Tensor) -> Result<()> {
        self.backward_step(loss)
    }

    fn step_without_rows(&mut self) -> Result<()> {
        self.step_without_rows()
    }
}

/// One of the table's rows.
#[derive(Clone)]
enum Member {
    Natural(Wake),
    AdamW,
}

impl Member {
    fn name(&self) -> String {
        match self {
            Self::Natural(wake) => wake.name().into(),
            Self::AdamW => "adamw".into(),
        }
    }

    fn optimizer(&self, net: &Net) -> Result<Box<dyn Trained>> {
        Ok(match self {
            Self::Natural(wake) => {
                let params = Params::of(wake.clone(), &net.tape);
                let every = Every { factors: 1, inverses: 2 };
                Box::new(NaturalGradient::from_varmap(&net.varmap, Params { every, ..params })?)
            }
            Self::AdamW => {
                Box::new(AdamW::from_varmap(&net.varmap, ParamsAdamW { lr: 0.02, ..Default::default() })?)
            }
        })
    }
}

/// A rank in a training.
struct Rank {
    net: Net,
    opt: Box<dyn Trained>,
    device: Device,
    dtype: DType,
}

impl Rank {
    fn new(
        member: &Member,
        world: &World,
        placement: Placement,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        // Other values than rank 0's, which are to be taken.
        let net = Net::on(device, dtype, 1 + world.rank() as u64, net)?;
        let mut opt = member.optimizer(&net)?;
        opt.share(world, placement)?;
        Ok(Self { net, opt, device: device.clone(), dtype })
    }

    fn step(&mut self, k: u64, (from, n): (usize, usize)) -> Result<()> {
        if n == 0 {
            return self.opt.step_without_rows();
        }
        let (x, y) = small_batch(k, ROWS, self.dtype)?;
        let (x, y) =
            (x.narrow(0, from, n)?.to_device(&self.device)?, y.narrow(0, from, n)?.to_device(&self.device)?);
        let z = (self.net.forward)(&x)?;
        self.opt.count(&z)?;
        self.opt.descend(&candle_nn::loss::cross_entropy(&z, &y)?)
    }

    fn values(&self) -> Result<Vec<Tensor>> {
        self.net.values()?.iter().map(|value| value.to_device(&Device::Cpu)).collect()
    }
}

/// The values before and after the steps.
fn trained(
    member: &Member,
    world: &World,
    placement: Placement,
    split: &[usize],
    (device, dtype): (&Device, DType),
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let mut rank = Rank::new(member, world, placement, device, dtype)?;
    let before = rank.values()?;
    for k in 0..STEPS {
        rank.step(k, rows(split, world.rank()))?;
    }
    Ok((before, rank.values()?))
}

/// Uneven splits, one with a rank that has no rows.
fn splits(size: usize) -> Vec<Vec<usize>> {
    match size {
        1 => vec![vec![ROWS]],
        2 => vec![vec![9, 3], vec![0, 12]],
        _ => {
            let mut split = vec![1; size];
            split[size - 1] = 0;
            split[0] = ROWS - (size - 2);
            vec![split]
        }
    }
}

fn members() -> Result<Vec<Member>> {
    Ok(vec![
        Member::Natural(Wake::KFac),
        Member::Natural(So::default().into()),
        Member::Natural("kld-wrm".parse()?),
        Member::AdamW,
    ])
}

/// How far KLD-WRM may come apart in f64, which makes more of rounding than the others, on a net with more units than rows.
const OF_KLD_WRM: f64 = 1e-11;

/// The equality table: where one process comes on all rows.
fn equal(world: &World, device: &Device, dtype: DType) -> Result<()> {
    for member in members()? {
        let (before, expected) =
            trained(&member, &World::alone(), Placement::Replicated, &[ROWS], (device, dtype))?;
        let moved = apart(&before, &expected);
        for placement in [Placement::Replicated, Placement::Gathered, Placement::Owned] {
            if matches!((&member, placement), (Member::AdamW, Placement::Gathered)) {
                continue;
            }
            let limit = match (dtype, member.name().as_str()) {
                (DType::F64, "kld-wrm") => OF_KLD_WRM,
                (DType::F64, _) => 1e-12,
                (_, "kld-wrm") => 2e-3,
                _ => 1e-4,
            };
            for split in splits(world.size()) {
                let found = trained(&member, world, placement, &split, (device, dtype))?.1;
                let far = apart(&found, &expected);
                let what = format!("{}, {dtype:?}, {split:?}, {placement:?}", member.name());
                if world.is_first() {
                    println!("{what}: {far:.1e} apart after a way of {moved:.2}");
                }
                if !(far < limit && moved > 0.02) {
                    bail!("{what}: {far:e} apart after a way of {moved}")
                }
                same_bits(world, &what, &found)?;
            }
        }
    }
    Ok(())
}

/// Refuses tensors that differ by a bit on some rank.
fn same_bits(world: &World, what: &str, tensors: &[Tensor]) -> Result<()> {
    let bits: Vec<String> =
        tensors.iter().flat_map(flat).map(|value| format!("{:x}", value.to_bits())).collect();
    world.agree(&format!("bits of {what}"), &bits.join(" "))
}

fn values(seed: u64, n: usize) -> Result<Vec<f64>> {
    Ok(flat(&random(seed, &[n])?))
}

/// Messages of any length, also of several kibibytes, which go by the GPUs, and sums of numbers of the host.
fn verbs(world: &World) -> Result<()> {
    let (rank, size) = (world.rank(), world.size());
    let mut expected = [0.0; 3];
    for rank in 0..size {
        expected.iter_mut().zip(values(rank as u64, 3)?).for_each(|(sum, value)| *sum += value);
    }
    let mut found = [0.0; 3];
    found.copy_from_slice(&values(rank as u64, 3)?);
    world.sum(&mut found)?;
    if found.iter().zip(expected).any(|(a, b)| (a - b).abs() > 1e-15) {
        bail!("a sum of numbers is {found:?}, expected {expected:?}")
    }
    // More than goes by the sockets: of the same text on all ranks, and of another on one.
    let text = "0123456789".repeat(5000);
    world.agree("a text", &text)?;
    let other = if rank == 1 { format!("{text}!") } else { text };
    match world.agree("a text", &other) {
        Err(error) if error.to_string().contains("rank 1 has a text") => {}
        found => bail!("a text that differs on rank 1: {:?}", found.err()),
    }
    // Tensors of the host among GPUs, more of them than goes by the sockets.
    for dtype in [DType::F64, DType::F32] {
        let varmap = nn::VarMap::new();
        let weight = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu).get((70, 70), "weight")?;
        let mut opt = AdamW::from_varmap(&varmap, ParamsAdamW::default())?;
        opt.share(world, Placement::Replicated)?;
        let own = |rank: usize| -> Result<Tensor> { random(50 + rank as u64, &[70, 70])?.to_dtype(dtype) };
        let mut grads = (&weight * &own(rank)?)?.sum_all()?.backward()?;
        opt.count_terms(1.0);
        opt.mean_gradients(&mut grads)?;
        let mut expected = own(0)?;
        for rank in 1..size {
            expected = (expected + own(rank)?)?;
        }
        let Some(found) = grads.get(&weight) else { bail!("no mean gradient") };
        let far = apart(std::slice::from_ref(found), &[(expected / size as f64)?]);
        if far > 1e-6 || (dtype == DType::F64 && far > 1e-15) {
            bail!("a mean gradient of the host, {dtype:?}: {far:e} apart")
        }
    }
    Ok(())
}

/// Gradients that are added up stay on the GPU: what a step without new factors reads is a few numbers.
fn stays(world: &World, device: &Device) -> Result<()> {
    let read = || -> Result<u64> {
        // SAFETY: the stand-in's own function, without arguments.
        unsafe {
            let library = libloading::Library::new("libcuda.so.1").map_err(candle_core::Error::wrap)?;
            let count = library
                .get::<unsafe extern "C" fn() -> u64>(b"hostGpuBytesToHost")
                .map_err(candle_core::Error::wrap)?;
            Ok(count())
        }
    };
    let split = &splits(world.size())[0];
    for placement in [Placement::Replicated, Placement::Gathered, Placement::Owned] {
        let mut rank = Rank::new(&Member::Natural(Wake::KFac), world, placement, device, DType::F32)?;
        let elements: usize = rank.net.values()?.iter().map(Tensor::elem_count).sum();
        let mut most = 0;
        for k in 0..STEPS {
            let before = read()?;
            rank.step(k, rows(split, world.rank()))?;
            most = most.max(read()? - before);
        }
        if world.is_first() {
            println!("{placement:?}: a step reads at most {most} bytes of {} of gradients", 4 * elements);
        }
        // Half of what the gradients are.
        if most > 2 * elements as u64 {
            bail!("{placement:?}: a step reads {most} bytes of the GPU, with {elements} parameters")
        }
    }
    Ok(())
}

/// Gradients that are added up in bfloat16: within a bound of rounding, and the same bits on all.
fn half(world: &World, device: &Device) -> Result<()> {
    let member = Member::AdamW;
    let split = &splits(world.size())[0];
    for placement in [Placement::Replicated, Placement::Owned] {
        let net = Net::on(device, DType::F64, 1, net)?;
        // The mean gradient of all rows, in f64, and the sum of its parts' sizes, of which each rounding is a share.
        let (x, y) = small_batch(0, ROWS, DType::F64)?;
        let loss = |from: usize, n: usize| -> Result<Tensor> {
            let (x, y) = (x.narrow(0, from, n)?.to_device(device)?, y.narrow(0, from, n)?.to_device(device)?);
            candle_nn::loss::cross_entropy(&(net.forward)(&x)?, &y)
        };
        let mut parts = vec![];
        for rank in 0..world.size() {
            let (from, n) = rows(split, rank);
            if n > 0 {
                parts.push((loss(from, n)?.backward()?, n as f64));
            }
        }
        let mut opt = AdamW::from_varmap(&net.varmap, ParamsAdamW::default())?;
        world.set_bf16_gradients(true);
        let shared = opt.share(world, placement);
        world.set_bf16_gradients(false);
        shared?;
        let (from, n) = rows(split, world.rank());
        let mut grads = match n {
            0 => loss(0, 1)?.backward()?,
            _ => loss(from, n)?.backward()?,
        };
        opt.count_terms(n as f64);
        opt.mean_gradients(&mut grads)?;
        let mut means = vec![];
        for name in net.names() {
            let var = net.var(&name);
            let Some(mean) = grads.get(&var) else { bail!("no gradient of {name}") };
            let mean = flat(mean);
            let (mut exact, mut sizes) = (vec![0.0; mean.len()], vec![0.0; mean.len()]);
            for (grads, terms) in &parts {
                let Some(part) = grads.get(&var) else { bail!("no gradient of {name}") };
                for (index, value) in flat(part).into_iter().enumerate() {
                    exact[index] += value * terms / ROWS as f64;
                    sizes[index] += (value * terms / ROWS as f64).abs();
                }
            }
            // A rounding of the part and of each partial sum, which is off by up to 2^-8 of itself.
            let roundings = world.size() as f64;
            for index in 0..mean.len() {
                let far = (mean[index] - exact[index]).abs();
                let bound = roundings * 2f64.powi(-8) * 1.02 * sizes[index];
                if far > bound {
                    bail!("{name}[{index}]: {far:e} from the mean, expected at most {bound:e}")
                }
            }
            if mean.iter().zip(&exact).all(|(a, b)| a == b)
                && exact.iter().any(|&v| f64::from(bf16::from_f64(v)) != v)
            {
                bail!("{name}: the mean has no rounding")
            }
            means.push(Tensor::from_vec(mean, exact.len(), &Device::Cpu)?);
        }
        same_bits(world, "mean gradients", &means)?;
        // A whole training keeps the same parameters on all ranks.
        world.set_bf16_gradients(true);
        let found = trained(&member, world, placement, split, (device, DType::F32));
        world.set_bf16_gradients(false);
        same_bits(world, "parameters", &found?.1)?;
        if world.is_first() {
            println!("bf16 gradients, {placement:?}: within the bound of rounding, the same bits on all");
        }
    }
    world.set_bf16_gradients(world.rank() == 1);
    let net = Net::on(device, DType::F32, 1, net)?;
    let refused =
        AdamW::from_varmap(&net.varmap, ParamsAdamW::default())?.share(world, Placement::Replicated);
    match refused {
        Err(error) if error.to_string().contains("rank 1 has gradients added up in bfloat16: true") => Ok(()),
        other => bail!("another type of the sum on rank 1: {:?}", other.err()),
    }
}

/// Goes on from a file, or begins, saves, and compares with one process that never stopped.
fn train(world: &World, device: &Device, file: &Path, first: u64, steps: u64) -> Result<()> {
    let split = splits(world.size()).pop().unwrap_or_default();
    let params = |net: &Net| Params::kld_wrm(&net.tape);
    let step = |net: &Net, opt: &mut NaturalGradient, k: u64, (from, n): (usize, usize)| -> Result<()> {
        if n == 0 {
            return opt.step_without_rows();
        }
        let (x, y) = small_batch(k, ROWS, DType::F64)?;
        let (x, y) = (x.narrow(0, from, n)?.to_device(device)?, y.narrow(0, from, n)?.to_device(device)?);
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&candle_nn::loss::cross_entropy(&z, &y)?)
    };
    let here = Net::on(device, DType::F64, 1 + world.rank() as u64, net)?;
    let mut opt = NaturalGradient::from_varmap(&here.varmap, params(&here))?;
    if !world.is_alone() {
        opt.share(world, Placement::Owned)?;
    }
    if first > 0 {
        opt.resume(file)?;
    }
    let part = if world.is_alone() { (0, ROWS) } else { rows(&split, world.rank()) };
    for k in first..first + steps {
        step(&here, &mut opt, k, part)?;
    }
    opt.save(file)?;
    let alone = Net::on(device, DType::F64, 1, net)?;
    let mut opt = NaturalGradient::from_varmap(&alone.varmap, params(&alone))?;
    for k in 0..first + steps {
        step(&alone, &mut opt, k, (0, ROWS))?;
    }
    let far = apart(&here.values()?, &alone.values()?);
    if world.is_first() {
        println!("{} ranks after {} steps: {far:.1e} apart", world.size(), first + steps);
    }
    if far < OF_KLD_WRM { Ok(()) } else { bail!("{far:e} apart") }
}

/// Trains, and does something wrong on rank 1, or has the stand-in do it.
fn fail(world: &World, device: &Device, fault: &str) -> Result<()> {
    world.set_time_limit(Duration::from_secs(3));
    let wrong = world.rank() == 1;
    let net = Net::on(device, DType::F64, 1, net)?;
    let params = Params { non_finite: NonFinite::Error, ..Params::k_fac(&net.tape) };
    let params = match fault {
        "options" if wrong => Params { damping: Damping::Pi(0.5), ..params },
        "seed" if wrong => Params { fisher: Fisher::Sampled { draws: 1, seed: 9 }, ..params },
        _ => params,
    };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, params)?;
    opt.share(world, Placement::Replicated)?;
    let (x, y) = small_batch(0, 6, DType::F64)?;
    let (mut x, y) = (x.to_device(device)?, y.to_device(device)?);
    for step in 0..4 {
        if step == 2 && wrong {
            match fault {
                "leave" => bail!("rank 1 cannot read its data"),
                "late" => std::thread::sleep(Duration::from_secs(6)),
                "nan" => x = (&x * f64::NAN)?,
                _ => {}
            }
        }
        let z = (net.forward)(&x)?;
        opt.observe(&z, Likelihood::Categorical)?;
        opt.backward_step(&candle_nn::loss::cross_entropy(&z, &y)?)?;
    }
    Ok(())
}
