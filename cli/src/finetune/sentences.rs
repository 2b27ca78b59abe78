//! Sentences with labels from a file, and a BERT encoder from a folder as Hugging Face's libraries write it.

use super::args::Args;
use super::task::{Forward, Inputs, Side, Task};
use crate::models::bert::{Bert, Config, mean_over_tokens};
use candle_core::{Device, Result, Tensor, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::{self, Module, VarBuilder};
use kronwake::parallel::World;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::{Tokenizer, TruncationParams};

/// Tokens of a sentence at most; the others are cut off.
const LONGEST: usize = 128;

pub struct Sentences {
    config: Config,
    labels: Vec<String>,
    /// Training and test examples.
    sides: [Vec<Example>; 2],
    device: Device,
}

struct Example {
    tokens: Vec<u32>,
    label: u32,
}

impl Sentences {
    /// `folder` has config.json and tokenizer.json; a line of `data` is a sentence, a tab and a label.
    pub fn new(args: &Args, folder: &Path, data: &Path, device: &Device) -> Result<Self> {
        let file = folder.join("config.json");
        let config = match serde_json::from_str(&read(&file)?) {
            Ok(config) => Config::parse(&config)?,
            Err(e) => bail!("{}: {e}", file.display()),
        };
        let file = folder.join("tokenizer.json");
        let failed = |e| candle_core::Error::Msg(format!("{}: {e}", file.display()));
        let mut tokenizer = Tokenizer::from_file(&file).map_err(failed)?;
        let max_length = LONGEST.min(config.positions);
        tokenizer
            .with_padding(None)
            .with_truncation(Some(TruncationParams { max_length, ..Default::default() }))
            .map_err(failed)?;
        let text = read(data)?;
        let mut labels = BTreeMap::new();
        let mut lines = Vec::new();
        for (index, line) in text.lines().enumerate() {
            match line.rsplit_once('\t') {
                _ if line.is_empty() || (index == 0 && line == "sentence\tlabel") => {}
                Some((sentence, label)) => {
                    labels.insert(label.to_string(), 0);
                    lines.push((sentence, label));
                }
                None => {
                    bail!("{}, line {}: expected a sentence, a tab and a label", data.display(), index + 1)
                }
            }
        }
        if labels.len() < 2 || lines.len() < 10 {
            bail!(
                "{}: {} sentences with {} labels, expected 10 and 2 at least",
                data.display(),
                lines.len(),
                labels.len()
            )
        }
        labels.values_mut().zip(0..).for_each(|(number, index)| *number = index);
        let mut sides = [Vec::new(), Vec::new()];
        for (index, (sentence, label)) in lines.into_iter().enumerate() {
            let found =
                tokenizer.encode(sentence, true).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
            let example = Example { tokens: found.get_ids().to_vec(), label: labels[label] };
            if let Some(wrong) = example.tokens.iter().find(|&&token| token as usize >= config.vocabulary) {
                bail!("{}: token {wrong} of a vocabulary of {}", file.display(), config.vocabulary)
            }
            // Every fifth is measured on; to choose by, the one before it, and that fifth is left out.
            match (index % 5, args.hold_out) {
                (4, true) => {}
                (4, false) | (3, true) => sides[1].push(example),
                _ => sides[0].push(example),
            }
        }
        Ok(Self { config, labels: labels.into_keys().collect(), sides, device: device.clone() })
    }
}

fn read(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) => bail!("{}: cannot be read: {e}", path.display()),
    }
}

impl Task for Sentences {
    fn title(&self) -> String {
        let [train, test] = &self.sides;
        format!("{} training, {} test sentences, labels {}", train.len(), test.len(), self.labels.join(", "))
    }

    fn len(&self, side: Side) -> usize {
        self.sides[usize::from(side == Side::Test)].len()
    }

    fn batch(&self, side: Side, places: &[usize]) -> Result<(Inputs, Tensor)> {
        let all = &self.sides[usize::from(side == Side::Test)];
        let examples: Vec<&Example> = places.iter().map(|&place| &all[place]).collect();
        let longest = examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
        let shape = (examples.len(), longest);
        let padded = |of: &dyn Fn(u32) -> u32| {
            let row = |example: &&Example| {
                let mut row: Vec<u32> = example.tokens.iter().map(|&token| of(token)).collect();
                row.resize(longest, 0);
                row
            };
            Tensor::from_vec(examples.iter().flat_map(row).collect(), shape, &self.device)
        };
        let labels: Vec<u32> = examples.iter().map(|example| example.label).collect();
        Ok((vec![padded(&|token| token)?, padded(&|_| 1)?], Tensor::new(labels, &self.device)?))
    }

    fn build(&self, vb: VarBuilder) -> Result<Forward> {
        let encoder = Bert::new(&self.config, &vb)?;
        let head = nn::linear(self.config.hidden, self.labels.len(), vb.pp("classifier"))?;
        Ok(Box::new(move |inputs| {
            let (tokens, mask) = (&inputs[0], &inputs[1]);
            let hidden = encoder.forward(tokens, &tokens.zeros_like()?, Some(mask))?;
            head.forward(&mean_over_tokens(&hidden, mask)?)
        }))
    }

    fn mask<'a>(&self, inputs: &'a Inputs) -> Option<&'a Tensor> {
        inputs.get(1)
    }

    fn head(&self) -> Option<&str> {
        Some("classifier.")
    }

    fn ends(&self) -> Vec<String> {
        ["embeddings.*", "classifier.*"].map(String::from).to_vec()
    }

    fn adapted(&self) -> Vec<String> {
        ["*.query", "*.value"].map(String::from).to_vec()
    }

    /// Checkpoints of classifiers and language models have the encoder below `bert.`, and their own layers beside.
    fn read(&self, path: &Path) -> Result<Checkpoint> {
        let mut file = Checkpoint::read(path, &Device::Cpu)?;
        let bare = |name: String| name.strip_prefix("bert.").map(str::to_string).unwrap_or(name);
        file.tensors = file.tensors.into_iter().map(|(name, tensor)| (bare(name), tensor)).collect();
        Ok(file)
    }

    fn train_base(&self, _: &Args, _: &Path, _: &World) -> Result<()> {
        bail!("--model bert needs --checkpoint: the folder of the encoder")
    }
}
