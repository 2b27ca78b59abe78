//! What a step takes in: this process's gradients and factors, or those of all processes that share the optimizer.

use super::NaturalGradient;
use super::gradients::Backward;
use crate::curvature::{FactorSums, Joint, Kept, LayerFactors};
use crate::optim::placement;
use crate::optim::share::{Brought, NOT_COUNTED, Share, Slot, add_gradients, read_gradients};
use crate::optim::state::pending::Others;
use crate::optim::step::gradients::{Refusal, Staged};
use crate::optim::step::renew::Refresh;
use crate::optim::wake::Model;
use crate::parallel::{Form, Kind, Placement, Sums, Totals, Trouble, World};
use candle_core::{Result, Tensor, bail};

/// What a step takes in. With several processes it is made of what all have brought, and equal on all.
pub(super) struct Incoming {
    pub grads: Vec<Option<Tensor>>,
    pub loss: Option<f64>,
    pub refresh: Staged<Option<Refresh>>,
}

/// What this process has seen of a step and does not add up at once.
#[derive(Default)]
struct Here {
    /// The gradients of drawn labels, which as many passes have as on other processes.
    drawn: Vec<Vec<Tensor>>,
    /// Records, which EKFAC's moments are sums over.
    kept: Vec<Kept>,
}

impl NaturalGradient {
    /// Ties this optimizer to those of the other processes of `world`, so that each step is the one that one process would take on all
    /// processes' rows: gradients, factors and counts are added up over them, with the weights of their loss terms.
    ///
    /// Each process builds the same model and the same optimizer; the parameters become rank 0's. Call it before the first step, or after all
    /// have resumed the same file. From then on every process makes the same calls: [`observe`](Self::observe) at *every* step, which counts
    /// its rows, then `backward_step`, whose loss is the mean over its own rows. A process without rows calls
    /// [`step_without_rows`](Self::step_without_rows). What goes wrong on one process is an error on all, at the step, that names its rank.
    /// In a world of one nothing changes.
    ///
    /// # Errors
    /// On all processes: when options, Vars, blocks, steps taken or state differ, with the first thing that does; when a process does not
    /// come; with QE, whose inner steps evaluate the model on rows of one process; with [`Placement::Owned`] and
    /// [`Params::ekfac`](crate::optim::Params::ekfac), whose moments need eigenvectors where the rows are; with inverses that are made beside the steps
    /// ([`Params::overlap`](crate::optim::Params::overlap)) under any placement but [`Placement::Replicated`].
    pub fn share(&mut self, world: &World, placement: Placement) -> Result<()> {
        if world.is_alone() {
            return Ok(());
        }
        let (name, steps) = (self.core.name(), self.core.steps);
        let settled = self.settle();
        if self.core.ownership.is_some() {
            bail!(
                "{name}: expected an optimizer with all of its state, got one that shares it with others already"
            )
        }
        let placement = match placement {
            Placement::ByCost => placement::cheapest(&self.core, world),
            Placement::Replicated | Placement::Gathered | Placement::Owned => placement,
        };
        let share = Share::new(world, placement, name, self.core.identity())?;
        share.all_did((name, "share", steps), settled)?;
        // All have the same options here, so all refuse.
        if self.core.params.wake.inner().is_some() {
            bail!(
                "{name}: expected a member whose step is one evaluation of the model, got inner steps, whose closure sees one process's rows alone"
            )
        }
        if self.core.params.ekfac && placement == Placement::Owned {
            bail!(
                "{name}: expected Placement::Replicated or Gathered with ekfac, whose moments need the eigenvectors where the rows are, got Owned"
            )
        }
        if placement != Placement::Replicated && self.core.params.overlap > 0 {
            bail!(
                "{name}: expected Placement::Replicated with inverses that are made beside the steps (overlap {}), got {placement:?}",
                self.core.params.overlap
            )
        }
        // Before any parameter is another.
        share.agree_on((name, "share", steps), &self.state_of(), self.core.state_hashes())?;
        let vars = self.core.vars.iter().map(|param| &param.var);
        let vars = vars.chain(self.core.frozen.iter().map(|(_, var)| var));
        let masters = self.core.vars.iter().filter_map(|param| param.master.as_ref());
        let values = share.values_of_first((name, steps), vars, masters)?;
        let masters = self.core.vars.iter_mut().filter_map(|param| param.master.as_mut());
        for (master, value) in masters.zip(values) {
            *master = value.unwrap_or_else(|| master.clone());
        }
        self.device = None;
        let others = || Some(Others { world: world.clone(), of: name });
        if self.core.params.ekfac {
            self.workplace.with_rows = others();
        }
        self.workplace.division = share.division.clone();
        if placement == Placement::Owned {
            let owners = placement::unit_owners(&self.core, world.size());
            self.core.ownership = Some(self.core.ownership(world.rank(), &owners));
            self.core.keep_own();
            self.workplace.owners = others();
        }
        self.shared = Some(share);
        Ok(())
    }

