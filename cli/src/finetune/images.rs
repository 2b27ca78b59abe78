//! The bundled images: a base learns one half of the classes, the fine-tuning is on the other.

use super::args::Args;
use super::task::{Forward, Inputs, Side, Task};
use super::train;
use crate::data::{Data, Part};
use crate::idx::SIDE;
use crate::model::{Model, Spec};
use crate::models::vit;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::nn::{Activation, Module, VarBuilder};
use kronwake::parallel::World;
use std::path::Path;

/// Classes of the base; the fine-tuning is on the others.
const BASE: u8 = 5;

pub struct Images {
    data: Data,
    /// Training and test examples of the classes from `BASE` on.
    halves: [Part; 2],
    /// A net of the example `mnist`, or else a vision transformer.
    spec: Option<Spec>,
    /// What the names of the last layer's parameters begin with.
    head: String,
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
    pub fn new(args: &Args, spec: Option<Spec>, device: &Device) -> Result<Self> {
        let data = Data::bundled()?;
        let train = half(&data.train, false);
        let halves = match args.hold_out {
            true => [choose(&train, |i| i % 5 != 4), choose(&train, |i| i % 5 == 4)],
            false => [train, half(&data.test, false)],
        };
        let head = match &spec {
            Some(spec) => spec.head(),
            None => "classifier.".into(),
        };
        Ok(Self { data, halves, spec, head, dtype: args.dtype, device: device.clone() })
    }

    fn of(&self, part: &Part, places: &[usize]) -> Result<(Inputs, Tensor)> {
        let (x, y) = self.data.batch(part, places, self.dtype, &self.device)?;
        Ok((vec![x], y))
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
        if let Some(spec) = &self.spec {
            let model = Model::new(spec, vb)?;
            return Ok(Box::new(move |inputs| model.forward(&inputs[0], None)));
        }
        let config = vit::Config {
            hidden: 48,
            inner: 96,
            layers: 3,
            heads: 4,
            image: SIDE,
            patch: 7,
            channels: 1,
            activation: Activation::Gelu,
            eps: 1e-6,
            bias: true,
        };
        let model = vit::Vit::new(&config, 10, &vb)?;
        Ok(Box::new(move |inputs| model.forward(&inputs[0])))
    }

    fn head(&self) -> Option<&str> {
        Some(&self.head)
    }

    fn ends(&self) -> Vec<String> {
        let head = format!("{}*", self.head);
        match &self.spec {
            Some(_) => vec![head],
            // The projection of patches is a layer like others.
            None => {
                vec!["vit.embeddings.cls_token".into(), "vit.embeddings.position_embeddings".into(), head]
            }
        }
    }

    fn adapted(&self) -> Vec<String> {
        match &self.spec {
            None => vec!["*.query".into(), "*.value".into()],
            Some(spec) => (1..spec.linear_layers()).map(|layer| format!("fc{layer}")).collect(),
        }
    }

    fn train_base(&self, args: &Args, path: &Path, world: &World) -> Result<()> {
        let [train, test] = [half(&self.data.train, true), half(&self.data.test, true)];
        let batch = |side: Side, places: &[usize]| match side {
            Side::Train => self.of(&train, places),
            Side::Test => self.of(&test, places),
        };
        train::base(self, args, [train.len(), test.len()], &batch, path, world)
    }
}
