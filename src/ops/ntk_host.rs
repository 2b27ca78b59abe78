//! A term of a neural tangent kernel on the CPU: its panels side by side on all threads, and their products kept for the traces.
//!
//! `ntk.rs` says what a term is. There a panel's products are a tensor and the panels come one after the other, as a GPU wants them;
//! here a thread makes the products of a panel, adds them to the kernel and goes on.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, WithDType, bail};
use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::record_layout::{WORTH_A_THREAD, cpu_slice};
use super::simd::vectorized;

/// Rows of a panel: so few that their products stay in the cache, and at least so many panels that threads share them.
const ROWS: usize = 128;
const PANELS: usize = 4;

/// `(weight inputs inputs^T + bias) grads grads^T`.
pub(crate) struct Term<'a> {
    /// `[size, k]`, f32 or f64.
    pub grads: &'a Tensor,
    /// Inner products of the inputs, `[size / each, size / each]`; 1 without.
    pub gram: Option<&'a Tensor>,
    /// Outputs of an example.
    pub each: usize,
}

/// The products of each panel's gradients, `[rows, columns up to its last row]`.
pub(crate) struct Kept(Vec<CpuStorage>);

/// Adds a term to `m` `[size, size]` in place, right on and below the diagonal; with `keep` its products come back.
pub(crate) fn add(m: &Tensor, term: &Term<'_>, [weight, bias]: [f64; 2], keep: bool) -> Result<Option<Kept>> {
    let op = Add { term, weight, bias, keep, kept: Mutex::default() };
    check(m, term)?;
    m.inplace_op1(&op)?;
    Ok(keep.then(|| Kept(op.kept.into_inner().unwrap_or_else(PoisonError::into_inner))))
}

/// The sums over the symmetric matrices of `m grads inputs` and of `m grads`, of which the lower halves are read; `kept` is what [`add`]
/// kept of the same term. They do not depend on the threads.
pub(crate) fn traces(m: &Tensor, term: &Term<'_>, kept: Option<&Kept>) -> Result<[f64; 2]> {
    check(m, term)?;
    match m.dtype() {
        DType::F64 => traces_of::<f64>(m, term, kept),
        _ => traces_of::<f32>(m, term, kept),
    }
}

const NAME: &str = "ntk";

fn check(m: &Tensor, term: &Term<'_>) -> Result<()> {
    let ((size, wide), (rows, _)) = (m.dims2()?, term.grads.dims2()?);
    let gram = term.gram.map(Tensor::dims2).transpose()?;
    let fit = size == wide
        && rows == size
        && term.each > 0
        && size.is_multiple_of(term.each)
        && gram.is_none_or(|dims| dims == (size / term.each, size / term.each))
        && m.is_contiguous()
        && matches!(m.dtype(), DType::F32 | DType::F64)
        && [Some(term.grads), term.gram].into_iter().flatten().all(|t| t.dtype() == m.dtype());
    if !fit {
        bail!(
            "{NAME}: a kernel {:?} {:?} of {} outputs an example does not fit gradients {:?} {:?} and inputs {gram:?}",
            m.dtype(),
            m.dims(),
            term.each,
            term.grads.dtype(),
            term.grads.dims()
        )
    }
    Ok(())
}

/// A term's numbers.
struct Numbers<'a, T> {
    grads: &'a [T],
    gram: Option<&'a [T]>,
    size: usize,
    columns: usize,
    each: usize,
}

