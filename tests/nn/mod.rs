//! Layers, their gradients, and adapters.

mod drop_in;
mod grad;
mod lora;
mod peft;
