//! Adapters in files, as Hugging Face's PEFT has them: `adapter_model.safetensors` with `adapter_config.json` beside it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Tensor, bail};

use super::config::{self, CONFIG, Config};
use super::{AdapterKind, Lora, ParamsLora, lock};
use crate::checkpoint::Checkpoint;

/// Before the name of every tensor in a file.
const PREFIX: &str = "base_model.model.";
/// The name of the file in its folder.
const TENSORS: &str = "adapter_model.safetensors";
/// The configuration in a file's own metadata, so that it is never read at the wrong strength on its own.
const METADATA: &str = "adapter_config";

impl ParamsLora {
    /// The options of the adapters in a folder or file of [`Lora::save`] or of PEFT: their ranks, alphas and layers, to build with and then
    /// [`Lora::load`] them.
    ///
    /// A dropout of the file is one of PEFT's training, and no option here.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use kronwake::nn::{self, Lora, ParamsLora, VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let folder = std::env::temp_dir().join(format!("kronwake-adapters-{}", std::process::id()));
    /// # std::fs::create_dir_all(&folder)?;
    /// let build = |lora: &Lora| {
    ///     let vars = VarMap::new();
    ///     lora.build(|| nn::linear(4, 3, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("fc1")))
    /// };
    /// let lora = Lora::new(ParamsLora { rank: 2, alpha: 4.0, ..Default::default() })?;
    /// build(&lora)?;
    /// lora.save(&folder)?; // adapter_model.safetensors and adapter_config.json
    ///
    /// let again = Lora::new(ParamsLora::read(&folder)?)?;
    /// build(&again)?;
    /// again.load(&folder)?;
    /// # assert_eq!(ParamsLora::read(&folder)?.alpha, 4.0);
    /// # std::fs::remove_dir_all(&folder)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the file cannot be read or is of no adapters; when nothing says how strong they are, neither an `adapter_config.json` beside
    /// it nor its metadata; and when that says what is not supported, such as DoRA, a bias or modules to save.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = File::read(path.as_ref())?;
        let config = file.config()?;
        for (name, &(_, rank)) in &file.layers {
            let expected = config.rank_of(name)?;
            if rank != expected {
                bail!("{}: the adapters of {name} have rank {rank}, expected {expected}", file.shown)
            }
        }
        let layers: Vec<_> = file.layers.iter().map(|(name, &(kind, _))| (name.clone(), kind)).collect();
        config::params(config, &layers)
    }
}

impl Lora {
    /// Writes the adapters alone, under the names that PEFT gives them. In an existing folder they become `adapter_model.safetensors`; beside a
    /// file of this name `adapter_config.json` is written, and PEFT reads the two. A file of another name has the configuration in its
    /// metadata alone.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = in_folder(path.as_ref());
        let config = config::written(self);
        let mut tensors = BTreeMap::new();
        {
            let vars = lock(&self.varmap)?;
            for (name, kind) in self.adapted() {
                let names = kind.vars(&name);
                for (at, full) in names.iter().enumerate() {
                    let Some(var) = vars.get(full) else { bail!("lora: there is no {full}") };
                    let tensor = var.as_detached_tensor();
                    // PEFT has the columns of an embedding's A side by side.
                    let turned = kind == AdapterKind::Embedding && at == 0;
                    let tensor = if turned { tensor.t()?.contiguous()? } else { tensor };
                    tensors.insert(format!("{PREFIX}{full}"), tensor);
                }
            }
        }
        let metadata = HashMap::from([
            ("format".to_string(), "pt".to_string()),
            ("r".to_string(), self.params.rank.to_string()),
            ("lora_alpha".to_string(), self.params.alpha.to_string()),
            (METADATA.to_string(), config.clone()),
        ]);
        Checkpoint { tensors, metadata, ..Default::default() }.write(&path)?;
        if path.file_name().is_some_and(|name| name == TENSORS) {
            write_text(&path.with_file_name(CONFIG), &config)?;
        }
        Ok(())
    }

    /// Sets the adapters to those of a folder or file of [`Lora::save`] or of PEFT.
    ///
    /// # Errors
    /// When the file cannot be read; when its adapters are of other layers or another rank; when nothing says how strong they are, when they
    /// are of another strength than these (`lora_alpha`, and `use_rslora`), or of a kind that is not supported. Nothing has changed then.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let file = File::read(path.as_ref())?;
        // A file without adapters has no strength either: that it lacks them says more.
        if !file.layers.is_empty() {
            let config = file.config()?;
            for (name, kind) in self.adapted() {
                if file.layers.get(&name).is_none_or(|&(of, _)| of != kind) {
                    continue;
                }
                let (found, expected) = (config.scale_of(&name)?, self.params.scale_of(&name));
                let same = config.alpha_of(&name)? == self.params.alpha_of(&name)
                    && config.rslora == self.params.rslora;
                // With the same alpha the ranks differ, as the shapes will tell.
                if !same && (found - expected).abs() > 1e-12 * expected.abs() {
                    let kind = |rslora: bool| if rslora { " with use_rslora" } else { "" };
                    bail!(
                        "{}: lora_alpha is {}{}, expected {}{}, for layer {name}: these adapters would be {} times as strong as they \
                         are in the file; ParamsLora::read takes the file's options",
                        file.shown,
                        config.alpha_of(&name)?,
                        kind(config.rslora),
                        self.params.alpha_of(&name),
                        kind(self.params.rslora),
                        expected / found
                    )
                }
            }
        }
        let adapters = Checkpoint { tensors: file.tensors, ..Default::default() };
        match adapters.load_into(&self.varmap) {
            Err(error) => bail!("{}: {error}", file.shown),
            done => done,
        }
    }
}

