//! Room for recursion.
//!
//! candle walks a graph by recursion, once in `backward` and once where the last tensor of the graph is freed: a step down the stack for
//! every operation between the loss and the first of them. A thread of 8 MiB has room for some ten thousand operations, one after the other;
//! a recurrent layer over some thousand steps has more, and the process ends with a stack overflow, which nothing can catch.

/// What is to be left of the stack, and how large a new one is: reserved, not used, until the recursion comes to it.
#[cfg(target_pointer_width = "64")]
const ROOM: usize = 512 << 20;
#[cfg(not(target_pointer_width = "64"))]
const ROOM: usize = 32 << 20;

/// Runs `f` where recursion has 512 MiB of stack (32 MiB where addresses have 32 bits), on this thread: thread-local state is as outside.
///
/// Every backward pass that the crate starts runs in here: with [`backward_step`](crate::nn::Optimizer::backward_step) of an
/// [`optimizer`](crate::optim), in an [`evidence`](crate::evidence), a [`Tape`](crate::tape::Tape) and a QE distance. That is room for the
/// graph of a hundred thousand steps of an LSTM (150,000 were tried). What remains is what you start: a `backward` of your own, and the end of a graph's life, at
/// the closing brace behind which the loss and the states are gone. Put the whole step in here where the graph is deep:
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kronwake::stack::deep;
///
/// let x = Var::new(1f64, &Device::Cpu)?;
/// let slope = deep(|| -> candle_core::Result<f64> {
///     let mut y = x.as_tensor().clone();
///     for _ in 0..100_000 {
///         y = (y * 1.00001)?;
///     }
///     let grads = y.backward()?;
///     grads.get(&x).map_or(Ok(0.), |grad| grad.to_scalar())
/// })?; // here the graph is gone
/// assert!((slope - 1f64.exp()).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Panics
/// When the system does not give as much address space, as under a tight `ulimit -v`; and where `f` panics.
pub fn deep<T>(f: impl FnOnce() -> T) -> T {
    // A call within a call finds most of the room still there.
    stacker::maybe_grow(ROOM / 2, ROOM, f)
}
