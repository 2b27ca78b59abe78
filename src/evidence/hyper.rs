//! Hyperparameters as Vars in log space: prior precisions, the temperature, the noise.

use super::fit::Evidence;
use super::log_det::Precision;
use super::problem::{Parameter, Problem};
use crate::nn::VarMap;
use crate::tape::Likelihood;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use std::sync::Arc;

/// Which weights have a prior precision in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Structure {
    /// All of them.
    Scalar,
    /// Those of a layer, its bias included.
    PerLayer,
    /// Those of a tensor: a weight or a bias. The default.
    #[default]
    PerTensor,
    /// None: every weight has its own.
    Diagonal,
}

/// The hyperparameters of a [`Problem`]: a Gaussian prior of mean 0 or of the problem's means, the temperature of the likelihood, and the noise of a Gaussian one.
///
/// They are Vars of f64 on the CPU that hold logarithms, in a VarMap of their own: `log_precision` (`log_precision.NAME`, in the
/// tensor's shape, for [`Structure::Diagonal`]), `log_temperature`, `log_noise`. Any optimizer may climb
/// [`Evidence::value`](super::Evidence) by them; give it [`Hyper::vars`].
#[derive(Clone)]
pub struct Hyper {
    structure: Structure,
    parameters: Arc<Vec<Parameter>>,
    vars: VarMap,
    /// One, or one a tensor for a diagonal prior.
    log_precision: Vec<Var>,
    /// The entry of `log_precision[0]` that is a tensor's, for the other structures.
    group: Vec<usize>,
    groups: Vec<String>,
    temperature: Scalar,
    noise: Scalar,
    has_noise: bool,
}

/// A number that is fixed or tuned.
#[derive(Debug, Clone)]
enum Scalar {
    Fixed(f64),
    Tuned(Var),
}

impl Scalar {
    fn value(&self) -> Result<f64> {
        match self {
            Scalar::Fixed(value) => Ok(*value),
            Scalar::Tuned(log) => Ok(log.to_scalar::<f64>()?.exp()),
        }
    }
}

impl std::fmt::Debug for Hyper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hyper")
            .field("structure", &self.structure)
            .field("temperature", &self.temperature)
            .field("noise", &self.noise)
            .finish_non_exhaustive()
    }
}

fn check(name: &str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        bail!("evidence: a {name} of {value}, expected a finite number above 0")
    }
}

