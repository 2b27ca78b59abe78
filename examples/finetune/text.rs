//! The project's own text: a small decoder learns to go on with the library's Rust, the fine-tuning is on the CUDA of its kernels.

use super::args::Args;
use super::models::llama::{Config, Llama};
use super::task::{Forward, Inputs, Side, Task};
use super::train;
use candle_core::{Device, Result, Tensor};
use kronwake::nn::{Module, VarBuilder};
use std::path::Path;

/// Characters that a sequence goes on for.
const LENGTH: usize = 64;
/// ASCII; what is not counts as a question mark.
const CHARACTERS: usize = 128;

macro_rules! texts {
    ($($file:literal),*) => { concat!($(include_str!(concat!("../../", $file))),*) };
}

const RUST: &str = texts!(
    "src/evidence/estimator.rs",
    "src/evidence/posterior.rs",
    "src/linalg/newton.rs",
    "src/ops/conv.rs",
    "src/ops/factor.rs",
    "src/optim/natural.rs",
    "src/optim/params.rs",
    "src/optim/step.rs",
    "src/penalty/prior.rs",
    "src/tape/mod.rs"
);
const CUDA: &str = texts!(
    "kernels/common.cuh",
    "kernels/factor.cuh",
    "kernels/group.cu",
    "kernels/newton.cu",
    "kernels/norm.cu",
    "kernels/ntk.cu",
    "kernels/patches.cu",
    "kernels/softmax.cu",
    "kernels/spatial.cu",
    "kernels/spd.cu",
    "kernels/update.cu",
    "kernels/wake.cu"
);

pub struct Text {
    cuda: Sequences,
    device: Device,
}

/// The sequences of a text, every tenth of them for tests.
struct Sequences {
    characters: Vec<u8>,
    /// Of every fifth training sequence in place of the tests.
    hold_out: bool,
}

impl Sequences {
    fn new(text: &str, hold_out: bool) -> Self {
        let ascii = |c: char| if c.is_ascii() { c as u8 } else { b'?' };
        Self { characters: text.chars().map(ascii).collect(), hold_out }
    }

    /// Where the sequences start.
    fn starts(&self, side: Side) -> Vec<usize> {
        let mut starts: Vec<usize> =
            (0..self.characters.len().saturating_sub(LENGTH)).step_by(LENGTH).collect();
        let mut keep = |every: usize, kept: bool| {
            let mut index = 0;
            starts.retain(|_| {
                index += 1;
                (index % every == 0) == kept
            });
        };
        match (side, self.hold_out) {
            (Side::Test, false) => keep(10, true),
            (Side::Train, false) => keep(10, false),
            (_, true) => {
                keep(10, false);
                keep(5, side == Side::Test);
            }
        }
        starts
    }

    fn batch(&self, side: Side, places: &[usize], device: &Device) -> Result<(Inputs, Tensor)> {
        let starts = self.starts(side);
        let from = |shift: usize| {
            let characters =
                places.iter().flat_map(|&place| &self.characters[starts[place] + shift..][..LENGTH]);
            let characters: Vec<u32> = characters.map(|&c| u32::from(c)).collect();
            Tensor::from_vec(characters, (places.len(), LENGTH), device)
        };
        Ok((vec![from(0)?], from(1)?))
    }
}

impl Text {
    pub fn new(args: &Args, device: &Device) -> Self {
        Self { cuda: Sequences::new(CUDA, args.hold_out), device: device.clone() }
    }
}

impl Task for Text {
    fn title(&self) -> String {
        let (train, test) = (self.len(Side::Train), self.len(Side::Test));
        format!("CUDA of this project: {train} training, {test} test sequences of {LENGTH} characters")
    }

    fn len(&self, side: Side) -> usize {
        self.cuda.starts(side).len()
    }

    fn batch(&self, side: Side, places: &[usize]) -> Result<(Inputs, Tensor)> {
        self.cuda.batch(side, places, &self.device)
    }

    fn build(&self, vb: VarBuilder) -> Result<Forward> {
        let config = Config {
            vocabulary: CHARACTERS,
            hidden: 64,
            inner: 128,
            layers: 2,
            heads: 4,
            key_heads: 2,
            positions: LENGTH,
            eps: 1e-5,
            theta: 10_000.0,
            tied: false,
        };
        let model = Llama::new(&config, &vb)?;
        Ok(Box::new(move |inputs| model.forward(&inputs[0])))
    }

    fn head(&self) -> Option<&str> {
        None
    }

    fn adapted(&self) -> Vec<String> {
        ["*.q_proj", "*.v_proj"].map(String::from).to_vec()
    }

    fn train_base(&self, args: &Args, path: &Path) -> Result<()> {
        let rust = Sequences::new(RUST, false);
        let sizes = [rust.starts(Side::Train).len(), rust.starts(Side::Test).len()];
        train::base(self, args, sizes, &|side, places| rust.batch(side, places, &self.device), path)
    }
}
