//! Low-rank adapters: fine-tuning by small matrices beside frozen ones.

mod config;
mod file;

use crate::building::within;
use crate::checkpoint::Checkpoint;
use crate::curvature::wide;
use crate::ops::dense::product;
use crate::ops::rng::{normal, uniform};
use crate::pattern::matches;
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::VarMap;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

thread_local! {
    /// The adapters of the `Lora::build` that runs on this thread: layer constructors keep candle_nn's signatures.
    static BUILDING: RefCell<Option<Lora>> = const { RefCell::new(None) };
}

/// Which layers get adapters, and what kind.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamsLora {
    /// Rows of `A` and columns of `B`; 8.
    pub rank: usize,
    /// The adapters' product is multiplied by `alpha / rank`; 16.
    pub alpha: f64,
    /// Patterns of names of linear layers, in which `*` stands for any run of characters and `?` for any one; all linear layers.
    pub layers: Vec<String>,
    /// Of the first values of `A`, for an embedding of `B`.
    pub seed: u64,
    /// Patterns of names of embeddings; none.
    pub embeddings: Vec<String>,
    /// Patterns of names of layers that get no adapters though they match; none.
    pub exclude: Vec<String>,
    /// Whether the product is multiplied by `alpha / sqrt(rank)`, as in rsLoRA (Kalajdzievski, 2023); false.
    pub rslora: bool,
    /// Ranks of the layers of some patterns, of which the first that matches counts; none.
    pub ranks: Vec<(String, usize)>,
    /// Alphas of the layers of some patterns, of which the first that matches counts; none.
    pub alphas: Vec<(String, f64)>,
    /// Whether the base's files hold their weights as `[in, out]`, as GPT-2's do: [`Lora::merged`] adds the adapters to these; false.
    pub fan_in_fan_out: bool,
}

impl Default for ParamsLora {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            layers: vec!["*".into()],
            seed: 0,
            embeddings: vec![],
            exclude: vec![],
            rslora: false,
            ranks: vec![],
            alphas: vec![],
            fan_in_fan_out: false,
        }
    }
}

impl ParamsLora {
    fn rank_of(&self, name: &str) -> usize {
        of_first(&self.ranks, name).unwrap_or(self.rank)
    }

    fn alpha_of(&self, name: &str) -> f64 {
        of_first(&self.alphas, name).unwrap_or(self.alpha)
    }

    /// What the product of a layer's adapters is multiplied by.
    fn scale_of(&self, name: &str) -> f64 {
        let rank = self.rank_of(name) as f64;
        self.alpha_of(name) / if self.rslora { rank.sqrt() } else { rank }
    }

    fn adapts(&self, name: &str, kind: AdapterKind) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, name));
        any(kind.patterns(self)) && !any(&self.exclude)
    }
}

/// The value of the first pattern that matches.
fn of_first<T: Copy>(values: &[(String, T)], name: &str) -> Option<T> {
    values.iter().find(|(pattern, _)| matches(pattern, name)).map(|&(_, value)| value)
}

/// Which layers adapters are of; the names of their parts are PEFT's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdapterKind {
    /// `A` `[rank, in]` and `B` `[out, rank]` beside a weight `[out, in]`.
    Linear,
    /// `A` `[rows, rank]` and `B` `[features, rank]` beside a table `[rows, features]`. (PEFT has `A^T`.)
    Embedding,
}

impl AdapterKind {
    /// The names of `A` and `B` as layers.
    pub(super) fn parts(self) -> [&'static str; 2] {
        match self {
            Self::Linear => ["lora_A", "lora_B"],
            Self::Embedding => ["lora_embedding_A", "lora_embedding_B"],
        }
    }

    /// The names of the Vars `A` and `B` of layer `name`.
    fn vars(self, name: &str) -> [String; 2] {
        self.parts().map(|part| match self {
            Self::Linear => format!("{name}.{part}.weight"),
            Self::Embedding => format!("{name}.{part}"),
        })
    }

    fn patterns(self, params: &ParamsLora) -> &[String] {
        match self {
            Self::Linear => &params.layers,
            Self::Embedding => &params.embeddings,
        }
    }
}

