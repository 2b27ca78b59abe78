//! Trains small networks on 28x28 images.
//!
//! `cargo run --release --example mnist -- --help` lists what can be chosen; the code is in `cli/src/mnist`.

fn main() -> std::process::ExitCode {
    kronwake_cli::mnist::main()
}
