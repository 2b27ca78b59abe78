//! Work beside the steps: on a thread of its own, and on a GPU on a stream of its own.
//!
//! candle ties a tensor to the one stream of its device. The work beside has a second candle device on the same GPU, with its own
//! stream and its own handles of the libraries, and what it reads and what it makes are copied from one to the other. The copies alone
//! need the streams to wait for each other; both directions start on the thread that steps.

use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use candle_core::{Device, Result, Tensor, bail};

/// Where work beside a device's own is done.
#[derive(Debug, Clone)]
pub(crate) enum Worker {
    /// A thread that uses the tensors as they are.
    Thread,
    /// A thread with a second device on the same GPU.
    #[cfg(feature = "cuda")]
    Stream { own: candle_core::CudaDevice, beside: candle_core::CudaDevice },
    /// Not beside at all: devices whose kernels belong to one thread, and the emulator.
    AtOnce,
}

impl Worker {
    /// # Errors
    /// If a GPU makes no second stream.
    pub fn of(device: &Device) -> Result<Self> {
        Ok(match device {
            #[cfg(test)]
            Device::Cpu if super::emulate::is_on() => Self::AtOnce,
            Device::Cpu => Self::Thread,
            #[cfg(feature = "cuda")]
            Device::Cuda(own) => Self::Stream { own: own.clone(), beside: super::cuda::beside(own)? },
            _ => Self::AtOnce,
        })
    }

    /// Tensors as the work beside may read them, whatever becomes of the originals.
    pub fn send(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Stream { own, beside } => super::cuda::across(own, beside, tensors),
            _ => Ok(tensors.to_vec()),
        }
    }

    /// Tensors that finished work beside has made, for the steps.
    pub fn bring(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Stream { own, beside } => super::cuda::across(beside, own, tensors),
            _ => Ok(tensors.to_vec()),
        }
    }

    /// Starts work; it may wait for its device.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<BackgroundTask<T>> {
        let state = match self {
            Self::AtOnce => State::Done(work()),
            _ => State::Running(Builder::new().name("kronwake".into()).spawn(work)?),
        };
        Ok(BackgroundTask(Mutex::new(state)))
    }
}

/// Work that was started; dropped, it is waited for.
#[derive(Debug)]
pub(crate) struct BackgroundTask<T>(Mutex<State<T>>);

#[derive(Debug)]
enum State<T> {
    Running(JoinHandle<T>),
    Done(T),
    Lost,
}

impl<T> BackgroundTask<T> {
    /// Work that is done.
    pub fn done(result: T) -> Self {
        Self(Mutex::new(State::Done(result)))
    }
}

impl<T: Clone> BackgroundTask<T> {
    /// What the work has made; waits for it.
    ///
    /// # Errors
    /// If the thread has panicked.
    pub fn wait(&self) -> Result<T> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = match std::mem::replace(&mut *state, State::Lost) {
            State::Running(handle) => joined(handle).map_or(State::Lost, State::Done),
            other => other,
        };
        match &*state {
            State::Done(result) => Ok(result.clone()),
            _ => bail!("the thread of the work beside the steps has panicked"),
        }
    }
}

impl<T> Drop for BackgroundTask<T> {
    fn drop(&mut self) {
        let state = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Running(handle) = std::mem::replace(state, State::Lost) {
            let _ = joined(handle);
        }
    }
}

/// Waits for a thread. Its parallel loops run on the pool that this thread may be one of, or all of, so this thread goes on working for
/// the pool.
fn joined<T>(handle: JoinHandle<T>) -> std::thread::Result<T> {
    while !handle.is_finished() {
        if rayon::yield_now() != Some(rayon::Yield::Executed) {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
    handle.join()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_once_and_read_often() -> Result<()> {
        for beside in [Worker::Thread, Worker::AtOnce] {
            let running = beside.start(|| std::thread::current().id())?;
            let found = running.wait()?;
            assert_eq!(found, running.wait()?);
            assert_eq!(found == std::thread::current().id(), matches!(beside, Worker::AtOnce));
        }
        Ok(())
    }

    #[test]
    fn a_pool_of_the_waiting_thread_alone_does_the_loops() -> Result<()> {
        use rayon::prelude::*;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
        let pool = std::sync::Arc::new(pool.build().map_err(candle_core::Error::wrap)?);
        let theirs = pool.clone();
        let sum = move || theirs.install(|| (0..1000u64).into_par_iter().sum::<u64>());
        assert_eq!(Worker::Thread.start(sum)?.wait()?, 499_500);
        Ok(())
    }

    #[test]
    fn a_panic_is_an_error() -> Result<()> {
        let running = Worker::Thread.start(|| -> u32 { panic!("as the test wants it") })?;
        for _ in 0..2 {
            let message = running.wait().expect_err("must fail").to_string();
            assert!(message.contains("panicked"), "{message}");
        }
        Ok(())
    }

    #[test]
    fn what_is_dropped_is_waited_for() -> Result<()> {
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let flag = done.clone();
        drop(Worker::Thread.start(move || {
            std::thread::sleep(Duration::from_millis(30));
            flag.store(true, std::sync::atomic::Ordering::SeqCst);
        })?);
        assert!(done.load(std::sync::atomic::Ordering::SeqCst));
        Ok(())
    }
}
