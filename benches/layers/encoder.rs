//! The encoders that are timed.

use serde_json::{Value, json};

/// BERT's configuration, so wide and deep.
pub fn encoder(hidden: usize, layers: usize) -> Value {
    json!({
        "vocab_size": 30522, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    })
}
