//! The directions of all blocks on a GPU, and the inner products that a step's length and clips depend on.

use super::device::DeviceStep;
use super::direction::Renewed;
use super::launches::Held;
use super::length::StepRule;
use super::natural::Natural;
use super::rule::{Model, WakeRule};
use super::turns::{Sums, Turn, apart, together};
use crate::curvature::damped_product;
use crate::gpu::Operand;
use crate::gpu::table::blocks_of;
use crate::ops::precondition::{DotItem, TotalItem, dots, totals};
use candle_core::{Result, Tensor, bail};

impl<R: WakeRule> Natural<R> {
    /// The directions `V` of all blocks; among the totals `<V, w>`, `<V, V>` where it is asked for, and the slopes.
    pub(super) fn directions(
        &self,
        device: &DeviceStep,
        renewed: &[Renewed<'_>],
        damping: f64,
    ) -> Result<Vec<Tensor>> {
        // A quadratic wake solves with more than the divergence's curvature.
        let by_metric = self.params.step_rule != StepRule::LearningRate
            && matches!(self.params.wake.model(), Model::Quadratic(_));
        let gpu = &device.gpu;
        let mut held = Held::new(gpu);
        let total = gpu.operand(&device.totals, "totals")?;
        let products = gpu.operand(&device.products, "products")?;
        let squares = gpu.operand(&device.squares, "squares")?;
        let mut sums = Vec::new();

        let mut scaled = Parts::of(&products, 0);
        let (directions, known) = self.precondition(device, renewed, &mut scaled)?;
        let mut dotted = Parts::of(&products, scaled.next);
        let mut items = Vec::new();
        for (index, direction) in directions.iter().enumerate() {
            let name = &self.blocks[index].name;
            let known = known[index].filter(|_| !by_metric);
            let (parts, len) = match known {
                Some(known) => known,
                None => {
                    let with = match by_metric {
                        true => self.in_metric(index, &renewed[index], direction, damping)?,
                        false => device.scratch[index].wake.clone(),
                    };
                    items.push(DotItem {
                        a: held.address(direction, name)?,
                        b: held.address(&with, name)?,
                        len: direction.elem_count() as u64,
                        ..DotItem::default()
                    });
                    dotted.take(direction.elem_count())
                }
            };
            sums.push(TotalItem { parts, total: total.at(index), len });
        }
        if !items.is_empty() {
            dots(gpu, device.dtype, &items, dotted.first())?;
        }
        if self.params.rms_clip.is_some() && !directions.is_empty() {
            let (mut items, mut dotted) = (Vec::new(), Parts::of(&squares, 0));
            for (index, direction) in directions.iter().enumerate() {
                let address = held.address(direction, &self.blocks[index].name)?;
                let len = direction.elem_count();
                items.push(DotItem { a: address, b: address, len: len as u64, ..DotItem::default() });
                let (parts, len) = dotted.take(len);
                sums.push(TotalItem { parts, total: total.at(directions.len() + index), len });
            }
            dots(gpu, device.dtype, &items, dotted.first())?;
        }
        let slopes = [gpu.operand(&device.slopes, "slopes")?, gpu.operand(&device.taken, "slopes")?];
        for (nth, parts) in slopes.iter().enumerate() {
            let total = total.at(2 * directions.len() + nth);
            sums.push(TotalItem { parts: parts.address(), total, len: parts.len as u64 });
        }
        totals(gpu, &sums)?;
        Ok(directions)
    }

    /// The blocks' directions from their wake gradients, and the partial sums of `<V, w>` where they have been made on the way.
    fn precondition(
        &self,
        device: &DeviceStep,
        renewed: &[Renewed<'_>],
        sums: &mut Parts<'_>,
    ) -> Result<(Vec<Tensor>, Vec<Option<Sums>>)> {
        let mut turns = Vec::with_capacity(device.stacks.len());
        for stack in &device.stacks {
            if let Some(inverse) = &stack.inverse {
                turns.push(Turn { inverse, wake: &stack.wake, blocks: &stack.blocks });
                continue;
            }
            for index in &stack.blocks {
                let Some(inverse) = &renewed[*index].state.preconditioner else {
                    bail!("{}: block {} has no inverse yet", R::NAME, self.blocks[*index].name)
                };
                let wake = &device.scratch[*index].wake;
                turns.push(Turn { inverse, wake, blocks: std::slice::from_ref(index) });
            }
        }
        let (small, large): (Vec<_>, Vec<_>) = turns.into_iter().partition(Turn::is_small);
        let mut turned = together(&device.gpu, device.dtype, &small, sums)?;
        turned.extend(apart(&device.gpu, device.dtype, &large, sums)?);
        let mut directions: Vec<Tensor> = device.scratch.iter().map(|scratch| scratch.wake.clone()).collect();
        let mut known = vec![None; self.blocks.len()];
        for (turn, turned) in small.iter().chain(&large).zip(&turned) {
            for (nth, &index) in turn.blocks.iter().enumerate() {
                directions[index] = turn.part(&turned.directions, nth)?;
                known[index] = turned.known.get(nth).copied();
            }
        }
        Ok((directions, known))
    }

    /// A direction times the damped average that measures its divergence.
    fn in_metric(
        &self,
        index: usize,
        renewed: &Renewed<'_>,
        direction: &Tensor,
        damping: f64,
    ) -> Result<Tensor> {
        let (block, (a, g)) = (&self.blocks[index], &renewed.average);
        let damping = self.damping_of(block, damping);
        damped_product(a, g, self.params.damping.kind(), damping, direction, &block.name)?.contiguous()
    }
}

/// Partial sums of tensors, one behind the other in an array of f64.
pub(super) struct Parts<'a> {
    array: &'a Operand,
    start: usize,
    next: usize,
}

impl<'a> Parts<'a> {
    pub fn of(array: &'a Operand, start: usize) -> Self {
        Self { array, start, next: start }
    }

    /// Where the first tensor's sums begin.
    fn first(&self) -> u64 {
        self.array.at(self.start)
    }

    /// Where the sums of the next tensor will begin.
    pub fn next(&self) -> u64 {
        self.array.at(self.next)
    }

    /// Where the sums of the next tensor, of `len` elements, begin, and how many there are.
    pub fn take(&mut self, len: usize) -> Sums {
        let count = blocks_of(len);
        let at = self.reserve(count);
        (self.at(at), count as u64)
    }

    /// The first of `count` places for the next sums.
    pub fn reserve(&mut self, count: usize) -> usize {
        let at = self.next;
        self.next += count;
        at
    }

    pub fn at(&self, place: usize) -> u64 {
        self.array.at(place)
    }
}
