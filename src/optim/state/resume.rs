//! Resuming: what `save.rs` has written, checked as a whole and then taken.

use super::block::{Block, BlockState, Part};
use super::param::{Adam, Param};
use super::pending::PendingInverses;
use super::reader::{Needs, Numbers, Resumed, StateReader};
use super::save::{FORMAT, KEY, PENDING, SLOPES, slot};
use super::{Core, Predicted, Slopes};
use crate::checkpoint::Checkpoint;
use crate::curvature::{Beyond, FactorShape, wide_dtype};
use candle_core::{Device, Result, Tensor, bail};
use std::path::Path;

/// What a file says, checked.
pub(in crate::optim) struct State {
    header: Header,
    body: Body,
}

/// The numbers of a file.
struct Header {
    steps: usize,
    skipped: usize,
    lr: f64,
    largest_lr: Option<f64>,
    previous_rate: Option<f64>,
    damping: f64,
    slopes: Slopes,
    /// The step of inverses that none has used, and their damping.
    pending: Option<(usize, f64)>,
    closure_checked: bool,
    models: usize,
    predicted: Option<Predicted>,
    optimizer: String,
    tensors: usize,
}

/// The tensors of a file, in the order of an optimizer's; none where it has none, which is in order where it is read in part.
struct Body {
    values: Vec<Option<Tensor>>,
    masters: Vec<Option<Tensor>>,
    frozen: Vec<Option<Tensor>>,
    states: Vec<Option<BlockState>>,
    pending: Option<PendingInverses>,
    adam: Vec<Option<Adam>>,
    models: Vec<Vec<Tensor>>,
    averages: Vec<Option<Tensor>>,
}

impl Core {
    /// Reads everything of a file that [`Core::save`] wrote, for [`Core::take_state`]; where it is read `partly`, what it has and is wanted.
    ///
    /// # Errors
    /// When the file is unreadable, or does not fit: one message lists every difference. Nothing has changed then but the shapes of factors
    /// that are chosen by cost.
    pub fn read_state(&mut self, path: &Path, partly: bool) -> Result<(Resumed, State)> {
        let device = self.vars.first().map_or(Device::Cpu, |p| p.var.device().clone());
        let file = Checkpoint::read(path, &device)?;
        self.refuse_low_rank(path, &file)?;
        self.take_factor_shapes(&file);
        let text = file.metadata.get(KEY).map_or("", String::as_str);
        let numbers =
            Numbers { path, values: text.lines().filter_map(|line| line.split_once(" = ")).collect() };
        let header = Header::read(&numbers, file.tensors.len())?;
        let mut reader = StateReader::new(&file, partly);
        header.check(self.name(), file.tensors.len(), &mut reader.wrong);
        let body = self.read(&header, &numbers, &mut reader)?;
        Ok((reader.finish(path)?, State { header, body }))
    }

    /// Refuses factors of low rank for EKFAC, which scales by eigenvectors in all directions.
    fn refuse_low_rank(&self, path: &Path, file: &Checkpoint) -> Result<()> {
        for block in self.blocks.iter().filter(|block| self.params.ekfac && block.part != Part::Table) {
            for (part, side) in [("factor_a", block.columns), ("factor_g", block.rows)] {
                let name = slot(&block.name, part);
                let Some(dims) = file.tensors.get(&name).map(|factor| factor.dims()) else { continue };
                if FactorShape::of_dims(side.dim, block.groups, dims)
                    .is_some_and(|shape| shape.rank.is_some())
                {
                    bail!(
                        "{}: {name} {dims:?} is of low rank, and ekfac needs eigenvectors in all {} directions: resume without ekfac, or a file \
                         that was written with it",
                        path.display(),
                        side.dim
                    )
                }
            }
        }
        Ok(())
    }

    /// Gives factors that are chosen by cost the shapes that they have in a file: there it was another machine's choice, or another version's.
    fn take_factor_shapes(&mut self, file: &Checkpoint) {
        for index in 0..self.blocks.len() {
            if !self.is_by_cost(&self.blocks[index]) {
                continue;
            }
            let block = &mut self.blocks[index];
            let groups = block.groups;
            for (part, side) in [("factor_a", &mut block.columns), ("factor_g", &mut block.rows)] {
                let dims = file.tensors.get(&slot(&block.name, part)).map(|factor| factor.dims());
                let found = dims.and_then(|dims| FactorShape::of_dims(side.dim, groups, dims));
                *side = found.unwrap_or(*side);
            }
        }
    }

