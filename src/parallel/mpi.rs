//! MPI, by way of the crate ferrompi.
//!
//! Each call is a roll call: every rank reports to rank 0 in a small message, and rank 0 answers all with what they brought, or with who is
//! missing. So a rank that has left or hangs has a name, and nobody waits for it beyond the time limit. Long messages and sums are
//! collectives of MPI, which begin when all have come.

use super::World;
use super::bytes::pieces;
use super::communicator::{Communicator, TIME_LIMIT, add, until, widened};
use candle_core::{Error, Result, bail};
use ferrompi::{Communicator as Comm, MpiDatatype, ReduceOp, Request, Source, ThreadLevel};
use half::bf16;
use std::fmt;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are sent with a roll call.
const SHORT: usize = 1024;
/// How long ranks that have to give up wait, so that each has said why before the first ends the others.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Bytes of one message at first: MPI counts elements in 32 bits.
const LARGEST: usize = 1 << 30;

const COME: i32 = 1;
const VERDICT: i32 = 2;
const LEFT: i32 = 3;

/// This process among those that `mpirun` has started: a [`World`], to which it dereferences. It begins and ends MPI, so it has to outlive
/// the training: make it first.
///
/// ```no_run
/// use kronwake::parallel::{Mpi, Placement};
/// # use kronwake::optim::NaturalGradient;
/// # fn train(opt: &mut NaturalGradient) -> candle_core::Result<()> {
/// let world = Mpi::init()?;
/// opt.share(&world, Placement::default())?;
/// let rows = world.part(256); // of each batch
/// # Ok(())
/// # }
/// ```
pub struct Mpi {
    world: World,
    engine: Arc<Engine>,
    /// Not dropped where finalizing would wait for a rank that does not come.
    mpi: ManuallyDrop<ferrompi::Mpi>,
}

struct Engine {
    comm: Comm,
    rank: usize,
    size: usize,
    limit: Mutex<Duration>,
    state: AtomicU8,
    /// Bytes of one message.
    largest: AtomicUsize,
}

const WHOLE: u8 = 0;
/// A rank has left; all that are there may end in order.
const ENDING: u8 = 1;
/// A rank does not come.
const BROKEN: u8 = 2;

fn of_mpi(error: ferrompi::Error) -> Error {
    Error::Msg(format!("parallel: MPI: {error}"))
}

impl Mpi {
    /// Begins MPI. Started without `mpirun`, the process is alone.
    ///
    /// # Errors
    /// When MPI cannot begin, or has before.
    pub fn init() -> Result<Self> {
        let mpi = ferrompi::Mpi::init_thread(ThreadLevel::Serialized).map_err(of_mpi)?;
        // Messages of a communicator of our own cannot meet those of the program.
        let comm = mpi.world().duplicate().map_err(of_mpi)?;
        let (rank, size) = (comm.rank() as usize, comm.size() as usize);
        let engine = Arc::new(Engine {
            comm,
            rank,
            size,
            limit: Mutex::new(TIME_LIMIT),
            state: AtomicU8::new(WHOLE),
            largest: AtomicUsize::new(LARGEST),
        });
        Ok(Self { world: World::new(Shared(engine.clone())), engine, mpi: ManuallyDrop::new(mpi) })
    }
}

impl Mpi {
    /// Sends what is longer in pieces of at most so many bytes, on all processes the same; 1 GiB at first, and at least one element. Above 1 GiB
    /// it stays that, since MPI counts in 32 bits.
    pub fn set_largest_message(&self, bytes: usize) {
        self.engine.largest.store(bytes.min(LARGEST), Ordering::Relaxed);
    }
}

impl Deref for Mpi {
    type Target = World;

    fn deref(&self) -> &World {
        &self.world
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.engine.rank).field("size", &self.engine.size).finish()
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if self.engine.goodbye() {
            // SAFETY: dropped here once, and not used after.
            unsafe { ManuallyDrop::drop(&mut self.mpi) }
        } else {
            // MPI is not finalized: when this process ends, mpirun ends those that do not come.
            std::thread::sleep(LAST_WORDS);
        }
    }
}

