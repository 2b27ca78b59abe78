//! GPUs, a process each, by NVIDIA's NCCL: tensors go from GPU to GPU and not by the host.
//!
//! Messages of some hundred bytes go where the processes met, by sockets or by MPI: there who is missing has a name, and nobody waits
//! for a GPU. Everything longer goes by NCCL, on the stream of the device, behind the kernels that make it. A message that was queued is waited
//! for here, under the time limit: so a GPU or a link that hangs ends in an error, and not in candle's next wait for the stream,
//! which has no limit. NCCL itself waits without end for a rank that does not come; its communicator is aborted then.

mod launch;
mod library;

use super::World;
use super::communicator::{Communicator, LONGEST_WAIT, TIME_LIMIT, Transfer, until};
use super::meeting::Meeting;
use super::world::{Place, Trouble};
use crate::gpu::Gpu;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::{CudaDevice, DType, Device, Error, Result, Tensor, WithDType, bail};
use launch::Launch;
use library::{Code, Comm, Config, IN_PROGRESS, Library, SUCCESS, SUM, Stream, UniqueId};
use std::ffi::c_int;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that go where the processes met.
const SHORT: usize = 16 * 1024;
/// In the sentence of who has waited for the others.
const IN_VAIN: &str = "did not end within";
/// How long a communicator may take to end in order.
const FAREWELL: Duration = Duration::from_secs(3);

/// Worlds of processes with a GPU each. Tensors of that GPU are added up and gathered from GPU to GPU.
///
/// ```no_run
/// use candle_core::Device;
/// use kronwake::parallel::{Nccl, Placement};
/// # use kronwake::optim::NaturalGradient;
/// # fn train(opt: &mut NaturalGradient) -> candle_core::Result<()> {
/// let device = Device::new_cuda(Nccl::local_rank())?;
/// let world = Nccl::from_env(&device)?;
/// opt.share(&world, Placement::default())?;
/// let rows = world.part(256); // of each batch
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Nccl;

impl Nccl {
    /// The world that the environment describes: `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as torchrun sets them; or
    /// `OMPI_COMM_WORLD_RANK` and `OMPI_COMM_WORLD_SIZE`, as OpenMPI's mpirun does. Without any the process is alone.
    ///
    /// Rank 0 listens at `MASTER_PORT` (29500 if it is not set; where torchrun listens there itself, with `TORCHELASTIC_USE_AGENT_STORE`, the next
    /// one), on all networks of its machine and to everybody, so run it where you trust the network, as NCCL wants too. `MASTER_ADDR` may be
    /// missing where mpirun has started all processes on one machine. All processes have to come within ten minutes.
    ///
    /// # Errors
    /// On all processes: when a rank does not come, or its library `libnccl.so.2` or GPU does not do. Here: when variables are missing, and
    /// where `device` is no GPU.
    pub fn from_env(device: &Device) -> Result<World> {
        Self::from_env_within(device, TIME_LIMIT)
    }

    /// [`from_env`](Self::from_env), where all processes have to come within `limit`, which is the world's time limit too.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_env_within(device: &Device, limit: Duration) -> Result<World> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(Launch { rank, size, address }) = Launch::of(&get)? else { return Ok(World::alone()) };
        if size == 1 {
            return Ok(World::alone());
        }
        cuda_device(device)?;
        let limit = limit.min(LONGEST_WAIT);
        let meeting = World::new(Meeting::open(rank, size, &address, limit)?);
        meeting.set_time_limit(limit);
        Self::over(&meeting, device)
    }

    /// The processes of another world, of MPI say, with tensors that go by NCCL from now on. Small messages go by that world, which has to last
    /// as long; its time limit is set with this one's.
    ///
    /// # Errors
    /// On all processes: when the library or GPU of one does not do, with its rank. Here: where `device` is no GPU.
    pub fn over(world: &World, device: &Device) -> Result<World> {
        let device = cuda_device(device)?;
        if world.is_alone() {
            return Ok(world.clone());
        }
        let place = |call| Place { of: "nccl", call, step: 0 };
        let told = |error: Error| Trouble::failed(&error);
        let id = Library::get().and_then(|library| match world.is_first() {
            true => unique_id(library),
            false => Ok(vec![]),
        });
        let ids = world.exchange(place("begin"), id.map_err(told)).map_err(Trouble::error)?;
        let engine = Library::get().and_then(|library| Engine::new(library, world, device, &ids[0]));
        let said = engine
            .as_ref()
            .map_or_else(|error| Trouble::failed(error).error().to_string(), |_| String::new());
        let told = world.exchange(place("init"), Ok(said.into_bytes())).map_err(Trouble::error)?;
        let said: Vec<_> = told.iter().map(|said| String::from_utf8_lossy(said)).enumerate().collect();
        // Who waits in vain for another is not why.
        let failed = || said.iter().filter(|(_, said)| !said.is_empty());
        match failed().find(|(_, said)| !said.contains(IN_VAIN)).or(failed().next()) {
            Some((rank, said)) => bail!("rank {rank}: {said}"),
            None => Ok(World::new(engine?)),
        }
    }

    /// Which GPU of its machine is this process's: `LOCAL_RANK` or `OMPI_COMM_WORLD_LOCAL_RANK`, 0 without either.
    pub fn local_rank() -> usize {
        let names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"];
        names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
    }
}

