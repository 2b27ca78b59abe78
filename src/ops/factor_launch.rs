//! Many second moments in one launch: the table that the kernels of `kernels/factor.cuh` are given.

use std::cmp::Reverse;

use candle_core::{Result, Tensor};

use super::factor_device::{Job, Kernel, Rows, fit};
use super::factor_tiles::splits;
use crate::gpu::{Gpu, Grid, args};

args! {
    /// A row of the table.
    struct FactorJob {
        rows: Rows,
        bar: u64,
        last: u64,
        out: u64,
        partial: u64,
        decay: f64,
        keep: f64,
        weight: f64,
        split_rows: u64,
        splits: u32,
        groups: u32,
        tiles: u32,
        one: u32,
        first: u32,
        first_merge: u32,
    }
}

/// Jobs of one launch; as in `kernels/factor.cuh`. The table travels in the kernel's argument.
const JOBS: usize = 96;

args! {
    /// The argument of the kernels in `factor.cuh`.
    struct FactorArgs { jobs: [FactorJob; JOBS], count: u32, unused: u32 }
}

// What CUDA 12.1 and later take.
const _: () = assert!(size_of::<FactorArgs>() <= 32_764);

/// Queues jobs none of which reads what another one writes: a launch for those of one kernel, and one to merge the sums of divided rows.
///
/// How the rows of a job are divided, and so the last bits of its result, depends on the jobs that share its launch.
pub(super) fn launch(gpu: &Gpu, jobs: &[Job]) -> Result<()> {
    let mut kernels: Vec<(Kernel, Vec<&Job>)> = Vec::new();
    for job in jobs {
        let kernel = job.kernel()?;
        match kernels.iter_mut().find(|(other, _)| *other == kernel) {
            Some((_, own)) => own.push(job),
            None => kernels.push((kernel, vec![job])),
        }
    }
    for (kernel, own) in &kernels {
        own.chunks(JOBS).try_for_each(|jobs| launch_one(gpu, *kernel, jobs))?;
    }
    Ok(())
}

