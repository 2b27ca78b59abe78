//! How every example starts and ends.

use super::sentence::sentence;
use candle_core::{Error, Result};
use std::process::ExitCode;

/// Runs `work` on `threads` threads, one a core if not said; its error is a sentence on stderr and exit code 1.
pub fn start(threads: Option<usize>, work: impl FnOnce() -> Result<()>) -> ExitCode {
    if let Some(threads) = threads {
        // SAFETY: no other thread runs yet. candle reads the variable when it first multiplies matrices.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    // This thread is one of the pool's: from outside of it every parallel loop would be handed over and waited for.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread();
    match pool.build_global().map_err(Error::wrap).and_then(|()| work()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}
