//! candle_nn's caches of keys and values. Its own write into a buffer, which cuts the graph; these keep it where there is one.

use candle_core::{Device, Result, Tensor, bail};

pub use candle_nn::kv_cache::*;

/// All keys and values so far, with their graph until [`ConcatKvCache::reset`]: reset before each training pass.
#[derive(Debug, Clone)]
pub struct ConcatKvCache {
    pair: Option<(Tensor, Tensor)>,
    dim: usize,
}

impl ConcatKvCache {
    /// A cache that grows along dimension `dim`.
    pub fn new(dim: usize) -> Self {
        Self { pair: None, dim }
    }

    /// Positions so far.
    pub fn current_seq_len(&self) -> usize {
        self.k().and_then(|k| k.dims().get(self.dim).copied()).unwrap_or(0)
    }

    /// Whether nothing was appended since the last reset.
    pub fn is_empty(&self) -> bool {
        self.pair.is_none()
    }

    /// The dimension along which it grows.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The keys so far.
    pub fn k(&self) -> Option<&Tensor> {
        self.pair.as_ref().map(|(k, _)| k)
    }

    /// The values so far.
    pub fn v(&self) -> Option<&Tensor> {
        self.pair.as_ref().map(|(_, v)| v)
    }

    /// Appends keys and values and gives all so far.
    ///
    /// # Errors
    /// When the shapes do not fit those so far in all dimensions but the one along which the cache grows.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let after = |past: Option<&Tensor>, new: &Tensor| match past {
            Some(past) => Tensor::cat(&[past, new], self.dim),
            None => new.contiguous(),
        };
        let all = (after(self.k(), k)?, after(self.v(), v)?);
        self.pair = Some(all.clone());
        Ok(all)
    }

    /// Empties the cache.
    pub fn reset(&mut self) {
        self.pair = None;
    }

    /// Keys and values.
    pub fn into_inner(self) -> Option<(Tensor, Tensor)> {
        self.pair
    }
}

/// All keys and values so far. Without a gradient they lie in candle's buffer; with one they are kept as by [`ConcatKvCache`]: reset
/// before each training pass.
#[derive(Debug, Clone)]
pub struct KvCache {
    plain: candle_nn::kv_cache::KvCache,
    tracked: ConcatKvCache,
}

impl KvCache {
    /// A cache that grows along dimension `dim`; `max_seq_len` is the first buffer's length and not a limit.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { plain: candle_nn::kv_cache::KvCache::new(dim, max_seq_len), tracked: ConcatKvCache::new(dim) }
    }

    /// The keys so far.
    ///
    /// # Errors
    /// When the device fails.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.tracked.k().map_or_else(|| self.plain.k(), |k| Ok(Some(k.clone())))
    }

    /// The values so far.
    ///
    /// # Errors
    /// When the device fails.
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.tracked.v().map_or_else(|| self.plain.v(), |v| Ok(Some(v.clone())))
    }

    /// Positions so far.
    pub fn current_seq_len(&self) -> usize {
        if self.tracked.is_empty() { self.plain.current_seq_len() } else { self.tracked.current_seq_len() }
    }

    /// Appends keys and values and gives all so far.
    ///
    /// # Errors
    /// When the shapes do not fit those so far in all dimensions but the one along which the cache grows.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        if self.tracked.is_empty() {
            if !k.track_op() && !v.track_op() {
                return self.plain.append(k, v);
            }
            if let (Some(k), Some(v)) = (self.plain.k()?, self.plain.v()?) {
                self.tracked.append(&k, &v)?;
            }
        }
        self.tracked.append(k, v)
    }

    /// Empties the cache.
    pub fn reset(&mut self) {
        self.plain.reset();
        self.tracked.reset();
    }
}

/// The last keys and values. With a gradient it takes one append between resets: reset before each training pass.
///
/// A query sees the last `max_seq_len` positions up to its own, however many are appended at once. (candle's mask lets it see one more where more
/// are appended than the buffer holds, and its positions are turned where as many are.)
#[derive(Debug, Clone)]
pub struct RotatingKvCache {
    buffer: candle_nn::kv_cache::RotatingKvCache,
    max_seq_len: usize,
}