impl<T: WithDType + RealField> Numbers<'_, T> {
    /// Calls `f` with the term's numbers.
    fn with<R>(term: &Term<'_>, f: impl FnOnce(Numbers<'_, T>) -> Result<R>) -> Result<R> {
        let (grads, gram) = (term.grads.contiguous()?, term.gram.map(Tensor::contiguous).transpose()?);
        let (size, columns) = grads.dims2()?;
        let (g_storage, g_layout) = grads.storage_and_layout();
        let held = gram.as_ref().map(Tensor::storage_and_layout);
        let gram = match &held {
            Some((storage, layout)) => Some(part(cpu_slice::<T>(storage, NAME)?, layout)),
            None => None,
        };
        let grads = part(cpu_slice::<T>(&g_storage, NAME)?, g_layout);
        f(Numbers { grads, gram, size, columns, each: term.each })
    }

    /// Rows of a panel, a multiple of an example's.
    fn step(&self) -> usize {
        let rows = self.size.div_ceil(PANELS).min(ROWS);
        (rows / self.each).max(1) * self.each
    }

    /// Whether the panels are worth handing to threads.
    fn is_large(&self) -> bool {
        self.size * self.size * (self.columns + 8) > WORTH_A_THREAD
    }

    /// Products of the gradients of rows from `first` on with those of all rows up to their last.
    fn products(&self, first: usize, rows: usize, out: &mut Vec<T>) {
        let (end, k) = (first + rows, self.columns);
        out.resize(rows * end, <T as WithDType>::from_f64(0.0));
        matmul(
            MatMut::from_row_major_slice_mut(out, rows, end),
            Accum::Replace,
            MatRef::from_row_major_slice(&self.grads[first * k..end * k], rows, k),
            MatRef::from_row_major_slice(&self.grads[..end * k], end, k).transpose(),
            <T as WithDType>::from_f64(1.0),
            Par::Seq,
        );
    }

    /// The row of `gram` of the example whose first row is `first`, up to the `end`th row's.
    fn inputs(&self, first: usize, end: usize) -> Option<&[T]> {
        let (across, example) = (self.size / self.each, first / self.each);
        self.gram.map(|gram| &gram[example * across..example * across + end / self.each])
    }
}

struct Add<'a> {
    term: &'a Term<'a>,
    weight: f64,
    bias: f64,
    keep: bool,
    kept: Mutex<Vec<CpuStorage>>,
}

impl Add<'_> {
    fn run<T: WithDType + RealField>(&self, m: &mut [T]) -> Result<()> {
        let scale = [self.weight, self.bias].map(<T as WithDType>::from_f64);
        let kept = Numbers::<T>::with(self.term, |term| {
            let (size, step) = (term.size, term.step());
            let panel = |products: &mut Vec<T>, (index, m): (usize, &mut [T])| {
                let (first, rows) = (index * step, m.len() / size);
                let end = first + rows;
                term.products(first, rows, products);
                let of_examples = m.chunks_mut(term.each * size).zip(products.chunks(term.each * end));
                for (example, (m, grads)) in of_examples.enumerate() {
                    let inputs = term.inputs(first + example * term.each, end);
                    add_example(m, grads, inputs, [size, end, term.each], scale);
                }
            };
            let kept = |(index, m)| {
                let mut products = Vec::new();
                panel(&mut products, (index, m));
                T::to_cpu_storage_owned(products)
            };
            if term.is_large() {
                let panels = m.par_chunks_mut(step * size).enumerate().with_max_len(1);
                if self.keep {
                    return Ok(panels.map(kept).collect());
                }
                panels.for_each_init(Vec::new, panel);
            } else {
                let panels = m.chunks_mut(step * size).enumerate();
                if self.keep {
                    return Ok(panels.map(kept).collect());
                }
                let mut products = Vec::new();
                panels.for_each(|chunk| panel(&mut products, chunk));
            }
            Ok(vec![])
        })?;
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok(())
    }
}

impl InplaceOp1 for Add<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, len) = (layout.start_offset(), layout.shape().elem_count());
        match m {
            CpuStorage::F32(m) => self.run(&mut m[start..start + len]),
            CpuStorage::F64(m) => self.run(&mut m[start..start + len]),
            _ => bail!("{NAME}: expected f32 or f64"),
        }
    }
}

