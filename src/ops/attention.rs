//! Attention on the CPU without a matrix of all scores in memory: blocks of queries meet blocks of keys, and a block's scores stay in
//! the cache (Dao et al., "FlashAttention", 2022). The backward pass computes them again.
//!
//! For a query `q_i`: `y_i = sum_j p_ij v_j`, `p_ij = exp(s_ij - m_i) / sum_j exp(s_ij - m_i)` with `s_ij = scale <q_i, k_j> + mask_ij` and
//! `m_i` the largest of them. What is kept of a row is `m_i` and one over its sum: in the logarithm of both together a large `m_i` would
//! swallow the sum. With `g_i = dL/dy_i` and `d_i = <g_i, y_i>`: `dL/ds_ij = p_ij (<g_i, v_j> - d_i)`, from which the other gradients follow. A
//! query that may look at no key has output 0 and no gradient.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use faer::MatRef;
use faer::traits::RealField;
use rayon::prelude::*;

use super::attention_tiles::{Head, MaskRows, Part, backward, forward};
use super::element::Real;
use crate::gpu::Gpu;

/// What is done with the scores.
#[derive(Clone)]
pub(crate) struct Attention {
    /// They are multiplied by this.
    pub scale: f64,
    /// Whether a query sees only the keys at its place and before, the last query all of them.
    pub causal: bool,
    /// Added to them: of the scores' dtype, broadcast to `[batch, heads, queries, keys]`.
    pub mask: Option<Tensor>,
}

/// Queries and keys of a block. Their scores fill an eighth of a common second-level cache.
const BLOCK: [usize; 2] = [64, 512];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub batch: usize,
    pub heads: usize,
    /// Heads of keys and values, each of which serves `heads / groups` neighbouring heads.
    pub groups: usize,
    pub queries: usize,
    pub keys: usize,
    /// Features of a query and a key.
    pub d: usize,
    /// Features of a value.
    pub dv: usize,
}

/// Whether [`Attention::apply`] takes these: on the CPU, in single or double precision, nothing empty, and a mask without a gradient.
pub(crate) fn applies([q, k, v]: [&Tensor; 3], mask: Option<&Tensor>) -> bool {
    let fits = |t: &Tensor| {
        t.device().is_cpu() && t.elem_count() > 0 && t.dtype() == q.dtype() && Gpu::of(t.device()).is_none()
    };
    matches!(q.dtype(), DType::F32 | DType::F64)
        && [q, k, v].into_iter().all(fits)
        && mask.is_none_or(|mask| mask.device().is_cpu() && !mask.track_op())
}

impl Attention {
    /// Outputs `[batch, heads, queries, dv]` for `q [batch, heads, queries, d]`, `k [batch, groups, keys, d]` and `v [batch, groups, keys, dv]`, which
    /// [`applies`] and whose shapes fit. The outputs of a query's heads lie side by side in memory.
    pub(crate) fn apply(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (batch, heads, queries, d) = q.dims4()?;
        let (_, groups, keys, dv) = v.dims4()?;
        let sizes = Sizes { batch, heads, groups, queries, keys, d, dv };
        self.run(q, k, v, sizes, false)?.transpose(1, 2)
    }

    /// Outputs `[batch, queries, heads dv]` for `q [batch, queries, heads d]`, `k [batch, keys, groups d]` and `v [batch, keys, groups dv]`, which
    /// [`applies`] and whose shapes fit.
    pub(crate) fn apply_joined(self, [q, k, v]: [&Tensor; 3], [heads, groups]: [usize; 2]) -> Result<Tensor> {
        let (batch, queries, width) = q.dims3()?;
        let (_, keys, v_width) = v.dims3()?;
        let sizes = Sizes { batch, heads, groups, queries, keys, d: width / heads, dv: v_width / groups };
        self.run(q, k, v, sizes, true)
    }

    fn run(self, q: &Tensor, k: &Tensor, v: &Tensor, sizes: Sizes, joined: bool) -> Result<Tensor> {
        let mask = match self.mask {
            Some(mask) => Some(by_rows(&mask.detach().to_dtype(q.dtype())?, sizes)?),
            None => None,
        };
        let op = Fused {
            attention: Attention { mask, ..self },
            sizes,
            joined,
            block: BLOCK,
            kept: OnceLock::new(),
        };
        op.on(q, k, v)
    }
}

/// `mask` as `[batch, heads, queries, keys]`, in memory as it is but for its rows, whose elements lie together.
fn by_rows(mask: &Tensor, Sizes { batch, heads, queries, keys, .. }: Sizes) -> Result<Tensor> {
    let mut dims = mask.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = keys;
    }
    let mask = match mask.rank() {
        0 => mask.broadcast_as(keys)?.contiguous()?,
        _ => mask.broadcast_as(dims)?.contiguous()?,
    };
    mask.broadcast_as((batch, heads, queries, keys))
}

struct Fused {
    attention: Attention,
    sizes: Sizes,
    /// Whether heads lie side by side: `[batch, positions, heads d]`.
    joined: bool,
    block: [usize; 2],
    /// Of each row, its largest score and one over the sum of its exponentials: `[2, batch, heads, queries]`.
    kept: OnceLock<Tensor>,
}

