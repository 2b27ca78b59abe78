//! Layer normalization on a GPU (`kernels/norm.cu`).

use candle_core::{DType, Result, Storage, Tensor};

use super::norm::Norm;
use super::row_launch::{THREADS, a_few_teams, a_team_each};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

args! {
    /// The argument of `norm` in `norm.cu`.
    struct NormArgs {
        x: u64, weight: u64, bias: u64, y: u64, rows: u64, d: u64, eps: f64, center: u32, block: u32,
    }
}

args! {
    /// The argument of `norm_gradient` in `norm.cu`.
    struct NormGradientArgs {
        x: u64, weight: u64, gy: u64, gx: u64, sums: u64, rows: u64, d: u64, eps: f64, center: u32, block: u32,
    }
}

args! {
    /// The argument of `norm_columns` in `norm.cu`.
    struct NormColumnArgs { sums: u64, gw: u64, gb: u64, parts: u64, d: u64 }
}

impl Norm {
    pub(super) fn gpu_forward(
        &self,
        gpu: &Gpu,
        x: &Operand,
        weight: &Operand,
        bias: Option<&Operand>,
    ) -> Result<Storage> {
        let out = gpu.storage(x.len, x.dtype)?;
        let y = gpu.of_storage(&out, x.len, self.name)?;
        let d = weight.len;
        let rows = x.len / d;
        let (grid, block) = a_team_each(rows, d, x.dtype)?;
        let args = NormArgs {
            x: x.address(),
            weight: weight.address(),
            bias: bias.map_or(0, Operand::address),
            y: y.address(),
            rows: rows as u64,
            d: d as u64,
            eps: self.eps,
            center: self.center.into(),
            block,
        };
        gpu.launch(Module::Norm, &typed("norm", x.dtype)?, grid, &args)?;
        Ok(out)
    }

    pub(super) fn gpu_gradients(
        &self,
        gpu: &Gpu,
        x: &Tensor,
        weight: &Tensor,
        gy: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let dtype = x.dtype();
        let (d, wide) = (weight.elem_count(), if dtype == DType::F64 { dtype } else { DType::F32 });
        let rows = x.elem_count() / d;
        let (grid, block) = a_few_teams(rows, d, dtype)?;
        let parts = grid.blocks[0] as usize;
        let (gx, sums) = (gpu.tensor(x.shape(), dtype)?, gpu.tensor((parts, 2, d), wide)?);
        let (gw, gb) = (gpu.tensor(d, dtype)?, gpu.tensor(d, dtype)?);
        let (x, weight, gy) = (x.contiguous()?, weight.contiguous()?, gy.contiguous()?);
        let operand = |t: &Tensor| gpu.operand(t, self.name);
        let (of_x, of_weight, of_gy) = (operand(&x)?, operand(&weight)?, operand(&gy)?);
        let (of_gx, of_sums, of_gw, of_gb) = (operand(&gx)?, operand(&sums)?, operand(&gw)?, operand(&gb)?);
        let args = NormGradientArgs {
            x: of_x.address(),
            weight: of_weight.address(),
            gy: of_gy.address(),
            gx: of_gx.address(),
            sums: of_sums.address(),
            rows: rows as u64,
            d: d as u64,
            eps: self.eps,
            center: self.center.into(),
            block,
        };
        gpu.launch(Module::Norm, &typed("norm_gradient", dtype)?, grid, &args)?;
        let args = NormColumnArgs {
            sums: of_sums.address(),
            gw: of_gw.address(),
            gb: of_gb.address(),
            parts: parts as u64,
            d: d as u64,
        };
        let grid = Grid::line((2 * d).div_ceil(32), THREADS)?;
        gpu.launch(Module::Norm, &typed("norm_columns", dtype)?, grid, &args)?;
        Ok([Some(gx), Some(gw), Some(gb)])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::norm::rms_norm;
    use crate::ops::testing::{assert_close, random, values};

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        let run = |dims: [usize; 2], dtype: DType, center: bool, with_bias: bool| -> Result<Vec<Vec<f64>>> {
            let make = |stream, dims: &[usize]| Var::from_tensor(&random(stream, dims)?.to_dtype(dtype)?);
            let (x, w, b) = (make(0, &dims)?, make(1, &dims[1..])?, make(2, &dims[1..])?);
            let c = random(3, &dims)?.to_dtype(dtype)?;
            let norm = Norm { name: "norm", center, eps: 1e-3 };
            let y = norm.apply(&x, &w, with_bias.then_some(b.as_tensor()))?;
            let grads = y.mul(&c)?.sum_all()?.backward()?;
            let found = [Some(&y), grads.get(&x), grads.get(&w), grads.get(&b)];
            found.into_iter().flatten().map(values).collect()
        };
        let few = [
            ([0, 3], DType::F32),
            ([9, 768], DType::BF16),
            ([35, 1025], DType::F32),
            ([3, 4099], DType::F32),
            ([2, 4099], DType::F16),
            ([1, 2501], DType::F64),
        ];
        let widths = [1, 3, 31, 33, 127, 512, 1000];
        let all = widths.into_iter().flat_map(|d| {
            [DType::F32, DType::F64, DType::F16, DType::BF16]
                .map(|dtype| ([if d < 100 { 70 } else { 9 }, d], dtype))
        });
        for (dims, dtype) in all.chain(few) {
            let tolerance = match dtype {
                DType::F64 => 1e-13,
                DType::F32 => 2e-6,
                DType::F16 => 2e-3,
                _ => 1e-2,
            };
            for (center, with_bias) in [(true, true), (false, false)] {
                let expected = run(dims, dtype, center, with_bias)?;
                let found = emulate(|| run(dims, dtype, center, with_bias))?;
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(&expected) {
                    assert_close(&Tensor::new(&found[..], &Device::Cpu)?, expected, tolerance);
                }
            }
        }
        let bad = Tensor::new(&[[1f32, f32::NAN], [1., 2.]], &Device::Cpu)?;
        let y = values(&emulate(|| rms_norm(&bad, &Tensor::ones(2, DType::F32, &Device::Cpu)?, 1e-5))?)?;
        assert!(y[0].is_nan() && y[1].is_nan() && y[2..].iter().all(|v| v.is_finite()));
        Ok(())
    }
}
