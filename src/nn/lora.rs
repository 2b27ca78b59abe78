//! Low-rank adapters: fine-tuning by small matrices beside frozen ones.

use crate::building::within;
use crate::checkpoint::Checkpoint;
use crate::curvature::wide;
use crate::ops::dense::product;
use crate::ops::rng::uniform;
use crate::pattern::matches;
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

thread_local! {
    /// The adapters of the `Lora::build` that runs on this thread: layer constructors keep candle_nn's signatures.
    static BUILDING: RefCell<Option<Lora>> = const { RefCell::new(None) };
}

/// Before the name of every tensor in a file, as Hugging Face's PEFT has it.
const PREFIX: &str = "base_model.model.";

/// Which layers get adapters, and what kind.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamsLora {
    /// Rows of `A` and columns of `B`; 8.
    pub rank: usize,
    /// The adapters' product is multiplied by `alpha / rank`; 16.
    pub alpha: f64,
    /// Patterns of layer names, in which `*` stands for any run of characters and `?` for any one; all linear layers.
    pub layers: Vec<String>,
    /// Of the first values of `A`.
    pub seed: u64,
}

impl Default for ParamsLora {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, layers: vec!["*".into()], seed: 0 }
    }
}

/// Adapters for the linear layers of a model: `y = x W^T + b + alpha / rank (x A^T) B^T`, of which only `A` `[rank, in]` and `B` `[out, rank]`
/// are trained. `B` starts at zero, so that the model does at first what it did; `A` starts uniform in `1 / sqrt(in)`, as in PyTorch.
///
/// Layers built inside [`Lora::build`] whose names match get adapters; weights and biases of those are constants to the optimizer. Built inside
/// [`Tape::build`](crate::tape::Tape::build) too, `A` and `B` are tapped as layers `NAME.lora_A` and `NAME.lora_B`, and have Kronecker blocks of
/// their own.
///
/// Source: Hu et al., "LoRA: Low-rank adaptation of large language models" (ICLR 2022). Clones share everything.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::nn::{self, Lora, Module, ParamsLora, VarBuilder, VarMap, loss};
/// use kronwake::optim::{NaturalGradient, Params};
/// use kronwake::tape::{Likelihood, Tape};
///
/// # fn main() -> candle_core::Result<()> {
/// let (base, tape) = (VarMap::new(), Tape::new());
/// let vb = VarBuilder::from_varmap(&base, DType::F32, &Device::Cpu);
/// let lora = Lora::new(ParamsLora { rank: 2, layers: vec!["fc*".into()], ..Default::default() })?;
/// let model = lora.build(|| tape.build(|| nn::linear(4, 3, vb.pp("fc1"))))?;
/// // Checkpoint::read("base.safetensors", &Device::Cpu)?.load_into(&base)?;
/// let mut optimizer = NaturalGradient::from_varmap(lora.varmap(), Params::so_kld_wrm(&tape))?;
/// assert_eq!(optimizer.block_names(), ["fc1.lora_A", "fc1.lora_B"]);
/// # let (x, y) = (Tensor::randn(0f32, 1., (6, 4), &Device::Cpu)?, Tensor::new(&[0u32, 1, 2, 0, 1, 2], &Device::Cpu)?);
/// let logits = model.forward(&x)?;
/// optimizer.observe(&logits, Likelihood::Categorical)?;
/// # use kronwake::optim::Optimizer;
/// optimizer.backward_step(&loss::cross_entropy(&logits, &y)?)?;
/// let tuned = model.forward(&x)?;
/// lora.merge(&base)?; // into the weights: `base` is a model without adapters now
/// # assert!((model.forward(&x)? - tuned)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Lora {
    params: ParamsLora,
    varmap: VarMap,
    /// Names of the linear layers that were built, adapted or not.
    built: Arc<Mutex<BTreeSet<String>>>,
}

impl std::fmt::Debug for Lora {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lora")
            .field("params", &self.params)
            .field("layers", &self.layers())
            .finish_non_exhaustive()
    }
}

