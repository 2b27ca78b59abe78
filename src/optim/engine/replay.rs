//! Whole training steps as a CUDA graph.

use super::NaturalGradient;
use crate::gpu::{Gpu, Graph};
use crate::optim::state::block::BlockState;
use crate::optim::step::inverses::takes_pending;
use crate::optim::wake::Model;
use candle_core::{Result, Tensor};

/// Records a training step once and then repeats it as one CUDA graph: the host launches the step at once instead of its kernels one by one.
/// Meant for short steps: small models, small batches.
///
/// A step is forward, [`NaturalGradient::observe`], backward and the optimizer's step, all in one closure. What the closure has to keep to:
///
/// - Its tensors stay where they are. A new batch is copied into the tensors of the old one, which has the same shape.
/// - It asks the device for no value.
/// - It does not depend on the step's number: dropout would repeat its masks.
/// - It does not call [`NaturalGradient::constrain`] on a half-precision model, whose f32 masters that moves.
///
/// What it returns (the loss, say) is written anew by every repetition. Steps that renew curvature, and those before the first inverse, run
/// as they are. So does everything where nothing can be recorded: on other devices, on those with a stream of the user's own, and with
/// quadratic wakes.
///
/// ```
/// use kronwake::nn::{self, Module, VarBuilder, VarMap};
/// use kronwake::optim::{NaturalGradient, Optimizer, Params, Replay};
/// use kronwake::tape::{Likelihood, Tape};
/// use candle_core::{DType, Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let device = Device::cuda_if_available(0)?;
/// let (tape, vars) = (Tape::new(), VarMap::new());
/// let model = tape.build(|| nn::linear(4, 3, VarBuilder::from_varmap(&vars, DType::F32, &device)))?;
/// let mut optimizer = NaturalGradient::from_varmap(&vars, Params::so_kld_wrm(&tape))?;
/// let x = Tensor::zeros((8, 4), DType::F32, &device)?;
/// let y = Tensor::zeros(8, DType::U32, &device)?;
/// let mut replay = Replay::new();
/// for _ in 0..20 {
///     x.slice_set(&Tensor::randn(0f32, 1.0, (8, 4), &device)?, 0, 0)?;
///     let loss = replay.step(&mut optimizer, |optimizer| {
///         let logits = model.forward(&x)?;
///         optimizer.observe(&logits, Likelihood::Categorical)?;
///         let loss = nn::loss::cross_entropy(&logits, &y)?;
///         optimizer.backward_step(&loss)?;
///         Ok(loss.detach())
///     })?;
///     # let _ = loss;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Replay<T> {
    recorded: Option<Recorded<T>>,
    /// [`NaturalGradient::moves`] at a plain step with candle's uploads kept for the recording. A renewal since may have changed what a step
    /// uploads.
    warm: Option<usize>,
}

#[derive(Debug)]
struct Recorded<T> {
    graph: Graph,
    output: T,
    /// [`NaturalGradient::moves`] when it was recorded.
    moves: usize,
}

impl<T: Clone> Replay<T> {
    /// Begins with nothing recorded.
    pub fn new() -> Self {
        Self { recorded: None, warm: None }
    }

    /// Takes one training step, `pass`: runs it, records it, or repeats it. See [`Replay`].
    ///
    /// # Errors
    /// What `pass` reports; and when a step that is being recorded asks the device for a value.
    pub fn step(
        &mut self,
        optimizer: &mut NaturalGradient,
        mut pass: impl FnMut(&mut NaturalGradient) -> Result<T>,
    ) -> Result<T> {
        let Some(gpu) = optimizer.records() else {
            return pass(optimizer);
        };
        optimizer.keep_inverses = true;
        if self.recorded.as_ref().is_some_and(|recorded| recorded.moves != optimizer.moves) {
            *self = Self::new();
        }
        if optimizer.renews() || optimizer.device.is_none() {
            return pass(optimizer);
        }
        let _kept = gpu.keep_uploads();
        if self.warm != Some(optimizer.moves) {
            self.warm = Some(optimizer.moves);
            return pass(optimizer);
        }
        let recorded = match self.recorded.take() {
            Some(recorded) => recorded,
            None => {
                optimizer.captured = true;
                let outcome = gpu.record(|| pass(optimizer));
                optimizer.captured = false;
                // Inverses that are made beside the steps may be in the way; a later step is recorded.
                let Some((graph, output)) = outcome? else { return pass(optimizer) };
                Recorded { graph, output, moves: optimizer.moves }
            }
        };
        if let Some(device) = &optimizer.device {
            device.begin(&optimizer.core)?;
        }
        let emulated = recorded.graph.launch(|| {
            optimizer.captured = true;
            let outcome = pass(optimizer);
            optimizer.captured = false;
            outcome
        })?;
        optimizer.count();
        let output = emulated.unwrap_or_else(|| recorded.output.clone());
        self.recorded = Some(recorded);
        Ok(output)
    }
}

impl NaturalGradient {
    /// The GPU that can record this optimizer's plain steps.
    fn records(&self) -> Option<Gpu> {
        // What comes from other processes cannot be recorded.
        if self.shared.is_some() {
            return None;
        }
        match self.core.params.wake.model() {
            Model::Linear => self.gpu().filter(Gpu::can_record),
            Model::Quadratic(_) => None,
        }
    }

    /// Whether the coming step makes new factors or inverses, or is the first to use some.
    fn renews(&self) -> bool {
        self.core.curvature_due() || self.core.inverses_due() || takes_pending(&self.core)
    }

    /// Moves new inverses to where the old ones are, which recorded kernels read. Nothing, where they are of another kind.
    pub(super) fn move_inverses(&mut self, old: &[BlockState]) -> Result<bool> {
        // What measures an orthogonal direction reads the averages and the damping too, which are others after a refresh: it is recorded anew.
        if self.core.params.orthogonal.is_some() {
            return Ok(false);
        }
        let both = || {
            self.core.blocks.iter().zip(old).map(|(b, old)| (&b.state.preconditioner, &old.preconditioner))
        };
        let mut moves: Vec<(&Tensor, &Tensor)> = Vec::new();
        for pair in both() {
            let (Some(new), Some(old)) = pair else { return Ok(false) };
            let (from, to) = (new.parts(), old.parts());
            let alike = |(a, b): (&(&str, &Tensor), &(&str, &Tensor))| a.0 == b.0 && a.1.dims() == b.1.dims();
            if from.len() != to.len() || !from.iter().zip(&to).all(alike) {
                return Ok(false);
            }
            let pairs = from.iter().zip(&to).map(|(from, to)| (from.1, to.1));
            moves.extend(pairs.filter(|(from, to)| from.id() != to.id()));
        }
        for (from, to) in moves {
            to.slice_set(&from.contiguous()?, 0, 0)?;
        }
        for (block, old) in self.core.blocks.iter_mut().zip(old) {
            block.state.preconditioner.clone_from(&old.preconditioner);
        }
        Ok(true)
    }
}
