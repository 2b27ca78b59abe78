//! An optimizer's tie to those of the other processes: what it has counted here, and the meetings of a step.

mod of_owners;

pub(super) use of_owners::Values;

use super::identity::{Lines, hash};
use super::step::gradients::Refusal;
use crate::parallel::{Division, Form, Kind, Place, Placement, Sums, Totals, Trouble, World};
use candle_core::{Error, Result, Tensor, Var, bail};

/// Steps from one comparison of the parameters' hashes to the next.
const COMPARED: usize = 100;

/// An optimizer's tie to those of the other processes.
#[derive(Debug)]
pub(super) struct Share {
    pub world: World,
    /// Which process computes what.
    pub placement: Placement,
    /// How inverses are divided, if they are.
    pub division: Option<Division>,
    /// Whether gradients are added up in bfloat16.
    bf16: bool,
    /// The total of loss terms that the coming step has been shown here; none before it was shown any outputs.
    pub terms: Option<f64>,
    /// The loss terms that all processes have drawn labels for in this step.
    pub rows: u64,
    /// What went wrong here since the last meeting.
    pub kept: Option<Error>,
    /// The total of the last step here.
    pub last_terms: f64,
    /// Bytes that this process has sent.
    pub sent: usize,
}

/// What a process says of its part of a step, or what is so of all parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Brought {
    /// The total of the loss terms.
    pub total: f64,
    /// The mean over them, where it is read.
    pub loss: Option<f64>,
    /// A number that is the same on all processes that have rows: the passes of drawn labels.
    pub passes: usize,
}

/// A param's name, its form, and whether it may be missing.
pub(super) struct Slot<'a> {
    pub name: &'a str,
    pub form: Form,
    pub optional: bool,
    /// Who alone needs its gradient; none where all do.
    pub owner: Option<usize>,
}

impl From<Trouble> for Refusal {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::NonFinite(what) => Refusal::NonFinite(what),
            Trouble::Failed(what) => Refusal::Failed(Error::Msg(what)),
        }
    }
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NonFinite(what) => Trouble::NonFinite(what),
            Refusal::Failed(error) => Trouble::failed(&error),
        }
    }
}

impl Share {
    /// Ties optimizers of equal `identity`.
    pub fn new(world: &World, placement: Placement, who: &'static str, mut identity: Lines) -> Result<Self> {
        let bf16 = world.has_bf16_gradients();
        identity.push(("a placement".into(), format!("{placement:?}")));
        identity.push(("gradients added up in bfloat16:".into(), bf16.to_string()));
        world.agree_all(&format!("{who}: share"), &identity)?;
        let division = match placement {
            Placement::Replicated | Placement::ByCost | Placement::Owned => None,
            Placement::Gathered => Some(Division::new(world, who)),
        };
        let (world, kept) = (world.clone(), None);
        Ok(Self { world, placement, division, bf16, terms: None, rows: 0, kept, last_terms: 0.0, sent: 0 })
    }

