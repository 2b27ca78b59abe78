//! The bundled images: a base learns one half of the classes, the fine-tuning is on the other.

use super::args::{Args, Choice};
use super::data::{Data, Part};
use super::idx::SIDE;
use super::model::{Model, Spec};
use super::optimizer::Tuner;
use super::task::{Forward, Inputs, Side, Task};
use super::train::{self, Steps};
use super::weights;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::nn::{VarBuilder, VarMap};
use kronwake::tape::Tape;
use std::path::Path;

/// Classes of the base; the fine-tuning is on the others.
const BASE: u8 = 5;

pub struct Images {
    data: Data,
    /// Training and test examples of the classes from `BASE` on.
    halves: [Part; 2],
    spec: Spec,
    dtype: DType,
    device: Device,
}

/// The examples of one half of the classes.
fn half(part: &Part, base: bool) -> Part {
    choose(part, |i| (part.labels[i] < BASE) == base)
}

fn choose(part: &Part, chosen: impl Fn(usize) -> bool) -> Part {
    let places: Vec<usize> = (0..part.len()).filter(|&i| chosen(i)).collect();
    let pixels = places.iter().flat_map(|&i| part.pixels[i * SIDE * SIDE..(i + 1) * SIDE * SIDE].iter());
    Part { pixels: pixels.copied().collect(), labels: places.iter().map(|&i| part.labels[i]).collect() }
}

impl Images {
    pub fn new(args: &Args, device: &Device) -> Result<Self> {
        let data = Data::bundled()?;
        let train = half(&data.train, false);
        let halves = match args.hold_out {
            true => [choose(&train, |i| i % 5 != 4), choose(&train, |i| i % 5 == 4)],
            false => [train, half(&data.test, false)],
        };
        Ok(Self { data, halves, spec: args.model.clone(), dtype: args.dtype, device: device.clone() })
    }

    fn of(&self, part: &Part, places: &[usize]) -> Result<(Inputs, Tensor)> {
        let (x, y) = self.data.batch(part, places, self.dtype, &self.device)?;
        Ok((vec![x], y))
    }

    /// The number of the last of the layers `fc1`, `fc2`, ..
    fn last(&self) -> usize {
        match &self.spec {
            Spec::Cnn => 2,
            Spec::Lenet300 | Spec::Lenet5 => 3,
            Spec::Mlp { widths, .. } => widths.len() - 1,
        }
    }
}

impl Task for Images {
    fn title(&self) -> String {
        let [train, test] = &self.halves;
        format!(
            "Fashion-MNIST, bundled subset, classes 5 to 9: {} training, {} test images",
            train.len(),
            test.len()
        )
    }

    fn len(&self, side: Side) -> usize {
        self.halves[usize::from(side == Side::Test)].len()
    }

    fn batch(&self, side: Side, places: &[usize]) -> Result<(Inputs, Tensor)> {
        self.of(&self.halves[usize::from(side == Side::Test)], places)
    }

    fn build(&self, vb: VarBuilder) -> Result<Forward> {
        let model = Model::new(&self.spec, vb)?;
        Ok(Box::new(move |inputs| model.forward(&inputs[0], None)))
    }

    fn head(&self) -> String {
        format!("fc{}.", self.last())
    }

    fn adapted(&self) -> Vec<String> {
        (1..self.last()).map(|i| format!("fc{i}")).collect()
    }

    fn train_base(&self, args: &Args, path: &Path) -> Result<()> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let forward = tape.build(|| self.build(VarBuilder::from_varmap(&vars, self.dtype, &self.device)))?;
        weights::draw(&vars, args.seed)?;
        let part = half(&self.data.train, true);
        let plain = Args { lr: None, clip: None, ..args.clone() };
        let mut tuner = Tuner::new(Choice::Adamw, &plain, &vars, &tape)?;
        let steps = Steps::new(args, args.base_epochs, part.len(), tuner.lr())?;
        train::epochs(&mut tuner, &steps, &forward, |places| self.of(&part, places), |_, _, _| Ok(()))?;
        let test = half(&self.data.test, true);
        let (loss, accuracy) = train::evaluate(test.len(), &forward, |places| self.of(&test, places))?;
        vars.save(path)?;
        println!(
            "base: classes 0 to 4, {} epochs of AdamW, test loss {loss:.4}, accuracy {:.2} %; {}",
            args.base_epochs,
            100.0 * accuracy,
            path.display()
        );
        Ok(())
    }
}
