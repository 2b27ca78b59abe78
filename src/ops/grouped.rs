//! Products of matrices of different shapes at once: on a GPU in one launch.

use candle_core::{DType, Result, Tensor, bail};

use super::dense::{dense, product};
use crate::gpu::table::{Item, Part, TABLE, THREADS, parts};
use crate::gpu::{Gpu, Grid, Module, Operand, args, typed};

/// `a b` for each pair of `[groups, m, k]` and `[groups, k, n]`: `[groups, m, n]`. Operands may be transposed views. Not differentiable.
///
/// On a GPU f32 and f64 take one launch for every 96 pairs, with the full precision of the type: meant for products that would not occupy it
/// by themselves. All else is a [`product`] a pair.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn products(pairs: &[(Tensor, Tensor)]) -> Result<Vec<Tensor>> {
    let Some((first, _)) = pairs.first() else { return Ok(vec![]) };
    let (dtype, device) = (first.dtype(), first.device());
    let alike = |t: &Tensor| t.dtype() == dtype && t.device().same_device(device);
    let gpu = Gpu::of(device).filter(|_| pairs.iter().all(|(a, b)| alike(a) && alike(b)));
    let dims = pairs.iter().map(|(a, b)| product_dims(a, b)).collect::<Result<Vec<_>>>()?;
    match gpu {
        Some(gpu) if dtype == DType::F32 || dtype == DType::F64 => {
            let outs = dims.iter().map(|dims| gpu.tensor(dims, dtype)).collect::<Result<Vec<_>>>()?;
            let all: Vec<_> = pairs
                .iter()
                .zip(&outs)
                .map(|((a, b), out)| Product { a: a.clone(), b: b.clone(), out, then: Then::Nothing })
                .collect();
            multiply(&gpu, dtype, &all)?;
            Ok(outs)
        }
        _ => pairs.iter().map(|(a, b)| product(a, b)).collect(),
    }
}

/// A product for [`multiply`].
pub(crate) struct Product<'a> {
    /// `[groups, m, k]`
    pub a: Tensor,
    /// `[groups, k, n]`
    pub b: Tensor,
    /// `[groups, m, n]`, to be written.
    pub out: &'a Tensor,
    pub then: Then<'a>,
}

/// What becomes of a product before it is written, and where the partial sums of its tiles go, in f64: see [`sums_of`].
#[derive(Clone, Copy)]
pub(crate) enum Then<'a> {
    Nothing,
    /// It is multiplied by `by`, element by element; the sums are those of `by product^2`.
    Scale {
        by: &'a Tensor,
        sums: u64,
    },
    /// The sums are those of its inner product with `with`.
    Dot {
        with: &'a Tensor,
        sums: u64,
    },
}

/// A product as in `kernels/grouped.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
// Only kernels read most fields.
#[allow(dead_code)]
struct ProductItem {
    a: u64,
    b: u64,
    out: u64,
    other: u64,
    sums: u64,
    m: u32,
    n: u32,
    k: u32,
    first: u32,
    blocks: u32,
    kind: u32,
}

impl Item for ProductItem {
    fn len(&self) -> u64 {
        u64::from(self.m) * u64::from(self.n)
    }
    fn blocks(&self) -> usize {
        self.blocks as usize
    }
    fn set_first(&mut self, first: u32) {
        self.first = first;
    }
}

args! {
    struct ProductArgs { items: [ProductItem; TABLE], count: u32, pad: u32 }
}

const A_TURNED: u32 = 1;
const B_TURNED: u32 = 2;
const SCALED: u32 = 4;

/// Rows and columns of the smaller tiles that a block of threads computes, and of the larger ones.
const SMALL: usize = 32;
const LARGE: usize = 64;

/// The most partial sums of one `[rows, columns]`.
pub(crate) fn most_sums(rows: usize, columns: usize) -> usize {
    sums_of(rows, columns, SMALL)
}

/// The partial sums of one `[rows, columns]` in tiles of `side`; those of groups lie one behind the other.
pub(crate) fn sums_of(rows: usize, columns: usize, side: usize) -> usize {
    rows.div_ceil(side) * columns.div_ceil(side)
}

