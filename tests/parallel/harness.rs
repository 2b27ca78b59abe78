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

/// What a training is of.
pub struct Training<'a> {
    pub build: fn(VarBuilder) -> Result<Forward>,
    pub params: &'a (dyn Fn(&Net) -> Params + Sync),
    pub steps: u64,
}

impl Training<'_> {
    /// The parameters after the steps, with those before: of one process, or of a rank with its rows.
    pub fn run(&self, world: Option<(&World, &[usize])>) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        // Other values than rank 0's, which are to be taken.
        let seed = world.map_or(1, |(world, _)| 1 + world.rank() as u64);
        let net = Net::of(DType::F64, seed, self.build)?;
        let mut opt = NaturalGradient::from_varmap(&net.varmap, (self.params)(&net))?;
        let mut part = (0, ROWS);
        if let Some((world, split)) = world {
            opt.share(world, Placement::Replicated)?;
            part = rows(split, world.rank());
        }
        let before = net.values()?;
        for k in 0..self.steps {
            let (x, y) = small_batch(k, ROWS, DType::F64)?;
            if part.1 == 0 {
                opt.step_without_rows()?;
                continue;
            }
            let z = (net.forward)(&x.narrow(0, part.0, part.1)?)?;
            opt.observe(&z, LIKELIHOOD)?;
            opt.backward_step(&mean_loss(LIKELIHOOD, &z, &y.narrow(0, part.0, part.1)?)?)?;
        }
        Ok((before, net.values()?))
    }

    /// Asserts that all splits lead where one process does.
    pub fn check(&self, what: &str, splits: &[&[usize]]) -> Result<f64> {
        let (before, expected) = self.run(None)?;
        let moved = apart(&before, &expected);
        assert!(moved > 0.02, "{what}: moved by {moved}");
        let mut largest = 0f64;
        for split in splits {
            for (rank, found) in
                ranks(split.len(), |world| self.run(Some((&world, split)))).into_iter().enumerate()
            {
                let found = found.map_err(|e| e.context(format!("{what}, {split:?}, rank {rank}")))?.1;
                let far = apart(&found, &expected);
                assert!(far < 1e-12, "{what}, {split:?}, rank {rank}: {far:e} apart after a way of {moved}");
                largest = largest.max(far);
            }
        }
        Ok(largest)
    }
}