#[derive(Debug)]
struct Shared(Arc<Engine>);

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Engine {
    fn limit(&self) -> Duration {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message of `tag` from `rank`, if one is there.
    fn message(&self, rank: usize, tag: i32) -> Result<Option<Vec<u8>>> {
        let source = Source::Rank(rank as i32);
        let Some(status) = self.comm.iprobe::<u8>(source, tag).map_err(of_mpi)? else { return Ok(None) };
        let mut bytes = vec![0u8; status.count.unwrap_or(0)];
        self.comm.recv(&mut bytes, source, tag).map_err(of_mpi)?;
        Ok(Some(bytes))
    }

    fn send(&self, rank: usize, tag: i32, bytes: &[u8]) -> Result<()> {
        self.comm.send(bytes, rank as i32, tag).map_err(of_mpi)
    }

    /// What a rank waits for next: a message of `tag`, or the news that it has left.
    fn news(&self, rank: usize, tag: i32) -> Result<Option<Option<Vec<u8>>>> {
        if let Some(bytes) = self.message(rank, tag)? {
            return Ok(Some(Some(bytes)));
        }
        // It stays, for the end.
        if self.comm.iprobe::<u8>(Source::Rank(rank as i32), LEFT).map_err(of_mpi)?.is_none() {
            return Ok(None);
        }
        // What it sent before may have come between the two looks.
        Ok(Some(self.message(rank, tag)?))
    }

    /// Says a sentence on the error output, in one piece: other ranks write there too.
    fn shout(&self, sentence: &str) {
        let line = format!("rank {}: {sentence}\n", self.rank);
        // Nobody is left to be told that it could not be said.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn fail<T>(&self, state: u8, sentence: &str) -> Result<T> {
        self.state.store(state, Ordering::Relaxed);
        if state == BROKEN {
            // The process may be ended before its caller can say it.
            self.shout(sentence);
        }
        bail!("{sentence}")
    }

    /// What rank 0 hears: the reports of all, in their order.
    fn hear(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let limit = self.limit();
        let mut reports: Vec<Option<Vec<u8>>> = vec![None; self.size];
        reports[0] = Some(own);
        let mut left = None;
        until(Instant::now() + limit, || {
            for (rank, heard) in reports.iter_mut().enumerate().filter(|(_, heard)| heard.is_none()) {
                match self.news(rank, COME)? {
                    Some(Some(report)) => *heard = Some(report),
                    Some(None) => left = Some(rank),
                    None => {}
                }
            }
            Ok((left.is_some() || reports.iter().all(Option::is_some)).then_some(()))
        })?;
        let missing = |rank: &usize| reports[*rank].is_none();
        let (state, sentence) = match left {
            Some(rank) => (ENDING, format!("parallel: rank {rank} has left, and the others wait for it")),
            None if (0..self.size).any(|rank| missing(&rank)) => {
                let ranks: Vec<String> = (0..self.size).filter(missing).map(|r| r.to_string()).collect();
                let (ranks, limit) = (ranks.join(", "), limit.as_secs_f64());
                (BROKEN, format!("parallel: rank {ranks} did not come within {limit} s"))
            }
            None => return Ok(reports.into_iter().flatten().collect()),
        };
        let mut verdict = vec![1u8];
        verdict.extend(sentence.as_bytes());
        for rank in (1..self.size).filter(|rank| Some(*rank) != left) {
            self.send(rank, VERDICT, &verdict)?;
        }
        self.fail(state, &sentence)
    }

    /// Calls the roll. Returns all ranks' bytes where they are short, and how long they are.
    fn roll(&self, bytes: &[u8]) -> Result<(Vec<usize>, Vec<Vec<u8>>)> {
        if self.state.load(Ordering::Relaxed) != WHOLE {
            bail!("parallel: a rank has left or did not come; start all processes again")
        }
        let mut report = (bytes.len() as u64).to_le_bytes().to_vec();
        if bytes.len() <= SHORT {
            report.extend(bytes);
        }
        let reports = if self.rank == 0 {
            let reports = self.hear(report)?;
            let mut verdict = vec![0u8];
            for report in &reports {
                verdict.extend((report.len() as u64).to_le_bytes());
                verdict.extend(report);
            }
            for rank in 1..self.size {
                self.send(rank, VERDICT, &verdict)?;
            }
            reports
        } else {
            self.send(0, COME, &report)?;
            let limit = self.limit();
            // Rank 0 says who is missing when its own time is over.
            let end = Instant::now() + limit + limit / 4 + Duration::from_secs(1);
            match until(end, || self.news(0, VERDICT))? {
                Some(Some(verdict)) => match verdict.split_first() {
                    Some((0, rest)) => pieces(rest),
                    Some((_, sentence)) => {
                        let sentence = String::from_utf8_lossy(sentence).into_owned();
                        let broken = sentence.contains("did not come");
                        return self.fail(if broken { BROKEN } else { ENDING }, &sentence);
                    }
                    None => bail!("parallel: rank 0 sends an empty answer"),
                },
                Some(None) => {
                    return self.fail(ENDING, "parallel: rank 0 has left, and the others wait for it");
                }
                None => {
                    let sentence = format!("parallel: rank 0 did not come within {} s", limit.as_secs_f64());
                    return self.fail(BROKEN, &sentence);
                }
            }
        };
        let length = |report: &Vec<u8>| match report.first_chunk::<8>() {
            Some(length) => Ok(u64::from_le_bytes(*length) as usize),
            None => bail!("parallel: a report without its length"),
        };
        let lengths = reports.iter().map(length).collect::<Result<Vec<_>>>()?;
        Ok((lengths, reports.into_iter().map(|mut report| report.split_off(8.min(report.len()))).collect()))
    }

    /// Waits for a collective that all have begun. One that does not end cannot be left: the buffers are MPI's.
    fn finish(&self, request: ferrompi::Result<Request<'_>>) -> ferrompi::Result<()> {
        let (mut request, limit) = (request?, self.limit());
        let mut outcome = Ok(());
        let done = until(Instant::now() + limit, || match request.test() {
            Ok(done) => Ok(done.map(drop)),
            Err(error) => {
                outcome = Err(error);
                Ok(Some(()))
            }
        });
        match done {
            Ok(Some(())) => outcome,
            _ => {
                let sentence =
                    format!("a sum did not end within {} s: a rank hangs within it", limit.as_secs_f64());
                self.end(&sentence)
            }
        }
    }

    /// Ends all processes.
    fn end(&self, sentence: &str) -> ! {
        self.shout(&format!("parallel: {sentence}"));
        std::thread::sleep(LAST_WORDS);
        self.comm.abort(1)
    }

    /// How many elements of so many bytes go into one message, of which there are `messages` at a time.
    fn piece(&self, bytes: usize, messages: usize) -> usize {
        (self.largest.load(Ordering::Relaxed) / bytes / messages.max(1)).max(1)
    }

    fn sum<T: MpiDatatype>(&self, values: &mut [T]) -> Result<()> {
        for piece in values.chunks_mut(self.piece(size_of::<T>(), 1)) {
            ferrompi::scope(|scope| self.finish(self.comm.iallreduce_inplace(scope, piece, ReduceOp::Sum)))
                .map_err(of_mpi)?;
        }
        Ok(())
    }

    /// Each part to its rank.
    fn scatter_sum<T: MpiDatatype + Default + Clone>(&self, values: &[T], parts: &[usize]) -> Result<Vec<T>> {
        let mut sums = vec![T::default(); parts.get(self.rank).copied().unwrap_or(0)];
        let mut rest = values;
        for (rank, &part) in parts.iter().enumerate() {
            let (part, after) = rest.split_at(part.min(rest.len()));
            rest = after;
            let mut place = 0;
            for piece in part.chunks(self.piece(size_of::<T>(), 1)) {
                let range = place..place + piece.len();
                place = range.end;
                let sums: &mut [T] = if rank == self.rank { &mut sums[range] } else { &mut [] };
                ferrompi::scope(|scope| {
                    self.finish(self.comm.ireduce(scope, piece, sums, ReduceOp::Sum, rank as i32))
                })
                .map_err(of_mpi)?;
            }
        }
        Ok(sums)
    }

    /// Bytes of any length, in rounds of messages that MPI can count.
    fn gather_long(&self, bytes: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>> {
        let piece = self.piece(1, self.size);
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&length| Vec::with_capacity(length)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        for round in 0..longest.div_ceil(piece) {
            let (counts, places) = counted(lengths, round * piece, piece);
            let own = bytes.get(round * piece..).unwrap_or_default();
            let own = &own[..own.len().min(piece)];
            let mut arrived = vec![0u8; counts.iter().map(|&count| count as usize).sum()];
            ferrompi::scope(|scope| {
                self.finish(self.comm.iallgatherv(scope, own, &mut arrived, &counts, &places))
            })
            .map_err(of_mpi)?;
            for (whole, (count, place)) in all.iter_mut().zip(counts.iter().zip(&places)) {
                whole.extend(&arrived[*place as usize..(*place + *count) as usize]);
            }
        }
        Ok(all)
    }

    /// The sums of this rank's part of bfloat16 numbers: each rank gets what the others have of its part, and adds that up in f32, in the order
    /// of the ranks. MPI has no such numbers.
    fn scatter_sum_bf16(&self, values: &[bf16], parts: &[usize]) -> Result<Vec<bf16>> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let lengths: Vec<usize> = parts.iter().map(|part| 2 * part).collect();
        let starts: Vec<usize> = lengths
            .iter()
            .scan(0, |next, length| {
                *next += length;
                Some(*next - length)
            })
            .collect();
        let own = lengths.get(self.rank).copied().unwrap_or(0);
        let piece = 2 * self.piece(2, self.size);
        let mut sums = Vec::with_capacity(own / 2);
        for round in 0..lengths.iter().copied().max().unwrap_or(0).div_ceil(piece) {
            let (counts, places) = counted(&lengths, round * piece, piece);
            let mut sent = Vec::with_capacity(counts.iter().map(|&count| count as usize).sum());
            for (start, &count) in starts.iter().zip(&counts) {
                let from = start + round * piece;
                sent.extend(bytes.get(from..from + count as usize).unwrap_or_default());
            }
            let (theirs, theirs_at) = counted(&vec![own; self.size], round * piece, piece);
            let mut arrived = vec![0u8; theirs.iter().map(|&count| count as usize).sum()];
            ferrompi::scope(|scope| {
                self.finish(self.comm.ialltoallv(
                    scope,
                    &sent,
                    &counts,
                    &places,
                    &mut arrived,
                    &theirs,
                    &theirs_at,
                ))
            })
            .map_err(of_mpi)?;
            let width = theirs.first().map_or(0, |&count| count as usize);
            if width > 0 {
                let rows: Vec<Vec<f32>> = arrived.chunks_exact(width).map(widened).collect();
                let mut sum = vec![0f32; width / 2];
                add(&mut sum, &rows)?;
                sums.extend(sum.into_iter().map(bf16::from_f32));
            }
        }
        Ok(sums)
    }

    /// Each rank adds up a part, and gives it to all.
    fn sum_bf16(&self, values: &mut [bf16]) -> Result<()> {
        let part = |rank: usize| values.len() / self.size + usize::from(rank < values.len() % self.size);
        let parts: Vec<usize> = (0..self.size).map(part).collect();
        let own = self.scatter_sum_bf16(values, &parts)?;
        let own: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let lengths: Vec<usize> = parts.iter().map(|part| 2 * part).collect();
        let all = self.gather_long(&own, &lengths)?;
        let sums = all.iter().flat_map(|part| part.chunks_exact(2));
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = bf16::from_le_bytes([sum[0], sum[1]]);
        }
        Ok(())
    }

    /// Says to the others that this rank has come to its end, and waits for theirs. Whether MPI can be finalized.
    fn goodbye(&self) -> bool {
        if self.state.load(Ordering::Relaxed) == BROKEN {
            return false;
        }
        let others = || (0..self.size).filter(|rank| *rank != self.rank && (self.rank == 0) != (*rank == 0));
        for rank in others() {
            if self.send(rank, LEFT, &[]).is_err() {
                return false;
            }
        }
        let ending = self.state.load(Ordering::Relaxed) == ENDING;
        let mut heard = vec![false; self.size];
        let end = Instant::now() + if ending { LAST_WORDS } else { self.limit() };
        let all = until(end, || {
            for rank in others() {
                while self.message(rank, COME)?.is_some() || self.message(rank, VERDICT)?.is_some() {}
                heard[rank] |= self.message(rank, LEFT)?.is_some();
            }
            Ok(others().all(|rank| heard[rank]).then_some(()))
        });
        ending || matches!(all, Ok(Some(())))
    }
}

