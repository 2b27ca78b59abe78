//! The step on a GPU: the stages in a few launches for all parameters, without waiting for the device.
//!
//! Whether a step is finite, how long it is and how far it is clipped is decided there. A step that is not finite changes
//! nothing: its kernels that write see that it is not to be taken. Where that is an error, the steps after it are not taken either,
//! until the host asks (`settle`), which it does by itself whenever curvature is renewed.

use super::gradients::{Gradients, Staged};
use super::renew::BlockCurvature;
use super::work_space::DeviceStep;
use super::{Backend, adam, length, precondition, wake_gradient, write};
use crate::optim::state::Core;
use candle_core::{Result, Tensor};

impl Backend for DeviceStep {
    type WakeGradients = ();
    type Directions = Vec<Tensor>;
    type Length = ();
    type Written = ();

    fn wake_gradients(&mut self, core: &Core, grads: &Gradients) -> Staged<()> {
        Ok(wake_gradient::device(core, self, &self.board()?, grads)?)
    }

    fn inverses(&mut self, core: &Core, curvature: &mut [Option<BlockCurvature<'_>>]) -> Result<()> {
        self.stacks.iter_mut().try_for_each(|stack| stack.take_inverses(&core.blocks, curvature))
    }

    fn directions(
        &mut self,
        core: &Core,
        curvature: &[Option<BlockCurvature<'_>>],
        (): &(),
        damping: f64,
    ) -> Staged<Vec<Tensor>> {
        Ok(precondition::device(core, self, curvature, damping)?)
    }

    fn sums(&self, _: &Core, (): &(), _: &Vec<Tensor>) -> Staged<Vec<f64>> {
        Ok(vec![])
    }

    fn length(&mut self, core: &Core, _: &[f64]) -> Staged<()> {
        Ok(length::device(core, self, &self.board()?)?)
    }

    fn write(
        &mut self,
        core: &Core,
        curvature: &mut [Option<BlockCurvature<'_>>],
        ((), directions, ()): ((), Vec<Tensor>, ()),
        grads: &Gradients,
    ) -> Staged<()> {
        let board = self.board()?;
        write::device(core, self, &board, &directions, curvature)?;
        Ok(adam::device(core, self, &board, grads)?)
    }
}