/// `t` with the features of a row side by side.
fn rows_together(t: &Tensor) -> Result<Tensor> {
    if t.dim(t.rank() - 1)? == 1 || t.stride().last() == Some(&1) { Ok(t.clone()) } else { t.contiguous() }
}

/// The numbers of a tensor, and where its heads lie.
#[derive(Clone, Copy)]
struct Heads<'a, T> {
    data: &'a [T],
    /// Elements from an example, a head and a position to the next.
    strides: [usize; 3],
    rows: usize,
    d: usize,
}

impl<'a, T> Heads<'a, T> {
    /// `data` begins where the layout does.
    fn of(data: &'a [T], layout: &Layout, [rows, d]: [usize; 2]) -> Result<Self> {
        let strides = match *layout.stride() {
            [example, position, _] => [example, d, position],
            [example, head, position, _] => [example, head, position],
            _ => bail!("attention: expected a tensor of rank 3 or 4, got {:?}", layout.dims()),
        };
        Ok(Self { data, strides, rows, d })
    }

    fn get(&self, example: usize, head: usize) -> MatRef<'a, T> {
        let data = &self.data[example * self.strides[0] + head * self.strides[1]..];
        MatRef::from_row_major_slice_with_stride(data, self.rows, self.d, self.strides[2])
    }
}

fn slice<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => Ok(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..]),
        _ => bail!("attention: expected tensors on the CPU"),
    }
}

/// The numbers of a mask `[batch, heads, queries, keys]`, and elements from an example, a head and a query to the next.
#[derive(Clone, Copy)]
struct Mask<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
    keys: usize,
}

impl<'a, T: WithDType> Mask<'a, T> {
    fn of(mask: Option<&'a (StorageRef<'a>, &'a Layout)>) -> Result<Option<Self>> {
        let Some((storage, layout)) = mask else { return Ok(None) };
        let (&[_, _, _, keys], &[example, head, query, _]) = (layout.dims(), layout.stride()) else {
            bail!("attention: expected a mask of rank 4, got {:?}", layout.dims())
        };
        Ok(Some(Self { data: slice(storage, layout)?, strides: [example, head, query], keys }))
    }

    fn get(&self, example: usize, head: usize) -> MaskRows<'a, T> {
        let [of_example, of_head, step] = self.strides;
        MaskRows { data: &self.data[example * of_example + head * of_head..], step, length: self.keys }
    }
}

/// Writes matrices `[rows, d]`, those of an example's heads one after the other, to where they lie side by side:
/// `[batch, rows, heads, d]`.
fn side_by_side<T: Real>(parts: &[&[T]], batch: usize, [rows, d]: [usize; 2]) -> Vec<T> {
    let heads = parts.len() / batch;
    let mut out = vec![T::ZERO; parts.len() * rows * d];
    out.par_chunks_mut(rows * heads * d).zip(parts.par_chunks(heads)).for_each(|(out, parts)| {
        for (row, out) in out.chunks_exact_mut(heads * d).enumerate() {
            for (out, part) in out.chunks_exact_mut(d).zip(parts) {
                out.copy_from_slice(&part[row * d..][..d]);
            }
        }
    });
    out
}

impl Fused {
    fn on(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        rows_together(q)?.apply_op3(&rows_together(k)?, &rows_together(v)?, self)
    }

    fn part<T: Real>(&self) -> Part<T> {
        let Sizes { queries, keys, .. } = self.sizes;
        // A causal mask over fewer keys than queries is refused before.
        let before = if self.attention.causal { Some(keys.saturating_sub(queries)) } else { None };
        Part { scale: T::rounded(self.attention.scale), before, block: self.block }
    }

    fn forward<T: Real + RealField>(
        &self,
        q: Heads<'_, T>,
        k: Heads<'_, T>,
        v: Heads<'_, T>,
    ) -> Result<Vec<T>> {
        let Sizes { batch, heads, groups, queries, dv, .. } = self.sizes;
        let part = self.part::<T>();
        let mask = self.attention.mask.as_ref().map(|mask| mask.storage_and_layout());
        let mask = Mask::of(mask.as_ref())?;
        let head_of = |at: usize| {
            let (example, head) = (at / heads, at % heads);
            let group = head / (heads / groups);
            let [q, k, v] = [q.get(example, head), k.get(example, group), v.get(example, group)];
            forward(&part, Head { q, k, v, mask: mask.map(|mask| mask.get(example, head)) })
        };
        let done: Vec<_> = (0..batch * heads).into_par_iter().map(head_of).collect();
        let mut kept = Vec::with_capacity(2 * done.len() * queries);
        done.iter().for_each(|head| kept.extend_from_slice(&head.largest));
        done.iter().for_each(|head| kept.extend_from_slice(&head.one_over_sum));
        let kept = Tensor::from_vec(kept, (2, batch, heads, queries), &Device::Cpu)?;
        // Twice only where one op were applied twice, to the same.
        let _ = self.kept.set(kept);
        let outputs: Vec<_> = done.iter().map(|head| &head.y[..]).collect();
        Ok(side_by_side(&outputs, batch, [queries, dv]))
    }

