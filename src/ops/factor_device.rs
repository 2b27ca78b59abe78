//! Second moments on a GPU, averaged as they are written: what the kernels of `kernels/factor.cuh` are told of one.

use candle_core::{DType, Result, Tensor, bail};

use super::factor_tiles::{Precision, Tile, Work};
use super::moment_queue::Average;
use super::patches::ConvShape;
use super::patches_device::{Divisor, gpu_patches};
use super::record_layout::record_shape;
use crate::gpu::{Gpu, Module, Operand, args};

args! {
    /// A matrix of rows: see `kernels/tiles.cuh`.
    pub(super) struct Rows {
        x: u64,
        pub count: u64,
        step: u64,
        group_step: u32,
        pub dim: u32,
        wide: u32,
        unused: u32,
        positions: Divisor,
        out_width: Divisor,
        image: [u32; 2],
        kernel: [u32; 2],
        stride: [u32; 2],
        padding: [u32; 2],
        dilation: [u32; 2],
    }
}

/// A kernel: its file, the type in its name, the kind of rows and the side of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    pub module: Module,
    pub input: &'static str,
    pub kind: &'static str,
    pub side: usize,
}

/// A second moment that is to be computed, with all that it is made of.
pub(super) struct Job {
    /// Contiguous.
    x: Tensor,
    /// Without what follows from the address of `x`.
    pub rows: Rows,
    by_rows: bool,
    /// From one multiple of so many elements of `x` to the next, they are read in order; 0 if they are not.
    run: usize,
    pub groups: usize,
    pub append_one: bool,
    precision: Precision,
    pub bar: Option<(Tensor, f64)>,
    pub last: Option<(Tensor, f64)>,
    pub weight: f64,
    /// The average, once the job is done.
    pub out: Tensor,
    pub name: String,
}

impl Job {
    /// Of rows `x` `[n, t, features]`.
    pub fn of_rows(
        gpu: &Gpu,
        average: Average,
        x: &Tensor,
        (groups, append_one): (usize, bool),
        precision: Precision,
        name: &str,
    ) -> Result<Self> {
        let (n, t, dim) = record_shape(x, groups, name)?;
        let columns = x.transpose(1, 2)?;
        let small = groups * dim * t * x.dtype().size_in_bytes() < LARGEST;
        if columns.is_contiguous() && t > 1 && groups * dim > 1 && small {
            // Images of one row under a kernel of one element.
            let shape = ConvShape {
                channels: groups * dim,
                out_channels: groups,
                input: (1, t),
                output: (1, t),
                kernel: (1, 1),
                stride: (1, 1),
                padding: (0, 0),
                dilation: (1, 1),
                groups,
            };
            return Self::of_patches(gpu, average, &columns, &shape, append_one, precision, name);
        }
        let rows = Rows {
            x: 0,
            count: (n * t) as u64,
            step: (groups * dim) as u64,
            group_step: fit(dim, name)?,
            dim: fit(dim, name)?,
            wide: 0,
            unused: 0,
            positions: Divisor::new(1, name)?,
            out_width: Divisor::new(1, name)?,
            image: [1; 2],
            kernel: [1; 2],
            stride: [1; 2],
            padding: [0; 2],
            dilation: [1; 2],
        };
        Self::new(gpu, average, x, rows, (true, dim), (groups, append_one), precision, name)
    }

    /// Of the patches of `x`, images of the size that `shape` says.
    pub fn of_patches(
        gpu: &Gpu,
        average: Average,
        x: &Tensor,
        shape: &ConvShape,
        append_one: bool,
        precision: Precision,
        name: &str,
    ) -> Result<Self> {
        let n = x.dim(0)?;
        if shape.kernel.0 + shape.kernel.1 > 31 {
            let patches = gpu_patches(gpu, x, n, shape)?.transpose(1, 2)?;
            return Self::of_rows(gpu, average, &patches, (shape.groups, append_one), precision, name);
        }
        let plain = shape.positions() == shape.input.0 * shape.input.1
            && (shape.kernel, shape.stride, shape.padding) == ((1, 1), (1, 1), (0, 0));
        let pair = |(y, x): (usize, usize)| Ok::<_, candle_core::Error>([fit(y, name)?, fit(x, name)?]);
        let (dim, area) = (shape.group_features(), shape.input.0 * shape.input.1);
        // The kernel counts the bytes of an image, and of what the padding adds to a plane, in 32 bits.
        let padded = (shape.input.0 + 2 * shape.padding.0) * (shape.input.1 + 2 * shape.padding.1);
        fit(shape.channels * area * x.dtype().size_in_bytes(), name)?;
        fit(padded * x.dtype().size_in_bytes(), name)?;
        let rows = Rows {
            x: 0,
            count: (n * shape.positions()) as u64,
            step: (shape.channels * area) as u64,
            group_step: fit(shape.group_channels() * area, name)?,
            dim: fit(dim, name)?,
            wide: 0,
            unused: 0,
            positions: Divisor::new(shape.positions(), name)?,
            out_width: Divisor::new(shape.output.1, name)?,
            image: pair(shape.input)?,
            kernel: pair(shape.kernel)?,
            stride: pair(shape.stride)?,
            padding: pair(shape.padding)?,
            dilation: pair(shape.dilation)?,
        };
        let run = if plain { shape.positions() } else { 0 };
        Self::new(gpu, average, x, rows, (false, run), (shape.groups, append_one), precision, name)
    }

