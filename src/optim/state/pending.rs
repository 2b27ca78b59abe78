//! Inverses that are made beside the steps: begun at one step and used from a later one on.

use crate::curvature::{Preconditioner, Task, damped_inverses};
use crate::gpu::background::{BackgroundTask, Worker};
use crate::linalg::next;
use crate::parallel::{Division, World};
use candle_core::{Device, Result};
use std::sync::{Arc, OnceLock};

/// A block's inverse, or why there is none.
pub(crate) type Made = std::result::Result<Preconditioner, String>;

/// Inverses that no step has used yet. A clone is the same ones.
#[derive(Debug, Clone)]
pub(crate) struct PendingInverses {
    /// The step whose factors they invert.
    pub from: usize,
    /// The damping that all blocks share.
    pub damping: f64,
    beside: Worker,
    running: Arc<BackgroundTask<Vec<Made>>>,
}

impl PendingInverses {
    /// Inverses that were made elsewhere.
    pub fn made(from: usize, damping: f64, inverses: Vec<Made>) -> Self {
        Self { from, damping, beside: Worker::AtOnce, running: Arc::new(BackgroundTask::done(inverses)) }
    }

    /// Begins them on `beside`.
    pub fn begin(beside: Worker, from: usize, damping: f64, tasks: Vec<Task>) -> Result<Self> {
        let tasks = sent(&beside, tasks)?;
        let work = move || {
            let _span = tracing::info_span!("inverse").entered();
            damped_inverses(&tasks, None)
                .into_iter()
                .map(|made| made.map_err(|error| error.to_string()))
                .collect()
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

/// Where inverses are made: beside the steps, the same place each time, and by which of several processes; and who has a part of a step.
#[derive(Debug, Default)]
pub(crate) struct Workplace {
    beside: OnceLock<Worker>,
    /// How several processes divide inverses that the step waits for, if they do.
    pub division: Option<Division>,
    /// Who else holds state, where it is divided.
    pub owners: Option<Others>,
    /// Who else has rows, where moments are sums over them.
    pub with_rows: Option<Others>,
}

/// The processes that meet within a step, and what their optimizer is called.
#[derive(Debug, Clone)]
pub(crate) struct Others {
    pub world: World,
    pub of: &'static str,
}

impl Workplace {
    /// The place for tensors on `device`.
    pub fn on(&self, device: Option<&Device>) -> Result<Worker> {
        if let Some(beside) = self.beside.get() {
            return Ok(beside.clone());
        }
        let beside = device.map_or(Ok(Worker::AtOnce), Worker::of)?;
        Ok(self.beside.get_or_init(|| beside).clone())
    }
}

/// Tasks that can be worked on beside the steps.
fn sent(beside: &Worker, tasks: Vec<Task>) -> Result<Vec<Task>> {
    let of = |task: &Task| {
        let last = task.last.iter().flat_map(|last| last.parts().into_iter().map(|(_, part)| part.clone()));
        let all = [&task.a, &task.g].into_iter().chain(&task.inputs).cloned();
        all.chain(last).collect::<Vec<_>>()
    };
    let mut sent = beside.send(&tasks.iter().flat_map(of).collect::<Vec<_>>())?.into_iter().map(Ok);
    let receive = |task: Task| {
        let (a, g) = (next(&mut sent)?, next(&mut sent)?);
        let inputs = task.inputs.map(|_| next(&mut sent)).transpose()?;
        let last = task.last.map(|last| last.map(|_| next(&mut sent))).transpose()?;
        Ok(Task { a, g, last, inputs, ..task })
    };
    tasks.into_iter().map(receive).collect()
}