impl Hyper {
    /// All precisions equal `precision`, temperature and noise fixed at 1.
    ///
    /// # Errors
    /// When the precision is not a finite number above 0.
    pub fn new(problem: &Problem<'_>, structure: Structure, precision: f64) -> Result<Self> {
        let log = check("prior precision", precision)?.ln();
        let parameters = problem.shared_parameters();
        let vars = VarMap::new();
        let (mut log_precision, mut group, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        match structure {
            Structure::Diagonal => {
                for p in parameters.iter() {
                    let var = Var::from_tensor(&Tensor::full(log, p.tensor.shape(), &Device::Cpu)?)?;
                    insert(&vars, &format!("log_precision.{}", p.name), &var)?;
                    log_precision.push(var);
                    groups.push(p.name.clone());
                }
            }
            _ => {
                for (index, p) in parameters.iter().enumerate() {
                    let (name, first) = match structure {
                        Structure::Scalar => ("all", 0),
                        // The tensors of a layer follow each other.
                        Structure::PerLayer => (
                            p.layer.as_str(),
                            parameters.iter().position(|other| other.of_layer == p.of_layer).unwrap_or(index),
                        ),
                        _ => (p.name.as_str(), index),
                    };
                    if first == index {
                        group.push(groups.len());
                        groups.push(name.to_string());
                    } else {
                        group.push(group.get(first).copied().unwrap_or(0));
                    }
                }
                let var = Var::from_tensor(&Tensor::full(log, groups.len(), &Device::Cpu)?)?;
                insert(&vars, "log_precision", &var)?;
                log_precision.push(var);
            }
        }
        let has_noise = problem.likelihood == Likelihood::Gaussian;
        let (temperature, noise) = (Scalar::Fixed(1.0), Scalar::Fixed(1.0));
        Ok(Self { structure, parameters, vars, log_precision, group, groups, temperature, noise, has_noise })
    }

    /// Fixes the temperature `T`: the likelihood enters to the power `1/T`.
    ///
    /// # Errors
    /// When it is not a finite number above 0.
    pub fn with_temperature(mut self, temperature: f64) -> Result<Self> {
        self.temperature = Scalar::Fixed(check("temperature", temperature)?);
        Ok(self)
    }

    /// Makes the temperature a Var, `log_temperature`, that starts at `temperature`.
    ///
    /// The derivative of the evidence by its logarithm is `effective parameters / 2 - log likelihood`, and zero only where the log-likelihood
    /// is above zero, as that of densities can be. Probabilities of classes never are: to the power `1/T` they are not normalized, and the evidence
    /// rises with the temperature without end. For them fix it, [`Hyper::with_temperature`].
    ///
    /// # Errors
    /// When it is not a finite number above 0.
    pub fn tune_temperature(mut self, temperature: f64) -> Result<Self> {
        let var = Var::new(check("temperature", temperature)?.ln(), &Device::Cpu)?;
        insert(&self.vars, "log_temperature", &var)?;
        self.temperature = Scalar::Tuned(var);
        Ok(self)
    }

    /// Fixes the standard deviation of a Gaussian likelihood's noise.
    ///
    /// # Errors
    /// When it is not a finite number above 0, or the likelihood has no noise.
    pub fn with_noise(mut self, noise: f64) -> Result<Self> {
        self.needs_noise()?;
        self.noise = Scalar::Fixed(check("noise", noise)?);
        Ok(self)
    }

    /// Makes the noise a Var, `log_noise`, that starts at `noise`.
    ///
    /// # Errors
    /// As [`Hyper::with_noise`].
    pub fn tune_noise(mut self, noise: f64) -> Result<Self> {
        self.needs_noise()?;
        let var = Var::new(check("noise", noise)?.ln(), &Device::Cpu)?;
        insert(&self.vars, "log_noise", &var)?;
        self.noise = Scalar::Tuned(var);
        Ok(self)
    }

    fn needs_noise(&self) -> Result<()> {
        if self.has_noise { Ok(()) } else { bail!("evidence: only a Gaussian likelihood has noise") }
    }

    /// Sets the precisions: one for all, or one a name of [`Hyper::groups`].
    ///
    /// # Errors
    /// When there are another number of them, or one is not a finite number above 0; then none is set.
    pub fn set_precisions(&self, precisions: &[f64]) -> Result<()> {
        let logs =
            precisions.iter().map(|&p| Ok(check("prior precision", p)?.ln())).collect::<Result<Vec<_>>>()?;
        let all = match *logs.as_slice() {
            [one] => vec![one; self.groups.len()],
            _ if logs.len() == self.groups.len() => logs,
            _ => bail!(
                "evidence: {} prior precisions, expected 1 or {}: {}",
                logs.len(),
                self.groups.len(),
                self.groups.join(", ")
            ),
        };
        match (self.structure, self.log_precision.as_slice()) {
            (Structure::Diagonal, vars) => {
                for (var, log) in vars.iter().zip(all) {
                    var.set(&Tensor::full(log, var.shape(), &Device::Cpu)?)?;
                }
            }
            (_, [var]) => var.set(&Tensor::new(all, &Device::Cpu)?)?,
            _ => {}
        }
        Ok(())
    }

    /// Sets a diagonal prior's precisions, one tensor a parameter in its shape.
    ///
    /// # Errors
    /// When the prior is not diagonal, or the tensors do not fit; then none is set.
    pub fn set_each(&self, precisions: &[Tensor]) -> Result<()> {
        if self.structure != Structure::Diagonal || precisions.len() != self.log_precision.len() {
            bail!(
                "evidence: {} tensors of precisions, expected {} for a diagonal prior and none for others",
                precisions.len(),
                self.log_precision.len()
            )
        }
        let mut logs = Vec::new();
        for ((new, var), p) in precisions.iter().zip(&self.log_precision).zip(self.parameters.iter()) {
            if new.dims() != var.dims() {
                bail!(
                    "evidence: precisions of {} have shape {:?}, expected {:?}",
                    p.name,
                    new.dims(),
                    var.dims()
                )
            }
            let new = new.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            for value in new.flatten_all()?.to_vec1::<f64>()? {
                check("prior precision", value)?;
            }
            logs.push(new.log()?);
        }
        for (var, log) in self.log_precision.iter().zip(logs) {
            var.set(&log)?;
        }
        Ok(())
    }

    /// What has a precision of its own, in the order of `log_precision`'s entries.
    pub fn groups(&self) -> &[String] {
        &self.groups
    }

    /// Which weights share a precision.
    pub fn structure(&self) -> Structure {
        self.structure
    }

    /// The Vars to optimize.
    pub fn vars(&self) -> Vec<Var> {
        let mut vars = self.log_precision.clone();
        for scalar in [&self.temperature, &self.noise] {
            if let Scalar::Tuned(var) = scalar {
                vars.push(var.clone());
            }
        }
        vars
    }

    /// The Vars of [`Hyper::vars`], in their order, with their names.
    pub(crate) fn named_vars(&self) -> Vec<(String, Var)> {
        let diagonal = self.structure == Structure::Diagonal;
        let name =
            |group: &String| if diagonal { format!("log_precision.{group}") } else { "log_precision".into() };
        let mut named: Vec<(String, Var)> =
            self.groups.iter().map(name).zip(self.log_precision.iter().cloned()).collect();
        for (name, scalar) in [("log_temperature", &self.temperature), ("log_noise", &self.noise)] {
            if let Scalar::Tuned(var) = scalar {
                named.push((name.into(), var.clone()));
            }
        }
        named
    }

    /// What is not tuned, and what the precisions are of.
    pub(crate) fn fixed(&self) -> Vec<(String, String)> {
        let of = |scalar: &Scalar| match scalar {
            Scalar::Fixed(value) => value.to_string(),
            Scalar::Tuned(_) => "tuned".into(),
        };
        let tensors: Vec<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
        let means: Vec<&str> =
            self.parameters.iter().filter(|p| p.mean.is_some()).map(|p| p.name.as_str()).collect();
        let mut fixed = [
            ("structure", format!("{:?}", self.structure)),
            ("of", tensors.join(", ")),
            ("groups", self.groups.join(", ")),
            ("temperature", of(&self.temperature)),
            ("noise", of(&self.noise)),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .to_vec();
        if !means.is_empty() {
            fixed.push(("means".into(), means.join(", ")));
        }
        fixed
    }

    /// The Vars by name, to save and load.
    pub fn varmap(&self) -> &VarMap {
        &self.vars
    }

    /// The temperature.
    ///
    /// # Errors
    /// When its Var cannot be read.
    pub fn temperature(&self) -> Result<f64> {
        check("temperature", self.temperature.value()?)
    }

    /// The noise, 1 without any.
    ///
    /// # Errors
    /// When its Var cannot be read.
    pub fn noise(&self) -> Result<f64> {
        check("noise", self.noise.value()?)
    }

    /// `1 / (noise^2 temperature)`.
    pub(crate) fn scale(&self) -> Result<f64> {
        let noise = self.noise()?;
        Ok(1.0 / (noise * noise * self.temperature()?))
    }

    /// The precision of every parameter tensor; of a diagonal prior their geometric means.
    ///
    /// # Errors
    /// When the Vars cannot be read, or are not logarithms of finite numbers above 0.
    pub fn tensor_precisions(&self) -> Result<Vec<f64>> {
        let of_each = |var: &Var| {
            let mean = var.mean_all()?.to_scalar::<f64>()?.exp();
            check("prior precision", mean)
        };
        match (self.structure, self.log_precision.as_slice()) {
            (Structure::Diagonal, vars) => vars.iter().map(of_each).collect(),
            (_, vars) => {
                let logs = match vars.first() {
                    Some(var) => var.to_vec1::<f64>()?,
                    None => vec![],
                };
                let of = |&group: &usize| {
                    check("prior precision", logs.get(group).copied().unwrap_or(f64::NAN).exp())
                };
                self.group.iter().map(of).collect()
            }
        }
    }

    pub(crate) fn precisions(&self) -> Result<Vec<Precision>> {
        if self.structure != Structure::Diagonal {
            return Ok(self.tensor_precisions()?.into_iter().map(Precision::Uniform).collect());
        }
        let of = |var: &Var| {
            let each = var.as_tensor().detach().exp()?;
            for value in each.flatten_all()?.to_vec1::<f64>()? {
                check("prior precision", value)?;
            }
            Ok(Precision::Each(each))
        };
        self.log_precision.iter().map(of).collect()
    }

    /// The precision of each group a part `rate` of the way, on the logarithm, to its fixed point, effective parameters over the sum of squares.
    /// With `pooled`, `a`, above 0 that of the evidence times a hyperprior of each precision, the gamma distribution of shape `a/2` and mean `d`,
    /// the fixed point of one precision for all: `(effective + a) / (squares + a / d)`.
    pub(crate) fn fixed_point(&self, evidence: &Evidence, rate: f64, pooled: f64) -> Result<Vec<f64>> {
        let precisions = self.tensor_precisions()?;
        let mut sums = vec![(0.0, 0.0); self.groups.len()];
        for (index, &group) in self.group.iter().enumerate() {
            let effective = evidence.effective[index];
            // The derivative by the logarithm is half of the effective number less precision times squares.
            let squares = (effective - 2.0 * evidence.grad_log_precision[index]) / precisions[index];
            sums[group].0 += effective;
            sums[group].1 += squares;
        }
        let logs = match self.log_precision.first() {
            Some(var) => var.to_vec1::<f64>()?,
            None => vec![],
        };
        let all = sums.iter().fold((0.0, 0.0), |all, of| (all.0 + of.0, all.1 + of.1));
        let believed = if pooled > 0.0 { pooled * all.1 / all.0 } else { 0.0 };
        let moved = |(log, (effective, squares)): (f64, (f64, f64))| {
            let way = ((effective + pooled) / (squares + believed)).ln() - log;
            // Without squares, or effective parameters, there is none.
            if way.is_finite() { (log + (rate * way).clamp(-2.0, 2.0)).exp() } else { log.exp() }
        };
        Ok(logs.into_iter().zip(sums).map(moved).collect())
    }

    pub(crate) fn has_noise(&self) -> bool {
        self.has_noise
    }

    pub(crate) fn parameters(&self) -> &Arc<Vec<Parameter>> {
        &self.parameters
    }

    /// `value` as a function of the Vars with the given derivatives: by the log-precision of each tensor, by `log_temperature` and
    /// by `log_noise`.
    pub(crate) fn tracked(
        &self,
        value: f64,
        by_precision: &[Tensor],
        by_temperature: f64,
        by_noise: f64,
    ) -> Result<Tensor> {
        let mut tracked = Tensor::new(value, &Device::Cpu)?;
        let mut follow = |var: &Var, slope: &Tensor| -> Result<()> {
            let moved = (var.as_tensor() - var.as_tensor().detach())?;
            tracked = (&tracked + (moved * slope)?.sum_all()?)?;
            Ok(())
        };
        match (self.structure, self.log_precision.as_slice()) {
            (Structure::Diagonal, vars) => {
                for (var, slope) in vars.iter().zip(by_precision) {
                    follow(var, slope)?;
                }
            }
            (_, vars) => {
                let mut slopes = vec![0.0; self.groups.len()];
                for (&group, slope) in self.group.iter().zip(by_precision) {
                    if let Some(sum) = slopes.get_mut(group) {
                        *sum += slope.to_scalar::<f64>()?;
                    }
                }
                if let Some(var) = vars.first() {
                    follow(var, &Tensor::new(slopes, &Device::Cpu)?)?;
                }
            }
        }
        for (scalar, slope) in [(&self.temperature, by_temperature), (&self.noise, by_noise)] {
            if let Scalar::Tuned(var) = scalar {
                follow(var, &Tensor::new(slope, &Device::Cpu)?)?;
            }
        }
        Ok(tracked)
    }
}

fn insert(vars: &VarMap, name: &str, var: &Var) -> Result<()> {
    match vars.data().lock() {
        Ok(mut data) => {
            data.insert(name.to_string(), var.clone());
            Ok(())
        }
        Err(_) => bail!("evidence: the VarMap's lock is poisoned"),
    }
}
