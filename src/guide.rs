//! A page a use, each with code that is compiled and run as a test.
//!
//! The pages are the files under `docs/`, where their links lead to other files. Here `docs/rustdoc-links.md` stands before each of them and
//! leads the same links to pages of this documentation: of two definitions of a link the first holds.

pub mod train {
    //! Training: what the optimizer sees, which member of the family, cost, memory, groups.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/train.md")]
}

pub mod fine_tune {
    //! Fine-tuning: candle_nn's models, adapters, checkpoints.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/fine-tune.md")]
}

pub mod tune {
    //! Weight decay, temperature and noise by the evidence.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/tune.md")]
}

pub mod constrain {
    //! Penalties, sets and multipliers.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/constrain.md")]
}

pub mod prune {
    //! Pruning, and smaller nets.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/prune.md")]
}

pub mod gpu {
    //! The CUDA backend: what a step does there, and how it is checked.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/gpu.md")]
}

pub mod parallel {
    //! Several processes on one model: MPI, what is compared when, and what it costs.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/parallel.md")]
}

pub mod results {
    //! What was measured, and the limits.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/results.md")]
}

pub mod speed {
    //! How fast whole models are beside PyTorch, and why.
    //!
    #![doc = include_str!("../docs/rustdoc-links.md")]
    #![doc = include_str!("../docs/speed.md")]
}
