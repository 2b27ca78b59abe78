//! A net that was fine-tuned, as a subject of tuning.

use super::Subject;
use super::args::{Args, Mean};
use crate::finetune::args::Args as Finetune;
use crate::finetune::open;
use crate::finetune::task::{Forward, Inputs};
use crate::program;
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use clap::Parser;
use kronwake::evidence::Examples;
use kronwake::nn::{Module, init};
use kronwake::tape::Likelihood;

/// A model of one tensor: images, or `[n, 2, positions]` of tokens and of which of them are there.
struct OfOne {
    forward: Forward,
    text: bool,
}

impl Module for OfOne {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inputs = match self.text {
            true => vec![x.narrow(1, 0, 1)?.squeeze(1)?, x.narrow(1, 1, 1)?.squeeze(1)?],
            false => vec![x.clone()],
        };
        (self.forward)(&inputs)
    }
}

fn examples((inputs, labels): (Inputs, Tensor)) -> Result<Examples> {
    match inputs.as_slice() {
        [tokens, mask] => Examples::new(Tensor::stack(&[tokens, mask], 1)?, labels)?.masked(mask)?.cut(2),
        [images] => Examples::new(images.clone(), labels),
        _ => bail!(
            "expected a model of images, or of tokens and their mask, got one of {} inputs",
            inputs.len()
        ),
    }
}

/// The examples of a model of tokens in the order of their lengths, so that those that are computed together are padded little.
pub fn shortest_first(examples: &Examples) -> Result<Examples> {
    let lengths = examples.x().narrow(1, 1, 1)?.squeeze(1)?.to_dtype(DType::F32)?.sum(1)?.to_vec1::<f32>()?;
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by(|&a, &b| lengths[a].total_cmp(&lengths[b]));
    examples.select(&order)
}

/// What `finetune` is asked for.
fn options(args: &Args) -> Result<Finetune> {
    let usual = Finetune::try_parse_from(["finetune"]).map_err(Error::wrap)?;
    Ok(Finetune {
        model: args.model.clone(),
        checkpoint: args.checkpoint.clone(),
        data: args.data.clone(),
        dtype: args.dtype,
        device: args.device,
        epochs: args.epochs,
        lora: args.tuned.is_none().then_some(args.lora.unwrap_or(8)),
        seed: args.seed,
        out: args.out.clone(),
        ..usual
    })
}

pub fn subject(args: &Args, device: &Device) -> Result<Subject> {
    if args.tuned.is_none() {
        program::make_folder("--out", &args.out)?;
    }
    let opened = open::open(&options(args)?, args.tuned.as_deref(), device)?;
    let [train, test] = opened.sides;
    let text = train.0.len() > 1;
    println!("{}", opened.title);
    let mut part = Vec::new();
    for pattern in &args.part {
        match pattern.as_str() {
            "adapters" if !opened.adapted => {
                bail!("--part adapters: the model has none; finetune --lora makes them")
            }
            "adapters" => part.push(ADAPTERS.to_string()),
            other => part.push(other.to_string()),
        }
    }
    if part.is_empty() && opened.adapted {
        part.push(ADAPTERS.into());
        part.extend(opened.head.map(|head| format!("{head}*")));
    }
    let order = init::named(&opened.vars)?.into_iter().map(|(name, _)| name).collect();
    Ok(Subject {
        vars: opened.vars,
        tape: opened.tape,
        model: Box::new(OfOne { forward: opened.forward, text }),
        order,
        train: examples(train)?,
        test: Some(examples(test)?),
        likelihood: Likelihood::Categorical,
        part,
        text,
        means: (args.prior_mean != Some(Mean::Zero)).then_some(opened.start),
    })
}

/// The adapters' parameters.
const ADAPTERS: &str = "*.lora_*";
