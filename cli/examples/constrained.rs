//! Weight decay, max-norm and multipliers at a high learning rate.
//!
//! `cargo run --release --example constrained -- --help` lists what can be chosen; the code is in `cli/src/constrained`.

fn main() -> std::process::ExitCode {
    kronwake_cli::constrained::main()
}
