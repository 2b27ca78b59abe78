//! Fields of a Hugging Face `config.json`.

use candle_core::{Result, bail};
use kronwake::nn::Activation;
use serde_json::Value;

/// The field `name`, a whole number above 0.
pub fn size(config: &Value, name: &str) -> Result<usize> {
    match config[name].as_u64() {
        Some(size) if size > 0 => Ok(size as usize),
        _ => bail!("config: expected a whole number above 0 for {name}, got {}", config[name]),
    }
}

/// The field `name`, a number.
pub fn number(config: &Value, name: &str) -> Result<f64> {
    match config[name].as_f64() {
        Some(number) => Ok(number),
        None => bail!("config: expected a number for {name}, got {}", config[name]),
    }
}

/// The field `name`, an activation by the name that Hugging Face gives it.
pub fn activation(config: &Value, name: &str) -> Result<Activation> {
    match serde_json::from_value(config[name].clone()) {
        Ok(activation) => Ok(activation),
        Err(_) => bail!("config: expected an activation for {name}, got {}", config[name]),
    }
}

/// The features of one of `heads` equal parts of `hidden`.
pub fn head_size(hidden: usize, heads: usize) -> Result<usize> {
    if !hidden.is_multiple_of(heads) {
        bail!("config: {hidden} features do not divide into {heads} heads")
    }
    Ok(hidden / heads)
}
