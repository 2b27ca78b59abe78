//! Threads of one process as ranks: for tests, and where there is no MPI.

use super::World;
use super::communicator::{Communicator, TIME_LIMIT, add};
use candle_core::{Result, bail};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ranks that are threads of one process.
///
/// ```
/// use kronwake::parallel::Threads;
///
/// # fn main() -> candle_core::Result<()> {
/// let ranks: Vec<_> = Threads::worlds(3)
///     .into_iter()
///     .map(|world| std::thread::spawn(move || world.part(10)))
///     .collect();
/// let parts: Vec<_> = ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect();
/// assert_eq!(parts, [0..4, 4..7, 7..10]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    size: usize,
    limit: Mutex<Duration>,
    table: Arc<Table>,
}

/// Where ranks lay down what they bring.
#[derive(Debug)]
struct Table {
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Debug)]
struct Round {
    number: u64,
    brought: Vec<Option<Parcel>>,
    /// How many have not yet taken what the round has gathered.
    leaving: usize,
    gathered: Arc<Vec<Parcel>>,
    /// Ranks that have left, in their order: who leaves because another did is not the one to name.
    gone: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Parcel {
    Bytes(Vec<u8>),
    F64(Vec<f64>),
    F32(Vec<f32>),
}

impl Threads {
    /// A world for each of `size` threads, which each takes its own of.
    pub fn worlds(size: usize) -> Vec<World> {
        let round = Round {
            number: 0,
            brought: vec![None; size],
            leaving: 0,
            gathered: Arc::default(),
            gone: vec![],
        };
        let table = Arc::new(Table { round: Mutex::new(round), changed: Condvar::new() });
        let of =
            |rank| World::new(Self { rank, size, limit: Mutex::new(TIME_LIMIT), table: Arc::clone(&table) });
        (0..size).map(of).collect()
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.table.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`, or says who is missing.
    fn until<'a>(
        &'a self,
        mut round: MutexGuard<'a, Round>,
        ready: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>> {
        let limit = *self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Instant::now() + limit;
        while !ready(&round) {
            if let Some(rank) = round.gone.iter().find(|&&rank| round.brought[rank].is_none()) {
                bail!("parallel: rank {rank} has left, and the others wait for it")
            }
            let now = Instant::now();
            if now >= end {
                let missing: Vec<String> =
                    (0..self.size).filter(|&r| round.brought[r].is_none()).map(|r| r.to_string()).collect();
                bail!("parallel: rank {} did not come within {} s", missing.join(", "), limit.as_secs_f64())
            }
            let waited = self.table.changed.wait_timeout(round, end - now);
            round = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(round)
    }

    fn exchange(&self, parcel: Parcel) -> Result<Arc<Vec<Parcel>>> {
        // The last round's may still be taking what they gathered.
        let mut round = self.until(self.round(), |round| round.leaving == 0)?;
        let number = round.number;
        round.brought[self.rank] = Some(parcel);
        if round.brought.iter().all(Option::is_some) {
            round.gathered = Arc::new(round.brought.iter_mut().filter_map(Option::take).collect());
            round.number += 1;
            round.leaving = self.size;
            self.table.changed.notify_all();
        }
        let mut round = self.until(round, |round| round.number > number)?;
        round.leaving -= 1;
        if round.leaving == 0 {
            self.table.changed.notify_all();
        }
        Ok(Arc::clone(&round.gathered))
    }

    fn sum<T: Copy + std::ops::AddAssign>(
        &self,
        values: &mut [T],
        parcel: Parcel,
        of: impl Fn(&Parcel) -> Option<Vec<T>>,
    ) -> Result<()> {
        let parcels = self.exchange(parcel)?;
        let rows: Vec<Vec<T>> = parcels.iter().map(|parcel| of(parcel).unwrap_or_default()).collect();
        add(values, &rows)
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let parcels = self.exchange(Parcel::Bytes(bytes.to_vec()))?;
        let bytes = |(rank, parcel): (usize, &Parcel)| match parcel {
            Parcel::Bytes(bytes) => Ok(bytes.clone()),
            Parcel::F64(_) | Parcel::F32(_) => {
                bail!(
                    "parallel: rank {rank} adds numbers where this rank gathers; all must make the same calls"
                )
            }
        };
        parcels.iter().enumerate().map(bytes).collect()
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.sum(values, Parcel::F64(values.to_vec()), |parcel| match parcel {
            Parcel::F64(row) => Some(row.clone()),
            Parcel::Bytes(_) | Parcel::F32(_) => None,
        })
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.sum(values, Parcel::F32(values.to_vec()), |parcel| match parcel {
            Parcel::F32(row) => Some(row.clone()),
            Parcel::Bytes(_) | Parcel::F64(_) => None,
        })
    }

    fn time_limit(&self) -> Duration {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_time_limit(&self, limit: Duration) {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    fn abort(&self, _: &str) {
        let mut round = self.round();
        if !round.gone.contains(&self.rank) {
            round.gone.push(self.rank);
        }
        drop(round);
        self.table.changed.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.abort("");
    }
}