    /// Whether the shapes of a block's factors are chosen by cost.
    fn is_by_cost(&self, block: &Block) -> bool {
        let given = block
            .params
            .first()
            .and_then(|&leader| self.params.groups.of(&self.vars[leader].name)?.factor_limit);
        given.unwrap_or(self.params.factor_limit).beyond == Beyond::ByCost
    }

    /// The shapes of `G` and `A` of every block.
    pub fn factor_shapes(&self) -> Vec<[FactorShape; 2]> {
        self.blocks.iter().map(|block| [block.rows, block.columns]).collect()
    }

    /// Puts back what [`Core::factor_shapes`] has given.
    pub fn set_factor_shapes(&mut self, shapes: &[[FactorShape; 2]]) {
        for (block, &[rows, columns]) in self.blocks.iter_mut().zip(shapes) {
            (block.rows, block.columns) = (rows, columns);
        }
    }

    fn read(&self, header: &Header, numbers: &Numbers<'_>, reader: &mut StateReader<'_>) -> Result<Body> {
        let dtype_of = |param: &Param| wide_dtype(param.var.dtype());
        let (mut values, mut masters) = (vec![], vec![]);
        for param in &self.vars {
            let (dims, dtype) = (param.var.dims(), param.var.dtype());
            let known = reader.knows(&param.name);
            values.push(known.then(|| reader.tensor(&param.name, dims, dtype, true)).flatten());
            let (name, needed) = (slot(&param.name, "master"), known && param.master.is_some());
            masters.push(reader.tensor(&name, dims, dtype_of(param), needed));
        }
        let mut frozen = vec![];
        for (name, var) in &self.frozen {
            let known = reader.knows(name);
            frozen.push(known.then(|| reader.tensor(name, var.dims(), var.dtype(), true)).flatten());
        }

        let started = header.steps > 0;
        let needs = Needs { wake: self.wake_decay().is_some(), step: self.measures_slopes() };
        let dtype = |block: &Block| dtype_of(&self.vars[block.params[0]]);
        let mut states = vec![];
        for block in &self.blocks {
            // A block that may sit out steps may have none yet.
            let started = started && !self.is_optional(block);
            let known = reader.knows_state_of(&block.name);
            states.push(known.then(|| reader.block(block, dtype(block), started, needs)));
        }
        let pending = header.pending.map(|(from, damping)| {
            let inverse = |block: &Block| {
                // One that could not be made was not written.
                reader
                    .inverse(block, dtype(block), PENDING)
                    .ok_or_else(|| format!("no inverse of step {from} in the file"))
            };
            PendingInverses::made(from, damping, self.blocks.iter().map(inverse).collect())
        });

        let mut adam = vec![];
        for &Adam { param: index, .. } in &self.adam {
            let param = &self.vars[index];
            let steps = numbers.optional(&format!("adam_steps.{}", param.name))?.unwrap_or(0);
            let mut moment = |which| {
                reader.tensor(&slot(&param.name, which), param.var.dims(), dtype_of(param), steps > 0)
            };
            let moments = moment("first_moment").zip(moment("second_moment"));
            adam.push((steps > 0 || moments.is_some()).then_some(Adam { param: index, steps, moments }));
        }
        let mut models = vec![];
        for index in 0..header.models {
            let mut model = vec![];
            for param in &self.vars {
                let name = slot(&param.name, &format!("model{index}"));
                model.extend(reader.tensor(&name, param.var.dims(), dtype_of(param), !reader.partly));
            }
            models.push(model);
        }
        let mut averages = vec![];
        for param in &self.vars {
            let needed = started && self.params.average.is_some() && !reader.partly;
            let name = slot(&param.name, "average");
            averages.push(reader.tensor(&name, param.var.dims(), dtype_of(param), needed));
        }
        Ok(Body { values, masters, frozen, states, pending, adam, models, averages })
    }

