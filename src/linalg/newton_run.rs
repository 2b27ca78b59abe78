//! Newton's iteration on a device, without a word from the host: matrix products and the kernels of `newton.cu`, which decide
//! for each group where it starts and when it stops. Nothing here waits, so it can be queued on any stream or captured
//! into a graph.
#![cfg_attr(not(any(test, feature = "cuda")), allow(unused_variables, unreachable_code))]

use candle_core::{DType, Result, Tensor, bail};

use crate::gpu::{Args, Gpu, Grid, Module, Operand, args, typed};

const THREADS: u32 = 256;
const WARP: usize = 32;

args! {
    struct ResidualArgs { product: u64, partial: u64, groups: u32, dim: u32, parts: u32, subtract: u32 }
}
args! {
    struct RowSumArgs { m: u64, partial: u64, groups: u32, dim: u32 }
}
args! {
    struct StartArgs {
        largest: u64,
        start: u64,
        first: u64,
        second: u64,
        x: u64,
        report: u64,
        groups: u32,
        dim: u32,
        rows: u32,
        parts: u32,
    }
}
args! {
    struct StepArgs {
        x: u64,
        change: u64,
        partial: u64,
        report: u64,
        next: u64,
        next_report: u64,
        tolerance: f64,
        groups: u32,
        dim: u32,
        parts: u32,
        pad: u32,
    }
}
args! {
    struct FinishArgs { x: u64, out: u64, groups: u32, dim: u32 }
}

/// How a group stands, as the kernels write it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum State {
    Running,
    Done,
    /// The residual grew, or stayed above the tolerance.
    Failed,
    /// A matrix of zeros, or with numbers that are not finite.
    Unusable,
}

/// One group's line of [`Run::report`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Report {
    /// Before the last update.
    pub residual: f64,
    pub updates: usize,
    pub state: State,
}

impl Report {
    pub fn of(numbers: &[f64]) -> Result<Self> {
        let &[residual, updates, state] = numbers else {
            bail!("newton: expected a report of 3 numbers, got {}", numbers.len())
        };
        let state = match state as u32 {
            0 => State::Running,
            1 => State::Done,
            2 => State::Failed,
            _ => State::Unusable,
        };
        Ok(Self { residual, updates: updates as usize, state })
    }
}

/// An iteration under way for `m` `[groups, dim, dim]`.
pub(super) struct Run {
    gpu: Gpu,
    m: Tensor,
    x: Tensor,
    /// `[groups, 3]` f64; see [`Report`].
    pub report: Tensor,
    groups: usize,
    dim: usize,
    /// Blocks of threads for a matrix.
    parts: usize,
}

impl Run {
    /// Chooses for each group between `start` and the scaled identity; both tensors contiguous.
    pub fn new(gpu: &Gpu, m: &Tensor, start: Option<&Tensor>) -> Result<Self> {
        let (groups, dim, _) = m.dims3()?;
        let parts = (dim * dim).div_ceil(THREADS as usize * 8).clamp(1, 256);
        let x = gpu.tensor(m.shape(), m.dtype())?;
        let report = gpu.tensor((groups, 3), DType::F64)?;
        let run = Self { gpu: gpu.clone(), m: m.clone(), x, report, groups, dim, parts };
        let rows = dim.div_ceil(8);
        let largest = gpu.tensor((groups, rows), DType::F64)?;
        let (shape, [m, sums]) = ((groups as u32, dim as u32), run.operands([m, &largest])?);
        let args = RowSumArgs { m: m.address(), partial: sums.address(), groups: shape.0, dim: shape.1 };
        run.launch("row_sums", [groups * rows, 1, 1], &args)?;
        let mut norms = (None, None);
        if let Some(start) = start {
            let mut r = run.m.matmul(start)?;
            norms.0 = Some(run.norms(&mut r, true)?);
            norms.1 = Some(run.norms(&mut r.matmul(&r)?, false)?);
        }
        let [x, report] = run.operands([&run.x, &run.report])?;
        let optional = |t: Option<&Tensor>| t.map(|t| run.gpu.operand(t, "newton")).transpose();
        let (start, first, second) =
            (optional(start)?, optional(norms.0.as_ref())?, optional(norms.1.as_ref())?);
        let address = |operand: &Option<Operand>| operand.as_ref().map_or(0, Operand::address);
        let args = StartArgs {
            largest: sums.address(),
            start: address(&start),
            first: address(&first),
            second: address(&second),
            x: x.address(),
            report: report.address(),
            groups: shape.0,
            dim: shape.1,
            rows: rows as u32,
            parts: parts as u32,
        };
        run.launch("start", run.matrix_blocks(), &args)?;
        Ok(run)
    }