    #[allow(clippy::too_many_arguments)]
    fn new(
        gpu: &Gpu,
        average: Average,
        x: &Tensor,
        rows: Rows,
        (by_rows, run): (bool, usize),
        (groups, append_one): (usize, bool),
        precision: Precision,
        name: &str,
    ) -> Result<Self> {
        if !x.dtype().is_float() {
            bail!("{name}: dtype {:?} found, expected f32, f64, f16 or bf16", x.dtype())
        }
        fit(groups, name)?;
        let size = rows.dim as usize + usize::from(append_one);
        let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let own = |given: Option<(&Tensor, f64)>| {
            given
                .map(|(t, weight)| Ok::<_, candle_core::Error>((t.detach().contiguous()?, weight)))
                .transpose()
        };
        Ok(Self {
            x: x.detach().contiguous()?,
            rows,
            by_rows,
            run,
            groups,
            append_one,
            precision,
            bar: own(average.bar)?,
            last: own(average.last)?,
            weight: average.weight,
            out: gpu.tensor((groups, size, size), dtype)?,
            name: name.to_owned(),
        })
    }

    /// Bytes that the job keeps in memory.
    pub fn bytes(&self) -> usize {
        self.x.elem_count() * self.x.dtype().size_in_bytes()
    }

    pub fn tile(&self) -> Tile {
        Tile::of(self.x.dtype(), self.precision, self.rows.dim as usize)
    }

    /// What jobs of one launch share.
    pub fn kernel(&self) -> Result<Kernel> {
        let (module, input) = match (self.x.dtype(), self.precision) {
            (DType::F32, Precision::Full) => (Module::FactorF32, "f32"),
            (DType::F32, Precision::Tf32) => (Module::FactorTf32, "tf32"),
            (DType::F16, _) => (Module::FactorF16, "f16"),
            (DType::BF16, _) => (Module::FactorBf16, "bf16"),
            (DType::F64, _) => (Module::FactorF64, "f64"),
            (other, _) => bail!("{}: dtype {other:?} found, expected f32, f64, f16 or bf16", self.name),
        };
        let kind = if self.by_rows { "rows" } else { "images" };
        Ok(Kernel { module, input, kind, side: self.tile().side })
    }

    /// The rows that `x`, the job's operand, holds.
    pub fn rows_of(&self, x: &Operand) -> Rows {
        Rows { x: x.address(), wide: wide(x, self.run), ..self.rows }
    }

    pub fn operand(&self, gpu: &Gpu) -> Result<Operand> {
        gpu.operand(&self.x, &self.name)
    }

    /// Tiles of one side of a group's moment.
    pub fn tiles(&self, tile: &Tile) -> usize {
        (self.rows.dim as usize).div_ceil(tile.side)
    }

    pub fn work(&self, tile: &Tile) -> Work {
        let tiles = self.tiles(tile);
        Work {
            turns: (self.rows.count as usize).div_ceil(tile.rows),
            blocks: self.groups * tiles * (tiles + 1) / 2,
        }
    }
}

/// Whether 16 bytes can be read at once, where runs of `run` elements follow one another.
fn wide(x: &Operand, run: usize) -> u32 {
    let whole = run > 0 && (run * x.dtype.size_in_bytes()).is_multiple_of(16);
    u32::from(whole && x.address().is_multiple_of(16))
}

/// No size that a kernel counts in 32 bits may reach this.
const LARGEST: usize = 1 << 30;

pub(super) fn fit(size: usize, name: &str) -> Result<u32> {
    if size >= LARGEST {
        bail!("{name}: a size of {size} found, expected less than {LARGEST} on a GPU")
    }
    Ok(size as u32)
}
