//! Models that load Hugging Face's checkpoints and train on `kronwake::nn`.

pub mod bert;
pub mod config;
pub mod encoder;
pub mod llama;
pub mod vit;
