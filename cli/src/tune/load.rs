//! The net and its examples.

use super::args::{Args, Kind};
use crate::data::{Data, Part};
use crate::model::{Model, Spec};
use crate::{program, sentence};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::evidence::Examples;
use kronwake::nn::{Module, Optimizer, VarBuilder, VarMap, init, loss};
use kronwake::optim::{NaturalGradient, Params, Schedule};
use kronwake::tape::{Likelihood, Tape};
use safetensors::SafeTensors;
use std::path::Path;

/// A net with its parameters.
pub struct Net {
    pub vars: VarMap,
    pub tape: Tape,
    pub model: Model,
    flat: Option<usize>,
    side: bool,
    dtype: DType,
}

impl Module for Net {
    /// The outputs for inputs of any type and of a shape that has as many numbers as the model takes.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = if x.dtype() == self.dtype { x.clone() } else { x.to_dtype(self.dtype)? };
        let (n, size) = (x.dim(0)?, x.elem_count() / x.dim(0)?.max(1));
        let x = match self.flat {
            Some(width) if size == width => x.reshape((n, width))?,
            None if size == 28 * 28 && self.side => x.reshape((n, 1, 28, 28))?,
            _ => bail!(
                "examples of {size} numbers {:?} do not fit the model, which takes {}",
                &x.dims()[1..],
                self.flat.unwrap_or(28 * 28)
            ),
        };
        self.model.forward(&x, None)
    }
}

impl Net {
    pub fn new(spec: &Spec, dtype: DType, device: &Device) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        let model = tape.build(|| Model::new(spec, VarBuilder::from_varmap(&vars, dtype, device)))?;
        let flat = match spec {
            Spec::Mlp { widths, .. } => widths.first().copied(),
            Spec::Lenet300 => Some(784),
            _ => None,
        };
        Ok(Self { vars, tape, model, flat, side: flat.is_none(), dtype })
    }

    /// The parameters of a file, and their names in its order.
    pub fn load(&self, path: &Path) -> Result<Vec<String>> {
        let file = Checkpoint::read(path, &Device::Cpu)?;
        for (name, tensor) in &file.tensors {
            if tensor.dtype().is_float() {
                let sum = tensor.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
                if !sum.is_finite() {
                    bail!("--checkpoint {}: {name} holds NaN or infinite numbers", path.display())
                }
            }
        }
        if let Err(e) = file.load_into(&self.vars) {
            bail!("--checkpoint {}: {}", path.display(), sentence::sentence(&e))
        }
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) => bail!("--checkpoint {}: cannot be read: {e}", path.display()),
        };
        match SafeTensors::read_metadata(&bytes) {
            Ok((_, header)) => Ok(header.offset_keys()),
            Err(e) => bail!("--checkpoint {}: {e}", path.display()),
        }
    }

    /// Trains with KLD-WRM, as it comes.
    pub fn train(&self, args: &Args, examples: &Examples) -> Result<()> {
        init::seeded_uniform(&init::named(&self.vars)?, args.seed)?;
        let mut opt = NaturalGradient::from_varmap(&self.vars, Params::kld_wrm(&self.tape))?;
        const BATCH: usize = 64;
        let n = examples.len();
        let steps = args.epochs * n.div_ceil(BATCH);
        let schedule = Schedule::cosine(1.0, steps + 1, 0, 0.05)?;
        let bar = program::bar(steps, 0, "steps, {eta} left")?;
        let mut step = 0;
        for epoch in 0..args.epochs {
            for places in crate::data::order(n, Some(args.seed), epoch).chunks(BATCH) {
                opt.set_learning_rate(schedule.at(step));
                let batch = examples.select(places)?;
                let logits = self.forward(batch.x())?;
                opt.observe(&logits, Likelihood::Categorical)?;
                opt.backward_step(&loss::cross_entropy(&logits, batch.y())?)?;
                step += 1;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        opt.adopt_average()
    }
}

/// Training examples, test examples where there are some, and the likelihood.
pub struct Loaded {
    pub title: String,
    pub train: Examples,
    pub test: Option<Examples>,
    pub likelihood: Likelihood,
}

pub fn examples(args: &Args, device: &Device) -> Result<Loaded> {
    let mut loaded = match &args.examples {
        Some(path) => from_file(path, args.dtype, device)?,
        None => {
            let data = Data::open(args.data_dir.as_deref(), args.dataset)?;
            let all = |part: &Part| {
                let places: Vec<usize> = (0..part.len()).collect();
                let (x, y) = data.batch(part, &places, args.dtype, device)?;
                Examples::new(x, y)
            };
            let (train, test) = (all(&data.train)?, all(&data.test)?);
            Loaded { title: data.title.clone(), train, test: Some(test), likelihood: Likelihood::Categorical }
        }
    };
    if let Some(first) = args.first {
        if first > loaded.train.len() {
            bail!("--first {first} is more than the {} examples there are", loaded.train.len())
        }
        loaded.train = loaded.train.select(&(0..first).collect::<Vec<_>>())?;
    }
    if let Some(kind) = args.likelihood {
        loaded.likelihood = match kind {
            Kind::Categorical => Likelihood::Categorical,
            Kind::Bernoulli => Likelihood::Bernoulli,
            Kind::Gaussian => Likelihood::Gaussian,
        };
    }
    let whole = loaded.train.y().dtype().is_int();
    if whole && loaded.likelihood != Likelihood::Categorical {
        let y = loaded.train.y().to_dtype(args.dtype)?;
        loaded.train = Examples::new(loaded.train.x().clone(), y)?;
    }
    if !whole && loaded.likelihood == Likelihood::Categorical {
        bail!(
            "--likelihood categorical needs labels of whole numbers, got {}",
            loaded.train.y().dtype().as_str()
        )
    }
    Ok(loaded)
}

fn from_file(path: &Path, dtype: DType, device: &Device) -> Result<Loaded> {
    let file = Checkpoint::read(path, device)?;
    let get = |name: &str| match file.tensors.get(name) {
        Some(tensor) if tensor.rank() > 0 => Ok(tensor.clone()),
        _ => bail!(
            "--examples {}: expected tensors x [n, ..] and y [n] or [n, outputs], found {}",
            path.display(),
            file.tensors.iter().map(|(n, t)| format!("{n} {:?}", t.dims())).collect::<Vec<_>>().join(", ")
        ),
    };
    let (x, y) = (get("x")?, get("y")?);
    let x = match x.dtype() {
        DType::U8 => (x.to_dtype(dtype)? / 255.0)?,
        _ => x.to_dtype(dtype)?,
    };
    let (y, likelihood) = if y.dtype().is_int() {
        // Labels in a column of their own are common.
        let y = if y.rank() == 2 && y.dim(D::Minus1)? == 1 { y.squeeze(1)? } else { y };
        (y, Likelihood::Categorical)
    } else {
        (y.to_dtype(dtype)?, Likelihood::Gaussian)
    };
    let train = match Examples::new(x, y) {
        Ok(train) => train,
        Err(e) => bail!("--examples {}: {}", path.display(), sentence::sentence(&e)),
    };
    let title = format!("{}: {} examples {:?}", path.display(), train.len(), &train.x().dims()[1..]);
    Ok(Loaded { title, train, test: None, likelihood })
}
