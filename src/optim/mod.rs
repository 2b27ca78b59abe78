//! The optimizers: one step loop, five wake rules.

mod average;
mod block;
mod build;
mod device;
mod direction;
mod groups;
mod kfac;
mod launches;
mod length;
mod natural;
mod observe;
mod params;
mod q;
mod qe;
mod rest;
mod rule;
mod schedule;
mod so;
mod state;
mod step;
mod summary;
mod two_rate;

pub use average::Average;
pub use candle_nn::{Optimizer, ParamsAdamW};
pub use groups::{Group, Groups, Rule};
pub use kfac::{KFac, KFacRule, ParamsKFac};
pub use length::{AdaptiveKl, StepRule};
pub use natural::Natural;
pub use params::{Bias, Decay, Every, NonFinite, Params};
pub use q::{ParamsQKldWrm, Q, QKldWrm};
pub use qe::{Inner, ParamsQeKldWrm, Qe, QeKldWrm};
pub use rule::{Carry, Defaults, Model, QSolve, WakeRule};
pub use schedule::Schedule;
pub use so::{ParamsSoKldWrm, So, SoKldWrm};
pub use summary::{Summary, SummaryBlock, SummaryRow};
pub use two_rate::{KldWrm, ParamsKldWrm, TwoRate};