    fn on_cpu<T: Real + RealField>(
        &self,
        [q, k, v]: [(&CpuStorage, &Layout); 3],
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { batch, heads, queries, keys, d, dv, .. } = self.sizes;
        fn heads_of<'a, T: WithDType>(
            (storage, layout): (&'a CpuStorage, &Layout),
            sizes: [usize; 2],
        ) -> Result<Heads<'a, T>> {
            Heads::of(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..], layout, sizes)
        }
        let y =
            self.forward::<T>(heads_of(q, [queries, d])?, heads_of(k, [keys, d])?, heads_of(v, [keys, dv])?)?;
        let shape = match self.joined {
            true => Shape::from((batch, queries, heads * dv)),
            false => Shape::from((batch, queries, heads, dv)),
        };
        Ok((T::to_cpu_storage_owned(y), shape))
    }

    fn gradients<T: Real + RealField>(
        &self,
        [q, k, v]: [&Tensor; 3],
        y: &Tensor,
        gy: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let Sizes { batch, heads, groups, queries, keys, d, dv } = self.sizes;
        let Some(kept) = self.kept.get() else { bail!("attention: a backward pass without a forward pass") };
        let (kept, kept_layout) = kept.storage_and_layout();
        let (largest, one_over_sum) = slice::<T>(&kept, kept_layout)?.split_at(batch * heads * queries);
        // As the forward pass wrote them.
        let [y, gy] = [y, gy].map(|t| t.contiguous()?.reshape((batch, queries, heads * dv)));
        let (y, gy) = (y?, gy?);
        let tensors = [q, k, v, &y, &gy].map(|t| t.storage_and_layout());
        let heads_of = |at: usize, sizes| {
            let (storage, layout) = &tensors[at];
            Heads::of(slice::<T>(storage, layout)?, layout, sizes)
        };
        let (of_q, of_k) = (heads_of(0, [queries, d])?, heads_of(1, [keys, d])?);
        let (of_v, of_y, of_gy) =
            (heads_of(2, [keys, dv])?, heads_of(3, [queries, dv])?, heads_of(4, [queries, dv])?);
        let part = self.part::<T>();
        let mask = self.attention.mask.as_ref().map(|mask| mask.storage_and_layout());
        let mask = Mask::of(mask.as_ref())?;
        let group_of = |at: usize| {
            let (example, group) = (at / groups, at % groups);
            let each = heads / groups;
            let [k, v] = [of_k.get(example, group), of_v.get(example, group)];
            let served = (group * each..(group + 1) * each).map(|head| {
                let rows = (example * heads + head) * queries..(example * heads + head + 1) * queries;
                let q = of_q.get(example, head);
                let y = [of_y.get(example, head), of_gy.get(example, head)];
                let mask = mask.map(|mask| mask.get(example, head));
                (Head { q, k, v, mask }, y, [&largest[rows.clone()], &one_over_sum[rows]])
            });
            backward(&part, served)
        };
        let done: Vec<_> = (0..batch * groups).into_par_iter().map(group_of).collect();
        let shaped = |data: Vec<T>, heads: usize, rows: usize, d: usize| -> Result<Tensor> {
            match self.joined {
                true => Tensor::from_vec(data, (batch, rows, heads * d), &Device::Cpu),
                false => Tensor::from_vec(data, (batch, rows, heads, d), &Device::Cpu)?.transpose(1, 2),
            }
        };
        let dq: Vec<_> = done.iter().flat_map(|group| group.q.chunks_exact(queries * d)).collect();
        let dk: Vec<_> = done.iter().map(|group| &group.k[..]).collect();
        let dv_parts: Vec<_> = done.iter().map(|group| &group.v[..]).collect();
        let together = |parts: &[&[T]], heads, rows, d| {
            shaped(side_by_side(parts, batch, [rows, d]), heads, rows, d).map(Some)
        };
        Ok([
            if q.track_op() { together(&dq, heads, queries, d)? } else { None },
            if k.track_op() { together(&dk, groups, keys, d)? } else { None },
            if v.track_op() { together(&dv_parts, groups, keys, dv)? } else { None },
        ])
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_l: &Layout,
        k: &CpuStorage,
        k_l: &Layout,
        v: &CpuStorage,
        v_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let all = [(q, q_l), (k, k_l), (v, v_l)];
        match q {
            CpuStorage::F32(_) => self.on_cpu::<f32>(all),
            CpuStorage::F64(_) => self.on_cpu::<f64>(all),
            other => bail!("attention: expected f32 or f64, got {:?}", other.dtype()),
        }
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [q, k, v] = match y.dtype() {
            DType::F64 => self.gradients::<f64>([q, k, v], y, gy)?,
            _ => self.gradients::<f32>([q, k, v], y, gy)?,
        };
        Ok((q, k, v))
    }
}

#[cfg(test)]
mod tests;
