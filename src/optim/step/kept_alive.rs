//! Addresses within one stage of a step on a GPU, with what has to live until its launches.

use crate::gpu::{Gpu, Operand};
use candle_core::{Result, Tensor};

pub(super) struct KeptAlive<'a> {
    gpu: &'a Gpu,
    operands: Vec<(Tensor, Operand)>,
}

impl<'a> KeptAlive<'a> {
    pub fn new(gpu: &'a Gpu) -> Self {
        Self { gpu, operands: Vec::new() }
    }

    /// The address of a tensor, whose `name` is for messages.
    pub fn address(&mut self, tensor: &Tensor, name: &str) -> Result<u64> {
        let operand = self.gpu.operand(tensor, name)?;
        let address = operand.address();
        self.operands.push((tensor.clone(), operand));
        Ok(address)
    }

    /// 0 where there is no tensor.
    pub fn maybe(&mut self, tensor: Option<&Tensor>, name: &str) -> Result<u64> {
        tensor.map_or(Ok(0), |tensor| self.address(tensor, name))
    }

    pub fn gradient(&mut self, gradient: &Tensor, name: &str) -> Result<u64> {
        self.address(&gradient.detach().contiguous()?, name)
    }
}
