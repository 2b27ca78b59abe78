//! Trainings of one process and of several, on the same batches.

use crate::common::*;
use candle_core::{DType, Result, Tensor};
use kronwake::nn::VarBuilder;
use kronwake::optim::{NaturalGradient, Optimizer, Params};
use kronwake::parallel::{Placement, Threads, World};
use kronwake::tape::Likelihood;

pub const ROWS: usize = 12;
pub const LIKELIHOOD: Likelihood = Likelihood::Categorical;

/// How the rows of a batch are divided: evenly, not, with a rank without rows, over three and four.
pub const SPLITS: [&[usize]; 5] = [&[6, 6], &[9, 3], &[12, 0], &[5, 4, 3], &[2, 0, 7, 3]];

/// Runs a training on each rank, on a thread of its own.
pub fn ranks<T: Send>(size: usize, f: impl Fn(World) -> Result<T> + Sync) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            Threads::worlds(size).into_iter().map(|world| scope.spawn(|| f(world))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// What each rank says, which must be an error, without a backtrace.
pub fn sentences<T>(outcomes: Vec<Result<T>>) -> Vec<String> {
    let sentence = |outcome: Result<T>| {
        let text = outcome.err().map(|error| error.to_string()).unwrap_or_default();
        text.lines().next().unwrap_or_default().to_string()
    };
    outcomes.into_iter().map(sentence).collect()
}

/// The rows of a split that are a rank's.
pub fn rows(split: &[usize], rank: usize) -> (usize, usize) {
    (split[..rank].iter().sum(), split[rank])
}

/// How far parameters lie apart, relative to their size.
pub fn apart(found: &[Tensor], expected: &[Tensor]) -> f64 {
    let far = |(a, b): (&Tensor, &Tensor)| {
        let (a, b) = (flat(a), flat(b));
        let size = b.iter().fold(1e-300f64, |m, v| m.max(v.abs()));
        a.iter().zip(&b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs() / size))
    };
    found.iter().zip(expected).map(far).fold(0.0, f64::max)
}

/// One process or a rank in a training.
pub struct Rank {
    pub net: Net,
    pub opt: NaturalGradient,
    pub world: World,
}

impl Rank {
    pub fn new(
        world: World,
        build: fn(VarBuilder) -> Result<Forward>,
        params: &dyn Fn(&Net) -> Params,
    ) -> Result<Self> {
        Self::placed(world, build, params, Placement::Replicated)
    }

    pub fn placed(
        world: World,
        build: fn(VarBuilder) -> Result<Forward>,
        params: &dyn Fn(&Net) -> Params,
        placement: Placement,
    ) -> Result<Self> {
        // Other values than rank 0's, which are to be taken.
        let net = Net::of(DType::F64, 1 + world.rank() as u64, build)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, params(&net))?;
        opt.share(&world, placement)?;
        Ok(Self { net, opt, world })
    }

    /// A plain step on the rows from `from` on.
    pub fn step(&mut self, (x, y): &(Tensor, Tensor), (from, n): (usize, usize)) -> Result<()> {
        if n == 0 {
            return self.opt.step_without_rows();
        }
        let z = (self.net.forward)(&x.narrow(0, from, n)?)?;
        self.opt.observe(&z, LIKELIHOOD)?;
        self.opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, from, n)?)?)
    }
}

/// A step of a rank, or of one process, on its part of the batch `k`.
pub type Step<'a> = &'a (dyn Fn(&mut Rank, u64, (usize, usize)) -> Result<()> + Sync);

/// The plain step.
pub fn plain(rank: &mut Rank, k: u64, part: (usize, usize)) -> Result<()> {
    rank.step(&small_batch(k, ROWS, DType::F64)?, part)
}

/// What a training is of.
pub struct Training<'a> {
    pub build: fn(VarBuilder) -> Result<Forward>,
    pub params: &'a (dyn Fn(&Net) -> Params + Sync),
    pub step: Step<'a>,
    pub placement: Placement,
}

impl Training<'_> {
    pub const STEPS: u64 = 20;

    /// The parameters before and after the steps.
    pub fn run(&self, world: World, split: &[usize]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let part = rows(split, world.rank());
        let mut rank = Rank::placed(world, self.build, self.params, self.placement)?;
        let before = rank.net.values()?;
        for k in 0..Self::STEPS {
            (self.step)(&mut rank, k, part)?;
        }
        Ok((before, rank.net.values()?))
    }

    /// Asserts that all splits lead where one process does.
    pub fn check(&self, what: &str, splits: &[&[usize]]) -> Result<()> {
        let (before, expected) = self.run(World::alone(), &[ROWS])?;
        let moved = apart(&before, &expected);
        assert!(moved > 0.02, "{what}: moved by {moved}");
        let mut largest = 0f64;
        for split in splits {
            let found = ranks(split.len(), |world| self.run(world, split));
            for (rank, found) in found.into_iter().enumerate() {
                let found = found.map_err(|e| e.context(format!("{what}, {split:?}, rank {rank}")))?.1;
                let far = apart(&found, &expected);
                assert!(far < 1e-12, "{what}, {split:?}, rank {rank}: {far:e} apart after a way of {moved}");
                largest = largest.max(far);
            }
        }
        println!("{what}: at most {largest:e} apart after a way of {moved:.2}");
        Ok(())
    }
}

