//! Wake gradients times inverses on a GPU: small products of one stage in one launch, whatever their shapes.

use super::kept_alive::KeptAlive;
use super::partial_sums::{Parts, Sums};
use super::same_shape;
use crate::curvature::{Preconditioner, factor_product};
use crate::gpu::Gpu;
use crate::gpu::table::blocks_of;
use crate::ops::grouped::{Product, Then, most_sums, multiply, sums_of};
use crate::ops::precondition::{ScaleItem, scales};
use crate::optim::state::block::Block;
use candle_core::{DType, Result, Tensor};

/// Multiplications in the larger product of all blocks of a job up to which it shares launches with others.
///
/// An H100 has at most 3.3e13 of them a second in f32, so that this many take it 8 us, and perhaps twice that with tiles of 64 x 64. The
/// larger tiles of a library get nearer to that, where there are enough of them to occupy the GPU; but each product costs a launch and
/// candle's way to it, some microseconds, and waits for the last tile of the one before. This is an estimate: the part `grouped products`
/// of `benches/kernels` measures both.
const SMALL: usize = 1 << 28;

/// An inverse, and the wake gradients that it is multiplied with.
pub(super) struct Job<'a> {
    pub inverse: &'a Preconditioner,
    /// `[blocks groups, rows, columns]`
    pub wake: &'a Tensor,
    /// Indices of the blocks.
    pub blocks: &'a [usize],
}

/// What comes of a [`Job`].
pub(super) struct Output {
    /// `[blocks groups, rows, columns]`
    pub directions: Tensor,
    /// The partial sums of `<V, w>` for each block; none where nothing has made them on the way.
    pub dots: Vec<Sums>,
}

impl Job<'_> {
    /// The part of a tensor that belongs to the `nth` of the blocks.
    pub fn part(&self, of: &Tensor, nth: usize) -> Result<Tensor> {
        same_shape::part(of, nth, self.blocks.len())
    }

    /// Whether it is small enough for the grouped launch.
    pub fn is_small(&self) -> bool {
        match self.inverse {
            Preconditioner::Factors { inv_a, inv_g } => fit(inv_g, self.wake, inv_a),
            Preconditioner::Basis { basis_a, basis_g, scale } => {
                let scales = scale.dims() == self.wake.dims() && scale.is_contiguous();
                scales && fit(basis_g, self.wake, basis_a)
            }
            Preconditioner::LowRank { .. } => false,
        }
    }
}

/// Whether `g` and `a` are full, and the products with `x` small.
fn fit(g: &Tensor, x: &Tensor, a: &Tensor) -> bool {
    let &[groups, rows, columns] = x.dims() else { return false };
    let full = g.dims() == [groups, rows, rows] && a.dims() == [groups, columns, columns];
    full && (groups * rows * columns).saturating_mul(rows.max(columns)) <= SMALL
}

/// The partial sums of a block's `<V, w>`, at most.
pub(super) fn room_of(block: &Block) -> usize {
    let [groups, rows, columns] = block.shape();
    blocks_of(block.inside().iter().product()).max(groups * most_sums(rows, columns))
}