/// How much of each length is in the piece from `from` on, and where it lies where they are one after the other.
fn counted(lengths: &[usize], from: usize, piece: usize) -> (Vec<i32>, Vec<i32>) {
    let mut place = 0;
    let counts = lengths.iter().map(|length| length.saturating_sub(from).min(piece) as i32);
    let counted = counts.map(|count| {
        place += count;
        (count, place - count)
    });
    counted.unzip()
}

impl Communicator for Shared {
    fn rank(&self) -> usize {
        self.0.rank
    }

    fn size(&self) -> usize {
        self.0.size
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (lengths, short) = self.0.roll(bytes)?;
        match lengths.iter().all(|&length| length <= SHORT) {
            true => Ok(short),
            false => self.0.gather_long(bytes, &lengths),
        }
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.0.sum(values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.0.sum(values)
    }

    fn scatter_sum_f64(&self, values: Vec<f64>, parts: &[usize]) -> Result<Vec<f64>> {
        self.0.scatter_sum(&values, parts)
    }

    fn scatter_sum_f32(&self, values: Vec<f32>, parts: &[usize]) -> Result<Vec<f32>> {
        self.0.scatter_sum(&values, parts)
    }

    fn sum_bf16(&self, values: &mut [bf16]) -> Result<()> {
        self.0.sum_bf16(values)
    }

    fn scatter_sum_bf16(&self, values: Vec<bf16>, parts: &[usize]) -> Result<Vec<bf16>> {
        self.0.scatter_sum_bf16(&values, parts)
    }

    fn time_limit(&self) -> Duration {
        self.0.limit()
    }

    fn set_time_limit(&self, limit: Duration) {
        *self.0.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    fn abort(&self, why: &str) {
        self.0.end(why)
    }
}