/// The adapters of one layer.
#[derive(Clone, Debug)]
pub(super) struct Adapter {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl Lora {
    /// # Errors
    /// If the rank is 0, `alpha` is not finite, or there are no patterns.
    pub fn new(params: ParamsLora) -> Result<Self> {
        if params.rank == 0 || !params.alpha.is_finite() || params.layers.is_empty() {
            bail!(
                "lora: expected a rank of 1 or more, a finite alpha and at least one pattern of layers, got rank {}, alpha {} and {:?}",
                params.rank,
                params.alpha,
                params.layers
            )
        }
        Ok(Self { params, varmap: VarMap::new(), built: Arc::default() })
    }

    /// Runs `build`, giving adapters to the linear layers that it constructs on this thread. A layer that is built again shares them.
    ///
    /// # Errors
    /// As `build`; if a pattern matches no layer that has been built, or the rank is larger than a side of a layer's weight.
    pub fn build<M>(&self, build: impl FnOnce() -> Result<M>) -> Result<M> {
        let model = within(&BUILDING, self.clone(), build)?;
        let built = self.built();
        for pattern in &self.params.layers {
            if !built.iter().any(|name| matches(pattern, name)) {
                let names: Vec<&str> = built.iter().map(String::as_str).collect();
                bail!("lora: {pattern:?} matches no linear layer; those are {}", names.join(", "))
            }
        }
        Ok(model)
    }

    /// The adapters' Vars, `NAME.lora_A.weight` and `NAME.lora_B.weight`: what an optimizer is to train.
    pub fn varmap(&self) -> &VarMap {
        &self.varmap
    }

    /// Names of the layers that have adapters.
    pub fn layers(&self) -> Vec<String> {
        self.built().iter().filter(|name| self.adapts(name)).cloned().collect()
    }

    fn adapts(&self, name: &str) -> bool {
        self.params.layers.iter().any(|pattern| matches(pattern, name))
    }

    /// What the adapters' product is multiplied by.
    fn scale(&self) -> f64 {
        self.params.alpha / self.params.rank as f64
    }

    /// The adapters of the layer that is being built, if it is to have some.
    pub(super) fn adapter(name: &str, weight: &Tensor) -> Result<Option<Adapter>> {
        match BUILDING.with(|b| b.borrow().clone()) {
            Some(lora) if !name.is_empty() => lora.adapt(name, weight),
            _ => Ok(None),
        }
    }

    fn adapt(&self, name: &str, weight: &Tensor) -> Result<Option<Adapter>> {
        let ParamsLora { rank, seed, .. } = self.params;
        self.built().insert(name.to_string());
        if !self.adapts(name) {
            return Ok(None);
        }
        let (out, columns) = weight.dims2()?;
        if rank > out.min(columns) {
            bail!("lora: rank {rank} is too large for layer {name} [{out}, {columns}]")
        }
        let stream = self.layers().len() as u64;
        let bound = 1.0 / (columns as f64).sqrt();
        let first = |i: usize| (2.0 * uniform(seed, stream, i as u64) - 1.0) * bound;
        let var = |part: &str, shape: (usize, usize), init: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            let full = format!("{name}.{part}.weight");
            let mut vars = lock(&self.varmap)?;
            if let Some(var) = vars.get(&full) {
                return Ok(var.as_tensor().clone());
            }
            let values: Vec<f64> = (0..shape.0 * shape.1).map(init).collect();
            let values =
                Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?.to_dtype(weight.dtype())?;
            let var = Var::from_tensor(&values.to_device(weight.device())?)?;
            let tensor = var.as_tensor().clone();
            vars.insert(full, var);
            Ok(tensor)
        };
        let a = var("lora_A", (rank, columns), &first)?;
        let b = var("lora_B", (out, rank), &|_| 0.0)?;
        Ok(Some(Adapter { a, b, scale: self.scale() }))
    }