    /// Compares the state of all processes hash by hash, where there are several, after each has come to its own as `outcome` says.
    pub(super) fn agree_on_state(&self, outcome: Result<()>) -> Result<()> {
        let Some(share) = &self.shared else { return outcome };
        let place = (self.core.name(), "resume", self.core.steps);
        share.agree_on(place, &self.state_of(), outcome.and_then(|()| self.core.state_hashes()))
    }

    /// What is compared of all processes.
    fn state_of(&self) -> String {
        format!("{}: the state (resume the same file on all processes)", self.core.name())
    }

    /// What is brought to a step: this process's part, or everybody's. A local error is everybody's too.
    pub(super) fn incoming(&mut self, local: Result<Backward>) -> Staged<Incoming> {
        let incoming = match self.shared.take() {
            None => local.map_err(Refusal::Failed).map(|(loss, grads)| {
                let refresh = match loss {
                    Some(loss) if !loss.is_finite() => Err(Refusal::NonFinite(format!("the loss is {loss}"))),
                    _ => self.take_factors(),
                };
                Incoming { grads, loss, refresh }
            }),
            Some(mut share) => {
                let incoming = self.of_all(&mut share, local);
                share.forget();
                self.shared = Some(share);
                incoming
            }
        };
        if incoming.is_err() {
            self.forget();
        }
        incoming
    }

    /// Meets the others with this process's part of the step, and adds all parts up.
    fn of_all(&mut self, share: &mut Share, local: Result<Backward>) -> Staged<Incoming> {
        let (name, steps) = (self.core.name(), self.core.steps);
        let joint_due = self.curvature_due();
        let mut seen = Here::default();
        let own =
            local.map_err(Refusal::Failed).and_then(|local| self.own(share, local, joint_due, &mut seen));
        let Here { drawn, kept } = seen;
        let alike = [("learning rate", self.core.params.lr), ("damping", self.core.damping)];
        let values: Vec<_> =
            self.core.vars.iter().map(|param| (param.name.as_str(), param.value())).collect();
        let (mut sums, brought) = match own {
            Ok((sums, brought)) => (sums, Ok(brought)),
            Err(refused) => (share.sums(), Err(Trouble::from(refused))),
        };
        share.last_terms = brought.as_ref().map_or(0.0, |brought| brought.total);
        let told = share.step(name, steps, brought, &alike, &values)?;
        let forms: Vec<_> = self.without_layer().collect();
        if told.passes > 0 && !forms.is_empty() {
            // How many passes there are was not known before to those without rows.
            let added = add_drawn(&mut sums, told.passes, &forms, &drawn);
            share.meet((name, "drawn", steps), added.map(|()| vec![]).map_err(Trouble::from))?;
        }
        let mut totals = share.add(sums)?;
        let refresh = joint_due.then_some(told.passes);
        // What fails from here on, on this process alone, is brought to the next meeting.
        Ok(match self.of_totals(&mut totals, told.total, refresh, &forms, kept) {
            Ok((grads, refresh)) => Incoming { grads, loss: told.loss, refresh: Ok(refresh) },
            Err(error) => {
                let grads = vec![None; self.core.vars.len()];
                Incoming { grads, loss: told.loss, refresh: Err(Refusal::Failed(error)) }
            }
        })
    }

