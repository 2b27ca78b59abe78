//! A page a use, each with code that is compiled and run as a test.
//!
//! The pages are the files under `docs/`, where their links lead to other files. Here `docs/rustdoc-links.md` stands before each of them and
//! leads the same links to pages of this documentation: of two definitions of a link the first holds.

/// Training: what the optimizer sees, which member of the family, cost, memory, groups.
pub mod train {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/train.md")]
}

/// Fine-tuning: candle_nn's models, adapters, checkpoints.
pub mod fine_tune {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/fine-tune.md")]
}

/// Weight decay, temperature and noise by the evidence.
pub mod tune {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/tune.md")]
}

/// Penalties, sets and multipliers.
pub mod constrain {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/constrain.md")]
}

/// Pruning, and smaller nets.
pub mod prune {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/prune.md")]
}

/// The CUDA backend: what a step does there, and how it is checked.
pub mod gpu {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/gpu.md")]
}

/// What was measured, and the limits.
pub mod results {
    #![doc = ""]
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/results.md")]
}