/// A training in which all compute all.
pub fn of<'a>(
    build: fn(VarBuilder) -> Result<Forward>,
    params: &'a (dyn Fn(&Net) -> Params + Sync),
    step: Step<'a>,
) -> Training<'a> {
    Training { build, params, step, placement: Placement::Replicated }
}

/// A training in which each computes what it owns.
pub fn owned<'a>(
    build: fn(VarBuilder) -> Result<Forward>,
    params: &'a (dyn Fn(&Net) -> Params + Sync),
    step: Step<'a>,
) -> Training<'a> {
    Training { placement: Placement::Owned, ..of(build, params, step) }
}

/// [`Training::check`] with plain steps of the small net, where all compute all and where each computes what it owns.
pub fn check(what: &str, params: &(dyn Fn(&Net) -> Params + Sync)) -> Result<()> {
    of(small, params, &plain).check(what, &SPLITS)?;
    owned(small, params, &plain).check(&format!("{what}, owned"), &SPLITS)
}

/// Steps of a rate of 1 on gradients of uneven parts that are added up in bfloat16: how far each is from the exact mean, in f64, and the bound of it:
/// each part and each partial sum is rounded, by up to `2^-8` of itself. On all ranks the bits are the same, and all ranks say the same.
pub fn half(world: &World) -> Result<()> {
    use candle_core::{Device, bail};
    use kronwake::optim::{ParamsSgd, Sgd};
    for (placement, dtype) in [
        (Placement::Replicated, DType::F64),
        (Placement::Owned, DType::F64),
        (Placement::Replicated, DType::F32),
    ] {
        let varmap = kronwake::nn::VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
        let weights = [vb.get((7, 11), "a")?, vb.get(5, "b")?];
        let own = |rank: usize, index: usize| random((60 + 10 * rank + index) as u64, weights[index].dims());
        // The first rank has no terms.
        let terms = |rank: usize| (3 * rank) as f64;
        let mut opt = Sgd::from_varmap(&varmap, ParamsSgd { lr: 1.0, ..Default::default() })?;
        world.set_bf16_gradients(true);
        let shared = opt.share(world, placement);
        world.set_bf16_gradients(false);
        shared?;
        let mut loss = Tensor::zeros((), dtype, &Device::Cpu)?;
        for (index, weight) in weights.iter().enumerate() {
            loss = (loss + (weight * own(world.rank(), index)?.to_dtype(dtype)?)?.sum_all()?)?;
        }
        let before: Vec<Vec<f64>> = weights.iter().map(flat).collect();
        opt.count_terms(terms(world.rank()));
        opt.backward_step(&loss)?;
        let (total, size) = ((0..world.size()).map(terms).sum::<f64>(), world.size());
        let (mut bits, mut rounded) = (String::new(), false);
        // Of the parameter itself.
        let own_rounding = if dtype == DType::F64 { 1e-15 } else { 1e-6 };
        for (index, weight) in weights.iter().enumerate() {
            for (at, (after, before)) in flat(weight).into_iter().zip(&before[index]).enumerate() {
                let mut parts = vec![];
                for rank in 0..size {
                    parts.push(flat(&own(rank, index)?)[at] * terms(rank) / total);
                }
                let far = (before - after - parts.iter().sum::<f64>()).abs();
                let bound = size as f64 * 2f64.powi(-8) * 1.02 * parts.iter().map(|v| v.abs()).sum::<f64>();
                if far > bound + own_rounding {
                    bail!(
                        "{placement:?}, {dtype:?}, [{at}]: {far:e} from the mean, expected at most {bound:e}"
                    )
                }
                rounded |= far > 0.01 * bound + own_rounding;
                bits += &format!("{:x} ", after.to_bits());
            }
        }
        world.agree("bits of", &bits)?;
        if !rounded {
            bail!("{placement:?}, {dtype:?}: the sum has no rounding of bfloat16")
        }
    }
    world.set_bf16_gradients(world.rank() == 1);
    let varmap = kronwake::nn::VarMap::new();
    VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu).get(5, "b")?;
    let refused = Sgd::from_varmap(&varmap, ParamsSgd::default())?.share(world, Placement::Replicated);
    world.set_bf16_gradients(false);
    match refused {
        Err(error) if error.to_string().contains("rank 1 has gradients added up in bfloat16: true") => Ok(()),
        other => bail!("another type of the sum on rank 1: {:?}", other.err()),
    }
}
