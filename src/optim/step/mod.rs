//! One training step: its stages in order, for the host and for a GPU.
//!
//! | stage | file | on the host | on a GPU |
//! |---|---|---|---|
//! | wake gradients | `wake_gradient.rs` | `host` | `device`: kernel `wake` |
//! | factors join their averages | `renew.rs` | `renew` | the same: kernel `factor` |
//! | damping and inverses | `inverses.rs`, `ekfac.rs` | `renew` | the same: cuSOLVER, kernels `newton` and `spd` |
//! | directions | `precondition.rs`, `orthogonal.rs`, `grouped.rs` | `host` | `device`: kernels `grouped` and `precondition` |
//! | rate and clip | `length.rs` | `host` | `device`: kernel `rate` of `update` |
//! | steps, and the parameters they lead to | `write.rs` | `host` | `device`: kernel `update` |
//! | Adam for the rest | `adam.rs` | `host` | `device`: kernel `adam` of `update` |
//! | what the next step looks back at | `carry.rs` | `host` | `device`: kernels `update` and `carry` |
//! | averaged parameters | `average.rs` | `host` | within `update` and `adam` |
//!
//! [`run`] is that list. On the host it computes a [`Proposal`](proposal::Proposal) and changes nothing, so that a step that fails leaves parameters and state
//! as they were; [`commit`](host::commit) makes it true. On a GPU the kernels that write see for themselves whether the step is to be taken
//! (`device.rs`).

pub(super) mod adam;
pub(super) mod average;
pub(super) mod carry;
pub(super) mod device;
#[cfg(test)]
mod device_tests;
mod ekfac;
pub(super) mod gradients;
mod grouped;
pub(super) mod host;
pub(super) mod inverses;
mod kept_alive;
pub(super) mod length;
mod of_owners;
mod orthogonal;
mod partial_sums;
mod precondition;
pub(super) mod predict;
pub(super) mod proposal;
pub(super) mod renew;
mod same_shape;
mod wake_gradient;
pub(super) mod work_space;
pub(super) mod write;

pub(super) use orthogonal::{inverts_the_metric, is_one_part};

use super::state::Core;
use super::state::block::BlockState;
use super::state::pending::{PendingInverses, Workplace};
use candle_core::Result;
use gradients::{Gradients, Staged};
use renew::{BlockCurvature, Refresh};

/// Where a step is computed. The stages that are not here are the same everywhere.
pub(super) trait Backend {
    /// What the wake gradients leave for the later stages.
    type WakeGradients;
    type Directions;
    type Length;
    type Written;

    fn wake_gradients(&mut self, core: &Core, grads: &Gradients) -> Staged<Self::WakeGradients>;

    /// Takes note of inverses that may be new.
    fn inverses(&mut self, core: &Core, curvature: &mut [Option<BlockCurvature<'_>>]) -> Result<()>;

    fn directions(
        &mut self,
        core: &Core,
        curvature: &[Option<BlockCurvature<'_>>],
        wakes: &Self::WakeGradients,
        damping: f64,
    ) -> Staged<Self::Directions>;

    /// What the length follows from, of the blocks that are here; empty where it is added up within [`length`](Self::length).
    fn sums(
        &self,
        core: &Core,
        wakes: &Self::WakeGradients,
        directions: &Self::Directions,
    ) -> Staged<Vec<f64>>;

    /// From the sums of all blocks.
    fn length(&mut self, core: &Core, sums: &[f64]) -> Staged<Self::Length>;

    fn write(
        &mut self,
        core: &Core,
        curvature: &mut [Option<BlockCurvature<'_>>],
        stages: (Self::WakeGradients, Self::Directions, Self::Length),
        grads: &Gradients,
    ) -> Staged<Self::Written>;
}

/// What all stages have led to.
pub(super) struct Stepped<W> {
    pub written: W,
    /// The blocks' new state; none of blocks that took no part.
    pub states: Vec<Option<BlockState>>,
    /// The damping of the step's inverses.
    pub damping: f64,
    /// Inverses that the step does not use yet.
    pub pending: Option<PendingInverses>,
    /// Whether the step is the first to use inverses that were made beside the steps.
    pub takes_pending: bool,
}

/// The stages of a step on the gradients `grads`, with the factors of its batch where they are due, or what this process has refused before. Where
/// owners of state meet in between, what they refuse there is refused by all, and the rest, the inner result, by this process alone.
pub(super) fn run<B: Backend>(
    core: &Core,
    backend: &mut B,
    workplace: &Workplace,
    refresh: Staged<Option<&Refresh>>,
    grads: &Gradients,
) -> Staged<Staged<Stepped<B::Written>>> {
    let found = refresh.and_then(|refresh| {
        let wakes = backend.wake_gradients(core, grads)?;
        Ok((wakes, renew::renew(core, refresh, grads)?))
    });
    // Where owners meet, what one refuses between two meetings is brought to the next.
    let found = inverses::damped(core, workplace.owners.as_ref(), found)?;
    let found = found.and_then(|((wakes, mut curvature), due)| {
        let inverses = inverses::renew(core, workplace, &mut curvature, due)?;
        backend.inverses(core, &mut curvature)?;
        let directions = backend.directions(core, &curvature, &wakes, inverses.damping)?;
        Ok((wakes, curvature, inverses, directions))
    });
    let (found, sums) = of_owners::summed(
        workplace.owners.as_ref(),
        ("length", core.steps),
        found,
        |(wakes, _, _, directions)| backend.sums(core, wakes, directions),
    )?;
    let (wakes, mut curvature, inverses, directions) = found;
    let length = backend.length(core, &sums)?;
    let written = backend.write(core, &mut curvature, (wakes, directions, length), grads);
    Ok(written.map(|written| Stepped {
        written,
        states: curvature.into_iter().map(|found| found.map(|found| found.state)).collect(),
        damping: inverses.damping,
        pending: inverses.pending,
        takes_pending: inverses.takes_pending,
    }))
}
