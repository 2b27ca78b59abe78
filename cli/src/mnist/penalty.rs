//! `--penalty` and `--factor`: a penalty of the layers' weights, beside any optimizer.

use crate::optimizer::Optimizer;
use candle_core::{DType, Result, Shape, Tensor, bail};
use kronwake::nn::{VarMap, init};
use kronwake::penalty::{
    Constraints, Factor, Family, GroupLasso, Grouping, Init, Lp, Penalty, Rule, SparseGroupLasso, Spatial,
};
use std::fmt::Write;
use std::sync::Arc;

/// The groups: what leaves an input unit, or a convolution's input channel, so that the unit can go.
const GROUPS: Grouping = Grouping::InputChannels;

/// What `--penalty` takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spec {
    L2,
    L1,
    Group,
    /// The L1 part.
    SparseGroup(f64),
    /// The spatial part.
    Spatial(f64),
}

impl std::str::FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let part = |digits: &str| match digits.parse::<f64>() {
            Ok(part) if (0.0..=1.0).contains(&part) => Ok(part),
            _ => Err(format!("expected a number from 0 to 1 after the colon, got {digits:?}")),
        };
        match text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest))) {
            ("l2", None) => Ok(Self::L2),
            ("l1", None) => Ok(Self::L1),
            ("group", None) => Ok(Self::Group),
            ("sparse-group", Some(alpha)) => part(alpha).map(Self::SparseGroup),
            ("spatial", kappa) => kappa.map_or(Ok(0.5), part).map(Self::Spatial),
            _ => Err("expected l2, l1, group, sparse-group:ALPHA or spatial[:KAPPA]".into()),
        }
    }
}

impl Spec {
    fn penalty(self) -> Result<Arc<dyn Penalty>> {
        Ok(match self {
            Self::L2 => Arc::new(Lp::l2()),
            Self::L1 => Arc::new(Lp::l1()),
            Self::Group => Arc::new(GroupLasso { grouping: GROUPS, size_weighted: true }),
            Self::SparseGroup(alpha) => Arc::new(SparseGroupLasso::new(alpha, GROUPS, true)?),
            Self::Spatial(kappa) => Arc::new(Spatial::new(kappa, SPATIAL_GAMMA)?),
        })
    }

    /// Whether there is a proximal step that makes exact zeros.
    pub fn proximal(self) -> bool {
        matches!(self, Self::L1 | Self::Group | Self::SparseGroup(_))
    }

    /// What the prediction of factors is to know, where there is one.
    pub fn family(self, shape: &Shape) -> Option<Family> {
        match self {
            Self::L2 => Some(Family::L2),
            Self::L1 => Some(Family::L1),
            Self::Group => {
                let groups = GROUPS.count(shape.dims()).unwrap_or(0).max(1);
                Some(Family::GroupLasso { size: shape.elem_count() / groups, size_weighted: true })
            }
            Self::SparseGroup(_) | Self::Spatial(_) => None,
        }
    }
}

/// `gamma` of the spatial penalty.
const SPATIAL_GAMMA: f64 = 6.0;

/// What the penalty does in a training.
pub struct Penalized {
    constraints: Constraints,
    /// What was chosen, in words and figures.
    pub text: String,
}

impl Penalized {
    /// The penalty of all of `vars` but biases, for a loss that is a mean over `examples`.
    pub fn new(spec: Spec, factor: Factor, vars: &VarMap, examples: usize) -> Result<Self> {
        let layers: Vec<_> =
            init::named(vars)?.into_iter().filter(|(name, _)| name.ends_with(".weight")).collect();
        let shapes: Vec<_> = layers.iter().map(|(name, var)| (name.as_str(), var.shape())).collect();
        let family = |_: &str, shape: &Shape| spec.family(shape).unwrap_or(Family::L2);
        let factors = factor.of_layers(&shapes, family, Init::LeCun, examples)?;
        let penalty = spec.penalty()?;
        let how = if spec.proximal() { "proximal steps" } else { "a term of the loss" };
        let mut text = format!("penalty: {}, by {how}, factor {factor}", penalty.name());
        if let Factor::Auto { .. } = factor {
            for ((name, shape), factor) in shapes.iter().zip(&factors) {
                let variance = Init::LeCun.variance(shape)?;
                write!(text, "\n  {name:14} {factor:.4e}, of a prior with variance {variance:.3e}")
                    .map_err(candle_core::Error::wrap)?;
            }
        }
        let mut rules = vec![("*", Rule::Free)];
        match spec {
            // One penalty of all layers together.
            Spec::Spatial(kappa) => {
                let penalty = Spatial::new(kappa, SPATIAL_GAMMA)?;
                let factor = factors.first().copied().unwrap_or(0.0);
                rules.push(("*.weight", Rule::SpatialTotal { penalty, factor }));
            }
            _ => rules.extend(shapes.iter().zip(factors).map(|((name, _), factor)| {
                let penalty = penalty.clone();
                let rule = if spec.proximal() {
                    Rule::Proximal { penalty, factor }
                } else {
                    Rule::Penalize { penalty, factor }
                };
                (*name, rule)
            })),
        }
        Ok(Self { constraints: Constraints::new(vars, &rules)?, text })
    }