/// Small jobs: two launches for those with inverse factors, two more for those with eigenvectors.
pub(super) fn grouped(
    gpu: &Gpu,
    dtype: DType,
    jobs: &[Job<'_>],
    sums: &mut Parts<'_>,
) -> Result<Vec<Output>> {
    if jobs.is_empty() {
        return Ok(vec![]);
    }
    // A stage reads the one and writes the other.
    let wakes: Vec<_> = jobs.iter().map(|job| job.wake).collect();
    let (first, second) = (all_like(gpu, dtype, &wakes)?, all_like(gpu, dtype, &wakes)?);
    let mut rooms = Vec::with_capacity(jobs.len());
    for job in jobs {
        let (groups, rows, columns) = job.wake.dims3()?;
        rooms.push(sums.reserve(groups * most_sums(rows, columns)));
    }
    let mut side = 1;
    for stage in 0..4 {
        let mut products = Vec::with_capacity(jobs.len());
        for (nth, job) in jobs.iter().enumerate() {
            let (wake, first, second, sums) = (job.wake, &first[nth], &second[nth], sums.at(rooms[nth]));
            let (a, b, out, then) = match (job.inverse, stage) {
                (Preconditioner::Factors { inv_g, .. }, 0) => {
                    (inv_g.clone(), wake.clone(), first, Then::Nothing)
                }
                (Preconditioner::Factors { inv_a, .. }, 1) => {
                    (first.clone(), inv_a.clone(), second, Then::Dot { with: wake, sums })
                }
                (Preconditioner::Basis { basis_g, .. }, 0) => {
                    (basis_g.t()?, wake.clone(), first, Then::Nothing)
                }
                (Preconditioner::Basis { basis_a, scale, .. }, 1) => {
                    (first.clone(), basis_a.clone(), second, Then::Scale { by: scale, sums })
                }
                (Preconditioner::Basis { basis_g, .. }, 2) => {
                    (basis_g.clone(), second.clone(), first, Then::Nothing)
                }
                (Preconditioner::Basis { basis_a, .. }, 3) => {
                    (first.clone(), basis_a.t()?, second, Then::Nothing)
                }
                _ => continue,
            };
            products.push(Product { a, b, out, then });
        }
        let tiles = multiply(gpu, dtype, &products)?;
        if stage == 1 {
            side = tiles;
        }
    }
    let mut outputs = Vec::with_capacity(jobs.len());
    for ((job, directions), room) in jobs.iter().zip(second).zip(rooms) {
        let (groups, rows, columns) = job.wake.dims3()?;
        let count = groups / job.blocks.len().max(1) * sums_of(rows, columns, side);
        let dots = (0..job.blocks.len()).map(|nth| (sums.at(room + nth * count), count as u64)).collect();
        outputs.push(Output { directions, dots });
    }
    Ok(outputs)
}

/// A tensor for each of some others, in its shape, in one piece of memory.
fn all_like(gpu: &Gpu, dtype: DType, others: &[&Tensor]) -> Result<Vec<Tensor>> {
    let all = gpu.tensor(others.iter().map(|other| other.elem_count()).sum::<usize>(), dtype)?;
    let mut from = 0;
    let mut parts = Vec::with_capacity(others.len());
    for other in others {
        parts.push(all.narrow(0, from, other.elem_count())?.reshape(other.shape())?);
        from += other.elem_count();
    }
    Ok(parts)
}

/// A matrix `x` `[groups, rows, columns]` of a block, and its factors.
pub(super) struct Curved<'a> {
    pub a: &'a Tensor,
    pub g: &'a Tensor,
    pub x: &'a Tensor,
    pub name: &'a str,
}

