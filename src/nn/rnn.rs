//! candle_nn's recurrent layers out of tapped linear layers: inputs and states are seen by curvature as two layers.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder, ops::sigmoid};

pub use candle_nn::rnn::{Direction, GRUConfig, GRUState, LSTMConfig, LSTMState, RNN};

use super::Linear;

/// The two products of a recurrent layer and what its zero state needs.
#[derive(Clone, Debug)]
struct Gates {
    of_input: Linear,
    of_state: Linear,
    hidden: usize,
    device: Device,
    dtype: DType,
}

impl Gates {
    /// From the variables `weight_ih_{suffix}`, `weight_hh_{suffix}` and, where they have an initialization, `bias_ih_{suffix}` and
    /// `bias_hh_{suffix}`.
    fn new(
        (gates, inputs, hidden): (usize, usize, usize),
        suffix: &str,
        weights: [Init; 2],
        biases: [Option<Init>; 2],
        vb: &VarBuilder,
    ) -> Result<Self> {
        let out = gates * hidden;
        let layer = |kind: &str, columns: usize, weight: Init, bias: Option<Init>| -> Result<Linear> {
            let weight = vb.get_with_hints((out, columns), &format!("weight_{kind}_{suffix}"), weight)?;
            let bias = bias.map(|init| vb.get_with_hints(out, &format!("bias_{kind}_{suffix}"), init));
            let name = [vb.prefix(), format!("{kind}_{suffix}")].into_iter().filter(|part| !part.is_empty());
            Linear::named(name.collect::<Vec<_>>().join("."), weight, bias.transpose()?)
        };
        Ok(Self {
            of_input: layer("ih", inputs, weights[0], biases[0])?,
            of_state: layer("hh", hidden, weights[1], biases[1])?,
            hidden,
            device: vb.device().clone(),
            dtype: vb.dtype(),
        })
    }

    fn zeros(&self, batch: usize) -> Result<Tensor> {
        Tensor::zeros((batch, self.hidden), self.dtype, &self.device)
    }

    /// The products with the input and with the state, `[batch, gates * hidden]` each.
    fn products(&self, input: &Tensor, state: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.of_input.forward(input)?, self.of_state.forward(state)?))
    }
}

/// A long short-term memory (Hochreiter & Schmidhuber 1997), with gates in the order input, forget, cell, output.
#[derive(Clone, Debug)]
#[allow(clippy::upper_case_acronyms)]
pub struct LSTM {
    gates: Gates,
    config: LSTMConfig,
}

impl LSTM {
    /// From the variables `weight_ih_l{n}`, `weight_hh_l{n}` and, unless the configuration has none, `bias_ih_l{n}` and `bias_hh_l{n}` of `vb`, with
    /// `_reverse` after them for the backward direction.
    ///
    /// # Errors
    /// When the builder has no such variable, or one of another shape.
    pub fn new(in_dim: usize, hidden_dim: usize, config: LSTMConfig, vb: VarBuilder) -> Result<Self> {
        let direction = match config.direction {
            Direction::Forward => "",
            Direction::Backward => "_reverse",
        };
        let suffix = format!("l{}{direction}", config.layer_idx);
        let (weights, biases) = ([config.w_ih_init, config.w_hh_init], [config.b_ih_init, config.b_hh_init]);
        Ok(Self { gates: Gates::new((4, in_dim, hidden_dim), &suffix, weights, biases, &vb)?, config })
    }

    /// Initializations, the layer's number and its direction.
    pub fn config(&self) -> &LSTMConfig {
        &self.config
    }
}

/// [`LSTM::new`].
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn lstm(in_dim: usize, hidden_dim: usize, config: LSTMConfig, vb: VarBuilder) -> Result<LSTM> {
    LSTM::new(in_dim, hidden_dim, config, vb)
}

impl RNN for LSTM {
    type State = LSTMState;

    fn zero_state(&self, batch_dim: usize) -> Result<LSTMState> {
        let zeros = self.gates.zeros(batch_dim)?;
        Ok(LSTMState::new(zeros.clone(), zeros))
    }

