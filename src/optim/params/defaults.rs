//! The default options of every member of the family.

use super::{
    AdaptiveKl, Average, Bias, Budget, Decay, Every, FallbackRate, NonFinite, Orthogonal, Params, StepRule,
};
use crate::curvature::{Damping, FactorLimit, Inverse, Relative, Sharing};
use crate::optim::groups::Groups;
use crate::optim::wake::{Carry, Q, Qe, So, TwoRate, Wake};
use crate::tape::{Fisher, Tape};
use candle_nn::ParamsAdamW;

/// The options whose defaults differ from member to member.
struct Defaults {
    lr: f64,
    step_rule: StepRule,
    damping: Damping,
    stat_decay: f64,
    kl_clip: Option<f64>,
    fisher: Fisher,
    early_refresh: bool,
    average: Option<Average>,
    orthogonal: Option<Orthogonal>,
    fallback_rate: FallbackRate,
}

/// The published form's: a learning rate, a fixed damping and a clip.
const fn published(lr: f64, damping: f64, stat_decay: f64, kl_clip: f64, fisher: Fisher) -> Defaults {
    Defaults {
        lr,
        step_rule: StepRule::LearningRate,
        damping: Damping::Eigenvalue(damping),
        stat_decay,
        kl_clip: Some(kl_clip),
        fisher,
        early_refresh: false,
        average: None,
        orthogonal: None,
        fallback_rate: FallbackRate::Own,
    }
}

const SAMPLED: Fisher = Fisher::Sampled { draws: 1, seed: 0 };

impl Defaults {
    fn of(wake: &Wake) -> Self {
        match wake {
            //                              lr     damping rho   kl_clip
            Wake::KFac => published(0.075, 0.011, 0.95, 0.0125, SAMPLED),
            Wake::So(_) => published(0.37, 0.0033, 0.5, 0.017, Fisher::Empirical),
            Wake::Q(_) => published(0.49, 0.016, 0.5, 0.067, SAMPLED),
            Wake::Qe(_) => published(0.076, 0.0013, 0.5, 0.01, Fisher::Empirical),
            Wake::KldWrm(_) => Defaults {
                lr: 1.0,
                step_rule: StepRule::AdaptiveKl(AdaptiveKl::default()),
                damping: Damping::Relative(Relative::default()),
                stat_decay: 0.5,
                kl_clip: None,
                fisher: SAMPLED,
                early_refresh: true,
                average: Some(Average::default()),
                orthogonal: Some(Orthogonal::default()),
                fallback_rate: FallbackRate::OfStep(2.0),
            },
        }
    }
}

impl Params {
    /// The defaults of a member, for a model that was built on `tape`.
    ///
    /// ```
    /// use kronwake::optim::{Params, Wake};
    /// let tape = kronwake::tape::Tape::new();
    /// for wake in Wake::members() {
    ///     println!("{}: lr {}", wake.name(), Params::of(wake, &tape).lr);
    /// }
    /// ```
    pub fn of(wake: impl Into<Wake>, tape: &Tape) -> Self {
        let wake = wake.into();
        let Defaults {
            lr,
            step_rule,
            damping,
            stat_decay,
            kl_clip,
            fisher,
            early_refresh,
            average,
            orthogonal,
            fallback_rate,
        } = Defaults::of(&wake);
        Self {
            tape: tape.clone(),
            lr,
            step_rule,
            damping,
            inverse: Inverse::Eigen,
            ekfac: false,
            eigenvalue_floor: 0.0,
            stat_decay,
            every: Every { factors: 10, inverses: 10 },
            early_refresh,
            overlap: 0,
            fisher,
            sharing: Sharing::Expand,
            bias: Bias::Folded,
            factor_limit: FactorLimit::default(),
            budget: Budget::default(),
            memory_limit: None,
            momentum: 0.0,
            weight_decay: 0.0,
            decay: Decay::AfterWake,
            kl_clip,
            rms_clip: None,
            non_finite: NonFinite::Error,
            groups: Groups::default(),
            orthogonal,
            orthogonal_side: Orthogonal::SIDE,
            fallback_rate,
            fallback_adam: ParamsAdamW { weight_decay: 0.0, ..ParamsAdamW::default() },
            carry: Carry::Gradient,
            average,
            products: None,
            wake,
        }
    }

