//! What has to be the same on all processes that share an optimizer, by name.

use super::params::Params;
use super::state::Core;
use candle_core::{Tensor, Var};

/// A name and a value, as a message shows them.
pub(super) type Lines = Vec<(String, String)>;

/// Programs of other versions do not add up the same numbers.
pub(super) fn version() -> (String, String) {
    ("kronwake".into(), env!("CARGO_PKG_VERSION").into())
}

/// A Var as it is trained. All processes have it on a device of the same kind: they meet more often where it is a GPU.
pub(super) fn of_var(name: &str, var: &Var, trained: &str) -> (String, String) {
    let place = if var.device().is_cpu() { "" } else { " on a GPU" };
    (format!("Var {name}"), format!("{:?} of {:?}{place}, {trained}", var.dims(), var.dtype()))
}

macro_rules! options {
    ($params:expr, $($name:ident),*) => {{
        // An option that is forgotten here does not compile.
        let Params { tape: _, $($name),* } = $params;
        vec![$((stringify!($name).to_string(), format!("{:?}", $name))),*]
    }};
}

fn of_params(params: &Params) -> Lines {
    options!(
        params,
        wake,
        lr,
        step_rule,
        damping,
        inverse,
        ekfac,
        eigenvalue_floor,
        stat_decay,
        every,
        early_refresh,
        overlap,
        fisher,
        sharing,
        bias,
        factor_limit,
        budget,
        memory_limit,
        momentum,
        weight_decay,
        decay,
        kl_clip,
        rms_clip,
        non_finite,
        groups,
        orthogonal,
        orthogonal_side,
        fallback_adam,
        fallback_rate,
        carry,
        average,
        products
    )
}

impl Core {
    /// Its options, Vars and blocks, and how many steps it has taken.
    pub fn identity(&self) -> Lines {
        let mut lines = vec![version(), ("optimizer".into(), self.name().into())];
        for param in &self.vars {
            let trained = if param.optional { "optional" } else { "trained" };
            lines.push(of_var(&param.name, &param.var, trained));
        }
        lines.extend(self.frozen.iter().map(|(name, var)| of_var(name, var, "frozen")));
        for block in &self.blocks {
            lines.push((
                format!("block {}", block.name),
                format!(
                    "{:?} of layer {:?}, factors {:?} and {:?}",
                    block.shape(),
                    block.layer,
                    block.rows,
                    block.columns
                ),
            ));
        }
        lines.extend(of_params(&self.params));
        lines.push(("a number of steps of".into(), self.steps.to_string()));
        lines.push(("a present damping of".into(), self.damping.to_string()));
        lines
    }

    /// A hash of the state of each block and param.
    pub fn state_hashes(&self) -> candle_core::Result<Lines> {
        let mut lines = vec![];
        let mut add = |name: &str, what: &str, tensors: &[&Tensor]| -> candle_core::Result<()> {
            let hash = hash(tensors.iter().copied())?;
            lines.push((format!("for {name} {what} of hash"), format!("{hash:016x}")));
            Ok(())
        };
        for block in &self.blocks {
            let tensors: Vec<&Tensor> = block.state.slots().into_iter().map(|(_, tensor)| tensor).collect();
            add(&block.name, "a state", &tensors)?;
        }
        for adam in &self.adam {
            let tensors: Vec<&Tensor> = adam.moments.iter().flat_map(|(m, v)| [m, v]).collect();
            add(&self.vars[adam.param].name, "averages", &tensors)?;
        }
        for (param, average) in self.vars.iter().zip(&self.averages) {
            add(&param.name, "an average", &[average])?;
        }
        Ok(lines)
    }
}

/// A hash of the bits of tensors.
pub(super) fn hash<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> candle_core::Result<u64> {
    use crate::ops::element::Host;
    use candle_core::{DType, Device};
    // Four lanes, or each multiplication would wait for the last.
    let mut lanes =
        [0x9E37_79B9_7F4A_7C15u64, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB, 0x2545_F491_4F6C_DD1D];
    let mut mix = |lane: usize, word: u64| {
        lanes[lane] = (lanes[lane] ^ word).wrapping_mul(0x9FB2_1C65_1E98_DF25).rotate_left(29);
    };
    for tensor in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?;
        let tensor = match tensor.dtype() {
            DType::F64 | DType::F32 => tensor,
            _ => tensor.to_dtype(DType::F32)?,
        };
        let host = Host::of(&tensor);
        match tensor.dtype() {
            DType::F64 => {
                for four in host.values::<f64>()?.chunks(4) {
                    four.iter().enumerate().for_each(|(lane, value)| mix(lane, value.to_bits()));
                }
            }
            _ => {
                for four in host.values::<f32>()?.chunks(4) {
                    four.iter().enumerate().for_each(|(lane, value)| mix(lane, value.to_bits().into()));
                }
            }
        }
        mix(0, tensor.elem_count() as u64);
    }
    Ok(lanes
        .into_iter()
        .fold(0, |hash: u64, lane| (hash ^ lane).wrapping_mul(0x9FB2_1C65_1E98_DF25).rotate_left(31)))
}
