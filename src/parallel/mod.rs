//! Several processes that train one model on parts of each batch: data parallel, step for step what one process does on the whole batch.
//!
//! | | |
//! |---|---|
//! | [`World`] | this process's place among the others: rank, size, its part of a batch |
//! | [`Threads`], [`Alone`] | engines: threads of one process, and one process; with the feature `mpi` also `Mpi`, with `nccl` also `Nccl` |
//! | [`Communicator`] | what an engine has to do |
//! | [`Placement`] | which process holds and computes what |
//!
//! An optimizer that is shared ([`NaturalGradient::share`](crate::optim::NaturalGradient::share),
//! [`FirstOrder::share`](crate::optim::FirstOrder::share)) adds gradients, factors and counts up over all processes at each step. Every
//! process calls the same methods in the same order. What goes wrong on one is brought to the next meeting and returned on all, with its
//! rank; so no process waits for one that has given up.

mod bytes;
mod communicator;
mod division;
#[cfg(any(test, feature = "nccl"))]
mod meeting;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod parcel;
mod sums;
mod threads;
mod world;

pub use communicator::{Alone, Communicator, Transfer};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use threads::Threads;
pub use world::World;

pub(crate) use bytes::{Reader, Writer};
pub(crate) use division::{Division, owners, spread};
pub(crate) use parcel::Parcel;
#[cfg(test)]
pub(crate) use parcel::testing;
pub(crate) use sums::{Form, Kind, Sums, Totals};
pub(crate) use world::{Place, Trouble};

/// Which process holds and computes what of an optimizer's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// The one of the others whose step is the shortest by a count of multiplications and bytes, which shapes, options and the number of
    /// processes decide and no clock: see [the guide](crate::guide::parallel).
    #[default]
    ByCost,
    /// All hold all and compute all, from the same sums.
    Replicated,
    /// All hold all, but each inverts a part of the factors: the largest first, each goes to the process that has the least to do, by the cube
    /// of its order. The results are gathered, so all have the same bits.
    Gathered,
    /// Each Kronecker block, and each Var without one, has an owner, who alone holds its state, and computes its inverse and its step (ZeRO-1:
    /// Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020). Gradients and factors are added up
    /// where they are owned, and the parameters that a step has led to are gathered. Parameters, their f32 masters and their averages
    /// ([`Params::average`](crate::optim::Params::average)) are on all.
    Owned,
}
