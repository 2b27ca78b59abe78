//! The tape: how curvature sees the inside of a model.
//!
//! Layers that are built inside [`Tape::build`] are *tapped*: in a backward pass that somebody listens to, each hands a
//! [`Record`] of its inputs and of the gradients of its outputs to a [`Reduce`]. Nothing is stored otherwise, and a
//! pass that nobody listens to costs nothing more than candle's own.

mod activated;
mod affine;
mod conv;
mod conv_pool;
mod labels;
mod likelihood;
mod mask;
mod record;
mod tap_identity;
mod terms;

pub(crate) use likelihood::{Cotangents, Root};
pub use likelihood::{Fisher, Likelihood};
pub(crate) use mask::Mask;
pub use record::{ExampleGrads, Inputs, Keep, Kind, Layer, Record, Reduce};
pub(crate) use terms::TermWeights;
pub use terms::{Head, Terms};

pub(crate) use activated::activated;
pub(crate) use affine::affine;
pub(crate) use conv::conv;
pub(crate) use conv_pool::conv_pool;
pub(crate) use tap_identity::{normed, picked};

use crate::building::within;
use candle_core::{DType, Result, Tensor, backprop::GradStore, bail};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard};

thread_local! {
    /// The tape of the `Tape::build` that runs on this thread: layer constructors keep candle_nn's signatures.
    static BUILDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// A register of tapped layers and the switchboard of their records. Clones share everything.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::{nn::{self, Module, VarBuilder, VarMap}, tape::{Keep, Tape}};
///
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
/// let tape = Tape::new();
/// let layer = tape.build(|| nn::linear(3, 2, vb.pp("fc1")))?;
/// let logits = layer.forward(&Tensor::ones((5, 3), DType::F64, &Device::Cpu)?)?;
/// let kept = tape.reduce(&logits, &logits.ones_like()?, Keep::default())?;
/// assert_eq!(kept.0[0].1.inputs.rows()?.dims(), [5, 1, 3]);
/// assert_eq!(kept.0[0].1.grads.dims(), [5, 1, 2]);
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    layers: Vec<Arc<Layer>>,
    /// Uses of these layers' weights with another bias than the first use's, or without one.
    other_biases: Vec<Arc<Layer>>,
    pass: Option<Pass>,
    mask: Option<Arc<Mask>>,
}