impl RotatingKvCache {
    /// A cache of `max_seq_len` positions along dimension `dim`.
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { buffer: candle_nn::kv_cache::RotatingKvCache::new(dim, max_seq_len), max_seq_len }
    }

    /// The keys in the buffer, without their graph.
    ///
    /// # Errors
    /// When the device fails.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.buffer.k()
    }

    /// The values in the buffer, without their graph.
    ///
    /// # Errors
    /// When the device fails.
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.buffer.v()
    }

    /// Appends keys and values and gives those that queries of the new positions may look at, in the buffer's order.
    ///
    /// # Errors
    /// With a gradient, when the cache is not empty.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let tracked = k.track_op() || v.track_op();
        if tracked && self.current_seq_len() > 0 {
            bail!(
                "rotating cache: an append with a gradient to {} earlier positions; reset it first",
                self.current_seq_len()
            )
        }
        let all = self.buffer.append(&k.detach(), &v.detach())?;
        Ok(if tracked { (k.clone(), v.clone()) } else { all })
    }

    /// The index at which the buffer is written next.
    pub fn offset(&self) -> usize {
        self.buffer.offset()
    }

    /// Positions so far, also those that are no longer in the buffer.
    pub fn current_seq_len(&self) -> usize {
        self.buffer.current_seq_len()
    }

    /// The mask of `seq_len` queries that are appended next, `[seq_len, keys]` of u8: 1 where they may not look. None for a single query, which
    /// may look anywhere. Call it before the append.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn attn_mask(&self, seq_len: usize, device: &Device) -> Result<Option<Tensor>> {
        if seq_len == 1 {
            return Ok(None);
        }
        let (before, positions) = (self.current_seq_len(), self.positions(seq_len));
        let hidden = |query: usize| {
            positions.iter().map(move |&key| u8::from(key > query || key + self.max_seq_len <= query))
        };
        let mask: Vec<u8> = (before..before + seq_len).flat_map(hidden).collect();
        Tensor::from_vec(mask, (seq_len, positions.len()), device).map(Some)
    }

    /// The positions of what the next append of `seq_len` gives. Call it before the append.
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        if seq_len >= self.max_seq_len {
            // What is appended is given as it is.
            return (self.current_seq_len()..self.current_seq_len() + seq_len).collect();
        }
        self.buffer.positions(seq_len)
    }

    /// Empties the cache.
    pub fn reset(&mut self) {
        self.buffer.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random, random_var, values};
    use candle_core::Var;

    fn sum_of_squares(pair: &(Tensor, Tensor)) -> Result<Tensor> {
        pair.0.sqr()?.sum_all()? + pair.1.sqr()?.sum_all()?
    }

    #[test]
    fn values_are_candles_and_gradients_reach_every_append() -> Result<()> {
        let vars: Vec<Var> = (0..4).map(|i| random_var(i, &[1, 2, 3, 2])).collect::<Result<_>>()?;
        let (mut ours, mut candles) = (KvCache::new(2, 4), candle_nn::kv_cache::KvCache::new(2, 4));
        let start = random(9, &[1, 2, 2, 2])?; // appended without a gradient
        candles.append(&start, &start)?;
        ours.append(&start, &start)?;
        let mut last = None;
        for pair in vars.chunks(2) {
            let expected = candles.append(&pair[0].detach(), &pair[1].detach())?;
            let found = ours.append(&pair[0], &pair[1])?;
            assert_close(&found.0, &values(&expected.0)?, 0.);
            assert_close(&found.1, &values(&expected.1)?, 0.);
            assert_eq!(ours.current_seq_len(), candles.current_seq_len());
            last = Some(found);
        }
        let Some(last) = last else { bail!("nothing was appended") };
        let grads = sum_of_squares(&last)?.backward()?;
        for var in &vars {
            let Some(grad) = grads.get(var) else { bail!("no gradient") };
            assert_close(grad, &values(&(var.as_tensor() * 2.)?)?, 1e-15);
        }
        ours.reset();
        assert!(ours.k()?.is_none() && ours.v()?.is_none() && ours.current_seq_len() == 0);
        Ok(())
    }

    /// The values that come back are those of the positions, and a query at `p` sees those of them that lie in `p - max_seq_len + 1 ..= p`.
    #[test]
    fn masks_of_a_rotating_cache() -> Result<()> {
        for max in [3usize, 4, 8] {
            for before in 0..10 {
                for seq_len in 1..=max + 2 {
                    let mut cache = RotatingKvCache::new(2, max);
                    // Each position's own number.
                    let at = |from: usize, n: usize| {
                        Tensor::arange(from as f64, (from + n) as f64, &Device::Cpu)?.reshape((1, 1, n, 1))
                    };
                    for position in 0..before {
                        cache.append(&at(position, 1)?, &at(position, 1)?)?;
                    }
                    let positions = cache.positions(seq_len);
                    let mask = cache.attn_mask(seq_len, &Device::Cpu)?;
                    let (keys, _) = cache.append(&at(before, seq_len)?, &at(before, seq_len)?)?;
                    let found: Vec<usize> = values(&keys)?.into_iter().map(|v| v as usize).collect();
                    assert_eq!(positions, found, "{max} {before} {seq_len}");
                    let Some(mask) = mask else {
                        // A single query is the last position, which sees all.
                        assert_eq!(seq_len, 1);
                        continue;
                    };
                    assert_eq!(mask.dims(), [seq_len, positions.len()]);
                    for (i, row) in mask.to_vec2::<u8>()?.into_iter().enumerate() {
                        for (&hidden, &position) in row.iter().zip(&positions) {
                            let query = before + i;
                            let seen = (query + 1).saturating_sub(max)..=query;
                            assert_eq!(hidden == 0, seen.contains(&position), "{max} {before} {seq_len} {i}");
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn rotating() -> Result<()> {
        for max in [2, 3, 8] {
            let var = random_var(0, &[1, 2, 3, 2])?;
            let (mut ours, mut candles) =
                (RotatingKvCache::new(2, max), candle_nn::kv_cache::RotatingKvCache::new(2, max));
            let expected = candles.append(&var.detach(), &var.detach())?;
            let found = ours.append(&var, &var)?;
            assert_close(&found.0, &values(&expected.0)?, 0.);
            assert!(sum_of_squares(&found)?.backward()?.get(&var).is_some());
            assert!(ours.append(&var, &var).is_err());
            let (k, v) = ours.append(&var.detach(), &var.detach())?;
            let (ek, ev) = candles.append(&var.detach(), &var.detach())?;
            assert_close(&k, &values(&ek)?, 0.);
            assert_close(&v, &values(&ev)?, 0.);
            assert_eq!((ours.offset(), ours.positions(2)), (candles.offset(), candles.positions(2)));
        }
        Ok(())
    }
}