    /// The mean gradients over `total` loss terms, and what renews the curvature with so many `passes` of drawn labels, if it is due.
    fn of_totals(
        &mut self,
        totals: &mut Totals,
        total: f64,
        passes: Option<usize>,
        forms: &[(Option<usize>, Form)],
        kept: Vec<Kept>,
    ) -> Result<(Vec<Option<Tensor>>, Option<Refresh>)> {
        let (mut grads, took_part) = read_gradients(totals, &self.slots(), total)?;
        let refresh = match passes {
            Some(passes) => {
                let joint = self.joint();
                let (mut layers, counts) = joint.read(totals)?;
                for (layer, kept) in layers.iter_mut().zip(kept) {
                    layer.kept = kept;
                }
                let averaged = !joint.last.is_empty();
                let mut drawn = Vec::with_capacity(passes);
                for _ in 0..passes {
                    let read = |(owner, form): &(_, Form)| totals.tensor(Kind::Exact, *owner, form, 1.0);
                    drawn.push(forms.iter().map(read).collect::<Result<Vec<_>>>()?);
                }
                Some(Refresh { layers, averaged, counts, drawn })
            }
            None => None,
        };
        let mut taking_part: Vec<_> = took_part.into_iter().map(|took| took.then_some(())).collect();
        self.sit_out(&mut taking_part)?;
        for (grad, taking_part) in grads.iter_mut().zip(taking_part) {
            *grad = grad.take().filter(|_| taking_part.is_some());
        }
        Ok((grads, refresh))
    }

    /// This process's part of a step, with what is not added up at once in `here`.
    fn own(
        &mut self,
        share: &mut Share,
        (loss, grads): Backward,
        due: bool,
        here: &mut Here,
    ) -> Staged<(Sums, Brought)> {
        if let Some(kept) = share.kept.take() {
            return Err(Refusal::Failed(kept));
        }
        self.core.check_rate()?;
        if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            return Err(Refusal::NonFinite(format!("the loss is {loss}")));
        }
        let Some(total) = share.terms else {
            let what = format!("{}: step {}: {NOT_COUNTED}", self.core.name(), self.core.steps);
            return Err(Refusal::Failed(candle_core::Error::Msg(what)));
        };
        let mut sums = share.sums();
        add_gradients(&mut sums, &self.slots(), &grads, total)?;
        let mut passes = 0;
        if due {
            let observed = self.take_sums(total > 0.0)?;
            let (factors, gradients) = observed.map_or((None, vec![]), |(sums, drawn)| (Some(sums), drawn));
            passes = gradients.len();
            here.drawn = gradients;
            let (kept, wrong) = self.joint().add(factors, &mut sums)?;
            here.kept = kept;
            if let Some(whose) = wrong {
                return Err(Refusal::NonFinite(format!("{whose} has NaN or infinite elements")));
            }
        }
        Ok((sums, Brought { total, loss, passes }))
    }

    pub(super) fn slots(&self) -> Vec<Slot<'_>> {
        let slot = |param: &'_ super::super::state::param::Param| Form::wide(param.var.as_tensor());
        let slots = self.core.vars.iter().enumerate();
        let slots = slots.map(|(index, param)| Slot {
            name: &param.name,
            form: slot(param),
            optional: param.optional,
            owner: self.core.owner_of_param(index),
        });
        slots.collect()
    }

    /// The forms of the gradients of blocks without a layer, and who alone needs them, if one does.
    fn without_layer(&self) -> impl Iterator<Item = (Option<usize>, Form)> {
        let blocks = self.core.blocks.iter().enumerate().filter(|(_, block)| block.layer.is_none());
        blocks.map(|(index, block)| {
            let like = Form::wide(self.core.vars[block.params[0]].var.as_tensor());
            (self.core.owner_of_block(index), Form { dims: block.shape().to_vec(), ..like })
        })
    }

    fn joint(&self) -> Joint<'_> {
        let (last, decay) = self.averages_to_join();
        let mut owners = vec![None; self.layers.len()];
        for (index, block) in self.core.blocks.iter().enumerate() {
            if let Some(layer) = block.layer {
                owners[layer] = self.core.owner_of_block(index);
            }
        }
        let sharing = self.core.params.sharing;
        Joint { wants: &self.wants, layers: &self.layers, sharing, last, decay, owners }
    }

    /// The averages that factors join as they are computed, and how much of these stays. None where something needs the factors of the
    /// batch alone, as a quadratic wake's model does.
    pub(super) fn averages_to_join(&self) -> (Vec<LayerFactors>, f64) {
        // Owners alone have averages.
        if self.core.ownership.is_some() {
            return (vec![], 0.0);
        }
        match self.core.params.wake.model() {
            Model::Linear => {}
            Model::Quadratic(_) => return (vec![], 0.0),
        }
        let mut last = vec![LayerFactors::default(); self.layers.len()];
        for block in &self.core.blocks {
            if let Some(layer) = block.layer {
                block.last_factors(&mut last[layer]);
            }
        }
        (last, self.core.params.stat_decay)
    }

    /// Asks all whether they will take the step that they have computed after `steps` others, before any does.
    pub(super) fn all_agree<T>(&mut self, steps: usize, outcome: Result<Option<T>>) -> Result<Option<T>> {
        match &mut self.shared {
            Some(share) => share.agree(self.core.name(), steps, outcome),
            None => outcome,
        }
    }
}

