//! What a device's decompositions need around the library that does them: scaling, triangles, and the check of a result by
//! one vector; and the inverses of small matrices. On the host `host.rs` has the same.
use candle_core::{DType, Result, Tensor};

use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

/// Up to this size a matrix is inverted within one block of threads.
pub(super) const SMALL: usize = 64;

const THREADS: u32 = 256;
const WARP: usize = 32;

args! {
    struct LargestArgs { m: u64, partial: u64, size: u64, groups: u32, parts: u32 }
}
args! {
    struct ScaleArgs { partial: u64, scale: u64, groups: u32, parts: u32 }
}
args! {
    struct MirrorArgs { m: u64, out: u64, scale: u64, groups: u32, dim: u32, zero: u32, pad: u32 }
}
args! {
    struct TimesArgs { m: u64, x: u64, weights: u64, y: u64, groups: u32, dim: u32 }
}
args! {
    struct JudgeArgs {
        verdict: u64,
        scale: u64,
        info: u64,
        later_info: u64,
        p: u64,
        q: u64,
        r: u64,
        values: u64,
        groups: u32,
        dim: u32,
    }
}
args! {
    struct SmallArgs { m: u64, out: u64, info: u64, groups: u32, dim: u32 }
}

/// Square matrices `[groups, dim, dim]` of f32 or f64 on a device.
#[derive(Clone)]
pub(super) struct Spd<'a> {
    gpu: &'a Gpu,
    m: &'a Tensor,
    groups: usize,
    dim: usize,
}

impl<'a> Spd<'a> {
    /// `m` has to be contiguous.
    pub fn new(gpu: &'a Gpu, m: &'a Tensor) -> Result<Self> {
        let (groups, dim, _) = m.dims3()?;
        Ok(Self { gpu, m, groups, dim })
    }

    fn launch<A: crate::gpu::Args>(&self, kernel: &str, blocks: usize, args: &A) -> Result<()> {
        // The kernels' blocks take one task after the other.
        let grid = Grid::line(blocks.min(1 << 20), THREADS)?;
        self.gpu.launch(Module::Spd, &typed(kernel, self.m.dtype())?, grid, args)
    }

    /// The largest number of each matrix in size, `[groups]` f64: 1 for a zero matrix, infinite where one is not finite.
    pub fn scale(&self) -> Result<Tensor> {
        let size = self.dim * self.dim;
        let parts = size.div_ceil(THREADS as usize * 16).clamp(1, 128);
        let partial = self.gpu.tensor((self.groups, parts), DType::F64)?;
        let scale = self.gpu.tensor(self.groups, DType::F64)?;
        let [m, partial, out] = self.operands([self.m, &partial, &scale])?;
        let (groups, parts) = (self.groups as u32, parts as u32);
        let args =
            LargestArgs { m: m.address(), partial: partial.address(), size: size as u64, groups, parts };
        self.launch("largest", self.groups * parts as usize, &args)?;
        let args = ScaleArgs { partial: partial.address(), scale: out.address(), groups, parts };
        let grid = Grid::line(self.groups.div_ceil(THREADS as usize), THREADS)?;
        self.gpu.launch(Module::Spd, "spd_scale", grid, &args)?;
        Ok(scale)
    }

    /// A copy whose upper triangles mirror the lower ones, or are zero; divided by `scale` `[groups]` if there is one, and the
    /// identity where that is infinite.
    pub fn mirrored(&self, scale: Option<&Tensor>, zero: bool) -> Result<Tensor> {
        let target = self.gpu.tensor(self.m.shape(), self.m.dtype())?;
        let [m, out] = self.operands([self.m, &target])?;
        let scale = self.optional(scale)?;
        let args = MirrorArgs {
            m: m.address(),
            out: out.address(),
            scale: address(&scale),
            groups: self.groups as u32,
            dim: self.dim as u32,
            zero: u32::from(zero),
            pad: 0,
        };
        self.launch("mirror", self.groups * self.dim.div_ceil(WARP).pow(2), &args)?;
        Ok(target)
    }

