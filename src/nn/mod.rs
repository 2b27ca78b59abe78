//! candle_nn under its own names, with gradients and taps.
