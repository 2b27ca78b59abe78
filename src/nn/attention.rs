//! candle_nn's attention with gradients, on every device.

use candle_core::{DType, Result, Tensor, WithDType, bail};
use half::{bf16, f16};

use crate::ops::attention::{Attention, applies};
use crate::ops::softmax::softmax_last_dim;

pub use candle_nn::attention::{
    AttnMask, cpu_flash, flash_attn_varlen_cpu, flash_attn_varlen_unfused, varlen,
};

/// `softmax(q k^T scale + mask) v`: `q` `[batch, heads, seq, d]`, `k` `[batch, kv_heads, kv_seq, d]`, `v` `[batch, kv_heads, kv_seq, dv]`,
/// outputs `[batch, heads, seq, dv]`. Each of the `kv_heads` serves `heads / kv_heads` neighbouring heads.
///
/// `mask` is added to the scores, to whose shape `[batch, heads, seq, kv_seq]` it is broadcast. `do_causal` hides later positions, the last
/// query seeing every key. Scores are bounded by `softcapping * tanh(scores / softcapping)` unless it is 1. In half precision the softmax is
/// computed in f32.
///
/// On the CPU no tensor of all scores is made, unless they are bounded or the mask has a gradient: they are computed in blocks that stay in the
/// cache, and again in the backward pass; in half precision all of it in f32. The outputs then are a view whose features `[batch, seq, heads, dv]` lie
/// together.
///
/// # Errors
/// When shapes or dtypes do not fit, and for a causal mask over fewer keys than queries.
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    let cap = Some(softcapping.into()).filter(|&cap| cap != 1.);
    attend([q, k, v], mask, do_causal, scale.into(), cap)
}

fn attend(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    causally: bool,
    scale: f64,
    cap: Option<f64>,
) -> Result<Tensor> {
    let (batch, heads, seq, d) = q.dims4()?;
    let (kv_batch, kv_heads, kv_seq, kd) = k.dims4()?;
    let (v_batch, v_heads, v_seq, _) = v.dims4()?;
    let fits = [kv_batch, v_batch] == [batch; 2] && kd == d && v_heads == kv_heads && v_seq == kv_seq;
    if !fits || kv_heads == 0 || heads % kv_heads != 0 {
        bail!("sdpa: queries {:?}, keys {:?} and values {:?} do not fit", q.dims(), k.dims(), v.dims())
    }
    if causally && kv_seq < seq {
        bail!("attention: a causal mask over {kv_seq} keys and {seq} queries")
    }
    if cap.is_none() {
        let attention = |mask| Attention { scale, causal: causally, mask };
        if applies([q, k, v], mask) {
            return attention(mask.cloned()).apply(q, k, v);
        }
        let halves = matches!(q.dtype(), DType::F16 | DType::BF16) && q.device().is_cpu();
        if halves && k.dtype() == q.dtype() && v.dtype() == q.dtype() {
            let [wide_q, wide_k, wide_v] = [q, k, v].map(|t| t.to_dtype(DType::F32));
            let (wide_q, wide_k, wide_v) = (wide_q?, wide_k?, wide_v?);
            if applies([&wide_q, &wide_k, &wide_v], mask) {
                return attention(mask.cloned()).apply(&wide_q, &wide_k, &wide_v)?.to_dtype(q.dtype());
            }
        }
    }
    plain([q, k, v], mask, causally, scale, cap)
}

/// The same from products and a softmax of all scores.
pub(crate) fn plain(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    causally: bool,
    scale: f64,
    cap: Option<f64>,
) -> Result<Tensor> {
    let (batch, heads, seq, d) = q.dims4()?;
    let (_, kv_heads, kv_seq, dv) = v.dims4()?;
    // The queries of the heads that share keys are rows of one product: the keys are not repeated.
    let rows = heads / kv_heads * seq;
    let q = (q.contiguous()? * scale)?.reshape((batch, kv_heads, rows, d))?;
    let scores = q.matmul(&k.contiguous()?.t()?)?.reshape((batch, heads, seq, kv_seq))?;
    let scores = match cap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = match mask {
        Some(mask) => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
        None => scores,
    };
    let scores = if causally { scores.broadcast_add(&causal(seq, kv_seq, &scores)?)? } else { scores };
    let weights = softmax_last_dim(&scores)?.reshape((batch, kv_heads, rows, kv_seq))?;
    weights.matmul(&v.contiguous()?)?.reshape((batch, heads, seq, dv))
}

