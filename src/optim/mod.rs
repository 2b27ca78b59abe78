//! The optimizer: K-FAC and the KLD-WRM family, one type with one set of options.
//!
//! | | |
//! |---|---|
//! | [`NaturalGradient`] | the optimizer |
//! | [`Params`] | its options, with the defaults of each member of the family |
//! | [`Wake`] | the members and the mathematics in which they differ |
//! | [`AdamW`], [`Sgd`], [`Muon`], [`Soap`], [`Shampoo`] | optimizers that see gradients alone, to compare with; [`FirstOrder`] is all of them |
//! | [`Groups`], [`Schedule`], [`clip_gradients`], [`LossScale`] | what goes with any training |
//!
//! Within: `wake` and `params` are values, `state` is data that knows no step, `step` has the stages of a step, each for the host and for
//! a GPU, and `engine` is the optimizer that runs them. Each uses those that are named before it, never those after it.

mod clip;
mod cost;
mod engine;
mod first_order;
mod groups;
mod identity;
mod loss_scale;
mod numbers;
mod params;
mod placement;
mod schedule;
mod share;
mod state;
mod step;
mod summary;
mod wake;

pub use candle_nn::{Optimizer, ParamsAdamW};
pub use clip::clip_gradients;
pub use cost::Forecast;
pub use engine::{BlockDivergence, NaturalGradient, Outputs, Replay, StepDivergence};
pub use first_order::{
    AdamW, FallbackAdam, FirstOrder, Grafting, Muon, MuonScale, ParamsMuon, ParamsSgd, ParamsShampoo,
    ParamsSoap, Sgd, Shampoo, ShampooFactors, Soap, SoapBasis, Update,
};
pub use groups::{Group, Groups, UpdateRule};
pub use loss_scale::LossScale;
pub use params::{
    AdaptiveKl, Average, Bias, Budget, Decay, Every, FallbackRate, NonFinite, Orthogonal, Params, Products,
    StepRule,
};
pub use schedule::Schedule;
pub use state::Resumed;
pub use summary::{Summary, SummaryBlock, SummaryRow, Together};
pub use wake::{Carry, Inner, Model, Q, QSolve, Qe, So, TwoRate, Wake};
