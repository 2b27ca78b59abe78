//! The directions of all blocks on a GPU, and the inner products that a step's length and clips depend on.

use super::device::DeviceStep;
use super::direction::Renewed;
use super::launches::Held;
use super::length::StepRule;
use super::natural::Natural;
use super::rule::{Model, WakeRule};
use crate::curvature::{Preconditioner, damped_product};
use crate::gpu::Operand;
use crate::gpu::table::blocks_of;
use crate::ops::precondition::{DotItem, ScaleItem, TotalItem, dots, scales, totals};
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

        let mut directions = Vec::with_capacity(self.blocks.len());
        let mut scaled = Parts::of(&products, 0);
        let known = self.precondition(device, renewed, &mut directions, &mut scaled)?;
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

    /// The blocks' directions from their wake gradients, and the partial sums of `<V, w>` where the scaling has made them on the
    /// way.
    fn precondition(
        &self,
        device: &DeviceStep,
        renewed: &[Renewed<'_>],
        directions: &mut Vec<Tensor>,
        scaled: &mut Parts<'_>,
    ) -> Result<Vec<Option<(u64, u64)>>> {
        let mut held = Held::new(&device.gpu);
        let mut known = vec![None; self.blocks.len()];
        let mut turned = Vec::with_capacity(device.stacks.len());
        let mut items = Vec::new();
        for stack in &device.stacks {
            let Some(Preconditioner::Basis { basis_a, basis_g, scale }) = &stack.inverse else {
                turned.push(None);
                continue;
            };
            let together = Preconditioner::inside(basis_a, basis_g, scale, &stack.wake)?.contiguous()?;
            let scale = scale.contiguous()?;
            for (nth, &index) in stack.blocks.iter().enumerate() {
                let (name, inside) = (&self.blocks[index].name, stack.part(&together, nth)?);
                items.push(ScaleItem {
                    inside: held.address(&inside, name)?,
                    scale: held.address(&stack.part(&scale, nth)?, name)?,
                    len: inside.elem_count() as u64,
                    ..ScaleItem::default()
                });
                known[index] = Some(scaled.take(inside.elem_count()));
            }
            turned.push(Some(together));
        }
        if !items.is_empty() {
            scales(&device.gpu, device.dtype, &items, scaled.first())?;
        }
        directions.extend(device.scratch.iter().map(|scratch| scratch.wake.clone()));
        for (stack, turned) in device.stacks.iter().zip(turned) {
            let together = match (&stack.inverse, turned) {
                (Some(Preconditioner::Basis { basis_a, basis_g, .. }), Some(turned)) => {
                    Some(Preconditioner::outside(basis_a, basis_g, &turned, &stack.wake)?.contiguous()?)
                }
                (Some(inverse), _) => Some(inverse.apply(&stack.wake)?.contiguous()?),
                (None, _) => None,
            };
            for (nth, &index) in stack.blocks.iter().enumerate() {
                directions[index] = match (&together, &renewed[index].state.preconditioner) {
                    (Some(together), _) => stack.part(together, nth)?,
                    (None, Some(inverse)) => inverse.apply(&device.scratch[index].wake)?.contiguous()?,
                    (None, None) => {
                        bail!("{}: block {} has no inverse yet", R::NAME, self.blocks[index].name)
                    }
                };
            }
        }
        Ok(known)
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
struct Parts<'a> {
    array: &'a Operand,
    start: usize,
    next: usize,
}

impl<'a> Parts<'a> {
    fn of(array: &'a Operand, start: usize) -> Self {
        Self { array, start, next: start }
    }

    /// Where the first tensor's sums begin.
    fn first(&self) -> u64 {
        self.array.at(self.start)
    }

    /// Where the sums of the next tensor, of `len` elements, begin, and how many there are.
    fn take(&mut self, len: usize) -> (u64, u64) {
        let (at, count) = (self.next, blocks_of(len));
        self.next += count;
        (self.array.at(at), count as u64)
    }
}
