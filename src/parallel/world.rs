//! A process's place among the others, and the meetings at which what went wrong on one becomes known to all.

use super::communicator::{Alone, Communicator, LONGEST_WAIT, Transfer};
use candle_core::{Device, Error, Result, Tensor, bail};
use half::bf16;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A process's place among others. Clones are the same place.
#[derive(Debug, Clone)]
pub struct World {
    engine: Arc<dyn Communicator>,
    /// Nanoseconds in messages.
    waited: Arc<AtomicU64>,
    /// Whether gradients are added up in bfloat16.
    bf16: Arc<AtomicBool>,
}

/// Why there is no step.
#[derive(Debug, Clone)]
pub(crate) enum Trouble {
    /// NaN or infinity, and where.
    NonFinite(String),
    Failed(String),
}

/// Where ranks meet: the name of the call, and how often it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub of: &'static str,
    pub call: &'static str,
    pub step: usize,
}

impl Trouble {
    /// An error, without its backtrace.
    pub fn failed(error: &Error) -> Self {
        match error {
            Error::WithBacktrace { inner, .. } => Self::failed(inner),
            error => Self::Failed(error.to_string()),
        }
    }

    /// As an error.
    pub fn error(self) -> Error {
        match self {
            Trouble::NonFinite(what) | Trouble::Failed(what) => Error::Msg(what),
        }
    }
}

impl World {
    /// The place of an engine's process.
    pub fn new(engine: impl Communicator + 'static) -> Self {
        Self { engine: Arc::new(engine), waited: Arc::default(), bf16: Arc::default() }
    }

    /// One process.
    pub fn alone() -> Self {
        Self::new(Alone)
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.engine.rank()
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.engine.size()
    }

    /// Whether this is rank 0, who writes files and progress.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is nobody else.
    pub fn is_alone(&self) -> bool {
        self.size() == 1
    }

    /// The rows of a batch of `rows` that are this process's: consecutive ones, in the order of the ranks, their numbers equal up to one. Of
    /// a batch of fewer rows than processes some have none.
    pub fn part(&self, rows: usize) -> Range<usize> {
        let (rank, size) = (self.rank(), self.size());
        let from = |rank: usize| rank * (rows / size) + rank.min(rows % size);
        from(rank)..from(rank + 1)
    }

    /// How long a process waits for the others before it gives up; ten minutes at first, and at most 34 years.
    pub fn set_time_limit(&self, limit: Duration) {
        self.engine.set_time_limit(limit.min(LONGEST_WAIT));
    }

    /// Adds gradients up in bfloat16 (or again in f32 and f64, the default), for the optimizers that are shared from now on: half the bytes of
    /// f32, for mean gradients that are off by up to `n 2^-8` times the sum of the sizes of the `n` processes' parts. Factors, counts and
    /// parameters are exact as before, and all processes have the same bits. By NCCL each partial sum is rounded, and by the other engines
    /// the sum once. All processes say the same; [`share`](crate::optim::NaturalGradient::share) refuses where they do not.
    pub fn set_bf16_gradients(&self, on: bool) {
        self.bf16.store(on, Ordering::Relaxed);
    }

    pub(crate) fn has_bf16_gradients(&self) -> bool {
        self.bf16.load(Ordering::Relaxed)
    }

    /// How long this process has been in messages so far, waiting for others included.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }

    fn timed<T>(&self, message: impl FnOnce(&dyn Communicator) -> T) -> T {
        let begun = Instant::now();
        let done = message(self.engine.as_ref());
        self.waited.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        done
    }

    /// Refuses, on all processes, a `value` that is not rank 0's: of an option, say, that all must have been given alike. `what` is its name
    /// in the message. All processes call it.
    ///
    /// # Errors
    /// When a process has another value, and when one does not come.
    pub fn agree(&self, what: &str, value: &str) -> Result<()> {
        self.agree_all("agree", &[(what.to_string(), value.to_string())])
    }

