//! What can be said to be wrong with options before there is a model.

use super::{FallbackRate, Orthogonal, Params};
use crate::curvature::{DampingKind, Inverse, Sharing};
use crate::optim::state::param::Param;
use crate::optim::wake::{Carry, Model};
use crate::tape::Fisher;
use candle_core::{Result, bail};

impl Params {
    /// Everything that can be said to be wrong without a model.
    pub(crate) fn check(&self) -> Result<()> {
        let optimizer = self.wake.name();
        let fraction = |name: &str, value: f64| {
            if (0.0..1.0).contains(&value) {
                Ok(())
            } else {
                bail!("{optimizer}: expected {name} in [0, 1), got {value}")
            }
        };
        let non_negative = |name: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                bail!("{optimizer}: expected {name} to be zero or more, got {value}")
            }
        };
        self.damping.check()?;
        self.factor_limit.check()?;
        self.budget.check(optimizer)?;
        non_negative("lr", self.lr)?;
        fraction("stat_decay", self.stat_decay)?;
        fraction("momentum", self.momentum)?;
        non_negative("weight_decay", self.weight_decay)?;
        non_negative("eigenvalue_floor", self.eigenvalue_floor)?;
        for (name, clip) in [("kl_clip", self.kl_clip), ("rms_clip", self.rms_clip)] {
            if let Some(clip) = clip
                && !(clip.is_finite() && clip > 0.0)
            {
                bail!("{optimizer}: expected {name} to be positive, got {clip}")
            }
        }
        self.step_rule.check(optimizer)?;
        if let Some(orthogonal) = self.orthogonal {
            orthogonal.check(optimizer)?;
        }
        if self.orthogonal_side == 0 {
            bail!("{optimizer}: expected orthogonal_side to be at least 1, got 0")
        }
        if let FallbackRate::OfStep(share) = self.fallback_rate {
            non_negative("fallback_rate", share)?;
        }
        if let (Some(target), Some(clip)) = (self.step_rule.target(), self.kl_clip) {
            bail!("{optimizer}: a step of KL {target} has no use for kl_clip, got {clip}; set it to None")
        }
        if self.every.factors == 0 || self.every.inverses == 0 {
            bail!("{optimizer}: expected periods of at least one step, got {:?}", self.every)
        }
        let holds_this_step = match self.wake.model() {
            Model::Linear => false,
            Model::Quadratic(_) => true,
        };
        if self.overlap > 0 && holds_this_step {
            bail!(
                "{optimizer}: the inverses of a quadratic wake hold the factors of their own step and cannot be late; expected \
                 overlap 0, got {}",
                self.overlap
            )
        }
        if let Fisher::Sampled { draws: 0, .. } = self.fisher {
            bail!("{optimizer}: expected at least one draw of the sampled Fisher, got 0")
        }
        let eigenvalue = self.damping.kind() == DampingKind::Eigenvalue;
        if eigenvalue && self.inverse != Inverse::Eigen {
            bail!(
                "{optimizer}: eigenvalue damping needs Inverse::Eigen, got Inverse::{:?}; it works with Damping::Pi",
                self.inverse
            )
        }
        if self.eigenvalue_floor > 0.0 && !eigenvalue {
            bail!("{optimizer}: eigenvalue_floor applies to eigenvalue damping alone, got {:?}", self.damping)
        }
        if self.ekfac && !eigenvalue {
            bail!("{optimizer}: ekfac needs eigenvalue damping, got {:?}", self.damping)
        }
        if self.ekfac && self.sharing == Sharing::Reduce {
            bail!(
                "{optimizer}: ekfac takes the true per-example gradients, so it needs Sharing::Expand, got Reduce"
            )
        }
        if self.carry == Carry::Literal && self.wake.wake_decay(self.stat_decay).is_none() {
            bail!("{optimizer}: Carry::Literal is a wake's, and {optimizer} has none")
        }
        if self.carry == Carry::Literal && self.ekfac {
            bail!("{optimizer}: Carry::Literal needs the Kronecker average itself, which ekfac replaces")
        }
        if let Some(average) = self.average {
            non_negative("average.power", average.power)?;
        }
        self.wake.check(self.damping, self.ekfac)
    }

    /// What is wrong with them for Vars where these are.
    pub(crate) fn check_devices(&self, vars: &[Param]) -> Result<()> {
        match (self.orthogonal, vars.iter().find(|param| !param.var.device().is_cpu())) {
            (Some(Orthogonal::Rational { .. }), Some(param)) => bail!(
                "{}: {} is on {:?}, where orthogonal directions are Orthogonal::Polynomials or ByDevice; expected Vars on the CPU for Rational",
                self.wake.name(),
                param.name,
                param.var.device().location()
            ),
            _ => Ok(()),
        }
    }
}