/// Queues up to [`JOBS`] jobs of one kernel.
fn launch_one(gpu: &Gpu, kernel: Kernel, jobs: &[&Job]) -> Result<()> {
    let Some(first) = jobs.first() else { return Ok(()) };
    let tile = first.tile();
    let work: Vec<_> = jobs.iter().map(|job| job.work(&tile)).collect();
    let parts = splits(&work, gpu.multiprocessors()? * tile.resident);
    // The longest blocks begin first.
    let mut order: Vec<_> = jobs.iter().zip(&work).zip(parts).collect();
    order.sort_by_key(|((_, work), parts)| Reverse(work.turns.div_ceil(*parts)));

    // What the kernels are given lives until they are queued.
    let mut held = Vec::new();
    let mut table = Vec::with_capacity(jobs.len());
    let (mut blocks, mut merging, mut scratch) = (0, 0, 0);
    for ((job, work), parts) in order {
        let name = &job.name;
        let split_rows = work.turns.div_ceil(parts).max(1) * tile.rows;
        let parts = (job.rows.count as usize).div_ceil(split_rows).max(1);
        let elements = work.blocks * tile.side * (tile.side + usize::from(job.append_one));
        let x = job.operand(gpu)?;
        let mut weighted = |given: &Option<(Tensor, f64)>| -> Result<(u64, f64)> {
            let Some((tensor, weight)) = given else { return Ok((0, 0.0)) };
            let operand = gpu.operand(tensor, name)?;
            let address = operand.address();
            held.push(operand);
            Ok((address, *weight))
        };
        let ((bar, decay), (last, keep)) = (weighted(&job.bar)?, weighted(&job.last)?);
        let out = gpu.operand(&job.out, name)?;
        table.push(FactorJob {
            rows: job.rows_of(&x),
            bar,
            last,
            out: out.address(),
            // Where its partial sums begin, until there is an array that holds them.
            partial: scratch as u64,
            decay,
            keep,
            weight: job.weight,
            split_rows: u64::from(fit(split_rows, name)?),
            splits: parts as u32,
            groups: fit(job.groups, name)?,
            tiles: fit(job.tiles(&tile), name)?,
            one: u32::from(job.append_one),
            first: blocks as u32,
            first_merge: merging as u32,
        });
        held.extend([x, out]);
        blocks += work.blocks * parts;
        if parts > 1 {
            merging += elements.div_ceil(32);
            scratch += elements * parts;
        }
    }
    let grid = Grid::line(blocks, tile.threads)?;
    let dtype = first.out.dtype();
    let partial = if scratch > 0 { Some(gpu.scratch(scratch, dtype)?) } else { None };
    let partial = partial.as_ref().map(|partial| gpu.operand(partial, "factor")).transpose()?;
    for job in &mut table {
        job.partial = partial.as_ref().map_or(0, |sums| sums.at(job.partial as usize));
    }
    let Some(&any) = table.first() else { return Ok(()) };
    let mut args = FactorArgs { jobs: [any; JOBS], count: table.len() as u32, unused: 0 };
    args.jobs[..table.len()].copy_from_slice(&table);

    let Kernel { module, input, kind, side } = kernel;
    gpu.launch(module, &format!("factor_{input}_{kind}_{side}"), grid, &args)?;
    if merging > 0 {
        gpu.launch(module, &format!("factor_{input}_merge_{side}"), Grid::line(merging, 256)?, &args)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::{emulate, launches};
    use crate::ops::factor::second_moment;
    use crate::ops::factor_tiles::Precision;
    use crate::ops::moment_queue::Average;
    use crate::ops::patches::{ConvShape, patches};
    use crate::ops::record_layout::testing::{Values, group, record};
    use crate::ops::testing::{random, values};
    use candle_core::DType;

    const DECAY: f64 = 0.75;
    const KEEP: f64 = -0.25;
    const WEIGHT: f64 = 0.5;

    /// What a moment of a test is: of these rows as candle reads them, with these averages.
    struct Case {
        what: String,
        x: Tensor,
        shape: Option<ConvShape>,
        rows: Values,
        groups: usize,
        one: bool,
        bar: Option<Tensor>,
        last: Option<Tensor>,
        weight: f64,
    }

    impl Case {
        fn new(x: &Tensor, shape: Option<ConvShape>, groups: usize, one: bool) -> Result<Self> {
            let rows = match &shape {
                Some(shape) => patches(&x.to_dtype(DType::F64)?, shape)?,
                None => x.to_dtype(DType::F64)?,
            };
            let what = format!("{:?} {groups} {one} {:?} {shape:?}", x.dims(), x.dtype());
            let (x, rows) = (x.clone(), rows.contiguous()?.to_vec3()?);
            Ok(Self { what, x, shape, rows, groups, one, bar: None, last: None, weight: 1.0 })
        }

        fn with(mut self, bar: bool, last: bool) -> Result<Self> {
            let width = self.shape.as_ref().map_or(self.x.dim(2)? / self.groups, ConvShape::group_features);
            let size = width + usize::from(self.one);
            let wide = if self.x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let other = |seed| random(seed, &[self.groups, size, size])?.to_dtype(wide);
            self.bar = bar.then(|| other(5)?.transpose(1, 2)).transpose()?;
            self.last = last.then(|| other(6)).transpose()?;
            self.weight = WEIGHT;
            Ok(self)
        }

        fn average(&self) -> Average<'_> {
            let (bar, last) = (self.bar.as_ref().map(|t| (t, DECAY)), self.last.as_ref().map(|t| (t, KEEP)));
            Average { bar, last, weight: self.weight }
        }

        fn job(&self, gpu: &Gpu, precision: Precision) -> Result<Job> {
            match &self.shape {
                Some(shape) => Job::of_patches(gpu, self.average(), &self.x, shape, self.one, precision, "x"),
                None => Job::of_rows(gpu, self.average(), &self.x, (self.groups, self.one), precision, "x"),
            }
        }

        /// What the CPU makes of it, where there is no emulator.
        fn on_the_cpu(&self) -> Result<Tensor> {
            let x = match &self.shape {
                Some(shape) => patches(&self.x, shape)?,
                None => self.x.clone(),
            };
            self.average().add(second_moment(&x, self.groups, self.one, "x")?)
        }

        /// By a loop in f64, with the sizes that the errors are relative to.
        fn exact(&self) -> Result<Vec<(f64, f64)>> {
            let read = |t: &Option<Tensor>| t.as_ref().map(values).transpose();
            let (bar, last) = (read(&self.bar)?, read(&self.last)?);
            let at = |t: &Option<Vec<f64>>, e: usize| t.as_ref().map_or(0.0, |t| t[e]);
            let size = self.average().terms().next().map(|(bar, _)| bar.dims()[2]);
            let first = self.rows.first().and_then(|x| x.first());
            let size = size.or(first.map(|p| p.len() / self.groups + usize::from(self.one))).unwrap_or(0);
            let mut all = Vec::new();
            for g in 0..self.groups {
                let rows: Vec<_> =
                    self.rows.iter().flatten().map(|p| group(p, g, self.groups, self.one)).collect();
                let sum = |i: usize, j: usize| rows.iter().map(|r| r[i] * r[j]).sum::<f64>();
                let diagonal: Vec<f64> = (0..size).map(|i| sum(i, i)).collect();
                for (i, j) in (0..size * size).map(|e| (e / size, e % size)) {
                    let (bar, last) = (at(&bar, all.len()), at(&last, all.len()));
                    let scale = self.weight * (diagonal[i] * diagonal[j]).sqrt() + bar.abs() + last.abs();
                    all.push((self.weight * sum(i, j) + DECAY * bar + KEEP * last, scale));
                }
            }
            Ok(all)
        }

        fn check(&self, found: &Tensor, tolerance: f64) -> Result<()> {
            let wide = if self.x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            assert_eq!(found.dtype(), wide);
            let (exact, numbers) = (self.exact()?, values(found)?);
            assert_eq!(numbers.len(), exact.len(), "{}", self.what);
            for (found, (exact, scale)) in numbers.iter().zip(&exact) {
                let near = found == exact || (found - exact).abs() <= tolerance * scale;
                assert!(near, "{}: {found} {exact} {scale}", self.what);
            }
            if self.bar.is_none() && self.last.is_none() {
                assert_eq!(numbers, values(&found.transpose(1, 2)?)?, "{}", self.what);
            }
            Ok(())
        }
    }

    /// All in the same launches, in their order.
    fn computed(cases: &[Case], precision: Precision) -> Result<Vec<Tensor>> {
        match Gpu::emulated() {
            Some(gpu) => {
                let jobs = cases.iter().map(|case| case.job(&gpu, precision)).collect::<Result<Vec<_>>>()?;
                launch(&gpu, &jobs)?;
                Ok(jobs.into_iter().map(|job| job.out).collect())
            }
            None => cases.iter().map(Case::on_the_cpu).collect(),
        }
    }

    const KINDS: [(DType, Precision, f64); 5] = [
        (DType::F32, Precision::Full, 1e-6),
        (DType::F32, Precision::Tf32, 1e-3),
        (DType::F16, Precision::Full, 3e-6),
        (DType::BF16, Precision::Full, 3e-6),
        (DType::F64, Precision::Full, 1e-14),
    ];

    /// Convolutions `(x, weight, [stride, padding, dilation, groups])`.
    type Convolution = ([usize; 4], [usize; 4], [usize; 4]);

    fn images(
        (x, w, [stride, padding, dilation, groups]): Convolution,
        dtype: DType,
        one: bool,
    ) -> Result<Case> {
        let pair = |v| (v, v);
        let shape = ConvShape::new("test", &x, &w, pair(stride), pair(padding), pair(dilation), groups)?;
        Case::new(&random(0, &x)?.to_dtype(dtype)?, Some(shape), groups, one)
    }

    #[test]
    fn moments_of_any_shape() -> Result<()> {
        // Layouts: by rows, by positions, and one that has to be copied.
        for (n, t, d, groups, layouts) in [
            (1, 1, 1, 1, 0..3),
            (3, 2, 5, 2, 0..3),
            (2, 70, 32, 1, 0..2),
            (20, 9, 33, 2, 0..2),
            (3, 48, 64, 1, 0..2),
            (2, 17, 130, 1, 0..2),
            (5, 8, 200, 1, 0..2),
            (600, 1, 8, 3, 0..1),
        ] {
            for (layout, (dtype, precision, tolerance)) in
                layouts.flat_map(|layout| KINDS.map(|kind| (layout, kind)))
            {
                let (x, _) = record(n, t, d * groups, layout, dtype)?;
                let case = Case::new(&x, None, groups, (layout + n + d) % 2 == 0)?;
                let case = if n % 2 == 0 { case.with(true, n % 4 == 0)? } else { case };
                let found = emulate(|| computed(std::slice::from_ref(&case), precision))?;
                case.check(&found[0], tolerance)?;
            }
        }
        Ok(())
    }

    #[test]
    fn moments_of_patches() -> Result<()> {
        for convolution in [
            ([3, 1, 9, 11], [5, 1, 5, 5], [1, 0, 1, 1]),
            ([2, 4, 9, 8], [6, 2, 3, 2], [2, 1, 1, 2]),
            ([2, 6, 10, 7], [6, 1, 3, 3], [1, 2, 2, 6]),
            ([40, 3, 5, 5], [4, 3, 1, 1], [1, 2, 1, 1]),
            ([2, 13, 4, 4], [4, 13, 3, 3], [3, 1, 1, 1]),
            ([9, 5, 4, 4], [4, 5, 1, 1], [1, 0, 1, 1]),
            ([2, 1, 1, 40], [1, 1, 1, 35], [1, 4, 1, 1]),
        ] {
            for (dtype, precision, tolerance) in KINDS {
                let case = images(convolution, dtype, dtype != DType::F64)?.with(true, false)?;
                let found = emulate(|| computed(std::slice::from_ref(&case), precision))?;
                case.check(&found[0], tolerance)?;
            }
        }
        Ok(())
    }

    /// Jobs of mixed sizes, with and without groups, ones, averages and rows; some divided and some not.
    #[test]
    fn many_moments_in_one_launch() -> Result<()> {
        for (dtype, precision, tolerance) in KINDS {
            let mut cases = Vec::new();
            for (index, (n, t, d, groups, layout)) in [
                (9, 1, 7, 1, 0),
                (0, 3, 6, 2, 0),
                (900, 1, 9, 1, 0),
                (1, 1, 1, 1, 0),
                (30, 1, 40, 1, 0),
                (300, 1, 5, 3, 0),
                (4, 16, 12, 2, 1),
                (2, 9, 130, 1, 0),
                (260, 1, 64, 1, 0),
                (8, 24, 33, 1, 1),
                (40, 1, 32, 1, 0),
            ]
            .into_iter()
            .enumerate()
            {
                let (x, _) = record(n, t, d * groups, layout, dtype)?;
                let case = Case::new(&x, None, groups, index % 3 != 1 || n == 0)?;
                cases.push(if index % 2 == 1 { case.with(index % 4 == 1, true)? } else { case });
            }
            let convolution = ([3, 2, 9, 7], [4, 1, 3, 3], [1, 1, 1, 2]);
            cases.push(images(convolution, dtype, true)?.with(true, true)?);
            cases.push(images(([4, 3, 5, 5], [4, 3, 3, 3], [2, 1, 1, 1]), dtype, false)?);
            let (found, kernels) = launches(|| computed(&cases, precision));
            for (case, found) in cases.iter().zip(found?) {
                case.check(&found, tolerance)?;
            }
            let sides = if dtype == DType::F64 { 1 } else { 3 };
            // Rows of each size, images of two, and for some of these what merges them.
            assert!(kernels.len() <= 2 * 2 * sides, "{kernels:?}");
            assert!(kernels.is_empty() || kernels.iter().any(|name| name.contains("merge")), "{kernels:?}");
        }
        Ok(())
    }

    #[test]
    fn more_moments_than_a_launch_takes() -> Result<()> {
        let mut cases = Vec::new();
        for index in 0..JOBS + 2 {
            let (x, _) = record(1 + index % 3, 1, 1 + index % 5, 0, DType::F32)?;
            cases.push(Case::new(&x, None, 1, index % 2 == 0)?);
        }
        let (found, kernels) = launches(|| computed(&cases, Precision::Full));
        for (case, found) in cases.iter().zip(found?) {
            case.check(&found, 1e-6)?;
        }
        assert!(kernels.is_empty() || kernels.len() == 2, "{kernels:?}");
        Ok(())
    }

    #[test]
    fn long_sums_of_one_sign_keep_their_precision() -> Result<()> {
        let x = (random(0, &[6000, 1, 3])?.abs()? + 0.5)?.to_dtype(DType::F32)?;
        let case = Case::new(&x, None, 1, true)?;
        case.check(&emulate(|| second_moment(&x, 1, true, "x"))?, 1e-6)
    }
}
