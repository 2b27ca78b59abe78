//! The project's own text: a small decoder learns to go on with the library's Rust, the fine-tuning is on the CUDA of its kernels.

use super::args::Args;
use super::task::{Forward, Inputs, Side, Task};
use super::train;
use crate::idx;
use crate::models::llama::{Config, Llama};
use candle_core::{Device, Result, Tensor};
use kronwake::nn::{Module, VarBuilder};
use kronwake::parallel::World;
use std::path::Path;

/// Characters that a sequence goes on for.
const LENGTH: usize = 64;
/// ASCII.
const CHARACTERS: usize = 128;

/// Ten of this project's Rust files and twelve of its CUDA files, as they were when the first figures were taken: later ones are of the same
/// task. One after the other, without anything between.
const RUST: (&str, &[u8]) = ("rust.txt.gz", include_bytes!("../../data/text/rust.txt.gz"));
const CUDA: (&str, &[u8]) = ("cuda.txt.gz", include_bytes!("../../data/text/cuda.txt.gz"));

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
    fn new((name, file): (&str, &[u8]), hold_out: bool) -> Result<Self> {
        Ok(Self { characters: idx::unpack(name, file)?, hold_out })
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
    pub fn new(args: &Args, device: &Device) -> Result<Self> {
        Ok(Self { cuda: Sequences::new(CUDA, args.hold_out)?, device: device.clone() })
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

    fn ends(&self) -> Vec<String> {
        ["*embed_tokens.*", "lm_head.*"].map(String::from).to_vec()
    }

    fn adapted(&self) -> Vec<String> {
        ["*.q_proj", "*.v_proj"].map(String::from).to_vec()
    }

    fn train_base(&self, args: &Args, path: &Path, world: &World) -> Result<()> {
        let rust = Sequences::new(RUST, false)?;
        let sizes = [rust.starts(Side::Train).len(), rust.starts(Side::Test).len()];
        train::base(self, args, sizes, &|side, places| rust.batch(side, places, &self.device), path, world)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a, as computed of the files that the first figures were taken with.
    fn checksum(bytes: &[u8]) -> u64 {
        bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }

    #[test]
    fn the_texts_stay_what_they_were() -> Result<()> {
        for (file, length, sum, sizes) in [
            (RUST, 138_772, 0x282c_8cdc_9f5b_19bd, [1952, 216]),
            (CUDA, 80_232, 0x187b_272c_e41b_5222, [1128, 125]),
        ] {
            let text = Sequences::new(file, false)?;
            assert_eq!((text.characters.len(), checksum(&text.characters)), (length, sum), "{}", file.0);
            assert!(text.characters.iter().all(|&c| usize::from(c) < CHARACTERS), "{}", file.0);
            assert_eq!([Side::Train, Side::Test].map(|side| text.starts(side).len()), sizes);
        }
        Ok(())
    }
}
