//! The processes that `mpirun` has started, in builds with the feature `mpi`; otherwise this one alone.

use candle_core::Result;
use clap::ValueEnum;
use kronwake::parallel::{Placement, World};

/// Which process computes what; see [`Placement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlacementKind {
    /// What costs the least by a count of multiplications and bytes
    ByCost,
    /// All compute all
    Replicated,
    /// Each inverts a part of the curvature's factors
    Gathered,
    /// Each holds the state of a part of the parameters, and computes their steps
    Owned,
}

impl PlacementKind {
    pub fn placement(self) -> Placement {
        match self {
            Self::ByCost => Placement::ByCost,
            Self::Replicated => Placement::Replicated,
            Self::Gathered => Placement::Gathered,
            Self::Owned => Placement::Owned,
        }
    }
}

/// This process's place among them. It begins and ends MPI: made first, it is dropped last.
pub struct Processes {
    #[cfg(feature = "mpi")]
    mpi: kronwake::parallel::Mpi,
    #[cfg(not(feature = "mpi"))]
    alone: World,
}

impl Processes {
    /// Joins the others. All but the first say nothing more on the standard output.
    #[cfg(feature = "mpi")]
    pub fn start() -> Result<Self> {
        let mpi = kronwake::parallel::Mpi::init()?;
        if !mpi.is_first() {
            silence();
        }
        Ok(Self { mpi })
    }

    #[cfg(not(feature = "mpi"))]
    pub fn start() -> Result<Self> {
        Ok(Self { alone: World::alone() })
    }

    pub fn world(&self) -> &World {
        #[cfg(feature = "mpi")]
        {
            &self.mpi
        }
        #[cfg(not(feature = "mpi"))]
        {
            &self.alone
        }
    }
}

/// Sends what this process prints nowhere.
#[cfg(feature = "mpi")]
fn silence() {
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd;
        if let Ok(nowhere) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
            // SAFETY: both are open, and what is replaced is a file descriptor alone.
            unsafe { libc::dup2(nowhere.as_raw_fd(), libc::STDOUT_FILENO) };
        }
    }
}

/// Threads of this process where the command line says none: its share of the machine's cores, of those that it may use.
pub fn threads() -> Option<usize> {
    let ranks = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"];
    let here = ranks.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok())?;
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    Some(usable.min((cores().unwrap_or(usable) / here.max(1)).max(1)))
}

/// Of the machine, also where this process is bound to some.
fn cores() -> Option<usize> {
    #[cfg(unix)]
    {
        // SAFETY: reads a number.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).ok()
    }
    #[cfg(not(unix))]
    {
        None
    }
}
