//! Inverses that are made beside the steps: begun at one step and used from a later one on.

use super::direction::Renewed;
use super::natural::Natural;
use super::rule::WakeRule;
use crate::curvature::{Damping, Preconditioner, Task, damped_inverses};
use crate::gpu::beside::{Beside, Running};
use crate::linalg::next;
use candle_core::Result;
use std::sync::Arc;

/// A block's inverse, or why there is none.
pub(super) type Made = std::result::Result<Preconditioner, String>;

/// Inverses that no step has used yet. A clone is the same ones.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    /// The step whose factors they invert.
    pub from: usize,
    /// The damping that all blocks share.
    pub damping: f64,
    beside: Beside,
    running: Arc<Running<Vec<Made>>>,
}

impl Ahead {
    /// Inverses that were made elsewhere.
    pub fn made(from: usize, damping: f64, inverses: Vec<Made>) -> Self {
        Self { from, damping, beside: Beside::AtOnce, running: Arc::new(Running::done(inverses)) }
    }

    fn begin(beside: Beside, from: usize, damping: f64, tasks: Vec<Task>) -> Result<Self> {
        let tasks = sent(&beside, tasks)?;
        let work = move || {
            let _span = tracing::info_span!("inverse").entered();
            damped_inverses(&tasks).into_iter().map(|made| made.map_err(|error| error.to_string())).collect()
        };
        let running = Arc::new(beside.start(work)?);
        Ok(Self { from, damping, beside, running })
    }

    /// The inverses, in the order of the blocks; waits for them.
    pub fn wait(&self) -> Result<Vec<Made>> {
        let made = self.running.wait()?;
        let parts = made.iter().flatten().flat_map(Preconditioner::parts).map(|(_, part)| part.clone());
        let mut brought = self.beside.bring(&parts.collect::<Vec<_>>())?.into_iter().map(Ok);
        let receive = |made: Made| match made {
            Ok(made) => made.map(|_| next(&mut brought)).map(Ok),
            Err(why) => Ok(Err(why)),
        };
        made.into_iter().map(receive).collect()
    }
}

/// What [`Natural::overlapped`] has done.
pub(super) struct Overlapped {
    /// What no step has used after this one.
    pub ahead: Option<Ahead>,
    /// The damping of the inverses that this step uses.
    pub damping: f64,
    /// Whether it is the first to use them.
    pub taken: bool,
}

impl<R: WakeRule> Natural<R> {
    /// Whether inverses that are due are begun and not waited for. The first ones always are.
    pub(super) fn overlaps(&self) -> bool {
        self.params.overlap > 0 && self.blocks.iter().all(|block| block.state.preconditioner.is_some())
    }

    /// Whether the coming step is the first to use inverses that were made beside the steps.
    pub(super) fn takes(&self) -> bool {
        let time = |ahead: &Ahead| {
            self.steps >= ahead.from.saturating_add(self.params.overlap) || self.inverses_due()
        };
        self.ahead.as_ref().is_some_and(time)
    }

    /// Puts inverses whose time has come into the states of `renewed`, and begins those that are due, with the damping `due`.
    pub(super) fn overlapped(&self, renewed: &mut [Renewed<'_>], due: f64) -> Result<Overlapped> {
        let (mut ahead, mut damping) = (self.ahead.clone(), due);
        let begins = self.overlaps() && self.inverses_due();
        if begins {
            // What is due is for later.
            damping = self.damping;
        }
        let taken = ahead.take_if(|_| self.takes());
        if let Some(taken) = &taken {
            if matches!(self.params.damping, Damping::Relative(_)) {
                damping = taken.damping;
            }
            for ((block, renewed), made) in self.blocks.iter().zip(&mut *renewed).zip(taken.wait()?) {
                renewed.fresh = true;
                match made {
                    Ok(made) => renewed.state.preconditioner = Some(made),
                    Err(why) => tracing::warn!("block {}: {why}; the last inverse stays", block.name),
                }
            }
        }
        if begins {
            let task = |(block, r): (_, &Renewed<'_>)| {
                let last = r.state.preconditioner.as_ref();
                self.task(block, (&r.average.0, &r.average.1), last, due)
            };
            let tasks = self.blocks.iter().zip(&*renewed).map(task).collect();
            ahead = Some(Ahead::begin(self.beside()?, self.steps, due, tasks)?);
        }
        Ok(Overlapped { ahead, damping, taken: taken.is_some() })
    }

    /// Where inverses are made beside the steps, the same place each time.
    fn beside(&self) -> Result<Beside> {
        if let Some(beside) = self.beside.get() {
            return Ok(beside.clone());
        }
        let beside = self.vars.first().map_or(Ok(Beside::AtOnce), |param| Beside::of(param.var.device()))?;
        Ok(self.beside.get_or_init(|| beside).clone())
    }
}

/// Tasks that can be worked on beside the steps.
fn sent(beside: &Beside, tasks: Vec<Task>) -> Result<Vec<Task>> {
    let of = |task: &Task| {
        let last = task.last.iter().flat_map(|last| last.parts().into_iter().map(|(_, part)| part.clone()));
        [task.a.clone(), task.g.clone()].into_iter().chain(last.collect::<Vec<_>>())
    };
    let mut sent = beside.send(&tasks.iter().flat_map(of).collect::<Vec<_>>())?.into_iter().map(Ok);
    let receive = |task: Task| {
        let (a, g) = (next(&mut sent)?, next(&mut sent)?);
        let last = task.last.map(|last| last.map(|_| next(&mut sent))).transpose()?;
        Ok(Task { a, g, last, ..task })
    };
    tasks.into_iter().map(receive).collect()
}
