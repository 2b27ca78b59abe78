//! PEFT's `adapter_config.json`, which says how strong the adapters of a file are.

use candle_core::{Result, bail};
use serde_json::{Map, Value, json};

use super::{AdapterKind, Lora, ParamsLora};

/// The file's name.
pub(super) const CONFIG: &str = "adapter_config.json";

/// What a file says of the adapters beside it.
#[derive(Debug)]
pub(super) struct Config {
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
    pub fan_in_fan_out: bool,
    ranks: Vec<(Key, usize)>,
    alphas: Vec<(Key, f64)>,
    /// Endings of names; none where the file gives a regular expression or a word for many, and its tensors are what they are of.
    targets: Option<Vec<String>>,
    exclude: Vec<String>,
}

/// What changes nothing of the adapters' values, or is read.
const KNOWN: [&str; 26] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    // Of training alone.
    "lora_dropout",
    "inference_mode",
    "eva_config",
    "runtime_config",
    // Which layers have adapters: the tensors say that.
    "layers_to_transform",
    "layers_pattern",
    // Of the base and of who wrote the file.
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "base_model_class",
    "parent_library",
    "revision",
    // Settings of what is refused when it is switched on.
    "qalora_group_size",
    "megatron_core",
];

impl Config {
    /// `shown` is what errors call it.
    pub(super) fn parse(shown: &str, text: &str) -> Result<Self> {
        let all: Map<String, Value> = match serde_json::from_str(text) {
            Ok(all) => all,
            Err(error) => bail!("{shown}: not an adapter_config.json: {error}"),
        };
        for (key, value) in &all {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(values) => values.is_empty(),
                Value::Object(values) => values.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            };
            if !off && !KNOWN.contains(&key.as_str()) {
                bail!(
                    "{shown}: {key} is {value}, which is not supported; expected adapters of LoRA without it"
                )
            }
        }
        let get = |key: &str| all.get(key).filter(|value| !value.is_null());
        let wrong = |key: &str, value: &Value, expected: &str| -> Result<()> {
            bail!("{shown}: {key} is {value}, expected {expected}")
        };
        for (key, expected) in [("peft_type", "LORA"), ("bias", "none")] {
            if let Some(value) = get(key).filter(|value| value.as_str() != Some(expected)) {
                wrong(key, value, &format!("{expected:?}: others are not supported"))?;
            }
        }
        // Others, such as "pissa", change the base.
        if let Some(value) = get("init_lora_weights")
            && !value.is_boolean()
            && !["gaussian", "eva", "orthogonal"].contains(&value.as_str().unwrap_or_default())
        {
            wrong("init_lora_weights", value, "one that leaves the base as it is: others are not supported")?;
        }
        let flag = |key: &str| match get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => bail!("{shown}: {key} is {value}, expected true or false"),
        };
        let (Some(rank), Some(alpha)) =
            (get("r").and_then(as_rank), get("lora_alpha").and_then(Value::as_f64))
        else {
            bail!("{shown}: expected a rank r of 1 or more and a lora_alpha")
        };
        let names = |key: &str| -> Result<Option<Vec<String>>> {
            match get(key) {
                Some(Value::Array(values)) => {
                    let names = values.iter().map(|name| name.as_str().map(str::to_string));
                    match names.collect() {
                        Some(names) => Ok(Some(names)),
                        None => bail!("{shown}: {key} is not a list of names"),
                    }
                }
                None | Some(Value::String(_)) => Ok(None),
                Some(value) => bail!("{shown}: {key} is {value}, expected a list of names"),
            }
        };
        Ok(Self {
            rank,
            alpha,
            rslora: flag("use_rslora")?,
            fan_in_fan_out: flag("fan_in_fan_out")?,
            ranks: patterns(shown, "rank_pattern", get("rank_pattern"), as_rank)?,
            alphas: patterns(shown, "alpha_pattern", get("alpha_pattern"), Value::as_f64)?,
            targets: names("target_modules")?,
            exclude: names("exclude_modules")?.unwrap_or_default(),
        })
    }

    /// Of a file of this crate that is older than its configurations.
    pub(super) fn plain(rank: usize, alpha: f64) -> Self {
        let (ranks, alphas) = (vec![], vec![]);
        Self {
            rank,
            alpha,
            rslora: false,
            fan_in_fan_out: false,
            ranks,
            alphas,
            targets: None,
            exclude: vec![],
        }
    }

    /// The rank of a layer.
    pub(super) fn rank_of(&self, name: &str) -> Result<usize> {
        Ok(of_only(&self.ranks, name)?.unwrap_or(self.rank))
    }

    /// The alpha of a layer.
    pub(super) fn alpha_of(&self, name: &str) -> Result<f64> {
        Ok(of_only(&self.alphas, name)?.unwrap_or(self.alpha))
    }

    /// What the product of a layer's adapters is multiplied by.
    pub(super) fn scale_of(&self, name: &str) -> Result<f64> {
        let rank = self.rank_of(name)? as f64;
        Ok(self.alpha_of(name)? / if self.rslora { rank.sqrt() } else { rank })
    }

    /// Whether PEFT would give the layer adapters.
    pub(super) fn targets(&self, name: &str) -> bool {
        let any = |endings: &[String]| endings.iter().any(|ending| ends(name, ending));
        self.targets.as_deref().is_none_or(any) && !any(&self.exclude)
    }
}