/// The tensors of a file under the names of the Vars, and what says how strong they are.
struct File {
    shown: String,
    tensors: BTreeMap<String, Tensor>,
    config: Option<Config>,
    /// Kind and rank.
    layers: BTreeMap<String, (AdapterKind, usize)>,
}

impl File {
    fn read(path: &Path) -> Result<Self> {
        let path = in_folder(path);
        let shown = path.display().to_string();
        let Checkpoint { tensors: all, metadata, .. } = Checkpoint::read(&path, &Device::Cpu)?;
        let beside = path.with_file_name(CONFIG);
        // PEFT reads what is beside a file of this name, and so what somebody changed there.
        let of_folder = path.file_name().is_some_and(|name| name == TENSORS) && beside.exists();
        let own = metadata.get(METADATA).filter(|_| !of_folder);
        let config = match (own, beside.exists(), metadata.get("lora_alpha")) {
            (Some(text), ..) => Some(Config::parse(&shown, text)?),
            (None, true, _) => match std::fs::read_to_string(&beside) {
                Ok(text) => Some(Config::parse(&beside.display().to_string(), &text)?),
                Err(error) => bail!("{}: cannot be read: {error}", beside.display()),
            },
            (None, false, Some(alpha)) => {
                let rank = metadata.get("r").and_then(|rank| rank.parse().ok());
                match (rank, alpha.parse()) {
                    (Some(rank), Ok(alpha)) => Some(Config::plain(rank, alpha)),
                    _ => bail!(
                        "{shown}: r and lora_alpha of the metadata are {rank:?} and {alpha:?}, expected numbers"
                    ),
                }
            }
            (None, false, None) => None,
        };
        let mut file = Self { shown, tensors: BTreeMap::new(), config, layers: BTreeMap::new() };
        let mut of_bases = vec![];
        for (name, tensor) in all {
            let name = name.strip_prefix(PREFIX).unwrap_or(&name).to_string();
            match name.strip_suffix(".base_layer.weight") {
                Some(layer) => of_bases.push((layer.to_string(), name.clone(), tensor)),
                None => file.take(name, tensor)?,
            }
        }
        for (layer, name, tensor) in of_bases {
            // PEFT adds the base's own table to the adapters of an embedding.
            if !matches!(file.layers.get(&layer), Some((AdapterKind::Embedding, _))) {
                file.tensors.insert(name, tensor);
            }
        }
        let targets = |name: &&String| file.config.as_ref().is_none_or(|config| config.targets(name));
        if let Some(name) = file.layers.keys().find(|name| !targets(name)) {
            bail!(
                "{}: has adapters of layer {name}, which are none of target_modules in its {CONFIG}",
                file.shown
            )
        }
        Ok(file)
    }

    fn take(&mut self, name: String, tensor: Tensor) -> Result<()> {
        for kind in [AdapterKind::Linear, AdapterKind::Embedding] {
            let [of_a, of_b] = kind.vars("");
            let is_a = name.ends_with(&of_a);
            let Some(layer) = name.strip_suffix(if is_a { &of_a } else { &of_b }) else { continue };
            let Ok((rows, columns)) = tensor.dims2() else {
                bail!(
                    "{}: {name} has shape {:?}, expected a matrix; adapters of linear layers and embeddings are supported",
                    self.shown,
                    tensor.dims()
                )
            };
            let layer = layer.to_string();
            self.layers.insert(layer, (kind, if is_a { rows } else { columns }));
            let turned = kind == AdapterKind::Embedding && is_a;
            self.tensors.insert(name, if turned { tensor.t()?.contiguous()? } else { tensor });
            return Ok(());
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    fn config(&self) -> Result<&Config> {
        match &self.config {
            _ if self.layers.is_empty() => {
                bail!("{}: has no adapters, no tensor named .. .lora_A.weight", self.shown)
            }
            Some(config) => Ok(config),
            None => bail!(
                "{}: nothing says how strong these adapters are; put the {CONFIG} that belongs to them beside it",
                self.shown
            ),
        }
    }
}

/// The file of a folder, or the file itself.
fn in_folder(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(TENSORS) } else { path.to_path_buf() }
}

/// First beside the path, then renamed over it.
fn write_text(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension(format!("json.{}.part", std::process::id()));
    let written = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, path));
    if let Err(error) = written {
        // The message about the failure matters more than one about the leftover.
        let _ = std::fs::remove_file(&part);
        bail!("{}: cannot be written: {error}", path.display())
    }
    Ok(())
}
