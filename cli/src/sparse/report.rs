//! Rows, a picture, and the files.

use super::net::{Net, Split, stages};
use candle_core::{Device, Result, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::prune::{Stage, Weights, read_sparse, write_sparse};
use std::fmt;
use std::path::Path;

/// What is left of a net, and how good it is.
pub struct Row {
    nonzeros: usize,
    widths: Vec<usize>,
    pub held: f64,
    test: f64,
}

impl Row {
    pub fn of(net: &Net, split: &Split) -> Result<Self> {
        Ok(Self {
            nonzeros: net.nonzeros()?,
            widths: net.widths()?,
            held: net.accuracy(&split.held)?,
            test: net.accuracy(&split.test)?,
        })
    }
}

/// The columns of a printed [`Row`].
pub const HEADER: &str = "nonzeros   pixels-units-classes   held out     test";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<String> = self.widths.iter().map(usize::to_string).collect();
        let (held, test) = (100.0 * self.held, 100.0 * self.test);
        write!(f, "{:8}   {:>20}   {held:6.2} %   {test:6.2} %", self.nonzeros, widths.join("-"))
    }
}

/// The pixels that are read, darker the more units read them.
pub fn picture(net: &Net) -> Result<String> {
    let Some(first) = net.weights()?.into_iter().next() else { bail!("a net without layers") };
    let read = first.weight.ne(0f32)?.to_dtype(candle_core::DType::U32)?.sum(0)?.to_vec1::<u32>()?;
    let most = read.iter().copied().max().unwrap_or(1).max(1);
    let mut text = vec!['.'; 784];
    for (&pixel, &units) in net.inputs.iter().zip(&read) {
        let shade = (units * 3).div_ceil(most) as usize;
        text[pixel] = ['.', '-', '+', '#'][shade];
    }
    let lines: Vec<String> = text.chunks(28).map(|line| line.iter().collect()).collect();
    Ok(format!(
        "{}\n{} of 784 pixels are read; - + # by few to many of the units",
        lines.join("\n"),
        net.inputs.len()
    ))
}

fn checkpoint(weights: &[Weights], inputs: &[usize]) -> Checkpoint {
    let mut file = Checkpoint::default();
    for layer in weights {
        file.tensors.insert(format!("{}.weight", layer.name), layer.weight.clone());
        file.tensors.extend(layer.bias.iter().map(|bias| (format!("{}.bias", layer.name), bias.clone())));
    }
    let inputs: Vec<String> = inputs.iter().map(usize::to_string).collect();
    file.metadata.insert("inputs".into(), inputs.join(" "));
    file
}

/// A net of the tensors and inputs of `file`.
fn net(file: &Checkpoint, path: &Path) -> Result<Net> {
    let layer = |i: usize| {
        let name = format!("fc{i}");
        let weight = file.tensors.get(&format!("{name}.weight"))?.clone();
        let bias = file.tensors.get(&format!("{name}.bias")).cloned();
        Some(Weights { name, weight, bias })
    };
    let weights: Vec<Weights> = (1..).map_while(layer).collect();
    let inputs = file.metadata.get("inputs").map(|text| text.split(' ').map(str::parse).collect());
    match inputs {
        Some(Ok(inputs)) if !weights.is_empty() => Net::of(&weights, &Vec::<usize>::clone(&inputs)),
        _ => bail!("{}: no list of inputs, or no layers", path.display()),
    }
}

/// Writes the dense net before, and the compact one as it is and with indices and values; reads them back.
pub fn save(dense: &Net, small: &Net, split: &Split, dir: &Path) -> Result<()> {
    println!();
    for (name, saved, sparse) in [("dense", dense, false), ("compact", small, false), ("sparse", small, true)]
    {
        let path = dir.join(format!("{name}.safetensors"));
        let file = checkpoint(&saved.weights()?, &saved.inputs);
        if sparse {
            write_sparse(&file, &path)?
        } else {
            file.write(&path)?
        }
        let read =
            if sparse { read_sparse(&path, &Device::Cpu)? } else { Checkpoint::read(&path, &Device::Cpu)? };
        let outputs = |net: &Net| {
            net.forward(&split.test.pixels(&net.inputs)?.x.narrow(0, 0, 100)?)?.detach().to_vec2::<f32>()
        };
        if outputs(&net(&read, &path)?)? != outputs(saved)? {
            bail!("{}: read back, the net has other outputs", path.display())
        }
        let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        println!("{}: {bytes} bytes, read back with the same outputs", path.display());
    }
    // What was removed is nothing: the compact net on its pixels is its layers as functions.
    let x = split.test.pixels(&small.inputs)?.x;
    let by_stages =
        stages(small.weights()?).iter().try_fold(x.clone(), |x, stage: &Stage| stage.forward(&x))?;
    if (by_stages - small.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-4 {
        bail!("the compact net's stages have other outputs than its layers")
    }
    Ok(())
}
