//! LeNet-300-100 with few weights.
//!
//! `cargo run --release --example sparse -- --help` lists what can be chosen; the code is in `cli/src/sparse`.

fn main() -> std::process::ExitCode {
    kronwake_cli::sparse::main()
}
