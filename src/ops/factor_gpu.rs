//! Second moments on a GPU, averaged as they are written: what the kernels of `kernels/factor.cuh` are given.

use candle_core::{DType, Result, Tensor, bail};

use super::factor::Average;
use super::factor_tiles::{Precision, Tile, splits};
use super::patches::ConvShape;
use super::patches_gpu::{Divisor, gpu_patches};
use super::record::record_shape;
use crate::gpu::{Gpu, Grid, Module, Operand, args};

args! {
    /// A matrix of rows: see `kernels/tiles.cuh`.
    struct Rows {
        x: u64,
        count: u64,
        step: u64,
        group_step: u32,
        dim: u32,
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

args! {
    /// The argument of the kernels in `factor.cuh`.
    struct FactorArgs {
        rows: Rows,
        bar: u64,
        out: u64,
        partial: u64,
        decay: f64,
        weight: f64,
        split_rows: u64,
        splits: u32,
        groups: u32,
        tiles: u32,
        one: u32,
    }
}

/// [`second_moment_into`](super::factor::second_moment_into) on a GPU.
pub(super) fn gpu_second_moment(
    gpu: &Gpu,
    x: &Tensor,
    groups: usize,
    append_one: bool,
    average: Average,
    precision: Precision,
    name: &str,
) -> Result<Tensor> {
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
        return gpu_patch_moment(gpu, &columns, n, &shape, append_one, average, precision, name);
    }
    let x = x.detach().contiguous()?;
    let operand = gpu.operand(&x, name)?;
    let rows = Rows {
        x: operand.address(),
        count: (n * t) as u64,
        step: (groups * dim) as u64,
        group_step: fit(dim, name)?,
        dim: fit(dim, name)?,
        wide: wide(&operand, dim),
        unused: 0,
        positions: Divisor::new(1, name)?,
        out_width: Divisor::new(1, name)?,
        image: [1; 2],
        kernel: [1; 2],
        stride: [1; 2],
        padding: [0; 2],
        dilation: [1; 2],
    };
    launch(gpu, &operand, rows, "rows", groups, append_one, average, precision, name)
}

/// [`patch_moment_into`](super::moment::patch_moment_into) on a GPU, for `x` that holds `n` images of the right size.
#[allow(clippy::too_many_arguments)]
pub(super) fn gpu_patch_moment(
    gpu: &Gpu,
    x: &Tensor,
    n: usize,
    shape: &ConvShape,
    append_one: bool,
    average: Average,
    precision: Precision,
    name: &str,
) -> Result<Tensor> {
    if shape.kernel.0 + shape.kernel.1 > 31 {
        let patches = gpu_patches(gpu, x, n, shape)?.transpose(1, 2)?;
        return gpu_second_moment(gpu, &patches, shape.groups, append_one, average, precision, name);
    }
    let x = x.detach().contiguous()?;
    let operand = gpu.operand(&x, name)?;
    let plain = shape.positions() == shape.input.0 * shape.input.1
        && (shape.kernel, shape.stride, shape.padding) == ((1, 1), (1, 1), (0, 0));
    let pair = |(y, x): (usize, usize)| Ok::<_, candle_core::Error>([fit(y, name)?, fit(x, name)?]);
    let (dim, area) = (shape.group_features(), shape.input.0 * shape.input.1);
    // The kernel counts the bytes of an image, and of what the padding adds to a plane, in 32 bits.
    let padded = (shape.input.0 + 2 * shape.padding.0) * (shape.input.1 + 2 * shape.padding.1);
    fit(shape.channels * area * x.dtype().size_in_bytes(), name)?;
    fit(padded * x.dtype().size_in_bytes(), name)?;
    let rows = Rows {
        x: operand.address(),
        count: (n * shape.positions()) as u64,
        step: (shape.channels * area) as u64,
        group_step: fit(shape.group_channels() * area, name)?,
        dim: fit(dim, name)?,
        wide: if plain { wide(&operand, shape.positions()) } else { 0 },
        unused: 0,
        positions: Divisor::new(shape.positions(), name)?,
        out_width: Divisor::new(shape.output.1, name)?,
        image: pair(shape.input)?,
        kernel: pair(shape.kernel)?,
        stride: pair(shape.stride)?,
        padding: pair(shape.padding)?,
        dilation: pair(shape.dilation)?,
    };
    launch(gpu, &operand, rows, "images", shape.groups, append_one, average, precision, name)
}

/// Whether 16 bytes can be read at once, where runs of `run` elements follow one another.
fn wide(x: &Operand, run: usize) -> u32 {
    let whole = (run * x.dtype.size_in_bytes()).is_multiple_of(16);
    u32::from(whole && x.address().is_multiple_of(16))
}

/// No size that a kernel counts in 32 bits may reach this.
const LARGEST: usize = 1 << 30;

fn fit(size: usize, name: &str) -> Result<u32> {
    if size >= LARGEST {
        bail!("{name}: a size of {size} found, expected less than {LARGEST} on a GPU")
    }
    Ok(size as u32)
}

#[allow(clippy::too_many_arguments)]
fn launch(
    gpu: &Gpu,
    x: &Operand,
    rows: Rows,
    kind: &str,
    groups: usize,
    append_one: bool,
    average: Average,
    precision: Precision,
    name: &str,
) -> Result<Tensor> {
    let dim = rows.dim as usize;
    let size = dim + usize::from(append_one);
    let dtype = if x.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let bar = average.bar.map(|bar| bar.detach().contiguous()).transpose()?;
    let out = gpu.tensor((groups, size, size), dtype)?;
    let target = gpu.operand(&out, name)?;
    let old = bar.as_ref().map(|bar| gpu.operand(bar, name)).transpose()?;

    let tile = Tile::of(x.dtype, precision, dim);
    let tiles = dim.div_ceil(tile.side);
    let blocks = groups * tiles * (tiles + 1) / 2;
    let turns = (rows.count as usize).div_ceil(tile.rows);
    let parts = splits(turns, blocks, gpu.multiprocessors()? * tile.resident);
    let split_rows = turns.div_ceil(parts).max(1) * tile.rows;
    let parts = (rows.count as usize).div_ceil(split_rows).max(1);
    fit(split_rows, name)?;
    let elements = blocks * tile.side * (tile.side + usize::from(append_one));
    let partial = if parts > 1 { Some(gpu.scratch((parts, elements), dtype)?) } else { None };
    let scratch = partial.as_ref().map(|partial| gpu.operand(partial, name)).transpose()?;
    let address = |operand: &Option<Operand>| operand.as_ref().map_or(0, Operand::address);

    let args = FactorArgs {
        rows,
        bar: address(&old),
        out: target.address(),
        partial: address(&scratch),
        decay: average.decay,
        weight: average.weight,
        split_rows: split_rows as u64,
        splits: parts as u32,
        groups: fit(groups, name)?,
        tiles: tiles as u32,
        one: u32::from(append_one),
    };
    let (module, input) = match (x.dtype, precision) {
        (DType::F32, Precision::Full) => (Module::FactorF32, "f32"),
        (DType::F32, Precision::Tf32) => (Module::FactorTf32, "tf32"),
        (DType::F16, _) => (Module::FactorF16, "f16"),
        (DType::BF16, _) => (Module::FactorBf16, "bf16"),
        (DType::F64, _) => (Module::FactorF64, "f64"),
        (other, _) => bail!("{name}: dtype {other:?} found, expected f32, f64, f16 or bf16"),
    };
    let grid = Grid::new([blocks, parts, 1], tile.threads)?;
    gpu.launch(module, &format!("factor_{input}_{kind}_{}", tile.side), grid, &args)?;
    if parts > 1 {
        let grid = Grid::line(elements.div_ceil(32), 256)?;
        gpu.launch(module, &format!("factor_{input}_merge_{}", tile.side), grid, &args)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::factor::{second_moment, second_moment_into};
    use crate::ops::moment::patch_moment_into;
    use crate::ops::patches::patches;
    use crate::ops::record::testing::{Values, group, record};
    use crate::ops::testing::{random, values};

    /// `weight sum x x^T + decay bar` by a loop in f64, with the sizes that the errors are relative to.
    fn exact(x: &Values, groups: usize, one: bool, bar: Option<&[f64]>) -> Vec<(f64, f64)> {
        let mut all = Vec::new();
        for g in 0..groups {
            let rows: Vec<_> = x.iter().flatten().map(|p| group(p, g, groups, one)).collect();
            let size = x.first().and_then(|x| x.first()).map_or(0, |p| p.len() / groups + usize::from(one));
            let sum = |i: usize, j: usize| rows.iter().map(|r| r[i] * r[j]).sum::<f64>();
            let diagonal: Vec<f64> = (0..size).map(|i| sum(i, i)).collect();
            for i in 0..size {
                for j in 0..size {
                    let (sum, scale) = (sum(i, j), (diagonal[i] * diagonal[j]).sqrt());
                    all.push(match bar {
                        Some(bar) => {
                            let bar = bar[(g * size + i) * size + j];
                            (WEIGHT * sum + DECAY * bar, WEIGHT * scale + bar.abs())
                        }
                        None => (sum, scale),
                    });
                }
            }
        }
        all
    }

    const DECAY: f64 = 0.75;
    const WEIGHT: f64 = 0.5;

    /// The largest error, relative to `sqrt(F_ii F_jj)`.
    fn error(found: &Tensor, exact: &[(f64, f64)]) -> Result<f64> {
        let found = values(found)?;
        assert_eq!(found.len(), exact.len());
        let errors = found.iter().zip(exact).map(|(found, (exact, scale))| {
            let error = (found - exact).abs() / scale;
            if found == exact {
                0.0
            } else if error.is_nan() {
                f64::INFINITY
            } else {
                error
            }
        });
        Ok(errors.fold(0.0, f64::max))
    }

    const KINDS: [(DType, Precision, f64); 5] = [
        (DType::F32, Precision::Full, 1e-6),
        (DType::F32, Precision::Tf32, 1e-3),
        (DType::F16, Precision::Full, 3e-6),
        (DType::BF16, Precision::Full, 3e-6),
        (DType::F64, Precision::Full, 1e-14),
    ];

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
                let (x, numbers) = record(n, t, d * groups, layout, dtype)?;
                let one = (layout + n + d) % 2 == 0;
                let what = format!("{n} {t} {d} {groups} {layout} {one} {dtype:?} {precision:?}");
                let size = d + usize::from(one);
                let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
                let bar = random(5, &[groups, size, size])?.to_dtype(wide)?;
                let bar = if layout == 0 { bar.transpose(1, 2)? } else { bar };
                let bar = (n % 2 == 0).then_some(&bar);
                let average = Average { bar, decay: DECAY, weight: bar.map_or(1.0, |_| WEIGHT) };
                let found = emulate(|| match Gpu::of(x.device()) {
                    Some(gpu) => gpu_second_moment(&gpu, &x, groups, one, average, precision, "x"),
                    None => average.add(second_moment(&x, groups, one, "x")?),
                })?;
                assert_eq!(found.dtype(), wide);
                let bar = bar.map(values).transpose()?;
                let error = error(&found, &exact(&numbers, groups, one, bar.as_deref()))?;
                assert!(error <= tolerance, "{what}: {error}");
                if bar.is_none() {
                    assert_eq!(values(&found)?, values(&found.transpose(1, 2)?)?, "{what}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn moments_of_patches() -> Result<()> {
        for (x, w, [stride, padding, dilation, groups]) in [
            ([3, 1, 9, 11], [5, 1, 5, 5], [1, 0, 1, 1]),
            ([2, 4, 9, 8], [6, 2, 3, 2], [2, 1, 1, 2]),
            ([2, 6, 10, 7], [6, 1, 3, 3], [1, 2, 2, 6]),
            ([40, 3, 5, 5], [4, 3, 1, 1], [1, 2, 1, 1]),
            ([2, 13, 4, 4], [4, 13, 3, 3], [3, 1, 1, 1]),
            ([9, 5, 4, 4], [4, 5, 1, 1], [1, 0, 1, 1]),
            ([2, 1, 1, 40], [1, 1, 1, 35], [1, 4, 1, 1]),
        ] {
            let pair = |v| (v, v);
            let shape = ConvShape::new("test", &x, &w, pair(stride), pair(padding), pair(dilation), groups)?;
            for (dtype, precision, tolerance) in KINDS {
                let x = random(0, &x)?.to_dtype(dtype)?;
                let rows = patches(&x.to_dtype(DType::F64)?, &shape)?.contiguous()?.to_vec3()?;
                let one = dtype != DType::F64;
                let size = shape.group_features() + usize::from(one);
                let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
                let bar = random(5, &[groups, size, size])?.to_dtype(wide)?;
                let average = Average { bar: Some(&bar), decay: DECAY, weight: WEIGHT };
                let found = emulate(|| match Gpu::of(x.device()) {
                    Some(gpu) => gpu_patch_moment(&gpu, &x, x.dim(0)?, &shape, one, average, precision, "x"),
                    None => average.add(second_moment(&patches(&x, &shape)?, groups, one, "x")?),
                })?;
                let error = error(&found, &exact(&rows, groups, one, Some(&values(&bar)?)))?;
                assert!(error <= tolerance, "{shape:?} {dtype:?} {precision:?}: {error}");
            }
        }
        Ok(())
    }

    #[test]
    fn long_sums_of_one_sign_keep_their_precision() -> Result<()> {
        let x = (random(0, &[6000, 1, 3])?.abs()? + 0.5)?.to_dtype(DType::F32)?;
        let numbers = x.to_dtype(DType::F64)?.to_vec3()?;
        let found = emulate(|| second_moment(&x, 1, true, "x"))?;
        let error = error(&found, &exact(&numbers, 1, true, None))?;
        assert!(error <= 1e-6, "{error}");
        Ok(())
    }

    #[test]
    fn nothing_and_too_much() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &candle_core::Device::Cpu);
        let bar = (zeros(&[2, 3, 3])? + 1.0)?;
        for empty in [zeros(&[0, 3, 4])?, zeros(&[3, 0, 4])?] {
            let found = emulate(|| second_moment_into(Some(&bar), &empty, 2, true, 0.5, 1.0, "x"))?;
            assert_eq!(values(&found)?, [0.5; 18]);
        }
        let shape = ConvShape::new("test", &[0, 2, 4, 4], &[2, 2, 3, 3], (1, 1), (1, 1), (1, 1), 1)?;
        let found =
            emulate(|| patch_moment_into(None, &zeros(&[0, 2, 4, 4])?, &shape, false, 0.5, 1.0, "x"))?;
        assert_eq!(values(&found)?, [0.0; 324]);
        for (bar, place) in [(zeros(&[2, 2, 2])?, "[2, 2, 2]"), (bar.to_dtype(DType::F64)?, "F64")] {
            for on_gpu in [false, true] {
                let run = || second_moment_into(Some(&bar), &zeros(&[1, 3, 4])?, 2, true, 0.5, 1.0, "conv1");
                let result = if on_gpu { emulate(run) } else { run() };
                let message = result.expect_err("must fail").to_string();
                assert!(message.contains("conv1") && message.contains(place), "{message}");
            }
        }
        Ok(())
    }

    #[test]
    fn averages_on_the_cpu_too() -> Result<()> {
        let x = random(0, &[5, 2, 6])?;
        let bar = random(1, &[2, 3, 3])?;
        let found = second_moment_into(Some(&bar), &x, 2, false, DECAY, WEIGHT, "x")?;
        let exact = exact(&x.to_vec3()?, 2, false, Some(&values(&bar)?));
        assert!(error(&found, &exact)? < 1e-14);
        Ok(())
    }
}