    /// [`agree`](Self::agree) of several values; the first that differs is named.
    ///
    /// # Errors
    /// As [`agree`](Self::agree).
    pub fn agree_all(&self, who: &str, values: &[(String, String)]) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let text: Vec<String> = values.iter().map(|(name, value)| format!("{name}\u{1f}{value}")).collect();
        let texts = self.timed(|engine| engine.gather(text.join("\u{1e}").as_bytes()))?;
        let lines = |text: &[u8]| -> Vec<String> {
            String::from_utf8_lossy(text).split('\u{1e}').map(str::to_string).collect()
        };
        let first = texts.first().map(|text| lines(text)).unwrap_or_default();
        let shown = |line: Option<&String>| match line.and_then(|line| line.split_once('\u{1f}')) {
            Some((name, value)) => format!("{name} {value}"),
            None => "nothing more".to_string(),
        };
        for (rank, text) in texts.iter().enumerate().skip(1) {
            let other = lines(text);
            let differs = (0..first.len().max(other.len())).find(|&i| first.get(i) != other.get(i));
            if let Some(at) = differs {
                let (own, zero) = (shown(other.get(at)), shown(first.get(at)));
                bail!("{who}: rank {rank} has {own}, where rank 0 has {zero}; all processes need the same")
            }
        }
        Ok(())
    }

    /// Replaces numbers by their sums over all processes: of losses and counts to report, say. All processes call it, with as many.
    ///
    /// # Errors
    /// When a process does not come or makes another call.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let told = self.meet(Place { of: "world", call: "sum", step: values.len() }, Ok(values.to_vec()));
        let told = told.map_err(Trouble::error)?;
        for (index, value) in values.iter_mut().enumerate() {
            *value = told.iter().map(|numbers| numbers.get(index).copied().unwrap_or(0.0)).sum();
        }
        Ok(())
    }

    pub(crate) fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        if values.is_empty() { Ok(()) } else { self.timed(|engine| engine.sum_f64(values)) }
    }

    pub(crate) fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        if values.is_empty() { Ok(()) } else { self.timed(|engine| engine.sum_f32(values)) }
    }

    /// The sums of this rank's part of `values`, which are the parts of all ranks one after the other, of the lengths `parts`.
    pub(crate) fn scatter_sum_f64(&self, values: Vec<f64>, parts: &[usize]) -> Result<Vec<f64>> {
        if values.is_empty() {
            Ok(values)
        } else {
            self.timed(|engine| engine.scatter_sum_f64(values, parts))
        }
    }

    pub(crate) fn scatter_sum_f32(&self, values: Vec<f32>, parts: &[usize]) -> Result<Vec<f32>> {
        if values.is_empty() {
            Ok(values)
        } else {
            self.timed(|engine| engine.scatter_sum_f32(values, parts))
        }
    }

    pub(crate) fn sum_bf16(&self, values: &mut [bf16]) -> Result<()> {
        if values.is_empty() { Ok(()) } else { self.timed(|engine| engine.sum_bf16(values)) }
    }

    pub(crate) fn scatter_sum_bf16(&self, values: Vec<bf16>, parts: &[usize]) -> Result<Vec<bf16>> {
        if values.is_empty() {
            Ok(values)
        } else {
            self.timed(|engine| engine.scatter_sum_bf16(values, parts))
        }
    }

    /// Whether tensors on a device stay there.
    pub(crate) fn takes(&self, device: &Device) -> bool {
        self.engine.takes(device)
    }

    pub(crate) fn transfer(&self, transfers: Vec<(Transfer, Tensor)>) -> Result<Vec<Tensor>> {
        if transfers.is_empty() { Ok(vec![]) } else { self.timed(|engine| engine.transfer(transfers)) }
    }

    #[cfg(feature = "nccl")]
    pub(super) fn time_limit(&self) -> Duration {
        self.engine.time_limit()
    }

    #[cfg(any(test, feature = "nccl"))]
    pub(super) fn engine(&self) -> &dyn Communicator {
        self.engine.as_ref()
    }

    /// Meets all ranks at `place` with what this one has to say: as many numbers as the others, or its trouble. Returns all ranks' numbers, in
    /// their order, and on every rank the same trouble where one has any. Nobody leaves before: that is why a local error is brought here
    /// and not returned.
    pub(crate) fn meet(
        &self,
        place: Place,
        local: std::result::Result<Vec<f64>, Trouble>,
    ) -> std::result::Result<Vec<Vec<f64>>, Trouble> {
        let bytes = local.map(|numbers| numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
        let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let told = self.exchange(place, bytes)?;
        Ok(told.iter().map(|bytes| bytes.chunks_exact(8).map(number).collect()).collect())
    }

    /// [`meet`](Self::meet) with bytes, of any length on each rank.
    pub(crate) fn exchange(
        &self,
        place: Place,
        local: std::result::Result<Vec<u8>, Trouble>,
    ) -> std::result::Result<Vec<Vec<u8>>, Trouble> {
        let reports = self
            .timed(|engine| engine.gather(&written(place, local)))
            .map_err(|error| Trouble::failed(&error))?;
        let mut told = Vec::with_capacity(reports.len());
        let mut trouble = None;
        let here = format!("{} {} {}", place.of, place.call, place.step);
        for (rank, report) in reports.into_iter().enumerate() {
            let Some((there, kind, rest)) = read(&report) else {
                return Err(Trouble::Failed(format!(
                    "parallel: at {here} rank {rank} sends no report; all processes must make the same calls"
                )));
            };
            if there != here {
                let (there, here) = (in_words(&there), in_words(&here));
                return Err(Trouble::Failed(format!(
                    "parallel: rank {rank} is {there}, and rank {} {here}; all processes must make the same calls",
                    self.rank()
                )));
            }
            let text = || named(rank, &String::from_utf8_lossy(rest));
            match (kind, &trouble) {
                (OK, _) => {}
                (NON_FINITE, None) => trouble = Some(Trouble::NonFinite(text())),
                // What failed counts before what is to be left out.
                (FAILED, None | Some(Trouble::NonFinite(_))) => trouble = Some(Trouble::Failed(text())),
                _ => {}
            }
            told.push(rest.to_vec());
        }
        match trouble {
            Some(trouble) => Err(trouble),
            None => Ok(told),
        }
    }
}