fn cuda_device(device: &Device) -> Result<&CudaDevice> {
    match device {
        Device::Cuda(device) => Ok(device),
        other => bail!(
            "parallel: NCCL: expected a CUDA device, got {:?}; for the CPU there is MPI",
            other.location()
        ),
    }
}

fn unique_id(library: &Library) -> Result<Vec<u8>> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: it writes the id.
    match unsafe { (library.get_unique_id)(&mut id) } {
        SUCCESS => Ok(id.0.to_vec()),
        code => bail!("parallel: NCCL: {}", library.words(code)),
    }
}

struct Engine {
    library: &'static Library,
    /// Where the processes met.
    meeting: World,
    device: CudaDevice,
    limit: Mutex<Duration>,
    /// One call at a time.
    state: Mutex<State>,
}

struct State {
    /// Null once it was aborted.
    comm: Comm,
    /// Why it was.
    why: Option<String>,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time, which the lock around this sees to.
unsafe impl Send for State {}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, size) = (self.meeting.rank(), self.meeting.size());
        f.debug_struct("Nccl").field("rank", &rank).field("size", &size).finish_non_exhaustive()
    }
}

/// `ncclDataType_t`.
fn type_of(dtype: DType) -> Result<c_int> {
    Ok(match dtype {
        DType::U8 => 1,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        other => bail!("parallel: NCCL: expected a tensor of f64, f32, f16, bf16 or u8, got {other:?}"),
    })
}

impl Engine {
    fn new(library: &'static Library, meeting: &World, device: &CudaDevice, id: &[u8]) -> Result<Self> {
        let Ok(id) = id.try_into().map(UniqueId) else { bail!("parallel: NCCL: rank 0 gives no id") };
        device.cuda_stream().context().bind_to_thread().w()?;
        let (rank, size) = (meeting.rank() as c_int, meeting.size() as c_int);
        let (mut comm, mut config): (Comm, _) = (std::ptr::null_mut(), Config::without_blocking());
        // SAFETY: the structs are NCCL's, and it keeps none of them.
        let code = unsafe { (library.init_rank)(&mut comm, size, id, rank, &mut config) };
        let engine = Self {
            library,
            meeting: meeting.clone(),
            device: device.clone(),
            limit: Mutex::new(meeting.time_limit()),
            state: Mutex::new(State { comm, why: None }),
        };
        let mut state = engine.state();
        engine.begun(&mut state, code, "the communicator")?;
        // Half of the time, so that who fails here still waits for those who wait for it, at the meeting that follows.
        engine.wait(&mut state, "the communicator", engine.limit() / 2, || Ok(true))?;
        drop(state);
        Ok(engine)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(&self) -> Duration {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the communicator up.
    fn fail<T>(&self, state: &mut State, sentence: String) -> Result<T> {
        let comm = std::mem::replace(&mut state.comm, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: it was not aborted before. What it returns changes nothing.
            unsafe { (self.library.abort)(comm) };
        }
        state.why.get_or_insert(sentence.clone());
        Err(Error::Msg(sentence))
    }

    /// A call's outcome.
    fn begun(&self, state: &mut State, code: Code, what: &str) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => {
                let sentence = format!("parallel: NCCL: {what}: {}", self.library.words(code));
                self.fail(state, sentence)
            }
        }
    }

