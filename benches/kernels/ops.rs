//! Single operations, and the ceilings that they are held against.

use super::report::{Report, Work};
use super::timing::{Times, time};
use super::{Options, grouped};
use candle_core::{DType, Device, Result, Tensor, Var, bail, cuda};
use kronwake::linalg::{
    cholesky::inverse_spd,
    eigh::eigh,
    newton::{NewtonOptions, newton_inverse},
};
use kronwake::ops::factor::{averaged_second_moment, patch_moment, second_moment};
use kronwake::ops::patches::{ConvShape, patches};
use kronwake::ops::sample::{DrawKey, categorical};
use kronwake::ops::{dense, norm, pool, softmax};
use kronwake::penalty::{GroupLasso, Grouping, Lp, Penalty, Spatial};

/// Measures the operations that are asked for. What fails is reported, and the rest goes on.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    type Part = fn(&Options, &mut Report) -> Result<()>;
    let parts: [(&str, Part); 12] = [
        ("ceilings", ceilings),
        ("second_moment", second_moments),
        ("patch_moment", patch_moments),
        ("grouped products", grouped::measure),
        ("mix", mixes),
        ("softmax", softmaxes),
        ("layer_norm", layer_norms),
        ("max_pool2d", pools),
        ("penalty", penalties),
        ("sample", samples),
        ("eigh", decompositions),
        ("inverse", inverses),
    ];
    for (name, part) in parts {
        if options.wants(name) {
            if let Err(error) = part(options, report) {
                report.failed(name, &error);
            }
            report.write()?;
        }
    }
    Ok(())
}

/// Random numbers of a dtype, generated in f32: a device may lack the generator of the others.
pub fn random(device: &Device, dtype: DType, dims: &[usize]) -> Result<Tensor> {
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    Tensor::zeros(dims, wide, device)?.randn_like(0.0, 1.0)?.to_dtype(dtype)
}

fn run(options: &Options, mut f: impl FnMut() -> Result<Tensor>) -> Result<Times> {
    time(&options.device, options.quick, &mut || f().map(drop))
}

pub fn bytes(t: &Tensor) -> f64 {
    (t.elem_count() * t.dtype().size_in_bytes()) as f64
}

