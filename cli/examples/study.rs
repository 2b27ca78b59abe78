//! Compares optimizers under equal budgets.
//!
//! `cargo run --release --example study -- --help` lists what can be chosen; the code is in `cli/src/study`.

fn main() -> std::process::ExitCode {
    kronwake_cli::study::main()
}