/// [`factor_product`] of each: two launches for all small ones.
pub(super) fn factor_products(gpu: &Gpu, dtype: DType, all: &[Curved<'_>]) -> Result<Vec<Tensor>> {
    let mut found: Vec<Tensor> = all.iter().map(|curved| curved.x.clone()).collect();
    let (small, large): (Vec<usize>, Vec<usize>) =
        (0..all.len()).partition(|&index| fit(all[index].g, all[index].x, all[index].a));
    for index in large {
        let Curved { a, g, x, name } = all[index];
        found[index] = factor_product(a, g, x, name)?.contiguous()?;
    }
    if small.is_empty() {
        return Ok(found);
    }
    let shapes: Vec<_> = small.iter().map(|&index| all[index].x).collect();
    let (first, second) = (all_like(gpu, dtype, &shapes)?, all_like(gpu, dtype, &shapes)?);
    let (mut left, mut right) = (vec![], vec![]);
    for (&index, (first, second)) in small.iter().zip(first.iter().zip(&second)) {
        let &Curved { a, g, x, .. } = &all[index];
        left.push(Product { a: g.clone(), b: x.clone(), out: first, then: Then::Nothing });
        right.push(Product { a: first.clone(), b: a.clone(), out: second, then: Then::Nothing });
    }
    multiply(gpu, dtype, &left)?;
    multiply(gpu, dtype, &right)?;
    for (index, curved) in small.into_iter().zip(second) {
        found[index] = curved;
    }
    Ok(found)
}

/// Other jobs, each with its own products, and one launch for all scalings between them.
pub(super) fn single(gpu: &Gpu, dtype: DType, jobs: &[Job<'_>], sums: &mut Parts<'_>) -> Result<Vec<Output>> {
    let mut kept = KeptAlive::new(gpu);
    let (mut insides, mut items) = (Vec::with_capacity(jobs.len()), Vec::new());
    let start = sums.next();
    for job in jobs {
        let Preconditioner::Basis { basis_a, basis_g, scale } = job.inverse else {
            insides.push((None, vec![]));
            continue;
        };
        let inside = Preconditioner::inside(basis_a, basis_g, scale, job.wake)?.contiguous()?;
        let scale = scale.contiguous()?;
        let mut dots = Vec::with_capacity(job.blocks.len());
        for nth in 0..job.blocks.len() {
            let part = job.part(&inside, nth)?;
            items.push(ScaleItem {
                inside: kept.address(&part, "a gradient in eigenvectors")?,
                scale: kept.address(&job.part(&scale, nth)?, "the scale of eigenvectors")?,
                len: part.elem_count() as u64,
                ..ScaleItem::default()
            });
            dots.push(sums.take(part.elem_count()));
        }
        insides.push((Some(inside), dots));
    }
    scales(gpu, dtype, &items, start)?;
    let outputs = jobs.iter().zip(insides).map(|(job, (inside, dots))| {
        let directions = match (job.inverse, inside) {
            (Preconditioner::Basis { basis_a, basis_g, .. }, Some(inside)) => {
                Preconditioner::outside(basis_a, basis_g, &inside, job.wake)?
            }
            (inverse, _) => inverse.apply(job.wake)?,
        };
        Ok(Output { directions: directions.contiguous()?, dots })
    });
    outputs.collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::curvature::{Damping, FactorLimit, Inverse};
    use crate::gpu::emulate::{emulate, launches};
    use crate::nn::{self, Module, VarBuilder, VarMap};
    use crate::ops::testing::{assert_close, random, values};
    use crate::optim::{
        AdaptiveKl, Average, Bias, Every, NaturalGradient, Optimizer, Params, Q, So, StepRule, TwoRate, Wake,
    };
    use crate::tape::{Likelihood, Tape};

    /// Jobs of several shapes, one with eigenvectors that lie transposed; the last is of two blocks with two groups each.
    fn inverses(dtype: DType) -> Result<Vec<(Preconditioner, Tensor)>> {
        let of = |seed, dims: &[usize]| random(seed, dims)?.to_dtype(dtype);
        let mut found = vec![];
        for (nth, [groups, rows, columns]) in
            [[1, 7, 70], [1, 33, 5], [1, 1, 1], [4, 3, 34]].into_iter().enumerate()
        {
            let (a, g) = (of(1, &[groups, columns, columns])?, of(2, &[groups, rows, rows])?);
            let (wake, scale) = (of(3, &[groups, rows, columns])?, of(4, &[groups, rows, columns])?);
            let transposed = a.t()?.contiguous()?.t()?;
            let basis = if nth == 1 { transposed } else { a.clone() };
            found.push((Preconditioner::Basis { basis_a: basis, basis_g: g.clone(), scale }, wake.clone()));
            found.push((Preconditioner::Factors { inv_a: a, inv_g: g }, wake));
        }
        Ok(found)
    }

    #[test]
    fn directions_are_the_inverses_products() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let all = inverses(dtype)?;
            let sums = Tensor::zeros(100, DType::F64, &Device::Cpu)?;
            // Each alone, then all at once.
            for all in all.chunks(1).chain(std::iter::once(&all[..])) {
                let blocks = [0, 1];
                let jobs: Vec<_> = all
                    .iter()
                    .map(|(inverse, wake)| {
                        let count = if wake.dims()[0] > 1 { 2 } else { 1 };
                        Job { inverse, wake, blocks: &blocks[..count] }
                    })
                    .collect();
                assert!(jobs.iter().all(Job::is_small));
                let found = emulate(|| -> Result<Option<Vec<_>>> {
                    let Some(gpu) = Gpu::emulated() else { return Ok(None) };
                    let array = gpu.operand(&sums, "sums")?;
                    let start = array.address();
                    let outputs = grouped(&gpu, dtype, &jobs, &mut Parts::of(&array, 0))?;
                    let place =
                        |(at, count): (u64, u64)| ((at - start) as usize / size_of::<f64>(), count as usize);
                    let with_places = outputs.into_iter().map(|outputs| {
                        let places: Vec<_> = outputs.dots.iter().map(|&dots| place(dots)).collect();
                        (outputs.directions, places)
                    });
                    Ok(Some(with_places.collect()))
                })?;
                let Some(found) = found else { return Ok(()) };
                for (job, (directions, places)) in jobs.iter().zip(found) {
                    let expected = job.inverse.apply(job.wake)?;
                    assert_close(&directions, &values(&expected)?, tolerance);
                    assert_eq!(places.len(), job.blocks.len());
                    for (nth, (at, count)) in places.into_iter().enumerate() {
                        let (v, w) = (job.part(&expected, nth)?, job.part(job.wake, nth)?);
                        let products: Vec<f64> =
                            values(&v)?.iter().zip(values(&w)?).map(|(v, w)| v * w).collect();
                        let (exact, size): (f64, f64) =
                            (products.iter().sum(), products.iter().map(|x| x.abs()).sum());
                        let sum: f64 = values(&sums)?[at..][..count].iter().sum();
                        assert!((sum - exact).abs() <= tolerance * size, "{dtype:?} {sum} {exact}");
                    }
                }
            }
        }
        Ok(())
    }

    /// Kernels of a step that renews nothing, of an MLP with layers of these widths.
    fn plain_step(wake: Wake, widths: &[usize], change: &dyn Fn(&mut Params)) -> Result<usize> {
        let (tape, vars) = (Tape::new(), VarMap::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let layer =
            |(nth, pair): (usize, &[usize])| nn::linear(pair[0], pair[1], vb.pp(format!("layer{nth}")));
        let layers = tape.build(|| widths.windows(2).enumerate().map(layer).collect::<Result<Vec<_>>>())?;
        let mut params = Params::of(wake, &tape);
        params.every = Every { factors: 10, inverses: 10 };
        params.early_refresh = false;
        change(&mut params);
        let mut optimizer = NaturalGradient::from_varmap(&vars, params)?;
        let x = random(1, &[8, widths[0]])?.to_dtype(DType::F32)?;
        let labels = Tensor::new(&[0u32, 1, 2, 2, 1, 0, 1, 2], &Device::Cpu)?;
        let mut launched = 0;
        for _ in 0..3 {
            let outputs = layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x)?.tanh())?;
            optimizer.observe(&outputs, Likelihood::Categorical)?;
            let grads = nn::loss::cross_entropy(&outputs, &labels)?.backward()?;
            let (stepped, kernels) = launches(|| optimizer.step(&grads));
            stepped?;
            launched = kernels.len();
        }
        Ok(launched)
    }

    #[test]
    fn launches_do_not_grow_with_the_layers() -> Result<()> {
        fn check(
            wake: impl Into<Wake>,
            what: &str,
            expected: usize,
            change: impl Fn(&mut Params),
        ) -> Result<()> {
            let wake = wake.into();
            let count = |widths: &[usize]| emulate(|| plain_step(wake.clone(), widths, &change));
            let found = [count(&[4, 7, 5, 3])?, count(&[4, 9, 6, 8, 7, 5, 3])?];
            // None at all without a compiler for the kernels.
            let expected = emulate(|| Gpu::emulated().map_or(0, |_| expected));
            assert_eq!(found, [expected; 2], "{what}");
            Ok(())
        }
        // Both ends of the wake, two or four stages, the sums, the rate; more where the options want more.
        check(Wake::KFac, "k-fac", 9, |_| ())?;
        check(Wake::KFac, "k-fac, pi, momentum", 7, |p| (p.damping, p.momentum) = (Damping::Pi(0.01), 0.9))?;
        check(Wake::KFac, "k-fac, biases apart", 9, |p| p.bias = Bias::Split)?;
        check(Wake::KFac, "k-fac, diagonal", 6, |p| p.factor_limit = FactorLimit::DIAGONAL)?;
        check(So::default(), "so", 9, |_| ())?;
        check(So::default(), "so, ekfac, rms clip", 10, |p| (p.ekfac, p.rms_clip) = (true, Some(0.1)))?;
        check(So::default(), "so, pi, averaged", 7, |p| {
            (p.damping, p.inverse, p.average) =
                (Damping::Pi(0.01), Inverse::Cholesky, Some(Average::default()));
        })?;
        check(So::default(), "so, lengths by slopes", 9, |p| {
            p.step_rule = StepRule::AdaptiveKl(AdaptiveKl::default());
            p.kl_clip = None;
        })?;
        check(TwoRate::default(), "kld-wrm, not orthogonal", 9, |p| p.orthogonal = None)?;
        // And the step times the curvature, which a quadratic wake looks back at.
        check(Q::default(), "q", 12, |_| ())
    }
}