fn traces_of<T: WithDType + RealField + Into<f64>>(
    m: &Tensor,
    term: &Term<'_>,
    kept: Option<&Kept>,
) -> Result<[f64; 2]> {
    let (storage, layout) = m.storage_and_layout();
    let m = part(cpu_slice::<T>(&storage, NAME)?, layout);
    let kept = match kept {
        Some(Kept(kept)) => Some(kept.iter().map(T::cpu_storage_as_slice).collect::<Result<Vec<_>>>()?),
        None => None,
    };
    Numbers::<T>::with(term, |term| {
        let (size, step) = (term.size, term.step());
        let panel = |room: &mut Vec<T>, (index, m): (usize, &[T])| {
            let (first, rows) = (index * step, m.len() / size);
            let end = first + rows;
            let products = match kept.as_ref().and_then(|kept| kept.get(index)) {
                Some(products) => products,
                None => {
                    term.products(first, rows, room);
                    room.as_slice()
                }
            };
            let mut sums = [0., 0.];
            let of_examples = m.chunks(term.each * size).zip(products.chunks(term.each * end));
            for (example, (m, grads)) in of_examples.enumerate() {
                let at = first + example * term.each;
                let found = trace_example(m, grads, term.inputs(at, end), at, [size, end, term.each]);
                sums = [sums[0] + found[0], sums[1] + found[1]];
            }
            sums
        };
        let sums: Vec<[f64; 2]> = if term.is_large() {
            let panels = m.par_chunks(step * size).enumerate().with_max_len(1);
            panels.map_init(Vec::new, panel).collect()
        } else {
            let mut room = Vec::new();
            m.chunks(step * size).enumerate().map(|chunk| panel(&mut room, chunk)).collect()
        };
        Ok(sums.iter().fold([0., 0.], |[w, b], [of_weight, of_bias]| [w + of_weight, b + of_bias]))
    })
}

/// The numbers of a contiguous tensor.
pub(super) fn part<'a, T>(slice: &'a [T], layout: &Layout) -> &'a [T] {
    &slice[layout.start_offset()..layout.start_offset() + layout.shape().elem_count()]
}

/// An example's factors of `columns` products, `each` alike: the outputs of an example share a row of them.
fn factors<T: WithDType>(inputs: Option<&[T]>, columns: usize, each: usize, of: impl Fn(T) -> T) -> Vec<T> {
    match inputs {
        None => vec![of(T::from_f64(1.0)); columns],
        Some(row) => row.iter().flat_map(|&v| std::iter::repeat_n(of(v), each)).collect(),
    }
}

/// Adds `(weight inputs + bias) grads` to an example's rows of a kernel: `m` `[each, size]`, `grads` `[each, columns]`, `inputs`
/// `[columns / each]`, 1 without.
pub(super) fn add_example<T: WithDType>(
    m: &mut [T],
    grads: &[T],
    inputs: Option<&[T]>,
    [size, columns, each]: [usize; 3],
    [weight, bias]: [T; 2],
) {
    let factors = factors(inputs, columns, each, |v| weight * v + bias);
    for (m, grads) in m.chunks_mut(size).zip(grads.chunks(columns)) {
        vectorized(
            #[inline(always)]
            || {
                for ((m, &g), &f) in m.iter_mut().zip(grads).zip(&factors) {
                    *m += f * g;
                }
            },
        );
    }
}

/// An example's part of `sum m grads inputs` and `sum m grads` over symmetric matrices, whose first row is the `at`th.
pub(super) fn trace_example<T: WithDType + Into<f64>>(
    m: &[T],
    grads: &[T],
    inputs: Option<&[T]>,
    at: usize,
    [size, columns, each]: [usize; 3],
) -> [f64; 2] {
    let factors = factors(inputs, columns, each, |v| v);
    let mut sums = [0., 0.];
    for (row, (m, grads)) in m.chunks(size).zip(grads.chunks_exact(columns)).enumerate() {
        let at = at + row;
        let left = at.min(columns);
        let twice = vectorized(
            #[inline(always)]
            || dots(&m[..left], &grads[..left], &factors[..left]),
        );
        let own = if at < columns { dots(&m[at..=at], &grads[at..=at], &factors[at..=at]) } else { [0.; 2] };
        for ((sum, twice), own) in sums.iter_mut().zip(twice).zip(own) {
            *sum += 2. * twice + own;
        }
    }
    sums
}