/// Adds the gradients of drawn labels, or nothing of a process without rows, to what all add up.
fn add_drawn(
    sums: &mut Sums,
    passes: usize,
    forms: &[(Option<usize>, Form)],
    drawn: &[Vec<Tensor>],
) -> Staged<()> {
    for pass in 0..passes {
        for (index, (owner, form)) in forms.iter().enumerate() {
            let drawn = drawn.get(pass).and_then(|pass| pass.get(index));
            sums.tensor(Kind::Exact, *owner, drawn, form, 1.0, || "a gradient of drawn labels".into())?;
        }
    }
    match sums.not_finite()? {
        Some(whose) => Err(Refusal::NonFinite(format!("{whose} has NaN or infinite elements"))),
        None => Ok(()),
    }
}

/// What was seen of a step: sums of factors, and the gradients of drawn labels.
pub(super) type Seen = (FactorSums, Vec<Vec<Tensor>>);

#[cfg(test)]
mod tests {
    use crate::gpu::emulate::emulate;
    use crate::nn::{self, Module, VarBuilder, VarMap};
    use crate::ops::testing::{random, values};
    use crate::optim::{Every, Group, Groups, NaturalGradient, Optimizer, Params, So, UpdateRule, Wake};
    use crate::parallel::{Placement, Threads, World, testing};
    use crate::tape::{Likelihood, Tape};
    use candle_core::{DType, Device, Result, Tensor};

