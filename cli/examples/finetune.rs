//! Fine-tunes a model from a safetensors checkpoint.
//!
//! `cargo run --release --example finetune -- --help` lists what can be chosen; the code is in `cli/src/finetune`.

fn main() -> std::process::ExitCode {
    kronwake_cli::finetune::main()
}
