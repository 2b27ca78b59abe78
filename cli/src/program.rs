//! How every program starts and ends, and where its files go.

use crate::processes::{self, Processes};
use crate::sentence::sentence;
use candle_core::{Error, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// [`start`] of a program that trains on all processes that `mpirun` or torchrun has started.
pub fn start_together(threads: Option<usize>, work: impl FnOnce(&Processes) -> Result<()>) -> ExitCode {
    start(threads.or_else(processes::threads), || {
        let processes = Processes::start()?;
        let begun = Instant::now();
        work(&processes)?;
        let all = begun.elapsed().as_secs_f64();
        if let Some(world) = processes.world().filter(|world| !world.is_alone()) {
            let waited = world.waited().as_secs_f64();
            println!("rank {} of {}: {waited:.2} s of {all:.2} s in messages", world.rank(), world.size());
        }
        Ok(())
    })
}

/// Runs `work` on `threads` threads, one a core if not said; its error is a sentence on stderr and exit code 1.
pub fn start(threads: Option<usize>, work: impl FnOnce() -> Result<()>) -> ExitCode {
    end_with_the_reader();
    match set_threads(threads).and_then(|()| work()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// How often a thread of candle's looks for work before it sleeps.
const SPIN_LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";

/// Makes this process compute on `threads` threads, one a core if not said. To be called while no other thread runs.
pub fn set_threads(threads: Option<usize>) -> Result<()> {
    // SAFETY: no other thread runs yet. candle reads the variables when it first divides its work.
    unsafe {
        if let Some(threads) = threads {
            std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
        }
        // candle's threads wait for work by turning in a loop, on cores that rayon's have work for.
        if std::env::var_os(SPIN_LIMIT).is_none() {
            std::env::set_var(SPIN_LIMIT, "1");
        }
    }
    // This thread is one of the pool's: from outside of it every parallel loop would be handed over and waited for.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread();
    pool.build_global().map_err(Error::wrap)
}

/// Lets the system end this process when what reads its output has ended, as in `| head`. Rust's programs ignore the signal, and panic at
/// the next line that they print.
fn end_with_the_reader() {
    #[cfg(unix)]
    // SAFETY: no other thread runs yet, and the default action is no function of this program.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Makes the folder that `flag` names, if it is missing.
pub fn make_folder(flag: &str, path: &Path) -> Result<()> {
    match std::fs::create_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) => bail!("{flag} {}: cannot be made ({e})", path.display()),
    }
}

/// Writes the file that `flag` names.
pub fn write(flag: &str, path: &Path, text: &str) -> Result<()> {
    match std::fs::write(path, text) {
        Ok(()) => Ok(()),
        Err(e) => bail!("{flag} {}: cannot be written ({e})", path.display()),
    }
}

/// A bar on the error output, where that is a terminal, of `done` out of `count` steps; its message is the last loss, or what is said.
pub fn bar(count: usize, done: usize, message: &str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template(&format!("{{bar:40}} {{pos}}/{{len}} {message}"));
    Ok(ProgressBar::new(count as u64).with_position(done as u64).with_style(style.map_err(Error::wrap)?))
}