/// A backward pass that somebody listens to.
struct Pass {
    reducer: Arc<Mutex<dyn Reduce>>,
    /// Whether the weight gradients are wanted too; a pass for the curvature alone leaves them out.
    weight_grads: bool,
    records: usize,
    /// Records that the mask is of.
    masked: usize,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.layers().iter().map(|l| l.name.clone()).collect();
        f.debug_tuple("Tape").field(&names).finish()
    }
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        crate::ops::memory::keep_freed_blocks();
        Self::default()
    }

    /// Runs `build`, tapping every layer of [`crate::nn`] that it constructs on this thread.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn build<M>(&self, build: impl FnOnce() -> Result<M>) -> Result<M> {
        within(&BUILDING, self.clone(), build)
    }

    /// The tapped layers in order of construction.
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        self.state().layers.clone()
    }

    /// The uses of layers' weights with another bias than the layer's own, or without one. Records say which bias was added: they come
    /// with the use's layer.
    pub(crate) fn other_biases(&self) -> Vec<Arc<Layer>> {
        self.state().other_biases.clone()
    }

    /// Runs one backward pass of `<cotangent, outputs>` for its records alone: weight gradients are not computed.
    ///
    /// `cotangent` has the shape of `outputs` and is what the records' gradients start from. The forward graph stays
    /// usable, so several passes may follow one forward.
    ///
    /// # Errors
    /// When the shapes differ, when no tapped layer lies between the Vars and `outputs`, when another pass is being
    /// listened to, or when the reducer or the backward pass fails.
    pub fn reduce<R: Reduce + 'static>(&self, outputs: &Tensor, cotangent: &Tensor, reducer: R) -> Result<R> {
        let shared = Arc::new(Mutex::new(reducer));
        self.reduce_into(outputs, cotangent, shared.clone())?;
        match Arc::try_unwrap(shared).map(Mutex::into_inner) {
            Ok(Ok(reducer)) => Ok(reducer),
            _ => bail!("tape: the reducer is still in use after its pass"),
        }
    }

    /// [`Tape::reduce`] into a reducer that outlives the pass.
    pub(crate) fn reduce_into(
        &self,
        outputs: &Tensor,
        cotangent: &Tensor,
        reducer: Arc<Mutex<dyn Reduce>>,
    ) -> Result<()> {
        self.reduce_with(outputs, cotangent, reducer, false).map(drop)
    }

    /// [`Tape::reduce_into`], with the gradients of the pass; those of tapped weights only where they are wanted.
    pub(crate) fn reduce_with(
        &self,
        outputs: &Tensor,
        cotangent: &Tensor,
        reducer: Arc<Mutex<dyn Reduce>>,
        weight_grads: bool,
    ) -> Result<GradStore> {
        if outputs.dims() != cotangent.dims() {
            bail!("tape: the cotangent has shape {:?}, the outputs {:?}", cotangent.dims(), outputs.dims())
        }
        let root = (outputs * cotangent.detach())?.sum_all()?;
        self.arm(reducer, weight_grads)?;
        let done = crate::stack::deep(|| root.backward());
        let records = self.disarm();
        let grads = done?;
        if records? == 0 {
            bail!(
                "tape: no tapped layer took part in the backward pass; build the model inside Tape::build from \
                 kronwake::nn layers, and pass the outputs of that model's forward"
            )
        }
        Ok(grads)
    }

    /// Sends the records of the next backward pass, the user's own, to `reducer`.
    pub(crate) fn arm(&self, reducer: Arc<Mutex<dyn Reduce>>, weight_grads: bool) -> Result<()> {
        let mut state = self.state();
        if state.pass.is_some() {
            bail!("tape: another pass is being recorded; finish it with a step first")
        }
        state.pass = Some(Pass { reducer, weight_grads, records: 0, masked: 0 });
        Ok(())
    }

    /// Stops listening; the number of records since [`Tape::arm`].
    ///
    /// # Errors
    /// When the mask is of none of the records.
    pub(crate) fn disarm(&self) -> Result<usize> {
        let mut state = self.state();
        let Some(Pass { records, masked, .. }) = state.pass.take() else { return Ok(0) };
        if let Some(mask) = &state.mask
            && masked == 0
            && records > 0
        {
            bail!(
                "tape: no layer saw a batch of {} examples of {} positions, which the mask is of; set the mask of this batch, or none",
                mask.dims()[0],
                mask.dims()[1]
            )
        }
        Ok(records)
    }

    /// Says which positions of the coming batches count: `mask` `[batch, positions]` is not zero there. Holds until the next call; `None`
    /// says that all count.
    ///
    /// It goes for every layer that sees inputs of that many examples and positions, as two dimensions or as one: the linear layers, norms and
    /// embeddings over padded sequences, but not the head over their pooled states. What is left out does not enter the factors, as if every example had been
    /// a batch of its own length. The gradients are not changed: the model's own masks and the loss have to leave padding out. Where the
    /// outputs have a term for every position, `observe` is to be shown those that count, selected as for the loss, or all with the weight 0
    /// for those that do not (see [`Terms`]).
    ///
    /// # Errors
    /// When it is not of rank 2, or an example has no position that counts. A pass whose layers all see other shapes fails.
    pub fn mask(&self, mask: Option<&Tensor>) -> Result<()> {
        let mask = mask.map(Mask::new).transpose()?.map(Arc::new);
        self.state().mask = mask;
        Ok(())
    }

    /// The mask that holds at present.
    pub(crate) fn current_mask(&self) -> Option<Arc<Mask>> {
        self.state().mask.clone()
    }

    /// Puts a mask in place of the present one, which is returned.
    pub(crate) fn replace_mask(&self, mask: Option<Arc<Mask>>) -> Option<Arc<Mask>> {
        std::mem::replace(&mut self.state().mask, mask)
    }

    /// The tap of a layer that is being built, if a tape is being recorded on this thread.
    pub(crate) fn tap(name: &str, weight: &Tensor, bias: Option<&Tensor>, groups: usize) -> Option<Tap> {
        Self::tap_as(Kind::Linear, name, weight, bias, groups)
    }

    /// [`Tape::tap`] of a layer of any kind.
    pub(crate) fn tap_as(
        kind: Kind,
        name: &str,
        weight: &Tensor,
        bias: Option<&Tensor>,
        groups: usize,
    ) -> Option<Tap> {
        let tape = BUILDING.with(|b| b.borrow().clone())?;
        // A bias that broadcasts over the outputs belongs to no block.
        let bias = bias.filter(|bias| bias.dims() == &weight.dims()[..1]);
        let mut state = tape.state();
        let known = state.layers.iter().find(|l| l.is_use_of(weight.id(), kind)).cloned();
        let layer = match known {
            Some(known) if known.bias.as_ref().map(Tensor::id) == bias.map(Tensor::id) => known,
            Some(known) => {
                let layer = Arc::new(Layer { bias: bias.cloned(), ..(*known).clone() });
                state.other_biases.push(layer.clone());
                layer
            }
            None => {
                let index = state.layers.len();
                let name = if name.is_empty() { format!("layer{index}") } else { name.to_string() };
                let layer = Layer { index, name, kind, weight: weight.clone(), bias: bias.cloned(), groups };
                let layer = Arc::new(layer);
                state.layers.push(layer.clone());
                layer
            }
        };
        drop(state);
        Some(Tap { tape, layer })
    }

    /// The state; a panic elsewhere while it was locked leaves it usable, since every change is one assignment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The bias of a convolution, contiguous and one a channel, as its kernels read it; a single number serves all channels.