    /// The loss with the penalty's term.
    pub fn add_to(&self, loss: &Tensor) -> Result<Tensor> {
        loss + self.constraints.loss()?.to_dtype(loss.dtype())?
    }

    /// The proximal step after the optimizer's.
    pub fn after_step(&mut self, optimizer: &mut Optimizer) -> Result<()> {
        optimizer.constrain(&mut self.constraints)
    }
}

/// How many of the weights, biases left out, are zero, and how many there are.
pub fn zeros(vars: &VarMap) -> Result<(usize, usize)> {
    let (mut zeros, mut all) = (0, 0);
    for (name, var) in init::named(vars)? {
        if name.ends_with(".weight") {
            let zero = var.eq(&var.zeros_like()?)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
            zeros += zero as usize;
            all += var.elem_count();
        }
    }
    if all == 0 {
        bail!("there are no weights to penalize")
    }
    Ok((zeros, all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn specs() {
        for (text, spec) in [
            ("l2", Spec::L2),
            ("l1", Spec::L1),
            ("group", Spec::Group),
            ("sparse-group:0.25", Spec::SparseGroup(0.25)),
            ("spatial", Spec::Spatial(0.5)),
            ("spatial:0", Spec::Spatial(0.0)),
        ] {
            assert_eq!(text.parse(), Ok(spec));
        }
        for (text, message) in [
            ("l3", "expected l2, l1, group, sparse-group:ALPHA or spatial[:KAPPA]"),
            ("l1:2", "expected l2, l1, group, sparse-group:ALPHA or spatial[:KAPPA]"),
            ("sparse-group", "expected l2, l1, group, sparse-group:ALPHA or spatial[:KAPPA]"),
            ("sparse-group:2", "expected a number from 0 to 1 after the colon, got \"2\""),
            ("spatial:nan", "expected a number from 0 to 1 after the colon, got \"nan\""),
        ] {
            assert_eq!(text.parse::<Spec>(), Err(message.into()), "{text}");
        }
    }

    #[test]
    fn terms_and_predicted_factors() -> Result<()> {
        let vars = VarMap::new();
        let values = [[3f64, 0.0], [-4.0, 1.0]];
        for (name, values) in [("fc1.weight", values), ("fc2.weight", values)] {
            vars.data().lock().unwrap().insert(name.into(), Var::new(&values, &Device::Cpu)?);
        }
        vars.data().lock().unwrap().insert("fc1.bias".into(), Var::new(&[5f64, 5.0], &Device::Cpu)?);
        let loss = Tensor::new(1f64, &Device::Cpu)?;
        let added = |spec, factor| -> Result<f64> {
            let found = Penalized::new(spec, factor, &vars, 10)?.add_to(&loss)?.to_scalar::<f64>()?;
            Ok(found - 1.0)
        };
        assert!((added(Spec::L2, Factor::Value(0.5))? - 26.0).abs() < 1e-12);
        // 1 / 2v = fan_in / 2 = 1, over ten examples.
        assert!((added(Spec::L2, Factor::Auto { temperature: 1.0 })? - 5.2).abs() < 1e-12);
        assert_eq!(added(Spec::L1, Factor::Value(0.5))?, 0.0);
        // Two equal layers are ln 2 above one.
        let one = Spatial::new(0.25, 6.0)?.value(&Tensor::new(&values, &Device::Cpu)?)?.to_scalar::<f64>()?;
        assert!((added(Spec::Spatial(0.25), Factor::Value(2.0))? - 2.0 * (one + 2f64.ln())).abs() < 1e-12);
        let auto = Penalized::new(Spec::Group, Factor::Auto { temperature: 1.0 }, &vars, 10)?.text;
        // Columns of two weights: sqrt(3 / (2 v)) = sqrt 3, over ten examples.
        assert!(auto.contains("fc2.weight     1.7321e-1, of a prior with variance 5.000e-1"), "{auto}");
        assert_eq!(zeros(&vars)?, (2, 8));
        Ok(())
    }
}
