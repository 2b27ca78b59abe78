//! Whether a penalty stands for a prior, and for which.
//!
//! `cargo run --release --example prior -- --help` lists what can be chosen; the code is in `cli/src/prior`.

fn main() -> std::process::ExitCode {
    kronwake_cli::prior::main()
}