    /// `m (weights x)`, `[groups, dim]` f64; `x` is f64 or the probe, `weights` of the matrix's dtype or 1.
    pub fn times(&self, x: Option<&Tensor>, weights: Option<&Tensor>) -> Result<Tensor> {
        self.product("times", self.groups * self.dim.div_ceil(8), x, weights)
    }

    /// `m^T (weights x)`, likewise.
    pub fn turned(&self, x: Option<&Tensor>, weights: Option<&Tensor>) -> Result<Tensor> {
        self.product("turned", self.groups * self.dim.div_ceil(WARP), x, weights)
    }

    fn product(
        &self,
        kernel: &str,
        blocks: usize,
        x: Option<&Tensor>,
        weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        let target = self.gpu.tensor((self.groups, self.dim), DType::F64)?;
        let [m, y] = self.operands([self.m, &target])?;
        let (x, weights) = (self.optional(x)?, self.optional(weights)?);
        let args = TimesArgs {
            m: m.address(),
            x: address(&x),
            weights: address(&weights),
            y: y.address(),
            groups: self.groups as u32,
            dim: self.dim as u32,
        };
        self.launch(kernel, blocks, &args)?;
        Ok(target)
    }

    /// What is known of a decomposition of these matrices, `[groups, 4]` f64: the scale, the first of the library's codes
    /// that is not 0, the drift and the residual; see [`Evidence`].
    pub fn verdict(&self, scale: &Tensor, evidence: &Evidence<'_>) -> Result<Tensor> {
        let target = self.gpu.tensor((self.groups, 4), DType::F64)?;
        let [verdict, scale] = self.operands([&target, scale])?;
        let Evidence { info, p, q, r, values } = *evidence;
        let [info, later_info, p, q, r, values] = [info[0], info[1], p, q, r, values];
        let given = [info, later_info, p, q, r, values].map(|tensor| self.optional(tensor));
        let [info, later_info, p, q, r, values] = given;
        let (info, later_info, p, q, r, values) = (info?, later_info?, p?, q?, r?, values?);
        let args = JudgeArgs {
            verdict: verdict.address(),
            scale: scale.address(),
            info: address(&info),
            later_info: address(&later_info),
            p: address(&p),
            q: address(&q),
            r: address(&r),
            values: address(&values),
            groups: self.groups as u32,
            dim: self.dim as u32,
        };
        self.launch("judge", self.groups, &args)?;
        Ok(target)
    }

    /// The inverses of positive definite matrices of at most [`SMALL`] rows, exactly symmetric, and for each group 0 or one
    /// more than the first pivot that is not positive. Only lower triangles are read.
    pub fn small_inverse(&self) -> Result<(Tensor, Tensor)> {
        if self.dim > SMALL {
            candle_core::bail!("small_inverse: expected at most {SMALL} rows, got {}", self.dim)
        }
        let target = self.gpu.tensor(self.m.shape(), self.m.dtype())?;
        let codes = self.gpu.tensor(self.groups, DType::U32)?;
        let [m, out, info] = self.operands([self.m, &target, &codes])?;
        let args = SmallArgs {
            m: m.address(),
            out: out.address(),
            info: info.address(),
            groups: self.groups as u32,
            dim: self.dim as u32,
        };
        self.launch("small_inverse", self.groups, &args)?;
        Ok((target, codes))
    }

    fn operands<const N: usize>(&self, tensors: [&Tensor; N]) -> Result<[Operand; N]> {
        let found = tensors.map(|tensor| self.gpu.operand(tensor, "decomposition"));
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;
        found.try_into().map_err(|_| candle_core::Error::Msg(format!("expected {N} operands")))
    }

    fn optional(&self, tensor: Option<&Tensor>) -> Result<Option<Operand>> {
        tensor.map(|tensor| self.gpu.operand(tensor, "decomposition")).transpose()
    }
}