/// 0 where a query may look, -inf elsewhere: `[seq, kv_seq]`, on the device and in the dtype of `like`.
fn causal(seq: usize, kv_seq: usize, like: &Tensor) -> Result<Tensor> {
    let before = kv_seq.saturating_sub(seq);
    let queries = Tensor::arange(before as u32, kv_seq as u32, like.device())?.unsqueeze(1)?;
    let hidden = Tensor::arange(0, kv_seq as u32, like.device())?.unsqueeze(0)?.broadcast_gt(&queries)?;
    let fill = |value: f32| Tensor::full(value, (seq, kv_seq), like.device())?.to_dtype(like.dtype());
    hidden.where_cond(&fill(f32::NEG_INFINITY)?, &fill(0.)?)
}

/// [`sdpa`] of heads that lie side by side, as linear layers give and take them: `q` `[batch, seq, heads * d]`, `k` `[batch, kv_seq, kv_heads * d]`, `v`
/// `[batch, kv_seq, kv_heads * dv]`, outputs `[batch, seq, heads * dv]`. How many heads of keys there are follows from the widths. On the CPU nothing is
/// transposed or copied.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::nn::attention::{multi_head, sdpa};
///
/// let x = Tensor::randn(0f32, 1., (2, 5, 12), &Device::Cpu)?;
/// let split = x.reshape((2, 5, 3, 4))?.transpose(1, 2)?;
/// let apart = sdpa(&split, &split, &split, None, true, 0.5, 1.)?;
/// let joined = multi_head(&x, &x, &x, 3, None, true, 0.5)?;
/// assert_eq!(joined.to_vec3::<f32>()?, apart.transpose(1, 2)?.flatten_from(2)?.to_vec3::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`sdpa`], and when a width does not hold whole heads.
pub fn multi_head(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
) -> Result<Tensor> {
    let (batch, seq, width) = q.dims3()?;
    let (kv_batch, kv_seq, k_width) = k.dims3()?;
    let (v_batch, v_seq, v_width) = v.dims3()?;
    let d = width.checked_div(heads).unwrap_or(0);
    let groups = k_width.checked_div(d).unwrap_or(0);
    let whole = groups > 0
        && heads.is_multiple_of(groups)
        && [width, k_width, v_width] == [heads * d, groups * d, v_width / groups * groups];
    if !whole || [kv_batch, v_batch, v_seq] != [batch, batch, kv_seq] {
        bail!(
            "multi_head: queries {:?}, keys {:?} and values {:?} do not fit {heads} heads",
            q.dims(),
            k.dims(),
            v.dims()
        )
    }
    if applies([q, k, v], mask) && !(do_causal && kv_seq < seq) {
        let attention = Attention { scale: scale.into(), causal: do_causal, mask: mask.cloned() };
        return attention.apply_joined([q, k, v], [heads, groups]);
    }
    let split = |t: &Tensor, heads: usize| {
        let (batch, rows, width) = t.dims3()?;
        t.reshape((batch, rows, heads, width / heads))?.transpose(1, 2)
    };
    let (q, k, v) = (split(q, heads)?, split(k, groups)?, split(v, groups)?);
    attend([&q, &k, &v], mask, do_causal, scale.into(), None)?.transpose(1, 2)?.flatten_from(2)
}

