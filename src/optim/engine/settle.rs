//! What the host knows of the steps that a GPU has taken.

use super::NaturalGradient;
use crate::ops::update;
use crate::optim::params::NonFinite;
use crate::optim::state::{Core, Slopes};
use candle_core::{Result, bail};

/// What the host knows of the steps once it has asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub slopes: Slopes,
    pub previous_rate: Option<f64>,
    pub skipped: usize,
    /// Steps taken, as the device counts.
    done: f64,
}

impl NaturalGradient {
    /// Waits for the steps that a GPU has queued, and brings what the host knows of them up to date. Elsewhere nothing happens.
    ///
    /// # Errors
    /// When one of those steps had a gradient with NaN or infinite elements, unless such steps are skipped. The message names step and tensor.
    /// Parameters and state are as that step found them.
    pub fn settle(&mut self) -> Result<()> {
        let seen = self.seen();
        let Some(device) = &self.device else { return Ok(()) };
        let flags = device.take_flags()?;
        match seen {
            Ok(Seen { slopes, previous_rate, skipped, done }) => {
                (self.core.slopes, self.core.previous_rate, self.core.skipped) =
                    (slopes, previous_rate, skipped);
                for (adam, ahead) in self.core.adam.iter_mut().zip(&device.adam_ahead) {
                    adam.steps = (done + ahead) as usize;
                }
                Ok(())
            }
            Err(error) => {
                self.core.steps = flags[update::FAILED_AT] as usize;
                Err(error)
            }
        }
    }

    /// What [`NaturalGradient::settle`] would set.
    pub(super) fn seen(&self) -> Result<Seen> {
        let Some(device) = &self.device else {
            let Core { slopes, previous_rate, skipped, .. } = self.core;
            return Ok(Seen { slopes, previous_rate, skipped, done: self.core.steps as f64 });
        };
        let flags: Vec<u32> = device.flags.to_vec1()?;
        if flags[update::BLAMED] != update::NOBODY && self.core.params.non_finite == NonFinite::Error {
            bail!(
                "{}: step {}: {}; parameters and state are as that step found them",
                self.core.name(),
                flags[update::FAILED_AT],
                self.blame(flags[update::BLAMED])
            )
        }
        let numbers: Vec<f64> = device.numbers.to_vec1()?;
        let previous = numbers[update::PREVIOUS];
        Ok(Seen {
            slopes: Slopes {
                after: numbers[update::AFTER],
                before: numbers[update::BEFORE],
                last: device.last_slopes.to_vec1::<f64>()?.iter().sum::<f64>().abs(),
                length: numbers[update::LENGTH],
                terms: self.core.slopes.terms,
            },
            previous_rate: (previous >= 0.0).then_some(previous),
            skipped: self.core.skipped + flags[update::SKIPPED] as usize,
            done: numbers[update::DONE],
        })
    }

    /// Says who made a step non-finite.
    fn blame(&self, culprit: u32) -> String {
        if culprit >= update::FIRST_BLOCK {
            let name = self.core.blocks.get((culprit - update::FIRST_BLOCK) as usize).map_or("", |b| &b.name);
            return format!("the direction of block {name} overflows; a larger damping would bound it");
        }
        let name = self.core.vars.get(culprit as usize).map_or("", |p| &p.name);
        format!("the gradient of {name} has NaN or infinite elements")
    }
}
