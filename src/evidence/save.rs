//! A posterior as a file.

use super::eigenbasis::{Eigenbases, Eigenbasis};
use super::file::{Reading, Writing};
use super::log_det::Precision;
use super::posterior::{Covariance, Posterior};
use super::predictive::Noise;
use super::problem::{Parameter, Problem};
use crate::tape::Kind;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::path::Path;

/// The metadata entry.
const KEY: &str = "kronwake posterior";
/// What a posterior and the rows of its predictions may take by default, as [`Estimator::new`](super::Estimator::new) has it.
const MEMORY: usize = 4 << 30;

/// Numbers as a line has them.
fn listed(numbers: &[f64]) -> String {
    numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")
}

fn dtype_of(problem: &Problem<'_>) -> DType {
    match problem.parameters().first().map(|p| p.tensor.dtype()) {
        Some(DType::F64) => DType::F64,
        _ => DType::F32,
    }
}

impl Posterior {
    /// Writes the posterior as safetensors, in f64, by the parameters' names: `NAME/precision` of each and, by structure, `covariance`, or
    /// `NAME/inputs`, `NAME/grads` (eigenvectors) and `NAME/values`, or `NAME/variance`. What it is of stands in the metadata. The parameters
    /// themselves are not in it.
    ///
    /// # Errors
    /// When `problem` is another than it was fitted to, or the file cannot be written.
    pub fn save(&self, problem: &Problem<'_>, path: impl AsRef<Path>) -> Result<()> {
        self.check(problem)?;
        let parameters = problem.parameters();
        let name = |tensor: usize| parameters.get(tensor).map_or("", |p| p.name.as_str());
        let mut file = Writing::new(KEY);
        file.line("structure", self.covariance.structure());
        file.line("likelihood", format!("{:?}", self.likelihood));
        file.line("of", self.names.join(", "));
        file.line("s", self.s);
        file.line("noise", self.noise.all);
        if let Some(each) = &self.noise.each {
            file.line("output_noise", listed(each));
        }
        for (tensor, precision) in self.precisions.iter().enumerate() {
            let precision = match precision {
                Precision::Uniform(delta) => Tensor::new(*delta, &Device::Cpu)?,
                Precision::Each(deltas) => deltas.clone(),
            };
            file.tensor(format!("{}/precision", name(tensor)), &precision)?;
        }
        match &self.covariance {
            Covariance::Full(sigma, spans) => {
                let order: Vec<&str> = spans.iter().map(|&(tensor, _)| name(tensor)).collect();
                file.line("rows", order.join(", "));
                file.tensor("covariance".into(), sigma)?;
            }
            Covariance::Kron(bases) => {
                for block in &bases.blocks {
                    let name = name(block.tensor);
                    for (slot, tensor) in [("inputs", &block.inputs), ("grads", &block.grads)] {
                        if let Some(tensor) = tensor {
                            file.tensor(format!("{name}/{slot}"), tensor)?;
                        }
                    }
                    file.tensor(format!("{name}/values"), &block.values)?;
                }
            }
            Covariance::Diagonal(variances) => {
                for (tensor, variance) in variances {
                    file.tensor(format!("{}/variance", name(*tensor)), variance)?;
                }
            }
        }
        file.write(path.as_ref())
    }

    /// [`Posterior::load_within`] 4 GiB.
    ///
    /// # Errors
    /// As [`Posterior::load_within`].
    pub fn load(problem: &Problem<'_>, path: impl AsRef<Path>) -> Result<Self> {
        Self::load_within(problem, path, MEMORY)
    }