    /// The defaults of KLD-WRM, the member to start with.
    pub fn kld_wrm(tape: &Tape) -> Self {
        Self::of(TwoRate::default(), tape)
    }

    /// The defaults of K-FAC, the baseline.
    pub fn k_fac(tape: &Tape) -> Self {
        Self::of(Wake::KFac, tape)
    }

    /// The defaults of SO-KLD-WRM.
    pub fn so_kld_wrm(tape: &Tape) -> Self {
        Self::of(So::default(), tape)
    }

    /// The defaults of Q-KLD-WRM.
    pub fn q_kld_wrm(tape: &Tape) -> Self {
        Self::of(Q::default(), tape)
    }

    /// The defaults of QE-KLD-WRM.
    pub fn qe_kld_wrm(tape: &Tape) -> Self {
        Self::of(Qe::default(), tape)
    }

    /// The same options with steps of fixed KL, at full length and without a clip; see [`StepRule::FixedKl`].
    pub fn fixed_kl(self, target: f64) -> Self {
        Self { lr: 1.0, step_rule: StepRule::FixedKl { target }, kl_clip: None, ..self }
    }

    /// The same options with steps whose KL follows the slopes along them, at full length and without a clip; see [`AdaptiveKl`].
    pub fn adaptive_kl(self, rule: AdaptiveKl) -> Self {
        Self { lr: 1.0, step_rule: StepRule::AdaptiveKl(rule), kl_clip: None, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cells of the table in the documentation of [`Params`], a row a member.
    fn documented() -> Vec<Vec<String>> {
        let rows = include_str!("mod.rs").lines().filter_map(|line| line.strip_prefix("/// | `"));
        rows.map(|row| row.split('|').map(|cell| cell.trim().replace('`', "")).collect()).collect()
    }

    #[test]
    fn the_documented_table_is_what_holds() {
        let tape = Tape::new();
        let rows = documented();
        assert_eq!(rows.len(), Wake::members().len());
        for (wake, row) in Wake::members().into_iter().zip(rows) {
            let Params {
                lr,
                step_rule,
                damping,
                stat_decay,
                kl_clip,
                fisher,
                early_refresh,
                average,
                orthogonal,
                wake,
                ..
            } = Params::of(wake, &tape);
            let step_rule = match step_rule {
                StepRule::LearningRate => "learning rate".to_string(),
                StepRule::FixedKl { target } => format!("fixed KL {target}"),
                StepRule::AdaptiveKl(_) => "adaptive KL".to_string(),
            };
            let damping = match damping {
                Damping::Eigenvalue(la) => format!("eigenvalue {la}"),
                Damping::Pi(la) => format!("pi {la}"),
                Damping::Relative(_) => "relative".to_string(),
                Damping::Adaptive(_) => "adaptive".to_string(),
            };
            let fisher = match fisher {
                Fisher::Exact => "exact".to_string(),
                Fisher::Sampled { draws, .. } => format!("sampled, draws: {draws}"),
                Fisher::Empirical => "empirical".to_string(),
            };
            let given = |yes: bool| if yes { "yes" } else { "no" }.to_string();
            let expected = [
                wake.name().to_string(),
                lr.to_string(),
                step_rule,
                damping,
                stat_decay.to_string(),
                kl_clip.map_or("none".to_string(), |clip| clip.to_string()),
                fisher,
                given(early_refresh),
                given(average.is_some()),
                given(orthogonal.is_some()),
            ];
            assert_eq!(row[..expected.len()], expected);
        }
    }

    #[test]
    fn names_choose_members() {
        for wake in Wake::members() {
            assert_eq!(wake.name().parse::<Wake>().ok(), Some(wake));
        }
        let message = "adam".parse::<Wake>().map_err(|error| error.to_string());
        assert!(
            message.is_err_and(|m| m.contains("expected one of kfac, so-kld-wrm,") && m.contains("\"adam\""))
        );
    }
}