    /// `alpha / rank B A` of every layer, `[out, in]`, in f32 at least.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn changes(&self) -> Result<BTreeMap<String, Tensor>> {
        let vars = lock(&self.varmap)?;
        let mut changes = BTreeMap::new();
        for name in self.layers() {
            let part = |part: &str| match vars.get(&format!("{name}.{part}.weight")) {
                Some(var) => wide(&var.as_detached_tensor()),
                None => bail!("lora: layer {name} has no {part}"),
            };
            let change = product(&part("lora_B")?, &part("lora_A")?)?;
            changes.insert(name, (change * self.scale())?);
        }
        Ok(changes)
    }

    /// Adds the adapters to the weights `NAME.weight` of `base`, and sets every `B` to zero: the model with adapters does what it did, and so does
    /// one that is built without them from `base`.
    ///
    /// # Errors
    /// If `base` has no such weight or of another shape; nothing has changed then.
    pub fn merge(&self, base: &VarMap) -> Result<()> {
        let mut merged = Vec::new();
        {
            let base = lock(base)?;
            for (name, change) in self.changes()? {
                let Some(var) = base.get(&format!("{name}.weight")) else {
                    bail!("lora: the base has no {name}.weight")
                };
                merged.push((var.clone(), added(&name, var.as_tensor(), &change)?));
            }
        }
        for (var, value) in merged {
            var.set(&value)?;
        }
        for (name, var) in lock(&self.varmap)?.iter() {
            if name.ends_with(".lora_B.weight") {
                var.set(&var.zeros_like()?)?;
            }
        }
        Ok(())
    }

    /// The checkpoint with the adapters added to its weights, for a base that is in no VarMap.
    ///
    /// # Errors
    /// If it lacks a weight, or has one of another shape.
    pub fn merged(&self, base: &Checkpoint) -> Result<Checkpoint> {
        let mut merged = base.clone();
        for (name, change) in self.changes()? {
            let Some(weight) = merged.tensors.get_mut(&format!("{name}.weight")) else {
                bail!("lora: the base has no {name}.weight")
            };
            *weight = added(&name, weight, &change)?;
        }
        Ok(merged)
    }

    /// Writes the adapters alone, under the names that Hugging Face's PEFT gives them, with `r` and `lora_alpha` in the metadata.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let tensors = lock(&self.varmap)?
            .iter()
            .map(|(name, var)| (format!("{PREFIX}{name}"), var.as_detached_tensor()))
            .collect();
        let metadata = HashMap::from([
            ("r".to_string(), self.params.rank.to_string()),
            ("lora_alpha".to_string(), self.params.alpha.to_string()),
        ]);
        Checkpoint { tensors, metadata, ..Default::default() }.write(path)
    }

    /// Sets the adapters to those of a file of [`Lora::save`] or of PEFT.
    ///
    /// # Errors
    /// When the file cannot be read, when its adapters are of other layers or another rank, or when its metadata have another `lora_alpha`;
    /// nothing has changed then.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut file = Checkpoint::read(path, &candle_core::Device::Cpu)?;
        if let Some(alpha) = file.metadata.get("lora_alpha")
            && alpha.parse() != Ok(self.params.alpha)
        {
            bail!("{}: lora_alpha is {alpha}, expected {}", path.display(), self.params.alpha)
        }
        let bare = |name: String| name.strip_prefix(PREFIX).map(str::to_string).unwrap_or(name);
        file.tensors = file.tensors.into_iter().map(|(name, tensor)| (bare(name), tensor)).collect();
        match file.load_into(&self.varmap) {
            Err(error) => bail!("{}: {error}", path.display()),
            done => done,
        }
    }

    fn built(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `weight + change` in the weight's type.
fn added(name: &str, weight: &Tensor, change: &Tensor) -> Result<Tensor> {
    if weight.dims() != change.dims() {
        bail!("lora: {name}.weight has shape {:?}, expected {:?}", weight.dims(), change.dims())
    }
    (wide(&weight.detach())?
        + change.to_device(weight.device())?.to_dtype(crate::curvature::wide_dtype(weight.dtype()))?)?
    .to_dtype(weight.dtype())
}

fn lock(varmap: &VarMap) -> Result<MutexGuard<'_, HashMap<String, Var>>> {
    match varmap.data().lock() {
        Ok(vars) => Ok(vars),
        Err(_) => bail!("lora: the VarMap's lock is poisoned"),
    }
}