    fn step(&self, input: &Tensor, state: &LSTMState) -> Result<LSTMState> {
        let (of_input, of_state) = self.gates.products(input, state.h())?;
        let parts = (of_input + of_state)?.chunk(4, 1)?;
        let kept = (sigmoid(&parts[1])? * state.c())?;
        let c = (kept + (sigmoid(&parts[0])? * parts[2].tanh()?)?)?;
        let h = (sigmoid(&parts[3])? * c.tanh()?)?;
        Ok(LSTMState::new(h, c))
    }

    fn states_to_tensor(&self, states: &[LSTMState]) -> Result<Tensor> {
        let states: Vec<&Tensor> = states.iter().map(LSTMState::h).collect();
        Tensor::stack(&states, 1)
    }
}

/// A gated recurrent unit (Cho et al. 2014), with gates in the order reset, update, new.
#[derive(Clone, Debug)]
#[allow(clippy::upper_case_acronyms)]
pub struct GRU {
    gates: Gates,
    config: GRUConfig,
}

impl GRU {
    /// From the variables `weight_ih_l0`, `weight_hh_l0` and, unless the configuration has none, `bias_ih_l0` and `bias_hh_l0` of `vb`.
    ///
    /// # Errors
    /// When the builder has no such variable, or one of another shape.
    pub fn new(in_dim: usize, hidden_dim: usize, config: GRUConfig, vb: VarBuilder) -> Result<Self> {
        let (weights, biases) = ([config.w_ih_init, config.w_hh_init], [config.b_ih_init, config.b_hh_init]);
        Ok(Self { gates: Gates::new((3, in_dim, hidden_dim), "l0", weights, biases, &vb)?, config })
    }

    /// Initializations.
    pub fn config(&self) -> &GRUConfig {
        &self.config
    }
}

/// [`GRU::new`].
///
/// # Errors
/// When the builder has no such variable, or one of another shape.
pub fn gru(in_dim: usize, hidden_dim: usize, config: GRUConfig, vb: VarBuilder) -> Result<GRU> {
    GRU::new(in_dim, hidden_dim, config, vb)
}

impl RNN for GRU {
    type State = GRUState;

    fn zero_state(&self, batch_dim: usize) -> Result<GRUState> {
        Ok(GRUState { h: self.gates.zeros(batch_dim)? })
    }

    fn step(&self, input: &Tensor, state: &GRUState) -> Result<GRUState> {
        let (of_input, of_state) = self.gates.products(input, &state.h)?;
        let (of_input, of_state) = (of_input.chunk(3, 1)?, of_state.chunk(3, 1)?);
        let reset = sigmoid(&(&of_input[0] + &of_state[0])?)?;
        let update = sigmoid(&(&of_input[1] + &of_state[1])?)?;
        let new = (&of_input[2] + (reset * &of_state[2])?)?.tanh()?;
        // update h + (1 - update) new
        Ok(GRUState { h: (&new + (update * (&state.h - &new)?)?)? })
    }

    /// The states of all steps side by side, `[batch, steps * hidden]`, as candle_nn has it.
    fn states_to_tensor(&self, states: &[GRUState]) -> Result<Tensor> {
        let states: Vec<&Tensor> = states.iter().map(GRUState::h).collect();
        Tensor::cat(&states, 1)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use candle_nn::VarMap;

    use super::*;
    use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};
    use crate::tape::Tape;