/// A dtype as it is reported.
pub fn named(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "f64",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Kinds of products: a name, a dtype, and whether products of f32 may round their operands to TF32.
fn products(options: &Options) -> Vec<(&'static str, DType, bool)> {
    let mut kinds: Vec<_> =
        narrow_dtypes(options).into_iter().map(|dtype| (named(dtype), dtype, false)).collect();
    if !options.device.is_cpu() {
        kinds.insert(1, ("tf32", DType::F32, true));
    }
    kinds
}

/// Runs `f` for each of them.
fn with_products(options: &Options, mut f: impl FnMut(&'static str, DType) -> Result<()>) -> Result<()> {
    for (name, dtype, reduced) in products(options) {
        cuda::set_gemm_reduced_precision_f32(reduced);
        let outcome = f(name, dtype);
        cuda::set_gemm_reduced_precision_f32(false);
        outcome?;
    }
    Ok(())
}

/// Sizes for a GPU, for a CPU, and to see that it runs.
pub fn pick<T: Copy>(options: &Options, gpu: &[T], cpu: &[T], quick: &[T]) -> Vec<T> {
    match (options.quick, options.device.is_cpu()) {
        (true, _) => quick.to_vec(),
        (_, true) => cpu.to_vec(),
        _ => gpu.to_vec(),
    }
}

fn narrow_dtypes(options: &Options) -> Vec<DType> {
    pick(options, &[DType::F32, DType::BF16, DType::F16], &[DType::F32], &[DType::F32, DType::BF16])
}

fn ceilings(options: &Options, report: &mut Report) -> Result<()> {
    let device = &options.device;
    let elements = pick(options, &[1usize << 28], &[1 << 25], &[1 << 20])[0];
    let x = Tensor::zeros(elements, DType::F32, device)?;
    let times = run(options, || x.copy())?;
    report.ceiling_copy(2.0 * bytes(&x) / times.median);
    let d = pick(options, &[8192usize], &[1024], &[128])[0];
    let cpu = device.is_cpu();
    let kinds: &[(&str, DType, bool)] = &[
        ("f32", DType::F32, false),
        ("tf32", DType::F32, true),
        ("bf16", DType::BF16, false),
        ("f16", DType::F16, false),
        ("f64", DType::F64, false),
    ];
    // candle's CPU has no TF32, and its half types are no ceiling of anything.
    for &(name, dtype, reduced) in kinds.iter().filter(|kind| !cpu || ["f32", "f64"].contains(&kind.0)) {
        let (a, b) = (random(device, dtype, &[d, d])?, random(device, dtype, &[d, d])?);
        cuda::set_gemm_reduced_precision_f32(reduced);
        let times = run(options, || if cpu { dense::product(&a, &b) } else { a.matmul(&b) });
        cuda::set_gemm_reduced_precision_f32(false);
        report.ceiling_product(name, 2.0 * (d as f64).powi(3) / times?.median);
    }
    Ok(())
}

fn second_moments(options: &Options, report: &mut Report) -> Result<()> {
    let rows: &[usize] = &[256, 4096, 65_536];
    let widths = pick(options, &[64usize, 256, 1024, 4096], &[64, 256, 1024], &[64]);
    with_products(options, |arithmetic, dtype| {
        for &d in &widths {
            // The most rows first: there is most to gain, and little time.
            for &n in if options.quick { &rows[..1] } else { rows }.iter().rev() {
                if options.device.is_cpu() && n * d * d > 1 << 34 {
                    continue;
                }
                let x = random(&options.device, dtype, &[n, 1, d])?;
                let bar = Tensor::zeros((1, d, d), DType::F32, &options.device)?;
                let times = run(options, || averaged_second_moment(&bar, 0.9, &x, 1, false, "bench"))?;
                let (flat, bar) = (x.reshape((n, d))?, bar.squeeze(0)?);
                let baseline = product_and_average(options, &flat, &bar, arithmetic == "tf32")?;
                // One triangle is computed, both are read and written.
                let flops = n as f64 * d as f64 * (d as f64 + 1.0);
                let work = Work { bytes: bytes(&x) + 2.0 * bytes(&bar), flops };
                report.kernel(
                    "second_moment",
                    &format!("[{n}, {d}]"),
                    arithmetic,
                    work,
                    times,
                    Some(baseline),
                );
            }
        }
        Ok(())
    })
}

/// The best that others' products give: on a GPU cuBLAS's, which adds up in f32 and to the average that is there; else candle's, and the
/// average after it.
fn product_and_average(
    options: &Options,
    x: &Tensor,
    bar: &Tensor,
    tf32: bool,
) -> Result<(&'static str, Times)> {
    #[cfg(feature = "cuda")]
    if options.device.is_cuda() {
        let times = time(&options.device, options.quick, &mut || super::blas::average(x, bar, 0.9, tf32))?;
        return Ok(("GemmEx", times));
    }
    let _ = tf32;
    let times = run(options, || (bar * 0.9)? + (x.t()?.matmul(x)? * 0.1)?)?;
    Ok(("product and average", times))
}

/// Images `[n, c, side, side]` under kernels of `k x k`, padded to keep their size.
const CONVOLUTIONS: [(usize, usize, usize, usize); 4] =
    [(512, 1, 28, 5), (512, 6, 14, 5), (128, 64, 32, 3), (64, 256, 14, 3)];

fn patch_moments(options: &Options, report: &mut Report) -> Result<()> {
    let shapes = pick(options, &CONVOLUTIONS, &CONVOLUTIONS[..2], &[(4, 3, 8, 3)]);
    with_products(options, |arithmetic, dtype| {
        for &(n, c, side, k) in &shapes {
            let x = random(&options.device, dtype, &[n, c, side, side])?;
            let pad = (k / 2, k / 2);
            let shape = ConvShape::new("bench", x.dims(), &[8, c, k, k], (1, 1), pad, (1, 1), 1)?;
            let times = run(options, || patch_moment(&x, &shape, true, "bench"))?;
            let composed =
                run(options, || second_moment(&patches(&x, &shape)?.contiguous()?, 1, true, "bench"))?;
            let d = (c * k * k + 1) as f64;
            let flops = (n * side * side) as f64 * d * (d + 1.0);
            let work = Work { bytes: bytes(&x) + 4.0 * d * d, flops };
            let name = format!("[{n}, {c}, {side}, {side}], {k} x {k}");
            report.kernel(
                "patch_moment",
                &name,
                arithmetic,
                work,
                times,
                Some(("patches, stored", composed)),
            );
        }
        Ok(())
    })
}

fn mixes(options: &Options, report: &mut Report) -> Result<()> {
    for dtype in narrow_dtypes(options) {
        for n in pick(options, &[1usize << 16, 1 << 20, 1 << 27], &[1 << 16, 1 << 24], &[1 << 12]) {
            let (a, b) = (random(&options.device, dtype, &[n])?, random(&options.device, dtype, &[n])?);
            let times = run(options, || dense::mix(&a, 0.9, &b, 0.1))?;
            let composed = run(options, || (&a * 0.9)? + (&b * 0.1)?)?;
            let work = Work { bytes: 3.0 * bytes(&a), flops: 3.0 * n as f64 };
            report.kernel("mix", &format!("[{n}]"), named(dtype), work, times, Some(("candle", composed)));
        }
    }
    Ok(())
}

/// Measures the value of `f` at `x`, and its gradient. `passes` are how often a tensor of the size of `x` is read or written
/// for the value, and in the backward pass.
fn both_ways(
    options: &Options,
    report: &mut Report,
    name: &str,
    x: &Tensor,
    passes: (f64, f64),
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let shape = format!("{:?}", x.dims());
    let times = run(options, || f(x))?;
    let forward = Work { bytes: passes.0 * bytes(x), flops: 0.0 };
    report.kernel(name, &shape, named(x.dtype()), forward, times, None);
    let backward = |var: &Var, y: &Tensor| -> Result<Times> {
        let root = y.sum_all()?;
        run(options, || match root.backward()?.get(var) {
            Some(grad) => Ok(grad.clone()),
            None => bail!("{name}: no gradient"),
        })
    };
    let var = Var::from_tensor(x)?;
    let y = f(&var)?;
    let all = backward(&var, &y)?;
    // Candle adds every gradient to a tensor of zeros. What that costs for `x` and for `y` is measured apart and taken off.
    let at_x = backward(&var, &var)?;
    let like_y = Var::from_tensor(&y.detach())?;
    let at_y = backward(&like_y, &like_y)?;
    let net = |all: f64, x: f64, y: f64| (all - x - y).max(0.05 * all);
    let times = Times {
        median: net(all.median, at_x.median, at_y.median),
        least: net(all.least, at_x.least, at_y.least),
    };
    let work = Work { bytes: passes.1 * bytes(x), flops: 0.0 };
    report.kernel(&format!("{name}, backward"), &shape, named(x.dtype()), work, times, None);
    Ok(())
}

fn rows_of(options: &Options) -> Vec<[usize; 2]> {
    pick(
        options,
        &[[512, 10], [16_384, 768], [4096, 4096], [2048, 50_257]],
        &[[512, 10], [4096, 768]],
        &[[16, 33]],
    )
}

fn softmaxes(options: &Options, report: &mut Report) -> Result<()> {
    for dtype in narrow_dtypes(options) {
        for dims in rows_of(options) {
            let x = random(&options.device, dtype, &dims)?;
            both_ways(options, report, "softmax", &x, (2.0, 3.0), &softmax::softmax_last_dim)?;
            both_ways(options, report, "log_softmax", &x, (2.0, 3.0), &softmax::log_softmax_last_dim)?;
            let labels = Tensor::zeros(dims[0], DType::U32, &options.device)?;
            both_ways(options, report, "cross_entropy", &x, (1.0, 2.0), &|x| {
                softmax::cross_entropy(x, &labels)
            })?;
        }
    }
    Ok(())
}

fn layer_norms(options: &Options, report: &mut Report) -> Result<()> {
    for dtype in narrow_dtypes(options) {
        for dims in rows_of(options) {
            let x = random(&options.device, dtype, &dims)?;
            let (weight, bias) = (x.get(0)?.contiguous()?, x.get(1)?.contiguous()?);
            let (weight, bias) = (Var::from_tensor(&weight)?, Var::from_tensor(&bias)?);
            both_ways(options, report, "layer_norm", &x, (2.0, 3.0), &|x| {
                norm::layer_norm(x, &weight, Some(bias.as_tensor()), 1e-5)
            })?;
        }
    }
    Ok(())
}

fn pools(options: &Options, report: &mut Report) -> Result<()> {
    let shapes = pick(
        options,
        &[[512, 6, 28, 28], [128, 64, 112, 112]],
        &[[512, 6, 28, 28], [32, 16, 56, 56]],
        &[[2, 3, 8, 8]],
    );
    for dtype in narrow_dtypes(options) {
        for dims in &shapes {
            let x = random(&options.device, dtype, dims)?;
            // A quarter of the elements come out; backward reads them with the inputs and writes all gradients.
            both_ways(options, report, "max_pool2d", &x, (1.25, 2.25), &|x| {
                pool::max_pool2d(x, (2, 2), (2, 2))
            })?;
        }
    }
    Ok(())
}

fn penalties(options: &Options, report: &mut Report) -> Result<()> {
    let shapes = pick(
        options,
        &[&[300, 784][..], &[512, 512, 3, 3], &[4096, 4096]],
        &[&[300, 784], &[256, 256, 3, 3], &[2048, 2048]],
        &[&[16, 33]],
    );
    let lasso = |grouping| Box::new(GroupLasso { grouping, size_weighted: true });
    let all: [Box<dyn Penalty>; 4] = [
        Box::new(Lp::l1()),
        lasso(Grouping::Rows),
        lasso(Grouping::InputChannels),
        Box::new(Spatial::default()),
    ];
    for dtype in narrow_dtypes(options) {
        for dims in shapes.iter().copied() {
            let w = random(&options.device, dtype, dims)?;
            for (at, penalty) in all.iter().enumerate() {
                // The value reads the weights; the gradient and the proximal step's second pass read and write.
                both_ways(options, report, &penalty.name(), &w, (1.0, 2.0), &|w| penalty.value(w))?;
                if at < 3 {
                    let times = run(options, || penalty.prox(&w, 0.01))?;
                    let passes = if at == 0 { 2.0 } else { 3.0 };
                    let work = Work { bytes: passes * bytes(&w), flops: 0.0 };
                    let name = format!("{}, proximal step", penalty.name());
                    report.kernel(&name, &format!("{dims:?}"), named(dtype), work, times, None);
                }
            }
        }
    }
    Ok(())
}

fn samples(options: &Options, report: &mut Report) -> Result<()> {
    for dims in rows_of(options) {
        let x = random(&options.device, DType::F32, &dims)?;
        let times = time(&options.device, options.quick, &mut || {
            let key = DrawKey { seed: 1, ..DrawKey::default() };
            let _labels = categorical(&x, key)?;
            Ok(())
        })?;
        let work = Work { bytes: bytes(&x) + 4.0 * dims[0] as f64, flops: 0.0 };
        report.kernel("sample, categorical", &format!("{dims:?}"), "f32", work, times, None);
    }
    Ok(())
}

/// A positive definite `[groups, d, d]` of condition number about 10.
fn spd(options: &Options, groups: usize, d: usize) -> Result<Tensor> {
    let x = random(&options.device, DType::F32, &[2 * d, groups, d])?;
    let x = x.transpose(0, 1)?.contiguous()?;
    let m = (x.transpose(1, 2)?.contiguous()?.matmul(&x)? / (2 * d) as f64)?;
    m.broadcast_add(&(Tensor::eye(d, DType::F32, &options.device)? * 0.1)?)?.contiguous()
}

/// Groups and sizes of factors.
fn factor_sizes(options: &Options) -> Vec<(usize, usize)> {
    let all = [(1, 64), (32, 64), (1, 301), (1, 785), (1, 1024), (1, 3072)];
    pick(options, &all, &all[..4], &[(2, 16)])
}

fn decompositions(options: &Options, report: &mut Report) -> Result<()> {
    for (groups, d) in factor_sizes(options) {
        let m = spd(options, groups, d)?;
        let times = run(options, || Ok(eigh(&m, "bench")?.vectors))?;
        // Tridiagonal form, its decomposition, and the turn back: about 9 d^3.
        let flops = 9.0 * groups as f64 * (d as f64).powi(3);
        let work = Work { bytes: 2.0 * bytes(&m), flops };
        report.kernel("eigh", &format!("[{groups}, {d}, {d}]"), "f32", work, times, None);
    }
    Ok(())
}

fn inverses(options: &Options, report: &mut Report) -> Result<()> {
    for (groups, d) in factor_sizes(options) {
        let m = spd(options, groups, d)?;
        let cube = groups as f64 * (d as f64).powi(3);
        let shape = format!("[{groups}, {d}, {d}]");
        let times = run(options, || inverse_spd(&m, "bench"))?;
        let work = Work { bytes: 2.0 * bytes(&m), flops: cube };
        report.kernel("inverse, Cholesky", &shape, "f32", work, times, None);
        let moved = ((&m * 0.95)? + (spd(options, groups, d)? * 0.05)?)?;
        let newton = |m: &Tensor, start| newton_inverse(m, start, NewtonOptions::new(DType::F32), "bench");
        let first = newton(&m, None)?;
        let again = newton(&moved, Some(&first.inverse))?;
        let times = run(options, || Ok(newton(&moved, Some(&first.inverse))?.inverse))?;
        let flops = 4.0 * cube * again.iterations as f64;
        let work = Work { bytes: 2.0 * bytes(&m), flops };
        report.kernel("inverse, Newton from the last", &shape, "f32", work, times, None);
    }
    Ok(())
}