    /// Takes what [`Core::read_state`] has read.
    pub fn take_state(&mut self, State { header, body }: State) -> Result<()> {
        let Header {
            steps,
            skipped,
            lr,
            largest_lr,
            previous_rate,
            damping,
            slopes,
            pending: _,
            closure_checked,
            models: _,
            predicted,
            optimizer: _,
            tensors: _,
        } = header;
        let Body { values, masters, frozen, states, pending, adam, mut models, averages } = body;
        for ((param, value), master) in self.vars.iter_mut().zip(values).zip(masters) {
            if let Some(value) = value {
                param.var.set(&value)?;
                param.master = master;
            }
        }
        for ((_, var), value) in self.frozen.iter().zip(frozen) {
            if let Some(value) = value {
                var.set(&value)?;
            }
        }
        let whole = states.iter().all(Option::is_some);
        for (block, state) in self.blocks.iter_mut().zip(states) {
            block.state = state.unwrap_or_default();
        }
        for (adam, found) in self.adam.iter_mut().zip(adam) {
            *adam = found.unwrap_or(Adam { param: adam.param, steps: 0, moments: None });
        }
        // Models of other Vars are none of this optimizer's.
        models.retain(|model| model.len() == self.vars.len());
        self.models = models;
        self.averages = match averages.iter().any(Option::is_some) {
            true => {
                let pairs = self.vars.iter().zip(averages);
                pairs
                    .map(|(param, average)| average.map_or_else(|| param.snapshot(), Ok))
                    .collect::<Result<_>>()?
            }
            false => vec![],
        };
        // A new block's inverse is due at once, and then all are.
        self.pending = pending.filter(|_| whole);
        self.steps = steps;
        self.skipped = skipped;
        self.previous_rate = previous_rate;
        self.damping = damping;
        self.slopes = slopes;
        self.predicted = predicted;
        self.closure_checked = closure_checked;
        if self.adam_rate.warming_up {
            self.adam_rate.at = largest_lr.unwrap_or(self.adam_rate.at);
        }
        self.set_learning_rate(lr);
        Ok(())
    }
}

impl Header {
    fn read(numbers: &Numbers<'_>, found: usize) -> Result<Self> {
        let path = numbers.path.display();
        match numbers.optional("format")? {
            Some(FORMAT) => {}
            Some(other) => bail!("{path}: state of format {other}, expected {FORMAT}"),
            None => bail!("{path}: holds no optimizer state, only {found} tensors"),
        }
        let mut slopes = [0f64; 4];
        for (name, value) in SLOPES.into_iter().zip(&mut slopes) {
            *value = numbers.needed(name)?;
        }
        let [after, before, last, length] = slopes;
        let predicted = numbers.optional("predicted_loss")?.zip(numbers.optional("predicted_change")?);
        let models = numbers.needed("models")?;
        if models > found {
            bail!("{path}: {models} stored models in {found} tensors")
        }
        Ok(Self {
            steps: numbers.needed("steps")?,
            skipped: numbers.needed("skipped")?,
            lr: numbers.needed("lr")?,
            largest_lr: numbers.optional("largest_lr")?,
            previous_rate: numbers.optional("previous_rate")?,
            damping: numbers.needed("damping")?,
            slopes: Slopes { after, before, last, length, terms: numbers.optional("terms")?.unwrap_or(0.0) },
            pending: numbers.optional("ahead_from")?.zip(numbers.optional("ahead_damping")?),
            closure_checked: numbers.needed("closure_checked")?,
            models,
            predicted: predicted.map(|(loss, change)| Predicted { loss, change }),
            optimizer: numbers.needed("optimizer")?,
            tensors: numbers.needed("tensors")?,
        })
    }

    /// Adds to `wrong` what makes no sense, in an optimizer of this name and a file of `found` tensors.
    fn check(&self, name: &str, found: usize, wrong: &mut Vec<String>) {
        if self.optimizer != name {
            wrong.push(format!("state of {}, expected {name}", self.optimizer));
        }
        // Not every tensor is needed by every optimizer, but none that was written may have been lost.
        if self.tensors != found {
            wrong.push(format!("{found} tensors, expected {}", self.tensors));
        }
        let rates = [
            ("lr", self.lr),
            ("previous_rate", self.previous_rate.unwrap_or(self.lr)),
            ("largest_lr", self.largest_lr.unwrap_or(self.lr)),
            ("damping", self.damping),
            ("ahead_damping", self.pending.map_or(self.damping, |(_, later)| later)),
        ];
        for (name, value) in rates {
            if !(value.is_finite() && value >= 0.0) {
                wrong.push(format!("{name} is {value}, expected zero or more"));
            }
        }
        let Slopes { after, before, last, length, terms } = self.slopes;
        let slopes = [after, before, last, length, terms];
        if slopes.iter().any(|slope| !slope.is_finite()) || length <= 0.0 || terms < 0.0 {
            wrong.push(format!("slopes are {slopes:?}, expected numbers, the length positive"));
        }
        if let Some((from, _)) = self.pending.filter(|(from, _)| *from > self.steps) {
            wrong.push(format!("inverses of step {from}, expected one up to {}", self.steps));
        }
    }
}