/// Attention in candle's other layout: `q` `[batch, seq, heads, d]`, `k` and `v` `[batch, kv_seq, kv_heads, d]`, outputs
/// `[batch, heads, seq, d]`. Where a gradient is wanted, and on GPUs, it is [`sdpa`]; otherwise candle's function of this name.
///
/// # Errors
/// When shapes or dtypes do not fit; with a gradient, also for a `max_bias` other than 0 and for a causal mask whose `kv_offset` is not the number of
/// keys less that of queries.
pub fn flash_attn<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if q.device().is_cpu() && ![q, k, v].iter().any(|t| t.track_op()) {
        macro_rules! candles {
            ($t:ty) => {
                candle_nn::attention::flash_attn::<$t>(q, k, v, softmax_scale, attn_mask, max_bias, softcap)
            };
        }
        return match q.dtype() {
            DType::F64 => candles!(f64),
            DType::F16 => candles!(f16),
            DType::BF16 => candles!(bf16),
            _ => candles!(f32),
        };
    }
    if max_bias.is_some_and(|bias| bias != 0.) {
        bail!("flash_attn: a gradient with a position bias is not supported, got max_bias {max_bias:?}")
    }
    let (q, k, v) = (q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?);
    let (mask, causal) = match attn_mask {
        AttnMask::None => (None, false),
        AttnMask::Mask(mask) => (Some(mask), false),
        AttnMask::Causal { kv_offset } => {
            let (seq, kv_seq) = (q.dim(2)?, k.dim(2)?);
            if kv_offset + seq != kv_seq {
                bail!(
                    "flash_attn: a causal mask at {kv_offset} for {seq} queries and {kv_seq} keys has no gradient"
                )
            }
            (None, true)
        }
    };
    let cap = softcap.filter(|&cap| cap != 0.).map(f64::from);
    attend([&q, &k, &v], mask.as_ref(), causal, softmax_scale.into(), cap)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::testing::{assert_close, assert_emulated, check_gradients, random, random_var, values};

    const SIZES: [usize; 6] = [2, 4, 3, 5, 2, 3]; // batch, heads, queries, keys, kv_heads, features

    /// Queries, keys, values and a mask.
    fn case() -> Result<([candle_core::Var; 3], Tensor)> {
        let [n, h, s, t, g, d] = SIZES;
        let q = random_var(0, &[n, h, s, d])?;
        Ok(([q, random_var(1, &[n, g, t, d])?, random_var(2, &[n, g, t, 2])?], random(3, &[n, 1, s, t])?))
    }

    #[test]
    fn values_against_loops_and_gradients() -> Result<()> {
        let [n, heads, s, t, g, d] = SIZES;
        let (vars, mask) = case()?;
        let (q, k, v, m) = (values(&vars[0])?, values(&vars[1])?, values(&vars[2])?, values(&mask)?);
        for (causal, cap, masked) in
            [(false, 1., false), (true, 1., true), (true, 2., false), (false, 2., true)]
        {
            let mut expected = Vec::new();
            for row in 0..n * heads * s {
                let (i, h, b) = (row % s, row / s % heads, row / s / heads);
                let key = |j: usize| (b * g + h / (heads / g)) * t + j;
                let weight = |j: usize| -> f64 {
                    let dot: f64 = (0..d).map(|f| q[row * d + f] * k[key(j) * d + f]).sum();
                    let score = if cap == 1. { 0.5 * dot } else { cap * (0.5 * dot / cap).tanh() };
                    let score = score + if masked { m[(b * s + i) * t + j] } else { 0. };
                    if causal && j > i + t - s { 0. } else { score.exp() }
                };
                let total: f64 = (0..t).map(weight).sum();
                expected.extend(
                    (0..2).map(|f| (0..t).map(|j| weight(j) * v[key(j) * 2 + f]).sum::<f64>() / total),
                );
            }
            let mask = masked.then_some(&mask);
            let run = |a: &[Tensor]| sdpa(&a[0], &a[1], &a[2], mask, causal, 0.5, cap as f32);
            let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            assert_close(&run(&tensors)?, &expected, 1e-13);
            check_gradients(&vars, run);
            let narrow: Result<Vec<Tensor>> = tensors.iter().map(|t| t.to_dtype(DType::F32)).collect();
            let narrow = narrow?;
            assert_emulated(|| Ok(vec![run(&narrow)?]), 1e-5)?;
        }
        Ok(())
    }

    /// A query that may look at no key has output 0 and no gradient, and the others have those they have without it.
    #[test]
    fn a_query_wholly_masked() -> Result<()> {
        let [n, heads, s, t, ..] = SIZES;
        let (vars, _) = case()?;
        // In every example and head the middle one of three queries.
        let mask: Vec<f64> = (0..s * t).map(|i| if i / t == 1 { f64::NEG_INFINITY } else { 0. }).collect();
        let mask = Tensor::from_vec(mask, (1, 1, s, t), &Device::Cpu)?;
        let loss = |y: &Tensor| -> Result<Tensor> {
            let others = Tensor::cat(&[y.narrow(2, 0, 1)?, y.narrow(2, 2, 1)?], 2)?;
            others.mul(&random(5, others.dims())?)?.sum_all()
        };
        for cap in [1f32, 2.] {
            let free = sdpa(&vars[0], &vars[1], &vars[2], None, false, 0.5, cap)?;
            let expected = loss(&free)?.backward()?;
            let run = || -> Result<()> {
                let y = sdpa(&vars[0], &vars[1], &vars[2], Some(&mask), false, 0.5, cap)?;
                assert_eq!(values(&y.narrow(2, 1, 1)?)?, vec![0.; n * heads * 2]);
                assert_close(&y.narrow(2, 0, 1)?, &values(&free.narrow(2, 0, 1)?)?, 1e-13);
                let grads = loss(&y)?.backward()?;
                for var in &vars {
                    let expected = expected.get(var).map(values).transpose()?.unwrap_or_default();
                    assert_close(grads.get(var).unwrap_or(&y), &expected, 1e-13);
                }
                Ok(())
            };
            run()?;
            crate::gpu::emulate::emulate(run)?;
        }
        // With a gradient and without.
        let turned = |t: &Tensor| t.narrow(0, 0, 1)?.narrow(3, 0, 2)?.transpose(1, 2)?.contiguous();
        let [q, k, v] = [turned(&vars[0])?, turned(&vars[1])?, turned(&vars[2])?];
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let cast = |t: &Tensor| t.to_dtype(dtype);
            let (q, k, v, mask) = (cast(&q)?, cast(&k)?, cast(&v)?, cast(&mask.reshape((s, t))?)?);
            let flash = |q: &Tensor, k: &Tensor, v: &Tensor| {
                flash_attn::<f32>(q, k, v, 0.5, AttnMask::Mask(mask.clone()), None, None)
            };
            let tracked = flash(&q, &k, &v)?;
            let plain = flash(&q.detach(), &k.detach(), &v.detach())?;
            assert_eq!(values(&tracked.narrow(2, 1, 1)?)?, vec![0.; heads * 2]);
            assert_close(&plain, &values(&tracked)?, 2e-2);
        }
        Ok(())
    }

    #[test]
    fn with_a_gradient_as_candles_own() -> Result<()> {
        let (vars, _) = case()?;
        let turned = |t: &Tensor| t.narrow(3, 0, 2)?.transpose(1, 2)?.contiguous()?.to_dtype(DType::F32);
        let [q, k, v] = [turned(&vars[0])?, turned(&vars[1])?, turned(&vars[2])?];
        let kinds = [(2, AttnMask::None, None), (2, AttnMask::causal_with_offset(2), None)];
        let explicit = AttnMask::Mask(random(4, &[3, 5])?.to_dtype(DType::F32)?);
        for (n, mask, cap) in
            kinds.into_iter().chain([(1, explicit, Some(1.5)), (1, AttnMask::None, Some(1.))])
        {
            let [q, k, v] = [q.narrow(0, 0, n)?, k.narrow(0, 0, n)?, v.narrow(0, 0, n)?];
            let expected = values(&candle_nn::attention::flash_attn::<f32>(
                &q.detach(),
                &k.detach(),
                &v.detach(),
                0.5,
                mask.clone(),
                None,
                cap,
            )?)?;
            let found = flash_attn::<f32>(&q, &k, &v, 0.5, mask, None, cap)?;
            assert_close(&found, &expected, 1e-5);
            let grads = found.sqr()?.sum_all()?.backward()?;
            assert!(vars.iter().all(|var| grads.get(var).is_some()));
        }
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        let x = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let q = x(&[1, 4, 3, 2])?;
        let call = |k: &Tensor, v: &Tensor, causal| sdpa(&q, k, v, None, causal, 1., 1.);
        for (k, v) in
            [([1, 3, 5, 2], [1, 3, 5, 2]), ([1, 2, 5, 3], [1, 2, 5, 3]), ([1, 2, 5, 2], [1, 2, 4, 2])]
        {
            assert!(call(&x(&k)?, &x(&v)?, false).is_err());
        }
        let few = x(&[1, 4, 2, 2])?;
        assert!(call(&few, &few, false).is_ok() && call(&few, &few, true).is_err());
        let var = candle_core::Var::from_tensor(&q)?;
        let flash = |mask, bias| flash_attn::<f32>(&var, &q, &q, 1., mask, bias, None);
        assert!(flash(AttnMask::None, Some(8.)).is_err());
        assert!(flash(AttnMask::causal_with_offset(1), None).is_err());
        Ok(())
    }
}