    /// Reads what [`Posterior::save`] wrote, for a problem with parameters of the same names and shapes: it predicts bit for bit what that
    /// one did, given the same parameters. `memory`: the most bytes that the file, and later the rows of a prediction, may take. What a file
    /// holds is known by its length before any of it is read.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kronwake::evidence::{Examples, HessianStructure, Hyper, Posterior, Problem, Structure};
    /// # use kronwake::nn::{self, VarBuilder, VarMap};
    /// # use kronwake::tape::{Likelihood, Tape};
    /// # let (vars, tape) = (VarMap::new(), Tape::new());
    /// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// # let model = tape.build(|| nn::linear(2, 3, vb.pp("fc")))?;
    /// # let problem = Problem::new(&tape, &vars, &model, Likelihood::Categorical)?;
    /// # let x = Tensor::randn(0f32, 1., (6, 2), &Device::Cpu)?;
    /// # let examples = Examples::new(x.clone(), Tensor::new(&[0u32, 1, 2, 0, 1, 2], &Device::Cpu)?)?;
    /// # let hyper = Hyper::new(&problem, Structure::PerTensor, 1.0)?;
    /// # let file = std::env::temp_dir().join(format!("kronwake-doc-posterior-{}", std::process::id()));
    /// let posterior = Posterior::fit(&problem, &examples, HessianStructure::Kron, &hyper, 1 << 30)?;
    /// posterior.save(&problem, &file)?;
    /// let loaded = Posterior::load_within(&problem, &file, 1 << 30)?;
    /// # let bits = |p: &Posterior| p.predict(&problem, &x)?.covariance.flatten_all()?.to_vec1::<f64>();
    /// # assert_eq!(bits(&posterior)?, bits(&loaded)?);
    /// # std::fs::remove_file(&file)?;
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be read, is larger than `memory` (the message says by how much), or does not fit the problem: one message lists
    /// every difference.
    pub fn load_within(problem: &Problem<'_>, path: impl AsRef<Path>, memory: usize) -> Result<Self> {
        let path = path.as_ref();
        // A file that is not there is a matter of reading it.
        let bytes = std::fs::metadata(path).map_or(0, |of| of.len());
        if bytes > memory as u64 {
            bail!(
                "{}: a posterior of {bytes} bytes, and {memory} are allowed: give Posterior::load_within more, or fit one with Kronecker \
                 factors or a diagonal",
                path.display()
            )
        }
        let mut file = Reading::open(path, KEY)?;
        let parameters = problem.parameters();
        let names: Vec<String> = parameters.iter().map(|p| p.name.clone()).collect();
        file.expect("likelihood", format!("{:?}", problem.likelihood));
        file.expect("of", names.join(", "));
        match problem.output_noise() {
            Some(each) => file.expect("output_noise", listed(each)),
            None => file.expect_none("output_noise"),
        }
        let structure = file.text("structure").unwrap_or_default();
        let (s, noise): (Option<f64>, Option<f64>) = (file.number("s"), file.number("noise"));
        for (name, value) in [("s", s), ("noise", noise)] {
            if value.is_some_and(|v| !(v.is_finite() && v > 0.0)) {
                file.note(format!("{name} is {value:?}, expected a finite number above 0"));
            }
        }
        let mut precisions = Vec::new();
        for p in parameters {
            precisions.extend(precision(&mut file, p)?);
        }
        let covariance = match structure.as_str() {
            "Full" => full(&mut file, parameters),
            "Kron" | "Rotated" => Some(Covariance::Kron(Eigenbases {
                blocks: kron(&mut file, problem),
                dtype: dtype_of(problem),
                rotated: structure == "Rotated",
            })),
            "Diagonal" => {
                let mut variances = Vec::new();
                for (tensor, p) in parameters.iter().enumerate() {
                    let name = format!("{}/variance", p.name);
                    variances.extend(file.tensor(&name, &[p.tensor.elem_count()]).map(|v| (tensor, v)));
                }
                Some(Covariance::Diagonal(variances))
            }
            other => {
                file.note(format!("structure is {other:?}, expected Full, Kron, Rotated or Diagonal"));
                None
            }
        };
        file.finish()?;
        let (Some(covariance), Some(s), Some(noise)) = (covariance, s, noise) else {
            bail!("{}: not a whole posterior", path.display())
        };
        let device = match parameters.first() {
            Some(p) => p.tensor.device().clone(),
            None => Device::Cpu,
        };
        let covariance = covariance.to_device(&device)?;
        let noise = Noise { all: noise, each: problem.output_noise().map(<[f64]>::to_vec) };
        Ok(Self { covariance, s, precisions, likelihood: problem.likelihood, noise, names, memory })
    }
}