/// `sum m g f` and `sum m g`.
#[inline(always)]
fn dots<T: WithDType + Into<f64>>(m: &[T], g: &[T], f: &[T]) -> [f64; 2] {
    const LANES: usize = 16;
    let (mut all, mut plain) = ([0.; LANES], [0.; LANES]);
    for ((m, g), f) in m.chunks(LANES).zip(g.chunks(LANES)).zip(f.chunks(LANES)) {
        let lanes = all.iter_mut().zip(&mut plain);
        for ((((all, plain), &m), &g), &f) in lanes.zip(m).zip(g).zip(f) {
            let product = Into::<f64>::into(m) * Into::<f64>::into(g);
            *plain += product;
            *all += product * Into::<f64>::into(f);
        }
    }
    [all.iter().sum(), plain.iter().sum()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{random, values};

    /// Against the definition, kept and not, of sizes that panels do not divide, with few and with many columns; and the same on one thread
    /// as on three.
    #[test]
    fn terms_as_defined() -> Result<()> {
        for (examples, each, k) in [(1, 1, 1), (5, 3, 2), (130, 1, 3), (60, 9, 40)] {
            let size = examples * each;
            let [m, g, i] = [&[size, size], &[size, k], &[examples, examples]].map(|dims| random(0, dims));
            let (m, g, i) = (m?, g?, i?);
            let [vm, vg, vi] = [values(&m)?, values(&g)?, values(&i)?];
            for gram in [Some(&i), None] {
                let (mut sum, mut traced) = (vm.clone(), [0., 0.]);
                for r in 0..size {
                    for c in 0..=r {
                        let product: f64 = (0..k).map(|at| vg[r * k + at] * vg[c * k + at]).sum();
                        let input = gram.map_or(1., |_| vi[r / each * examples + c / each]);
                        sum[r * size + c] += (0.5 * input - 2.) * product;
                        let times = if c < r { 2. } else { 1. };
                        traced[0] += times * vm[r * size + c] * product * input;
                        traced[1] += times * vm[r * size + c] * product;
                    }
                }
                let term = Term { grads: &g, gram, each };
                let run = |keep, threads: usize| -> Result<(Vec<f64>, [f64; 2])> {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.map_err(candle_core::Error::wrap)?.install(|| {
                        let added = m.copy()?;
                        let kept = add(&added, &term, [0.5, -2.], keep)?;
                        assert_eq!(kept.is_some(), keep);
                        Ok((values(&added)?, traces(&m, &term, kept.as_ref())?))
                    })
                };
                let (added, found) = run(true, 1)?;
                for r in 0..size {
                    for c in 0..=r {
                        let at = r * size + c;
                        assert!((added[at] - sum[at]).abs() < 1e-11, "{at}: {} {}", added[at], sum[at]);
                    }
                }
                let scale = vm.iter().map(|v| v.abs()).sum::<f64>() * k as f64;
                assert!(found.iter().zip(traced).all(|(a, b)| (a - b).abs() < 1e-13 * scale));
                for (keep, threads) in [(true, 3), (false, 1), (false, 3)] {
                    assert_eq!(run(keep, threads)?, (added.clone(), found));
                }
            }
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() -> Result<()> {
        let (m, g, i) = (random(0, &[12, 12])?, random(1, &[12, 2])?, random(2, &[4, 4])?);
        let narrow = g.narrow(0, 0, 6)?;
        let single = g.to_dtype(DType::F32)?;
        for (grads, gram, each) in
            [(&g, Some(&i), 4), (&g, None, 5), (&g, None, 0), (&narrow, None, 3), (&single, None, 3)]
        {
            let term = Term { grads, gram, each };
            for error in [add(&m, &term, [1.; 2], false).err(), traces(&m, &term, None).err()] {
                assert!(error.is_some_and(|e| e.to_string().contains("does not fit")));
            }
        }
        Ok(())
    }
}
