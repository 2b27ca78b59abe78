//! Tunes hyperparameters of a trained net by its evidence.
//!
//! `cargo run --release --example tune -- --help` lists what can be chosen; the code is in `cli/src/tune`.

fn main() -> std::process::ExitCode {
    kronwake_cli::tune::main()
}
