//! Numbers within a step that blocks of several owners have a part of.

use super::gradients::Staged;
use crate::optim::state::pending::Others;
use crate::parallel::{Place, Trouble};

/// What this process has, with the sums of the numbers that each owner has of its own blocks. Where one refuses, all do: so what was refused
/// before comes here too. Without owners the numbers are the sums.
pub(super) fn summed<T>(
    owners: Option<&Others>,
    (call, step): (&'static str, usize),
    own: Staged<T>,
    numbers: impl FnOnce(&T) -> Staged<Vec<f64>>,
) -> Staged<(T, Vec<f64>)> {
    let own = own.and_then(|own| {
        let numbers = numbers(&own)?;
        Ok((own, numbers))
    });
    let Some(Others { world, of }) = owners else { return own };
    let own = own.map_err(Trouble::from);
    let local = own.as_ref().map(|(_, numbers)| numbers.clone()).map_err(Trouble::clone);
    let told = world.meet(Place { of, call, step }, local)?;
    let numbers = told.iter().map(Vec::len).max().unwrap_or(0);
    let sum = |index: usize| told.iter().filter_map(|numbers| numbers.get(index)).sum();
    Ok((own?.0, (0..numbers).map(sum).collect()))
}
