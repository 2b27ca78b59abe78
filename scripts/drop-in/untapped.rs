//! Trains models of candle-transformers as they are, without a tape: K-FAC has their gradients and nothing else. The first values are random
//! without a seed, and such deep nets start badly without statistics of their normalizations: that the loss falls is shown, not checked.

use candle::{DType, Device, Result, Tensor};
use candle_transformers::models::{efficientnet, vgg};
use kronwake::curvature::{Beyond, Damping, FactorLimit, Relative};
use kronwake::nn::{loss::cross_entropy, Module, ModuleT, VarBuilder, VarMap};
use kronwake::optim::{Every, Group, Groups, NaturalGradient, Optimizer, Params, UpdateRule};
use kronwake::tape::{Likelihood, Tape};

const CLASSES: usize = 4;

/// `count` images `[3, side, side]` of stripes in one of four directions, at random places and in noise, and their directions.
fn stripes(count: usize, side: usize) -> Result<(Tensor, Tensor)> {
    let labels: Vec<u32> = (0..count).map(|i| (i % CLASSES) as u32).collect();
    let images = labels.iter().map(|&label| {
        let angle = label as f64 * std::f64::consts::PI / CLASSES as f64;
        let place =
            |d: usize| Tensor::arange(0u32, side as u32, &Device::Cpu)?.to_dtype(DType::F64)?.unsqueeze(d);
        let phase = Tensor::rand(0f64, 6.28, (1, 1), &Device::Cpu)?;
        let wave = (place(0)? * (0.4 * angle.cos()))?.broadcast_add(&(place(1)? * (0.4 * angle.sin()))?)?;
        let wave = wave.broadcast_add(&phase)?.sin()?.to_dtype(DType::F32)?.unsqueeze(0)?;
        wave.broadcast_add(&Tensor::randn(0f32, 1f32, (3, side, side), &Device::Cpu)?)
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    Ok((Tensor::stack(&images, 0)?, Tensor::from_vec(labels, count, &Device::Cpu)?))
}

struct Training {
    name: &'static str,
    side: usize,
    batch: usize,
    steps: usize,
    lr: f64,
    /// The variance of a weight's first values is this over the inputs of an output.
    gain: f32,
}

impl Training {
    fn run(&self, vars: &VarMap, forward: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let names: Vec<String> = vars.data().lock().expect("no other thread").keys().cloned().collect();
        let mut groups = Groups::default();
        for name in &names {
            let var = vars.data().lock().expect("no other thread")[name].clone();
            let rank = var.rank();
            if rank > 1 {
                // Without statistics of normalizations, candle's first values fade to nothing in so many layers.
                let gain = if var.dim(0)? == CLASSES { 0.0 } else { self.gain };
                let deviation = (gain * var.dim(0)? as f32 / var.elem_count() as f32).sqrt();
                var.set(&Tensor::randn(0f32, deviation, var.shape(), &Device::Cpu)?)?;
            }
            if name.contains("running_") {
                groups.0.push(Group { frozen: true, ..Group::named(name) });
            } else if rank > 1 {
                groups.0.push(Group { rule: Some(UpdateRule::GradientFactors), ..Group::named(name) });
            }
        }
        let params = Params {
            lr: self.lr,
            stat_decay: 0.95,
            kl_clip: Some(1e-3),
            damping: Damping::Relative(Relative::default()),
            every: Every { factors: 1, inverses: 5 },
            factor_limit: FactorLimit { rows: 512, beyond: Beyond::BlockDiagonal },
            groups,
            ..Params::k_fac(&Tape::new())
        };
        let mut optimizer = NaturalGradient::from_varmap(vars, params)?;
        let (x, y) = stripes(2 * self.batch, self.side)?;
        let held_out = || cross_entropy(&forward(&x)?, &y)?.to_scalar::<f32>();
        let before = held_out()?;
        for _ in 0..self.steps {
            let (x, y) = stripes(self.batch, self.side)?;
            let logits = forward(&x)?;
            optimizer.observe(&logits, Likelihood::Categorical)?;
            optimizer.backward_step(&cross_entropy(&logits, &y)?)?;
        }
        let after = held_out()?;
        println!(
            "{}: {} blocks of gradients alone; held-out loss {before:.4}, after {} steps of K-FAC {after:.4}",
            self.name,
            optimizer.block_names().len(),
            self.steps
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model = efficientnet::EfficientNet::new(vb, efficientnet::MBConvConfig::b0(), CLASSES)?;
    let training = Training { name: "efficientnet-b0", side: 32, batch: 16, steps: 50, lr: 0.1, gain: 2.7 };
    training.run(&vars, |x| model.forward(x))?;

    let vars = VarMap::new();
    let model = vgg::Vgg::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), vgg::Models::Vgg13)?;
    let training = Training { name: "vgg13", side: 224, batch: 2, steps: 3, lr: 0.1, gain: 2.0 };
    // It takes one image at a time.
    let forward = |x: &Tensor| -> Result<Tensor> {
        let rows = (0..x.dim(0)?).map(|i| model.forward_t(&x.get(i)?, false));
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
    };
    training.run(&vars, forward)
}