fn per_output(name: &str, bias: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let out = weight.dim(0)?;
    if bias.dims() == [out] {
        return bias.contiguous();
    }
    if bias.elem_count() != 1 {
        bail!("layer {name}: expected a bias [{out}], or one number for all channels, got {:?}", bias.dims())
    }
    bias.reshape(1)?.broadcast_as(out)?.contiguous()
}

/// A layer's line to its tape. Clones are the same layer: using it again shares its weights.
#[derive(Clone, Debug)]
pub struct Tap {
    tape: Tape,
    layer: Arc<Layer>,
}

impl Tap {
    /// Whether the running backward pass wants this layer's weight gradients, and whether it wants a record.
    fn wanted(&self) -> (bool, bool) {
        self.tape.state().pass.as_ref().map_or((true, false), |p| (p.weight_grads, true))
    }

    fn record(&self, inputs: Inputs, grads: Tensor) -> Result<()> {
        // A layer that was called without a row has nothing to tell.
        if grads.elem_count() == 0 {
            return Ok(());
        }
        let (reducer, mask) = {
            let mut state = self.tape.state();
            let mask = state.mask.clone().filter(|mask| mask.fits(&grads));
            let Some(pass) = state.pass.as_mut() else { return Ok(()) };
            pass.records += 1;
            pass.masked += usize::from(mask.is_some());
            (pass.reducer.clone(), mask)
        };
        let mut reducer = reducer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        reducer.record(&self.layer, &Record { inputs, grads, mask })
    }
}

impl Tap {
    /// Whether the reader of the running pass takes [`ExampleGrads`] of this layer, of tensors of `dtype`.
    fn takes_examples(&self, dtype: DType) -> bool {
        let state = self.tape.state();
        let Some(pass) = state.pass.as_ref().filter(|_| state.mask.is_none()) else { return false };
        let reducer = pass.reducer.clone();
        drop(state);
        let reducer = reducer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        matches!(dtype, DType::F32 | DType::F64) && reducer.takes_examples(&self.layer)
    }

    /// Hands them over.
    fn examples(&self, grads: ExampleGrads) -> Result<()> {
        if grads.weight.elem_count() == 0 {
            return Ok(());
        }
        let mut state = self.tape.state();
        let Some(pass) = state.pass.as_mut() else { return Ok(()) };
        pass.records += 1;
        let reducer = pass.reducer.clone();
        drop(state);
        let mut reducer = reducer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        reducer.examples(&self.layer, grads)
    }
}

/// What an op's backward pass owes: decided once, from the arguments and from the pass.
struct Owed {
    input: bool,
    weight: bool,
    bias: bool,
    record: bool,
}

impl Owed {
    /// A gradient that nobody reads is left out, except that candle requires one for every argument with a history.
    fn new(tap: Option<&Tap>, input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Self {
        let (weight_grads, record) = tap.map_or((true, false), Tap::wanted);
        let owes = |t: &Tensor| t.track_op() && (weight_grads || !t.is_variable());
        Owed { input: input.track_op(), weight: owes(weight), bias: bias.is_some_and(owes), record }
    }
}