/// One for the tensor, or one a weight.
fn precision(file: &mut Reading, p: &Parameter) -> Result<Option<Precision>> {
    let name = format!("{}/precision", p.name);
    let each = file.rank(&name).is_some_and(|rank| rank > 0 || p.tensor.rank() == 0);
    let Some(found) = file.tensor(&name, if each { p.tensor.dims() } else { &[] }) else { return Ok(None) };
    if found.flatten_all()?.to_vec1::<f64>()?.iter().any(|v| *v <= 0.0) {
        file.note(format!("{name} is not above 0"));
        return Ok(None);
    }
    Ok(Some(if each { Precision::Each(found) } else { Precision::Uniform(found.to_scalar()?) }))
}

fn full(file: &mut Reading, parameters: &[Parameter]) -> Option<Covariance> {
    let rows = file.text("rows")?;
    let mut spans = Vec::new();
    for name in rows.split(", ") {
        match parameters.iter().position(|p| p.name == name) {
            Some(tensor) => spans.push((tensor, parameters[tensor].tensor.elem_count())),
            None => file.note(format!("rows of {name:?}, of which there is no parameter")),
        }
    }
    let size = spans.iter().map(|&(_, size)| size).sum();
    Some(Covariance::Full(file.tensor("covariance", &[size, size])?, spans))
}

fn kron(file: &mut Reading, problem: &Problem<'_>) -> Vec<Eigenbasis> {
    let mut blocks = Vec::new();
    for (tensor, p) in problem.parameters().iter().enumerate() {
        let Some(layer) = problem.tape.layers().into_iter().find(|layer| layer.index == p.of_layer) else {
            continue;
        };
        let is_weight = layer.weight.id() == p.tensor.id();
        let out = layer.out_features();
        let (inputs, grads) = match (layer.kind, is_weight) {
            (Kind::Linear, true) => {
                let (groups, columns) = (layer.groups, layer.in_features());
                let rows = out / groups.max(1);
                (Some([groups, columns, columns]), Some([groups, rows, rows]))
            }
            (Kind::Linear, false) | (Kind::Embedding, true) => (None, Some([1, out, out])),
            _ => (None, None),
        };
        let mut read = |slot: &str, dims: Option<[usize; 3]>| {
            dims.and_then(|dims| file.tensor(&format!("{}/{slot}", p.name), &dims))
        };
        let (inputs, grads) = (read("inputs", inputs), read("grads", grads));
        let values = file.tensor(&format!("{}/values", p.name), &[p.tensor.elem_count()]);
        blocks.extend(values.map(|values| Eigenbasis { tensor, inputs, grads, values }));
    }
    blocks
}

impl Covariance {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let to = |t: &Tensor| t.to_device(device);
        Ok(match self {
            Covariance::Full(sigma, spans) => Covariance::Full(to(sigma)?, spans.clone()),
            Covariance::Diagonal(variances) => {
                let each = variances.iter().map(|(tensor, v)| Ok((*tensor, to(v)?)));
                Covariance::Diagonal(each.collect::<Result<_>>()?)
            }
            Covariance::Kron(bases) => {
                let of = |block: &Eigenbasis| {
                    Ok(Eigenbasis {
                        tensor: block.tensor,
                        inputs: block.inputs.as_ref().map(to).transpose()?,
                        grads: block.grads.as_ref().map(to).transpose()?,
                        values: to(&block.values)?,
                    })
                };
                let blocks = bases.blocks.iter().map(of).collect::<Result<_>>()?;
                Covariance::Kron(Eigenbases { blocks, ..*bases })
            }
        })
    }
}