    /// Sets Vars and `masters` to what rank 0's are, once all of them are there.
    pub fn take_values_of_first(
        &self,
        (of, step): (&'static str, usize),
        vars: &[Var],
        masters: Vec<&mut Tensor>,
    ) -> Result<()> {
        let place = Place { of, call: "share", step };
        let all = vars.iter().map(Var::as_tensor).chain(masters.iter().map(|master| &**master));
        let values = all.map(|own| self.world.tensor_of_first(place, own).map_err(Trouble::error));
        let mut values = values.collect::<Result<Vec<_>>>()?.into_iter();
        for (var, value) in vars.iter().zip(values.by_ref()) {
            value.map_or(Ok(()), |value| var.set(&value))?;
        }
        for (master, value) in masters.into_iter().zip(values) {
            *master = value.unwrap_or_else(|| master.clone());
        }
        Ok(())
    }

    /// Refuses values that are not the same on all, named line by line, or that one process could not tell.
    pub fn agree_on(
        &self,
        (of, call, step): (&'static str, &'static str, usize),
        who: &str,
        lines: Result<Lines>,
    ) -> Result<()> {
        let (lines, told) = match lines {
            Ok(lines) => (lines, Ok(())),
            Err(error) => (vec![], Err(error)),
        };
        self.all_did((of, call, step), told)?;
        self.world.agree_all(who, &lines)
    }

    /// What this process brings to a sum.
    pub fn sums(&self) -> Sums {
        Sums::new(&self.world, self.bf16)
    }

    /// Adds up what all have brought. What could fail on one process alone has been agreed on before: the others would wait here.
    pub fn add(&mut self, sums: Sums) -> Result<Totals> {
        self.sent += sums.bytes();
        sums.over()
    }

    /// Takes note of loss terms.
    pub fn count(&mut self, total: f64) {
        self.terms = Some(self.terms.unwrap_or(0.0) + total);
    }

    /// Keeps an error for the next meeting.
    pub fn keep(&mut self, error: Error) {
        self.kept.get_or_insert(error);
    }

    /// Forgets the step under way.
    pub fn forget(&mut self) {
        (self.terms, self.rows, self.kept) = (None, 0, None);
    }

    /// Meets the others in a call after `step` steps, with numbers of this process or with what went wrong since the last meeting.
    pub fn meet(
        &mut self,
        (of, call, step): (&'static str, &'static str, usize),
        local: std::result::Result<Vec<f64>, Trouble>,
    ) -> std::result::Result<Vec<Vec<f64>>, Trouble> {
        let local = match self.kept.take() {
            Some(kept) => Err(Trouble::failed(&kept)),
            None => local,
        };
        self.world.meet(Place { of, call, step }, local)
    }

    /// Says to all how something that each did for itself went: on all the same outcome.
    pub fn all_did(
        &self,
        (of, call, step): (&'static str, &'static str, usize),
        outcome: Result<()>,
    ) -> Result<()> {
        let local = outcome.map(|()| vec![]).map_err(|error| Trouble::failed(&error));
        self.world.meet(Place { of, call, step }, local).map(drop).map_err(Trouble::error)
    }

    /// Whether this process was shown a batch without rows.
    pub fn has_no_rows(&self) -> bool {
        self.terms == Some(0.0)
    }

    /// Meets the others with the gradients of a step. `alike` are numbers that must be the same on all, with their names; `vars` are compared
    /// every [`COMPARED`] steps.
    pub fn step(
        &mut self,
        of: &'static str,
        step: usize,
        own: std::result::Result<Brought, Trouble>,
        alike: &[(&str, f64)],
        vars: &[(&str, Tensor)],
    ) -> std::result::Result<Brought, Trouble> {
        let compared = step > 0 && step.is_multiple_of(COMPARED);
        let hashes = |vars: &[(&str, Tensor)]| hash(vars.iter().map(|(_, value)| value));
        let own = own.and_then(|own| {
            let hash = match compared {
                true => hashes(vars).map_err(|error| Trouble::failed(&error))?,
                false => 0,
            };
            let mut numbers = vec![
                own.total,
                own.loss.unwrap_or(f64::NAN),
                own.passes as f64,
                f64::from((hash >> 32) as u32),
                f64::from(hash as u32),
            ];
            numbers.extend(alike.iter().map(|(_, value)| value));
            Ok(numbers)
        });
        let told = self.meet((of, "step", step), own)?;
        let failed = |what: String| Err(Trouble::Failed(format!("{of}: step {step}: {what}")));
        for (rank, numbers) in told.iter().enumerate() {
            for (index, (name, _)) in alike.iter().enumerate() {
                let (own, first) = (numbers[5 + index], told[0][5 + index]);
                if own.to_bits() != first.to_bits() {
                    return failed(format!(
                        "rank {rank} has the {name} {own}, where rank 0 has {first}; all processes need the same"
                    ));
                }
            }
        }
        if told.iter().any(|numbers| numbers[3..5] != told[0][3..5]) {
            let lines: Result<Lines> = vars
                .iter()
                .map(|(name, value)| {
                    let hash = hash(std::iter::once(value))?;
                    Ok((format!("for {name} values of hash"), format!("{hash:016x}")))
                })
                .collect();
            let parted = format!("{of}: step {step}: the parameters have parted");
            return Err(Trouble::Failed(match self.agree_on((of, "step", step), &parted, lines) {
                Err(error) => error.to_string(),
                Ok(()) => parted,
            }));
        }
        let total: f64 = told.iter().map(|numbers| numbers[0]).sum();
        if total <= 0.0 {
            return failed("no process has a loss term".into());
        }
        let passes = told.iter().map(|numbers| numbers[2] as usize).max().unwrap_or(0);
        if let Some(rank) = told.iter().position(|n| n[0] > 0.0 && n[2] as usize != passes) {
            return failed(format!("rank {rank} was shown labels where others draw theirs"));
        }
        let with_rows = || told.iter().filter(|numbers| numbers[0] > 0.0);
        let loss = with_rows().map(|numbers| numbers[0] * numbers[1]).sum::<f64>() / total;
        let loss = with_rows().all(|numbers| !numbers[1].is_nan()).then_some(loss);
        Ok(Brought { total, loss, passes })
    }

    /// Asks all whether they will take the step that they have computed, before any does.
    pub fn agree<T>(
        &mut self,
        of: &'static str,
        step: usize,
        outcome: Result<Option<T>>,
    ) -> Result<Option<T>> {
        let numbers = match &outcome {
            Ok(outcome) => Ok(vec![if outcome.is_some() { 1.0 } else { 0.0 }]),
            Err(error) => Err(Trouble::failed(error)),
        };
        let told = self.meet((of, "commit", step), numbers).map_err(Trouble::error)?;
        if told.iter().any(|numbers| numbers != &told[0]) {
            bail!("{of}: step {step}: some processes leave the step out and some do not: they have parted")
        }
        outcome
    }

    /// Whether the gradients of a loss times `scale` are finite on all processes.
    pub fn all_finite<T>(
        &mut self,
        of: &'static str,
        step: usize,
        local: Result<(T, bool)>,
        scale: f64,
    ) -> Result<(T, bool)> {
        let numbers = match &local {
            Ok((_, finite)) => Ok(vec![if *finite { 1.0 } else { 0.0 }, scale]),
            Err(error) => Err(Trouble::failed(error)),
        };
        let told = self.meet((of, "backward_step_scaled", step), numbers).map_err(Trouble::error)?;
        if let Some(rank) = told.iter().position(|numbers| numbers[1] != told[0][1]) {
            bail!(
                "{of}: rank {rank} has the loss scale {}, where rank 0 has {}; all processes need the same",
                told[rank][1],
                told[0][1]
            )
        }
        let finite = told.iter().all(|numbers| numbers[0] == 1.0);
        local.map(|(local, _)| (local, finite))
    }

    /// The means over all loss terms of gradients that this process has of its own.
    pub fn means(
        &mut self,
        of: &'static str,
        step: usize,
        slots: &[Slot<'_>],
        local: Result<Vec<Option<Tensor>>>,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut sums = self.sums();
        let local = match (self.terms, local) {
            (None, _) => Err(Trouble::Failed(NOT_COUNTED.into())),
            (_, Err(error)) => Err(Trouble::failed(&error)),
            (Some(total), Ok(grads)) => {
                let added = add_gradients(&mut sums, slots, &grads, total);
                added.map(|()| vec![total]).map_err(Trouble::from)
            }
        };
        let told = self.meet((of, "mean_gradients", step), local).map_err(Trouble::error)?;
        let total: f64 = told.iter().map(|numbers| numbers[0]).sum();
        if total <= 0.0 {
            bail!("{of}: no process has a loss term")
        }
        Ok(read_gradients(&mut self.add(sums)?, slots, total)?.0)
    }
}

/// What is missing where a step's loss terms were not counted.
pub(super) const NOT_COUNTED: &str = "the loss terms of this process are not known: call observe at every step (first-order optimizers: count_terms)";

/// Adds gradients of `total` loss terms to what all add up. Where an element is not finite, says of whom.
pub(super) fn add_gradients(
    sums: &mut Sums,
    slots: &[Slot<'_>],
    grads: &[Option<Tensor>],
    total: f64,
) -> std::result::Result<(), Refusal> {
    for (slot, grad) in slots.iter().zip(grads) {
        let grad = grad.as_ref().filter(|_| total > 0.0);
        if slot.optional {
            sums.number(if grad.is_some() { 1.0 } else { 0.0 });
        }
        sums.tensor(Kind::Gradient, slot.owner, grad, &slot.form, total, || {
            format!("the gradient of {}", slot.name)
        })?;
    }
    match sums.not_finite()? {
        Some(whose) => Err(Refusal::NonFinite(format!("{whose} has NaN or infinite elements"))),
        None => Ok(()),
    }
}

/// The mean gradients of all that are for this process, and which params took part anywhere.
pub(super) fn read_gradients(
    totals: &mut Totals,
    slots: &[Slot<'_>],
    total: f64,
) -> Result<(Vec<Option<Tensor>>, Vec<bool>)> {
    let (mut grads, mut took_part) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
    for slot in slots {
        let present = !slot.optional || totals.number()? > 0.0;
        grads.push(totals.tensor(Kind::Gradient, slot.owner, &slot.form, total)?.filter(|_| present));
        took_part.push(present);
    }
    Ok((grads, took_part))
}
