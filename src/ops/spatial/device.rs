//! The passes of `spatial.rs` on a GPU.

use super::super::group::value_dtype;
use super::{Entropy, NAME, Seen, Shape};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};
use candle_core::{DType, Result, Storage, Tensor};

/// Threads of a block, as in `spatial.cu`.
const THREADS: u32 = 256;

args! {
    struct SumArgs {
        w: u64, rows: u64, columns: u64, totals: u64, m: u64, width: u64, band: u64, strip: u64, strips: u64
    }
}

args! {
    struct MarginalArgs { rows: u64, columns: u64, marginals: u64, m: u64, n: u64, k: u64, bands: u64, strips: u64 }
}

args! {
    struct ValueArgs {
        totals: u64, marginals: u64, numbers: u64, value: u64, m: u64, n: u64, k: u64, parts: u64,
        kappa: f64, gamma: f64, empty: f64, factor: f64
    }
}

args! {
    struct GradientArgs {
        w: u64, marginals: u64, numbers: u64, scale: u64, out: u64, m: u64, n: u64, k: u64,
        kappa: f64, gamma: f64, factor: f64, exact: u64
    }
}

impl Entropy {
    pub(super) fn gpu_pass(&self, gpu: &Gpu, w: &Tensor, shape: Shape) -> Result<(Storage, Seen)> {
        /// Columns that a block reads at once, as in `spatial.cu`; and into how many parts rows and columns are cut at most, which
        /// bounds the memory by a multiple of `m + n k`.
        const CHUNK: usize = 128;
        const STRIPS: usize = 16;
        const BANDS: usize = 64;
        let Shape { m, n, k } = shape;
        let width = shape.width();
        let strip = width.div_ceil(STRIPS).next_multiple_of(CHUNK);
        let band = m.div_ceil(BANDS).max(16);
        let (strips, bands) = (width.div_ceil(strip), m.div_ceil(band));
        let rows = gpu.tensor((strips, m), DType::F64)?;
        let columns = gpu.tensor((bands, width), DType::F64)?;
        let totals = gpu.tensor((bands * strips, 2), DType::F64)?;
        let (marginals, numbers) = (gpu.tensor(m + n, DType::F64)?, gpu.tensor(4, DType::F64)?);
        let value = gpu.storage((), value_dtype(w.dtype()))?;
        let operand = |t: &Tensor| gpu.operand(t, NAME);
        let (of_w, of_rows, of_columns) = (operand(w)?, operand(&rows)?, operand(&columns)?);
        let (of_totals, of_marginals, of_numbers) =
            (operand(&totals)?, operand(&marginals)?, operand(&numbers)?);
        let of_value = gpu.of_storage(&value, 1, NAME)?;
        let [m, n, k, bands, strips] = [m, n, k, bands, strips].map(|v| v as u64);
        let args = SumArgs {
            w: of_w.address(),
            rows: of_rows.address(),
            columns: of_columns.address(),
            totals: of_totals.address(),
            m,
            width: width as u64,
            band: band as u64,
            strip: strip as u64,
            strips,
        };
        let blocks = (bands * strips) as usize;
        gpu.launch(Module::Spatial, &typed("spatial_sums", w.dtype())?, Grid::line(blocks, THREADS)?, &args)?;
        let args = MarginalArgs {
            rows: of_rows.address(),
            columns: of_columns.address(),
            marginals: of_marginals.address(),
            m,
            n,
            k,
            bands,
            strips,
        };
        let grid = Grid::line(of_marginals.len.div_ceil(THREADS as usize), THREADS)?;
        gpu.launch(Module::Spatial, "spatial_marginals", grid, &args)?;
        let args = ValueArgs {
            totals: of_totals.address(),
            marginals: of_marginals.address(),
            numbers: of_numbers.address(),
            value: of_value.address(),
            m,
            n,
            k,
            parts: bands * strips,
            kappa: self.kappa,
            gamma: self.gamma,
            empty: self.empty,
            factor: self.factor,
        };
        let kernel = typed("spatial_value", of_value.dtype)?;
        gpu.launch(Module::Spatial, &kernel, Grid::line(1, THREADS)?, &args)?;
        Ok((value, Seen { marginals, numbers }))
    }

    pub(super) fn gpu_slope(
        &self,
        gpu: &Gpu,
        w: &Tensor,
        seen: &Seen,
        scale: Option<&Tensor>,
    ) -> Result<Tensor> {
        /// Elements of a thread.
        const EACH: usize = 4;
        let shape = Shape::of(w);
        let out = gpu.tensor(w.shape(), w.dtype())?;
        let scale = scale.map(Tensor::contiguous).transpose()?;
        let of_scale = scale.as_ref().map(|scale| gpu.operand(scale, NAME)).transpose()?;
        let (of_w, of_out) = (gpu.operand(w, NAME)?, gpu.operand(&out, NAME)?);
        let (marginals, numbers) = (gpu.operand(&seen.marginals, NAME)?, gpu.operand(&seen.numbers, NAME)?);
        let args = GradientArgs {
            w: of_w.address(),
            marginals: marginals.address(),
            numbers: numbers.address(),
            scale: of_scale.as_ref().map_or(0, Operand::address),
            out: of_out.address(),
            m: shape.m as u64,
            n: shape.n as u64,
            k: shape.k as u64,
            kappa: self.kappa,
            gamma: self.gamma,
            factor: self.factor,
            exact: u64::from(self.exact),
        };
        let grid = Grid::line(of_w.len.div_ceil(THREADS as usize * EACH), THREADS)?;
        gpu.launch(Module::Spatial, &typed("spatial_gradient", w.dtype())?, grid, &args)?;
        Ok(out)
    }
}