    /// Waits until NCCL has done what was begun, and then until `done`; gives up when it reports an error, when a rank has left, and when
    /// the time is over.
    fn wait(
        &self,
        state: &mut State,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let mut looked = Instant::now();
        let comm = state.comm;
        let outcome = until(Instant::now() + limit, || {
            let mut code = SUCCESS;
            // SAFETY: the communicator is there, and it writes a number.
            let asked = unsafe { (self.library.get_async_error)(comm, &mut code) };
            let wrong = [asked, code].into_iter().find(|&code| code != SUCCESS && code != IN_PROGRESS);
            if let Some(code) = wrong {
                return Ok(Some(Some(format!("{what}: {}", self.library.words(code)))));
            }
            if code == SUCCESS && done()? {
                return Ok(Some(None));
            }
            if looked.elapsed() > Duration::from_millis(5) {
                looked = Instant::now();
                return Ok(self.meeting.engine().trouble().map(Some));
            }
            Ok(None)
        });
        let sentence = match outcome {
            Ok(Some(None)) => return Ok(()),
            // A rank that has left is why NCCL fails, where both are so.
            Ok(Some(Some(why))) => match self.meeting.engine().trouble() {
                Some(gone) => gone,
                None => format!("parallel: NCCL: {why}"),
            },
            Ok(None) => format!(
                "parallel: NCCL: {what} {IN_VAIN} {} s, and no rank is known to have left: a GPU, a link or a rank hangs within it",
                limit.as_secs_f64()
            ),
            Err(error) => format!("parallel: NCCL: {what}: {error}"),
        };
        self.fail(state, sentence)
    }

    /// Queues these transfers, in place, and waits for them.
    fn together(&self, transfers: &[(Transfer, Tensor)]) -> Result<()> {
        let (gpu, stream) = (Gpu::Cuda(self.device.clone()), self.device.cuda_stream());
        let mut jobs = Vec::with_capacity(transfers.len());
        for (what, tensor) in transfers {
            let operand = gpu.operand(tensor, "parallel: NCCL")?;
            if operand.len > 0 {
                jobs.push((*what, operand.address(), operand.len, type_of(operand.dtype)?));
            }
        }
        if jobs.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        if let Some(why) = &state.why {
            bail!("{why}")
        }
        stream.context().bind_to_thread().w()?;
        let (library, comm, queue) = (self.library, state.comm, stream.cu_stream() as Stream);
        // SAFETY: the addresses are those of tensors on this GPU that are there until the wait below is over; where that is given up,
        // `fail` ends what is queued.
        let codes = unsafe {
            let begun = (library.group_start)();
            let mut codes = vec![begun];
            for (what, address, count, of) in jobs {
                let (from, to) = (address as *const _, address as *mut _);
                codes.push(match what {
                    Transfer::Sum => (library.all_reduce)(from, to, count, of, SUM, comm, queue),
                    Transfer::SumAt(rank) => {
                        (library.reduce)(from, to, count, of, SUM, rank as c_int, comm, queue)
                    }
                    Transfer::From(rank) => {
                        (library.broadcast)(from, to, count, of, rank as c_int, comm, queue)
                    }
                });
            }
            codes.push((library.group_end)());
            codes
        };
        for code in codes {
            self.begun(&mut state, code, "a message")?;
        }
        let mut queued: Option<CudaEvent> = None;
        // Once NCCL has queued everything.
        self.wait(&mut state, "a message", self.limit(), || match &queued {
            Some(event) => event.try_is_complete().w(),
            None => {
                queued = Some(stream.record_event(None).w()?);
                Ok(false)
            }
        })
    }

    /// What this process has made for a message, once all have made theirs: who has no room for it on its GPU is named, and nobody waits for it
    /// in the message.
    fn ready<T>(&self, made: Result<T>) -> Result<T> {
        let place = Place { of: "nccl", call: "message", step: 0 };
        let said = made.as_ref().map(|_| vec![]).map_err(Trouble::failed);
        self.meeting.exchange(place, said).map_err(Trouble::error)?;
        made
    }