/// Computes all of `all`, of f32 or f64, in one launch for every [`TABLE`]. Comes back with the side of the tiles.
pub(crate) fn multiply(gpu: &Gpu, dtype: DType, all: &[Product<'_>]) -> Result<usize> {
    let tiles = |side| -> Result<usize> {
        let mut tiles = 0;
        for Product { out, .. } in all {
            let (groups, rows, columns) = out.dims3()?;
            tiles += groups * sums_of(rows, columns, side);
        }
        Ok(tiles)
    };
    // Larger tiles read less, if there are enough of them for two blocks of threads at a time on every multiprocessor.
    let large = dtype == DType::F32 && tiles(LARGE)? >= 2 * gpu.multiprocessors()?;
    let side = if large { LARGE } else { SMALL };
    let mut held = Vec::with_capacity(4 * all.len());
    let mut items = Vec::with_capacity(all.len());
    for product in all {
        items.extend(item(gpu, dtype, product, side, &mut held)?);
    }
    // The blocks of threads start in order: those that take longest first.
    items.sort_by_key(|item| std::cmp::Reverse(item.k));
    for Part { items, count, blocks, .. } in parts(&items) {
        let args = ProductArgs { items, count, pad: 0 };
        let kernel = typed(&format!("products_{side}"), dtype)?;
        gpu.launch(Module::Grouped, &kernel, Grid::line(blocks, THREADS)?, &args)?;
    }
    Ok(side)
}

/// A product's row of the table; none where there is nothing to write. Its operands join `held`.
fn item(
    gpu: &Gpu,
    dtype: DType,
    Product { a, b, out, then }: &Product<'_>,
    side: usize,
    held: &mut Vec<(Tensor, Operand)>,
) -> Result<Option<ProductItem>> {
    let [groups, m, n] = product_dims(a, b)?;
    let k = a.dim(2)?;
    let (other, sums, scaled) = match *then {
        Then::Nothing => (None, 0, 0),
        Then::Scale { by, sums } => (Some(by), sums, SCALED),
        Then::Dot { with, sums } => (Some(with), sums, 0),
    };
    for t in std::iter::once(*out).chain(other) {
        if t.dims() != [groups, m, n] {
            bail!("grouped products: expected {:?} beside a product, got {:?}", [groups, m, n], t.dims())
        }
    }
    let blocks = groups * sums_of(m, n, side);
    if blocks == 0 {
        return Ok(None);
    }
    let mut address = |t: &Tensor, name: &str| -> Result<u64> {
        let operand = gpu.operand(t, name)?;
        if operand.dtype != dtype {
            bail!("grouped products: {name}: expected {dtype:?}, got {:?}", operand.dtype)
        }
        let address = operand.address();
        held.push((t.clone(), operand));
        Ok(address)
    };
    let small = |dim: usize| match u32::try_from(dim) {
        Ok(dim) => Ok(dim),
        Err(_) => bail!("grouped products: a dimension of {dim}, more than 2^32 - 1"),
    };
    let ((a, a_turned), (b, b_turned)) = (dense(a)?, dense(b)?);
    Ok(Some(ProductItem {
        a: address(&a, "a")?,
        b: address(&b, "b")?,
        out: address(out, "product")?,
        other: other.map_or(Ok(0), |t| address(t, "factors of a product"))?,
        sums,
        m: small(m)?,
        n: small(n)?,
        k: small(k)?,
        first: 0,
        blocks: small(blocks)?,
        kind: scaled | if a_turned { A_TURNED } else { 0 } | if b_turned { B_TURNED } else { 0 },
    }))
}

/// `[groups, m, n]` of `[groups, m, k]` and `[groups, k, n]`.
fn product_dims(a: &Tensor, b: &Tensor) -> Result<[usize; 3]> {
    match (a.dims(), b.dims()) {
        (&[groups, m, k], &[b_groups, b_k, n]) if groups == b_groups && k == b_k => Ok([groups, m, n]),
        (a, b) => {
            bail!("grouped products: expected [groups, m, k] and [groups, k, n], got {a:?} and {b:?}")
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};

    /// Groups, m, k, n.
    const SHAPES: [[usize; 4]; 14] = [
        [1, 1, 1, 1],
        [1, 7, 33, 65],
        [3, 33, 7, 1],
        [1, 64, 64, 64],
        [2, 65, 130, 33],
        [1, 130, 65, 7],
        [2, 1, 130, 130],
        [1, 130, 1, 64],
        [5, 7, 7, 7],
        [2, 33, 0, 65],
        [1, 0, 7, 33],
        [0, 7, 7, 7],
        [2, 7, 64, 0],
        [1, 32, 129, 32],
    ];

    type Pair = (Tensor, Tensor);

    fn turned(t: &Tensor) -> Result<Tensor> {
        t.transpose(1, 2)?.contiguous()?.transpose(1, 2)
    }

    /// Pairs of operands, transposed in memory or not in turn, and their products by the definition.
    fn cases(shapes: &[[usize; 4]], dtype: DType) -> Result<(Vec<Pair>, Vec<Vec<f64>>)> {
        let (mut pairs, mut expected) = (vec![], vec![]);
        for (nth, &[groups, m, k, n]) in shapes.iter().enumerate() {
            let of = |seed, dims: &[usize]| random(seed, dims)?.to_dtype(dtype);
            let (a, b) = (of(2 * nth as u64, &[groups, m, k])?, of(2 * nth as u64 + 1, &[groups, k, n])?);
            let (va, vb) = (values(&a)?, values(&b)?);
            let at = |at: usize| -> f64 {
                let (group, i, j) = (at / (m * n), at / n % m, at % n);
                (0..k).map(|l| va[(group * m + i) * k + l] * vb[(group * k + l) * n + j]).sum()
            };
            let all: Vec<f64> = (0..groups * m * n).map(at).collect();
            for how in 0..4 {
                let a = if how & 1 == 0 { a.clone() } else { turned(&a)? };
                let b = if how & 2 == 0 { b.clone() } else { turned(&b)? };
                pairs.push((a, b));
                expected.push(all.clone());
            }
        }
        Ok((pairs, expected))
    }

    #[test]
    fn products_by_their_definition() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
            // One by one small tiles, together larger ones.
            let (pairs, expected) = cases(&SHAPES, dtype)?;
            let together = emulate(|| products(&pairs))?;
            assert_eq!(together.len(), expected.len());
            for (found, expected) in together.iter().zip(&expected) {
                assert_close(found, expected, tolerance);
            }
            for (pair, expected) in pairs.iter().zip(&expected).step_by(3) {
                let [found] = &emulate(|| products(std::slice::from_ref(pair)))?[..] else {
                    panic!("one product")
                };
                assert_eq!(found.dtype(), dtype);
                assert_close(found, expected, tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn more_than_a_table_has_rows() -> Result<()> {
        let shapes: Vec<_> = (0..30).map(|i| [1 + i % 2, 1 + i, 3, 2]).collect();
        let (pairs, expected) = cases(&shapes, DType::F32)?;
        assert!(pairs.len() > TABLE);
        for (found, expected) in emulate(|| products(&pairs))?.iter().zip(&expected) {
            assert_close(found, expected, 1e-5);
        }
        Ok(())
    }

    #[test]
    fn products_are_scaled_and_measured_on_their_way_out() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            for shapes in [&[[2, 33, 40, 70]][..], &[[2, 70, 40, 33], [1, 130, 7, 130], [3, 5, 5, 5]]] {
                let (pairs, expected) = cases(shapes, dtype)?;
                for scaled in [true, false] {
                    let (mut others, mut outs) = (vec![], vec![]);
                    for (nth, (a, b)) in pairs.iter().enumerate() {
                        let dims = product_dims(a, b)?;
                        others.push(random(90 + nth as u64, &dims)?.to_dtype(dtype)?);
                        outs.push(Tensor::zeros(&dims, dtype, &Device::Cpu)?);
                    }
                    let most = |t: &Tensor| t.dims()[0] * most_sums(t.dims()[1], t.dims()[2]);
                    let room: usize = outs.iter().map(most).sum();
                    let sums = Tensor::zeros(room, DType::F64, &Device::Cpu)?;
                    let Some(side) = emulate(|| -> Result<_> {
                        let Some(gpu) = Gpu::emulated() else { return Ok(None) };
                        let (array, mut next) = (gpu.operand(&sums, "sums")?, 0);
                        let mut all = vec![];
                        for ((pair, out), other) in pairs.iter().zip(&outs).zip(&others) {
                            let sums = array.at(next);
                            next += most(out);
                            let then = match scaled {
                                true => Then::Scale { by: other, sums },
                                false => Then::Dot { with: other, sums },
                            };
                            all.push(Product { a: pair.0.clone(), b: pair.1.clone(), out, then });
                        }
                        multiply(&gpu, dtype, &all).map(Some)
                    })?
                    else {
                        return Ok(());
                    };
                    let (found, mut next) = (values(&sums)?, 0);
                    for ((out, other), expected) in outs.iter().zip(&others).zip(&expected) {
                        let pairs = || expected.iter().zip(values(other).expect("readable"));
                        let (groups, rows, columns) = out.dims3()?;
                        let count = sums_of(rows, columns, side);
                        match scaled {
                            true => {
                                assert_close(out, &pairs().map(|(x, s)| x * s).collect::<Vec<_>>(), tolerance)
                            }
                            false => assert_close(out, expected, tolerance),
                        }
                        let exact: Vec<f64> =
                            pairs().map(|(x, s)| if scaled { s * x * x } else { s * x }).collect();
                        for group in 0..groups {
                            let sum: f64 = found[next + group * count..][..count].iter().sum();
                            let own = &exact[group * rows * columns..][..rows * columns];
                            let (total, size) =
                                (own.iter().sum::<f64>(), own.iter().map(|x| x.abs()).sum::<f64>());
                            assert!((sum - total).abs() <= tolerance * size, "{sum} {total}");
                        }
                        next += most(out);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unfitting_operands_are_refused() -> Result<()> {
        let a = random(0, &[2, 3, 4])?;
        for b in [
            random(1, &[2, 3, 4])?,
            random(1, &[1, 4, 3])?,
            random(1, &[4, 3])?,
            random(1, &[2, 4, 3])?.to_dtype(DType::F32)?,
        ] {
            let pairs = [(a.clone(), b)];
            assert!(products(&pairs).is_err() && emulate(|| products(&pairs)).is_err());
        }
        assert!(products(&[])?.is_empty());
        Ok(())
    }
}
