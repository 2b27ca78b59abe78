//! The processes that `mpirun` or torchrun has started, in builds with the features `mpi` or `nccl`; otherwise this one alone.

use candle_core::{Device, Result};
use clap::ValueEnum;
#[cfg(feature = "nccl")]
use kronwake::parallel::Nccl;
use kronwake::parallel::{Placement, World};
use std::cell::OnceCell;

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

/// This process among them. It begins and ends MPI: made first, it is dropped last.
pub struct Processes {
    world: OnceCell<World>,
    #[cfg(feature = "mpi")]
    mpi: kronwake::parallel::Mpi,
}

impl Processes {
    /// Begins MPI, in builds with it.
    pub fn start() -> Result<Self> {
        Ok(Self {
            world: OnceCell::new(),
            #[cfg(feature = "mpi")]
            mpi: kronwake::parallel::Mpi::init()?,
        })
    }

    /// Joins the others, whose tensors are on such a device too: on a GPU by NCCL, in builds with it, and else by MPI. All but the first say
    /// nothing more on the standard output.
    pub fn join(&self, device: &Device) -> Result<&World> {
        let world = self.world_on(device)?;
        #[cfg(any(feature = "mpi", feature = "nccl"))]
        if !world.is_first() {
            silence();
        }
        Ok(self.world.get_or_init(|| world))
    }

    /// Without MPI's `mpirun` the environment says who the others are.
    #[cfg(feature = "nccl")]
    fn world_on(&self, device: &Device) -> Result<World> {
        #[cfg(feature = "mpi")]
        match (device.is_cuda(), self.mpi.is_alone()) {
            (false, _) => return Ok(World::clone(&self.mpi)),
            (true, false) => return Nccl::over(&self.mpi, device),
            (true, true) => {}
        }
        Nccl::from_env(device)
    }

    #[cfg(all(feature = "mpi", not(feature = "nccl")))]
    fn world_on(&self, _: &Device) -> Result<World> {
        Ok(World::clone(&self.mpi))
    }

    #[cfg(not(any(feature = "mpi", feature = "nccl")))]
    fn world_on(&self, _: &Device) -> Result<World> {
        Ok(World::alone())
    }

    /// The world that was joined.
    pub fn world(&self) -> Option<&World> {
        self.world.get()
    }
}

/// Which of its machine's GPUs is this process's, counted from the one that the command line names.
pub fn local_rank() -> usize {
    #[cfg(feature = "nccl")]
    {
        Nccl::local_rank()
    }
    #[cfg(not(feature = "nccl"))]
    {
        0
    }
}

/// Sends what this process prints nowhere.
#[cfg(any(feature = "mpi", feature = "nccl"))]
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
    let ranks = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"];
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