/// Adapters for the linear layers of a model: `y = x W^T + b + alpha / rank (x A^T) B^T`, of which only `A` `[rank, in]` and `B` `[out, rank]`
/// are trained. `B` starts at zero, so that the model does at first what it did; `A` starts uniform in `1 / sqrt(in)`, as in PyTorch.
/// Embeddings of a table `E` `[rows, features]` can have them too, `y = E[i] + alpha / rank A[i] B^T` with `A` `[rows, rank]`; there `A` starts
/// at zero and `B` standard normal.
///
/// Layers built inside [`Lora::build`] whose names match get adapters; weights and biases of those are constants to the optimizer. Built inside
/// [`Tape::build`](crate::tape::Tape::build) too, `A` and `B` are tapped as layers `NAME.lora_A` and `NAME.lora_B`, and have Kronecker blocks of
/// their own. (Of an embedding they are `NAME.lora_embedding_A` and `NAME.lora_embedding_B`.)
///
/// [`Lora::save`] and [`Lora::load`] speak the format of Hugging Face's PEFT; [`ParamsLora::read`] takes the options of such a file.
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
    /// The layers that were built, adapted or not.
    built: Arc<Mutex<BTreeMap<String, AdapterKind>>>,
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
    /// If a rank is 0, an `alpha` is not finite, or there are no patterns.
    pub fn new(params: ParamsLora) -> Result<Self> {
        let ranks = || params.ranks.iter().map(|&(_, rank)| rank).chain([params.rank]);
        let alphas = || params.alphas.iter().map(|&(_, alpha)| alpha).chain([params.alpha]);
        let none = params.layers.is_empty() && params.embeddings.is_empty();
        if ranks().any(|rank| rank == 0) || alphas().any(|alpha| !alpha.is_finite()) || none {
            bail!(
                "lora: expected a rank of 1 or more, a finite alpha and at least one pattern of layers, got rank {}, alpha {} and {:?}",
                ranks().min().unwrap_or(params.rank),
                alphas().find(|alpha| !alpha.is_finite()).unwrap_or(params.alpha),
                params.layers
            )
        }
        Ok(Self { params, varmap: VarMap::new(), built: Arc::default() })
    }

    /// Runs `build`, giving adapters to the linear layers that it constructs on this thread. A layer that is built again shares them.
    ///
    /// # Errors
    /// As `build`; if a pattern matches no layer of its kind that has been built, or the rank is larger than a side of a layer's weight.
    pub fn build<M>(&self, build: impl FnOnce() -> Result<M>) -> Result<M> {
        let model = within(&BUILDING, self.clone(), build)?;
        let built = self.built();
        for (kind, what) in [(AdapterKind::Linear, "linear layer"), (AdapterKind::Embedding, "embedding")] {
            let of_kind = || built.iter().filter(|&(_, &of)| of == kind).map(|(name, _)| name.as_str());
            for pattern in kind.patterns(&self.params) {
                if !of_kind().any(|name| matches(pattern, name)) {
                    let names: Vec<&str> = of_kind().collect();
                    bail!("lora: {pattern:?} matches no {what}; those are {}", names.join(", "))
                }
            }
        }
        let of_layers = self.params.ranks.iter().map(|(pattern, _)| pattern);
        let of_layers = of_layers.chain(self.params.alphas.iter().map(|(pattern, _)| pattern));
        for pattern in of_layers.chain(&self.params.exclude) {
            if !built.keys().any(|name| matches(pattern, name)) {
                bail!("lora: {pattern:?}, of a rank, an alpha or what is excluded, matches no layer")
            }
        }
        Ok(model)
    }

    /// The adapters' Vars, `NAME.lora_A.weight` and `NAME.lora_B.weight`, of embeddings `NAME.lora_embedding_A` and
    /// `NAME.lora_embedding_B`: what an optimizer is to train.
    pub fn varmap(&self) -> &VarMap {
        &self.varmap
    }

    /// Names of the layers that have adapters.
    pub fn layers(&self) -> Vec<String> {
        self.adapted().into_keys().collect()
    }

    fn adapted(&self) -> BTreeMap<String, AdapterKind> {
        let built = self.built();
        let adapted = built.iter().filter(|&(name, &kind)| self.params.adapts(name, kind));
        adapted.map(|(name, &kind)| (name.clone(), kind)).collect()
    }

    /// The adapters of the layer that is being built, if it is to have some.
    pub(super) fn adapter(kind: AdapterKind, name: &str, weight: &Tensor) -> Result<Option<Adapter>> {
        match BUILDING.with(|b| b.borrow().clone()) {
            Some(lora) if !name.is_empty() => lora.adapt(kind, name, weight),
            _ => Ok(None),
        }
    }

    fn adapt(&self, kind: AdapterKind, name: &str, weight: &Tensor) -> Result<Option<Adapter>> {
        let (rank, seed) = (self.params.rank_of(name), self.params.seed);
        self.built().insert(name.to_string(), kind);
        if !self.params.adapts(name, kind) {
            return Ok(None);
        }
        let (out, columns) = weight.dims2()?;
        if rank > out.min(columns) {
            bail!("lora: rank {rank} is too large for layer {name} [{out}, {columns}]")
        }
        let stream = self.layers().len() as u64;
        let bound = 1.0 / (columns as f64).sqrt();
        let spread = |i: usize| (2.0 * uniform(seed, stream, i as u64) - 1.0) * bound;
        let drawn = |i: usize| normal(seed, stream, i as u64);
        let zero = |_: usize| 0.0;
        let var = |full: &str, shape: (usize, usize), init: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            let mut vars = lock(&self.varmap)?;
            if let Some(var) = vars.get(full) {
                return Ok(var.as_tensor().clone());
            }
            let values: Vec<f64> = (0..shape.0 * shape.1).map(init).collect();
            let values =
                Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?.to_dtype(weight.dtype())?;
            let var = Var::from_tensor(&values.to_device(weight.device())?)?;
            let tensor = var.as_tensor().clone();
            vars.insert(full.to_string(), var);
            Ok(tensor)
        };
        let [of_a, of_b] = kind.vars(name);
        let (a, b) = match kind {
            AdapterKind::Linear => (var(&of_a, (rank, columns), &spread)?, var(&of_b, (out, rank), &zero)?),
            AdapterKind::Embedding => (var(&of_a, (out, rank), &zero)?, var(&of_b, (columns, rank), &drawn)?),
        };
        Ok(Some(Adapter { a, b, scale: self.params.scale_of(name) }))
    }

    /// What the adapters add to the weight of every layer, `alpha / rank B A` `[out, in]` and of an embedding `alpha / rank A B^T`
    /// `[rows, features]`, in f32 at least.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn changes(&self) -> Result<BTreeMap<String, Tensor>> {
        let vars = lock(&self.varmap)?;
        let mut changes = BTreeMap::new();
        for (name, kind) in self.adapted() {
            let part = |full: &String| match vars.get(full) {
                Some(var) => wide(&var.as_detached_tensor()),
                None => bail!("lora: there is no {full}"),
            };
            let [a, b] = kind.vars(&name);
            let (a, b) = (part(&a)?, part(&b)?);
            let change = match kind {
                AdapterKind::Linear => product(&b, &a)?,
                AdapterKind::Embedding => product(&a, &b.t()?)?,
            };
            let scale = self.params.scale_of(&name);
            changes.insert(name, (change * scale)?);
        }
        Ok(changes)
    }

    /// Adds the adapters to the weights `NAME.weight` of `base`, and sets every `B`, of an embedding `A`, to zero: the model with adapters does what it did, and so does
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
        let vars = lock(&self.varmap)?;
        for (name, kind) in self.adapted() {
            let [a, b] = kind.vars(&name);
            if let Some(var) = vars.get(if kind == AdapterKind::Linear { &b } else { &a }) {
                var.set(&var.zeros_like()?)?;
            }
        }
        Ok(())
    }

    /// The checkpoint with the adapters added to its weights, for a base that is in no VarMap. With `fan_in_fan_out` its linear weights
    /// are `[in, out]`.
    ///
    /// # Errors
    /// If it lacks a weight, or has one of another shape.
    pub fn merged(&self, base: &Checkpoint) -> Result<Checkpoint> {
        let mut merged = base.clone();
        let kinds = self.adapted();
        for (name, change) in self.changes()? {
            let Some(weight) = merged.tensors.get_mut(&format!("{name}.weight")) else {
                bail!("lora: the base has no {name}.weight")
            };
            let turned = self.params.fan_in_fan_out && kinds.get(&name) == Some(&AdapterKind::Linear);
            *weight = added(&name, weight, &if turned { change.t()? } else { change })?;
        }
        Ok(merged)
    }

    fn built(&self) -> MutexGuard<'_, BTreeMap<String, AdapterKind>> {
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