    /// The sums of numbers of the host, by way of the GPUs.
    fn sum_long<T: WithDType>(&self, values: &mut [T]) -> Result<()> {
        let own = Tensor::from_slice(values, values.len(), &Device::Cuda(self.device.clone()));
        for sum in self.transfer(vec![(Transfer::Sum, self.ready(own)?)])? {
            values.copy_from_slice(&sum.to_vec1()?);
        }
        Ok(())
    }

    /// Bytes of any length, those of ranks that have some by way of the GPUs.
    fn gather_long(&self, bytes: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>> {
        let device = Device::Cuda(self.device.clone());
        let with_bytes = lengths.iter().enumerate().filter(|(_, length)| **length > 0);
        let transfer = |(rank, &length): (usize, &usize)| {
            let tensor = match rank == self.rank() {
                true => Tensor::from_slice(bytes, length, &device)?,
                false => Tensor::zeros(length, DType::U8, &device)?,
            };
            Ok((Transfer::From(rank), tensor))
        };
        let transfers = self.ready(with_bytes.map(transfer).collect())?;
        let mut arrived = self.transfer(transfers)?.into_iter();
        let bytes = |&length: &usize| match length {
            0 => Ok(vec![]),
            _ => arrived.next().map_or_else(|| Ok(vec![]), |tensor| tensor.to_vec1()),
        };
        lengths.iter().map(bytes).collect()
    }
}

impl Communicator for Engine {
    fn rank(&self) -> usize {
        self.meeting.rank()
    }

    fn size(&self) -> usize {
        self.meeting.size()
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut report = (bytes.len() as u64).to_le_bytes().to_vec();
        if bytes.len() <= SHORT {
            report.extend(bytes);
        }
        let reports = self.meeting.engine().gather(&report)?;
        let mut lengths = Vec::with_capacity(reports.len());
        let mut short = Vec::with_capacity(reports.len());
        for (rank, report) in reports.iter().enumerate() {
            let Some((length, rest)) = report.split_first_chunk::<8>() else {
                bail!("parallel: rank {rank} sends a report without its length")
            };
            lengths.push(u64::from_le_bytes(*length) as usize);
            short.push(rest.to_vec());
        }
        match lengths.iter().all(|&length| length <= SHORT) {
            true => Ok(short),
            false => self.gather_long(bytes, &lengths),
        }
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        if size_of_val(values) <= SHORT {
            return self.meeting.engine().sum_f64(values);
        }
        self.sum_long(values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        if size_of_val(values) <= SHORT {
            return self.meeting.engine().sum_f32(values);
        }
        self.sum_long(values)
    }

    fn takes(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.same_device(&self.device))
    }

    fn transfer(&self, transfers: Vec<(Transfer, Tensor)>) -> Result<Vec<Tensor>> {
        self.together(&transfers)?;
        Ok(transfers.into_iter().map(|(_, tensor)| tensor).collect())
    }

    fn trouble(&self) -> Option<String> {
        self.state().why.clone().or_else(|| self.meeting.engine().trouble())
    }

    fn time_limit(&self) -> Duration {
        self.limit()
    }

    fn set_time_limit(&self, limit: Duration) {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
        self.meeting.set_time_limit(limit);
    }

    fn abort(&self, why: &str) {
        let _ = self.fail::<()>(&mut self.state(), format!("parallel: {why}"));
        self.meeting.engine().abort(why);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut state = self.state();
        if state.comm.is_null() {
            return;
        }
        // SAFETY: the communicator is there.
        let code = unsafe { (self.library.finalize)(state.comm) };
        let ended = self
            .begun(&mut state, code, "the end")
            .and_then(|()| self.wait(&mut state, "the end", FAREWELL, || Ok(true)));
        if ended.is_ok() {
            // SAFETY: it is finalized, and not used after.
            unsafe { (self.library.destroy)(state.comm) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_refused() {
        let refused = Nccl::over(&World::alone(), &Device::Cpu).expect_err("a CPU").to_string();
        assert!(refused.contains("expected a CUDA device"), "{refused}");
    }
}
