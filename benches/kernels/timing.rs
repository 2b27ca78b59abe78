//! Seconds of a call.

use candle_core::{Device, Result};
use std::time::{Duration, Instant};

/// How long a call takes.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// The median of the repeats, in seconds.
    pub median: f64,
    /// The fastest repeat, in seconds.
    pub least: f64,
}

impl Times {
    pub fn of(mut repeats: Vec<f64>) -> Self {
        repeats.sort_by(f64::total_cmp);
        let middle = repeats.len() / 2;
        let median = match repeats.len() {
            0 => f64::NAN,
            n if n % 2 == 0 => (repeats[middle - 1] + repeats[middle]) / 2.0,
            _ => repeats[middle],
        };
        Self { median, least: repeats.first().copied().unwrap_or(f64::NAN) }
    }
}

/// Seconds of `calls` calls of `f`, from an empty queue to an empty queue.
pub fn once(device: &Device, calls: usize, f: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..calls {
        f()?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64())
}

/// A repeat is as many calls as take this long.
const REPEAT: f64 = 5e-3;
/// A measurement takes about this long at most, but has its two repeats in any case.
const MOST: Duration = Duration::from_secs(3);

/// The time of a call of `f`.
pub fn time(device: &Device, quick: bool, f: &mut dyn FnMut() -> Result<()>) -> Result<Times> {
    let start = Instant::now();
    // The first calls load kernels and fill the allocator's pool.
    once(device, 1, f)?;
    let one = once(device, 1, f)?;
    let calls = ((REPEAT / one.max(1e-9)).ceil() as usize).clamp(1, 10_000);
    once(device, calls, f)?;
    let (few, many) = (2, if quick { 2 } else { 15 });
    let mut repeats = vec![];
    while repeats.len() < few || (repeats.len() < many && start.elapsed() < MOST) {
        repeats.push(once(device, calls, f)? / calls as f64);
    }
    Ok(Times::of(repeats))
}