fn address(operand: &Option<Operand>) -> u64 {
    operand.as_ref().map_or(0, Operand::address)
}

/// What a decomposition is judged by; vectors are `[groups, dim]` f64.
#[derive(Default)]
pub(super) struct Evidence<'a> {
    /// The library's codes, `[groups]` of 32 bits, 0 where all went well.
    pub info: [Option<&'a Tensor>; 2],
    /// Should be the probe `z`: the drift is `|p - z| / sqrt(dim)`.
    pub p: Option<&'a Tensor>,
    /// Should be `r`: the residual is `|q - r| / (sqrt(dim) max |values|)`.
    pub q: Option<&'a Tensor>,
    /// Divided by the scale if there are values. None stands for `values z`.
    pub r: Option<&'a Tensor>,
    /// In the matrix's dtype; none for 1.
    pub values: Option<&'a Tensor>,
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::linalg::host::{probe, times, transpose_times};
    use crate::linalg::testing::{max_abs, random_symmetric};

    #[test]
    fn kernels_agree_with_the_host() -> Result<()> {
        for (g, d) in [(1, 1), (3, 2), (2, 31), (1, 33), (2, 64), (1, 97)] {
            for dtype in [DType::F32, DType::F64] {
                let cpu = &Device::Cpu;
                let lower = Tensor::tril2(d, dtype, cpu)?.unsqueeze(0)?;
                let symmetric = (random_symmetric(g, d, 1)? * 7.0)?.to_dtype(dtype)?;
                let noise = random_symmetric(g, d, 2)?.to_dtype(dtype)?;
                let m = (&symmetric + noise.broadcast_mul(&lower.affine(-1.0, 1.0)?)?)?;
                let weights = noise.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
                emulate(|| -> Result<()> {
                    let Some(gpu) = Gpu::emulated() else { return Ok(()) };
                    let m64 = m.to_dtype(DType::F64)?.flatten_from(1)?;
                    let spd = Spd::new(&gpu, &m)?;
                    let scale = spd.scale()?;
                    let scales = scale.to_vec1::<f64>()?;
                    assert_eq!(scales, m64.abs()?.max(1)?.to_vec1::<f64>()?);
                    assert_eq!(max_abs(&(spd.mirrored(None, false)? - &symmetric)?)?, 0.0);
                    let zeroed = symmetric.broadcast_mul(&lower)?;
                    assert_eq!(max_abs(&(spd.mirrored(None, true)? - zeroed)?)?, 0.0);
                    let divided = symmetric.broadcast_div(&scale.to_dtype(dtype)?.reshape((g, 1, 1))?)?;
                    assert_eq!(max_abs(&(spd.mirrored(Some(&scale), false)? - divided)?)?, 0.0);

                    let once = spd.times(None, None)?;
                    let found = [
                        once.to_vec2::<f64>()?,
                        spd.times(Some(&once), Some(&weights))?.to_vec2()?,
                        spd.turned(None, None)?.to_vec2()?,
                        spd.turned(Some(&once), Some(&weights))?.to_vec2()?,
                    ];
                    let weights = weights.to_dtype(DType::F64)?.to_vec2::<f64>()?;
                    for (group, m) in m64.to_vec2::<f64>()?.into_iter().enumerate() {
                        let z = probe(d);
                        let weighted: Vec<f64> =
                            found[0][group].iter().zip(&weights[group]).map(|(x, w)| x * w).collect();
                        let exact = [
                            times(&m, &z),
                            times(&m, &weighted),
                            transpose_times(&m, &z),
                            transpose_times(&m, &weighted),
                        ];
                        for (found, exact) in found.iter().map(|all| &all[group]).zip(exact) {
                            for (found, exact) in found.iter().zip(exact) {
                                assert!(
                                    (found - exact).abs() < 1e-10 * (1.0 + exact.abs()),
                                    "{found} {exact}"
                                );
                            }
                        }
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}