    /// Parameters after some steps of a rank on its part of six rows.
    fn train(world: &World, wake: Wake, placement: Placement) -> Result<Vec<Vec<f64>>> {
        let (tape, vars) = (Tape::new(), VarMap::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let (a, b) = tape.build(|| Ok((nn::linear(5, 34, vb.pp("a"))?, nn::linear(34, 3, vb.pp("b"))?)))?;
        let mut named: Vec<_> = vars.data().lock().expect("a lock").clone().into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        for (index, (_, var)) in named.iter().enumerate() {
            var.set(&random((index + 10 * world.rank()) as u64, var.dims())?)?;
        }
        let every = Every { factors: 2, inverses: 2 };
        let mut opt = NaturalGradient::from_varmap(&vars, Params { every, ..Params::of(wake, &tape) })?;
        opt.share(world, placement)?;
        let (x, y) = (random(90, &[6, 5])?, Tensor::new(&[0u32, 1, 2, 2, 1, 0], &Device::Cpu)?);
        let (from, n) = if world.is_alone() { (0, 6) } else { [(0, 4), (4, 2)][world.rank()] };
        for _ in 0..6 {
            let outputs = b.forward(&a.forward(&x.narrow(0, from, n)?)?.tanh()?)?;
            opt.observe(&outputs, Likelihood::Categorical)?;
            opt.backward_step(&nn::loss::cross_entropy(&outputs, &y.narrow(0, from, n)?)?)?;
        }
        opt.settle()?;
        named.iter().map(|(_, var)| values(var)).collect()
    }

    #[test]
    fn tensors_on_a_gpu_are_added_up_there_and_by_way_of_the_host() -> Result<()> {
        let wakes: [Wake; 3] = [Wake::KFac, So::default().into(), "kld-wrm".parse()?];
        let placements = [Placement::Replicated, Placement::Gathered, Placement::Gathered];
        let owned = wakes.clone().map(|wake| (wake, Placement::Owned));
        for (wake, placement) in wakes.into_iter().zip(placements).chain(owned) {
            let expected = emulate(|| train(&World::alone(), wake.clone(), placement))?;
            let run = &|world: World| emulate(|| train(&world, wake.clone(), placement));
            let trained = |worlds: Vec<World>| -> Vec<_> {
                std::thread::scope(|scope| {
                    let ranks: Vec<_> =
                        worlds.into_iter().map(|world| scope.spawn(move || run(world))).collect();
                    ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
                })
            };
            let found = [Threads::worlds(2), testing::worlds(2)].into_iter().flat_map(trained);
            for found in found {
                for (found, expected) in found?.iter().flatten().zip(expected.iter().flatten()) {
                    let far = (found - expected).abs();
                    assert!(far < 1e-11, "{}: {found}, expected {expected}", wake.name());
                }
            }
        }
        Ok(())
    }

    /// What the ranks of a world say of a step whose drawn gradients `spoil` has changed on rank 1, and what becomes of the parameters. Rank 2 has
    /// no rows.
    fn drawn(world: &World, placement: Placement, spoil: fn(&Tensor) -> Result<Tensor>) -> Result<String> {
        world.set_time_limit(std::time::Duration::from_secs(20));
        let (tape, vars) = (Tape::new(), VarMap::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let (a, b) = tape.build(|| Ok((nn::linear(5, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?)))?;
        let by_gradient = Group { rule: Some(UpdateRule::GradientFactors), ..Group::named("a.weight") };
        let params = Params { groups: Groups(vec![by_gradient]), ..Params::k_fac(&tape) };
        let mut opt = NaturalGradient::from_varmap(&vars, params)?;
        opt.share(world, placement)?;
        let before = b.weight().copy()?;
        let stepped = match world.rank() {
            2 => opt.step_without_rows(),
            rank => {
                let (x, y) = (random(rank as u64, &[3, 5])?, Tensor::new(&[0u32, 1, 2], &Device::Cpu)?);
                let z = b.forward(&a.forward(&x)?.tanh()?)?;
                opt.observe(&z, Likelihood::Categorical)?;
                let drawn = opt.observed.iter_mut().flat_map(|seen| seen.drawn.iter_mut().flatten());
                for gradient in drawn.filter(|_| rank == 1) {
                    *gradient = spoil(gradient)?;
                }
                opt.backward_step(&nn::loss::cross_entropy(&z, &y)?)
            }
        };
        assert_eq!(values(b.weight())?, values(&before)?);
        Ok(stepped.err().map_or(String::new(), |error| error.to_string()))
    }

    #[test]
    fn drawn_gradients_that_one_cannot_add_are_said_on_all() -> Result<()> {
        type Spoil = fn(&Tensor) -> Result<Tensor>;
        let cases: [(Spoil, &str); 2] = [
            (
                |g| g.narrow(1, 0, 2)?.contiguous(),
                "rank 1: parallel: expected a tensor [1, 4, 5] to add, got",
            ),
            (
                |g| g * f64::NAN,
                "kfac: step 0: rank 1: a gradient of drawn labels has NaN or infinite elements",
            ),
        ];
        for (spoil, expected) in cases {
            for placement in [Placement::Replicated, Placement::Owned] {
                for worlds in [Threads::worlds(3), testing::worlds(3)] {
                    let said: Vec<_> = std::thread::scope(|scope| {
                        let run = |world: World| scope.spawn(move || drawn(&world, placement, spoil));
                        let ranks: Vec<_> = worlds.into_iter().map(run).collect();
                        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
                    });
                    for said in said {
                        let said = said?;
                        assert!(said.starts_with(expected), "{said:?}, expected {expected:?}");
                    }
                }
            }
        }
        Ok(())
    }
}