    /// One more update of the groups that still run.
    pub fn advance(&mut self, tolerance: f64) -> Result<()> {
        let mut r = self.m.matmul(&self.x)?;
        let norms = self.norms(&mut r, true)?;
        let change = self.x.matmul(&r)?;
        let next = self.gpu.tensor(self.m.shape(), self.m.dtype())?;
        let next_report = self.gpu.tensor((self.groups, 3), DType::F64)?;
        let read = self.operands([&self.x, &change, &norms, &self.report])?;
        let written = self.operands([&next, &next_report])?;
        let args = StepArgs {
            x: read[0].address(),
            change: read[1].address(),
            partial: read[2].address(),
            report: read[3].address(),
            next: written[0].address(),
            next_report: written[1].address(),
            tolerance,
            groups: self.groups as u32,
            dim: self.dim as u32,
            parts: self.parts as u32,
            pad: 0,
        };
        self.launch("step", self.matrix_blocks(), &args)?;
        (self.x, self.report) = (next, next_report);
        Ok(())
    }

    /// The inverse as far as it is, exactly symmetric.
    pub fn inverse(&self) -> Result<Tensor> {
        let out = self.gpu.tensor(self.m.shape(), self.m.dtype())?;
        let [x, target] = self.operands([&self.x, &out])?;
        let (groups, dim) = (self.groups as u32, self.dim as u32);
        let args = FinishArgs { x: x.address(), out: target.address(), groups, dim };
        self.launch("finish", [self.groups * self.dim.div_ceil(WARP).pow(2), 1, 1], &args)?;
        Ok(out)
    }

    /// `1 - product` in place, if `subtract` says so, and the sums of its squares, `[groups, parts]`.
    fn norms(&self, product: &mut Tensor, subtract: bool) -> Result<Tensor> {
        let partial = self.gpu.tensor((self.groups, self.parts), DType::F64)?;
        let [m, sums] = self.operands([product, &partial])?;
        let args = ResidualArgs {
            product: m.address(),
            partial: sums.address(),
            groups: self.groups as u32,
            dim: self.dim as u32,
            parts: self.parts as u32,
            subtract: u32::from(subtract),
        };
        self.launch("residual", [self.groups * self.parts, 1, 1], &args)?;
        Ok(partial)
    }

    fn matrix_blocks(&self) -> [usize; 3] {
        [self.parts, self.groups.min(65_535), 1]
    }

    fn launch<A: Args>(&self, kernel: &str, [x, y, z]: [usize; 3], args: &A) -> Result<()> {
        // The kernels' blocks take one task after the other.
        let grid = Grid::new([x.min(1 << 20), y, z], THREADS)?;
        self.gpu.launch(Module::Newton, &typed(kernel, self.m.dtype())?, grid, args)
    }

    fn operands<const N: usize>(&self, tensors: [&Tensor; N]) -> Result<[Operand; N]> {
        let found = tensors.map(|tensor| self.gpu.operand(tensor, "newton"));
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        found.try_into().map_err(|_| candle_core::Error::Msg(format!("newton: expected {N} operands")))
    }
}