const OK: u8 = 0;
const NON_FINITE: u8 = 1;
const FAILED: u8 = 2;

/// What a rank says, with its number; what it passes on has that of whom it comes from.
pub(super) fn named(rank: usize, said: &str) -> String {
    let whose = said.strip_prefix("rank ").and_then(|rest| rest.split_once(": "));
    match whose.is_some_and(|(number, _)| number.parse::<usize>().is_ok()) {
        true => said.to_string(),
        false => format!("rank {rank}: {said}"),
    }
}

/// A place that a report names.
fn in_words(place: &str) -> String {
    let mut words = place.split(' ');
    let mut next = || words.next().unwrap_or_default();
    let (of, call, step) = (next(), next(), next());
    format!("in {call} of {of} after {step} steps")
}

/// `of call step`, a zero, what kind of report it is, and what it says.
fn written(place: Place, local: std::result::Result<Vec<u8>, Trouble>) -> Vec<u8> {
    let mut bytes = format!("{} {} {}\0", place.of, place.call, place.step).into_bytes();
    let (kind, text) = match local {
        Ok(bytes) => (OK, bytes),
        Err(Trouble::NonFinite(what)) => (NON_FINITE, what.into_bytes()),
        Err(Trouble::Failed(what)) => (FAILED, what.into_bytes()),
    };
    bytes.push(kind);
    bytes.extend(text);
    bytes
}

fn read(report: &[u8]) -> Option<(String, u8, &[u8])> {
    let end = report.iter().position(|&byte| byte == 0)?;
    let (kind, rest) = report[end + 1..].split_first()?;
    Some((String::from_utf8_lossy(&report[..end]).into_owned(), *kind, rest))
}
