//! Text, a character at a time: a small decoder learns to go on with the library's Rust; the fine-tuning is on the CUDA of its kernels, or on a
//! file of the user's own.

use super::args::{Args, Net};
use super::task::{Forward, Inputs, Side, Task};
use super::train;
use crate::idx;
use crate::models::llama::{Config, Llama};
use candle_core::{Device, Error, Result, Tensor, bail};
use kronwake::nn::{Module, VarBuilder};
use kronwake::parallel::World;
use std::path::Path;

/// Characters that a sequence goes on for.
const LENGTH: usize = 64;
/// Characters of most texts; others are read as bytes.
const ASCII: usize = 128;

/// Ten of this project's Rust files and twelve of its CUDA files, as they were when the first figures were taken: later ones are of the same
/// task. One after the other, without anything between.
const RUST: (&str, &[u8]) = ("rust.txt.gz", include_bytes!("../../data/text/rust.txt.gz"));
const CUDA: (&str, &[u8]) = ("cuda.txt.gz", include_bytes!("../../data/text/cuda.txt.gz"));

/// How wide and deep the decoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: usize,
    pub layers: usize,
}

/// Of a head.
const HEAD_WIDTH: usize = 16;

impl Default for Size {
    fn default() -> Self {
        Self { width: 64, layers: 2 }
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    /// WIDTH-LAYERS
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let two = text.split_once('-').map(|(width, layers)| (width.parse(), layers.parse()));
        match two {
            Some((Ok(width), Ok(layers))) if width > 0 && width % (2 * HEAD_WIDTH) == 0 && layers > 0 => {
                Ok(Self { width, layers })
            }
            _ => Err(format!(
                "expected decoder:WIDTH-LAYERS with a multiple of {} and one layer or more, as in decoder:64-2, got {text:?}",
                2 * HEAD_WIDTH
            )),
        }
    }
}

pub struct Text {
    title: String,
    text: Sequences,
    /// One more than the largest character that there is.
    vocabulary: usize,
    size: Size,
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

    /// Of a file.
    fn read(path: &Path, hold_out: bool) -> Result<Self> {
        let characters = std::fs::read(path).map_err(|e| Error::Msg(format!("{}: {e}", path.display())))?;
        let least = 20 * LENGTH;
        if characters.len() <= least {
            bail!("{}: expected more than {least} characters, found {}", path.display(), characters.len())
        }
        Ok(Self { characters, hold_out })
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
        let (title, text) = match &args.data {
            None => ("CUDA of this project".to_string(), Sequences::new(CUDA, args.hold_out)?),
            Some(path) => (path.display().to_string(), Sequences::read(path, args.hold_out)?),
        };
        let ascii = text.characters.is_ascii();
        let size = match args.model {
            Net::Decoder(size) => size,
            Net::Of(_) | Net::Vit | Net::Bert => Size::default(),
        };
        Ok(Self { title, text, vocabulary: if ascii { ASCII } else { 256 }, size, device: device.clone() })
    }
}

impl Task for Text {
    fn title(&self) -> String {
        let (train, test) = (self.len(Side::Train), self.len(Side::Test));
        format!("{}: {train} training, {test} test sequences of {LENGTH} characters", self.title)
    }

    fn len(&self, side: Side) -> usize {
        self.text.starts(side).len()
    }

    fn batch(&self, side: Side, places: &[usize]) -> Result<(Inputs, Tensor)> {
        self.text.batch(side, places, &self.device)
    }

    fn build(&self, vb: VarBuilder) -> Result<Forward> {
        let config = Config {
            vocabulary: self.vocabulary,
            hidden: self.size.width,
            inner: 2 * self.size.width,
            layers: self.size.layers,
            heads: self.size.width / HEAD_WIDTH,
            key_heads: self.size.width / (2 * HEAD_WIDTH),
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
    fn a_text_of_ones_own() -> Result<()> {
        let path = std::env::temp_dir().join(format!("kronwake-text-{}", std::process::id()));
        std::fs::write(&path, "short")?;
        let refused = Sequences::read(&path, false).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(refused.contains("expected more than 1280 characters, found 5"), "{refused}");
        std::fs::write(&path, "é is two bytes, ".repeat(200))?;
        let line =
            ["finetune", "--model", "decoder:96-3", "--data", &path.to_string_lossy()].map(String::from);
        let args = <Args as clap::Parser>::parse_from(line);
        let text = Text::new(&args, &Device::Cpu)?;
        std::fs::remove_file(&path)?;
        assert_eq!((text.vocabulary, text.size), (256, Size { width: 96, layers: 3 }));
        assert_eq!([Side::Train, Side::Test].map(|side| text.len(side)), [48, 5]);
        let vars = kronwake::nn::VarMap::new();
        let forward = text.build(VarBuilder::from_varmap(&vars, candle_core::DType::F32, &Device::Cpu))?;
        let (inputs, labels) = text.batch(Side::Test, &[0, 4])?;
        assert_eq!((forward(&inputs)?.dims(), labels.dims()), (&[2, 64, 256][..], &[2, 64][..]));
        for wrong in ["96", "96-0", "50-2", "0-1"] {
            assert!(wrong.parse::<Size>().is_err_and(|e| e.contains("multiple of 32")), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn the_texts_stay_what_they_were() -> Result<()> {
        for (file, length, sum, sizes) in [
            (RUST, 138_772, 0x282c_8cdc_9f5b_19bd, [1952, 216]),
            (CUDA, 80_232, 0x187b_272c_e41b_5222, [1128, 125]),
        ] {
            let text = Sequences::new(file, false)?;
            assert_eq!((text.characters.len(), checksum(&text.characters)), (length, sum), "{}", file.0);
            assert!(text.characters.iter().all(|&c| usize::from(c) < ASCII), "{}", file.0);
            assert_eq!([Side::Train, Side::Test].map(|side| text.starts(side).len()), sizes);
        }
        Ok(())
    }
}