/// A rank, which is 1 or more.
fn as_rank(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&rank| rank > 0).map(|rank| rank as usize)
}

/// Whether the name is `ending`, or ends in it after a dot.
fn ends(name: &str, ending: &str) -> bool {
    name.strip_suffix(ending).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A key of `rank_pattern` or `alpha_pattern`: a regular expression of the end of a name, of which plain ones are understood. Those consist of
/// characters, where `.` is any one and `\.` a dot; `^` before them says that they are the whole name.
#[derive(Debug)]
struct Key {
    text: String,
    whole: bool,
    /// None for any character.
    characters: Vec<Option<char>>,
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        let (whole, rest) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let mut characters = vec![];
        let mut rest = rest.chars();
        while let Some(c) = rest.next() {
            characters.push(match c {
                '.' => None,
                '\\' => Some(rest.next().filter(|c| !c.is_alphanumeric())?),
                c if c.is_alphanumeric() || "_- ".contains(c) => Some(c),
                _ => return None,
            });
        }
        Some(Self { text: text.to_string(), whole, characters })
    }

    fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        let Some(before) = name.len().checked_sub(self.characters.len()) else { return false };
        let starts = before == 0 || (!self.whole && name[before - 1] == '.');
        starts && self.characters.iter().zip(&name[before..]).all(|(c, n)| c.is_none_or(|c| c == *n))
    }
}

fn patterns<T>(
    shown: &str,
    key: &str,
    values: Option<&Value>,
    value_of: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Key, T)>> {
    let values = match values {
        None => return Ok(vec![]),
        Some(Value::Object(values)) => values,
        Some(value) => bail!("{shown}: {key} is {value}, expected numbers by name"),
    };
    let read = |(pattern, value): (&String, &Value)| match (Key::parse(pattern), value_of(value)) {
        (Some(pattern), Some(value)) => Ok((pattern, value)),
        (None, _) => bail!(
            "{shown}: {key} has {pattern:?}, a regular expression that is not supported; expected the end of a name"
        ),
        (_, None) => {
            bail!("{shown}: {key} of {pattern:?} is {value}, expected a number, a rank of 1 or more")
        }
    };
    values.iter().map(read).collect()
}

/// The value of what matches. PEFT takes the first that does, in an order that a JSON object does not have.
fn of_only<T: Copy + PartialEq>(values: &[(Key, T)], name: &str) -> Result<Option<T>> {
    let mut matching = values.iter().filter(|(key, _)| key.matches(name));
    let Some((first, value)) = matching.next() else { return Ok(None) };
    match matching.find(|(_, other)| other != value) {
        Some((other, _)) => bail!(
            "{CONFIG}: layer {name} matches {:?} and {:?} of a pattern, whose values differ; leave one of them out",
            first.text,
            other.text
        ),
        None => Ok(Some(*value)),
    }
}

/// The configuration of the adapters, as PEFT reads it.
pub(super) fn written(lora: &Lora) -> String {
    let params = &lora.params;
    let adapted = lora.layers();
    // PEFT adapts every layer whose name ends in a target.
    let too_many = lora
        .built()
        .keys()
        .any(|name| !adapted.contains(name) && adapted.iter().any(|target| ends(name, target)));
    let targets = match too_many {
        false => json!(adapted),
        true => json!(adapted.iter().map(|name| escaped(name)).collect::<Vec<_>>().join("|")),
    };
    let by_name = |value: &dyn Fn(&str) -> Option<Value>| -> Map<String, Value> {
        let values = adapted.iter().filter_map(|name| Some((format!("^{}", escaped(name)), value(name)?)));
        values.collect()
    };
    let (rank, alpha) = (params.rank, params.alpha);
    let ranks = by_name(&|name| Some(params.rank_of(name)).filter(|&of| of != rank).map(|of| json!(of)));
    let alphas = by_name(&|name| Some(params.alpha_of(name)).filter(|&of| of != alpha).map(number));
    let config = json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "use_rslora": params.rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": params.fan_in_fan_out,
        "target_modules": targets,
        "exclude_modules": null,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": null,
        "init_lora_weights": true,
    });
    format!("{config:#}\n")
}

/// As an integer where it is one, as PEFT writes it.
fn number(value: f64) -> Value {
    if value.fract() == 0. && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// A regular expression of the name alone.
fn escaped(name: &str) -> String {
    name.chars()
        .flat_map(|c| (!c.is_alphanumeric() && c != '_').then_some('\\').into_iter().chain([c]))
        .collect()
}

/// Options of adapters that have the layers' own ranks.
pub(super) fn params(config: &Config, layers: &[(String, AdapterKind)]) -> Result<ParamsLora> {
    let of = |kind| layers.iter().filter(move |&&(_, of)| of == kind).map(|(name, _)| name.clone()).collect();
    let mut params = ParamsLora {
        rank: config.rank,
        alpha: config.alpha,
        layers: of(AdapterKind::Linear),
        embeddings: of(AdapterKind::Embedding),
        rslora: config.rslora,
        fan_in_fan_out: config.fan_in_fan_out,
        ..ParamsLora::default()
    };
    for (name, _) in layers {
        let (rank, alpha) = (config.rank_of(name)?, config.alpha_of(name)?);
        if rank != config.rank {
            params.ranks.push((name.clone(), rank));
        }
        if alpha != config.alpha {
            params.alphas.push((name.clone(), alpha));
        }
    }
    Ok(params)
}

#[cfg(test)]
mod tests;
