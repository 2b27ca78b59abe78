//! AdamW.

use super::update::{At, State, Update, decay, in_range};
use crate::ops::adam::{AdamStep, Stepped};
use crate::optim::ParamsAdamW;
use candle_core::{DType, Result, Tensor};

impl Update for ParamsAdamW {
    const NAME: &'static str = "adamw";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, beta1, beta2, eps, weight_decay } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("beta1", beta1)?;
        decay("beta2", beta2)?;
        in_range("eps", eps, eps > 0.0, "above 0")?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")
    }

    fn adam(&self) -> Option<ParamsAdamW> {
        Some(self.clone())
    }

    fn state(&self, value: &Tensor) -> Result<State> {
        Ok(vec![("average0", value.zeros_like()?), ("average1", value.zeros_like()?)])
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let &Self { beta1, beta2, eps, .. } = self;
        let bias = |beta: f64| 1.0 - beta.powf(at.step as f64);
        if value.dtype() == DType::F32 && value.device().is_cpu() {
            let kept = 1.0 - at.lr * at.weight_decay;
            let step = AdamStep { beta1, beta2, eps, lr: at.lr, kept, bias: [bias(beta1), bias(beta2)] };
            let Stepped { value, mean, square, finite: _ } =
                step.one_pass([value, grad, &state[0], &state[1]])?;
            return Ok((value, vec![mean, square]));
        }
        let m = ((&state[0] * beta1)? + (grad * (1.0 - beta1))?)?;
        let v = ((&state[1] * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let mean = (&m / bias(beta1))?;
        let scale = ((&v / bias(beta2))?.sqrt()? + eps)?;
        let kept = (value * (1.0 - at.lr * at.weight_decay))?;
        Ok(((kept - ((mean / scale)? * at.lr)?)?, vec![m, v]))
    }
}