    /// A sequence whose graph is deeper than a thread's stack: its gradient against the recursion by hand, its records, and its end.
    #[test]
    fn a_long_sequence() -> Result<()> {
        const STEPS: usize = 10_000;
        let (map, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
        let lstm = tape.build(|| lstm(1, 1, LSTMConfig::default(), vb))?;
        for var in map.all_vars() {
            var.set(&Tensor::zeros(var.dims(), DType::F64, &Device::Cpu)?)?;
        }
        let set = |name: &str, gates: [f64; 4]| -> Result<()> {
            let data = map.data().lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))?;
            let var = data.get(name).cloned();
            var.map_or(Ok(()), |var: Var| var.set(&Tensor::new(&gates, &Device::Cpu)?.reshape(var.shape())?))
        };
        // Input and output gates are sigmoid(0) = 1/2, the forget gate f = sigmoid(5): c' = f c + tanh(x) / 2, h = tanh(c) / 2.
        set("bias_ih_l0", [0., 5., 0., 0.])?;
        set("weight_ih_l0", [0., 0., 1., 0.])?;
        crate::stack::deep(|| {
            let x = Var::from_tensor(&Tensor::full(0.01f64, (1, STEPS, 1), &Device::Cpu)?)?;
            let states = lstm.seq(&x)?;
            let Some(last) = states.last() else { candle_core::bail!("no states") };
            let grads = last.c().sum_all()?.backward()?;
            let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
            let forget = 1. / (1. + (-5f64).exp());
            for ago in [0, 1, 100, 2000] {
                let slope = forget.powi(ago) * (1. - 0.01f64.tanh().powi(2)) / 2.;
                assert!((grad[STEPS - 1 - ago as usize] - slope).abs() < 1e-14, "{ago}");
            }
            Ok::<_, candle_core::Error>(())
        })?;
        // The crate's own passes need no help; the graph's end does.
        let x = Tensor::full(0.01f64, (1, STEPS, 1), &Device::Cpu)?;
        let states = lstm.seq(&x)?;
        let outputs = states.last().map(|state| state.h().clone());
        let Some(outputs) = outputs else { candle_core::bail!("no states") };
        let kept = tape.reduce(&outputs, &outputs.ones_like()?, crate::tape::Keep::default())?;
        assert_eq!(kept.0.len(), 2 * STEPS);
        crate::stack::deep(|| drop((outputs, states, kept)));
        Ok(())
    }

    #[test]
    fn candles_values_tapped_with_gradients() -> Result<()> {
        let (map, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
        let reversed =
            LSTMConfig { direction: Direction::Backward, layer_idx: 1, ..LSTMConfig::default_no_bias() };
        let (lstm, bare, gru) = tape.build(|| {
            Ok((
                lstm(2, 3, LSTMConfig::default(), vb.pp("a"))?,
                lstm(2, 3, reversed, vb.clone())?,
                gru(2, 3, GRUConfig::default(), vb.pp("b"))?,
            ))
        })?;
        for (stream, var) in map.all_vars().iter().enumerate() {
            var.set(&random(stream as u64, var.dims())?)?;
        }
        let names: Vec<String> = tape.layers().iter().map(|layer| layer.name.clone()).collect();
        assert_eq!(names, ["a.ih_l0", "a.hh_l0", "ih_l1_reverse", "hh_l1_reverse", "b.ih_l0", "b.hh_l0"]);
        let x = random_var(20, &[2, 4, 2])?;
        fn run<R: RNN>(rnn: &R, x: &Tensor) -> Result<Tensor> {
            rnn.states_to_tensor(&rnn.seq(x)?)
        }
        let candles = [
            run(&candle_nn::lstm(2, 3, LSTMConfig::default(), vb.pp("a"))?, &x)?,
            run(&candle_nn::lstm(2, 3, reversed, vb.clone())?, &x)?,
            run(&candle_nn::gru(2, 3, GRUConfig::default(), vb.pp("b"))?, &x)?,
        ];
        let ours = [run(&lstm, &x)?, run(&bare, &x)?, run(&gru, &x)?];
        let mut loss = x.sum_all()?;
        for (ours, candles) in ours.iter().zip(&candles) {
            assert_eq!(ours.dims(), candles.dims());
            assert_close(ours, &values(candles)?, 1e-14);
            loss = (loss + ours.sqr()?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        assert_eq!(map.all_vars().len(), 10);
        assert!(map.all_vars().iter().all(|var| grads.get(var).is_some()));
        check_gradients(std::slice::from_ref(&x), |a| run(&lstm, &a[0]));
        check_gradients(std::slice::from_ref(&x), |a| run(&gru, &a[0]));
        Ok(())
    }
}
