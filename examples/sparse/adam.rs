//! Adam in one pass over each parameter.

use candle_core::{Result, Tensor, Var, backprop::GradStore, bail};
use kronwake::nn::VarMap;

use super::weights::named;

/// Adam (beta 0.9 and 0.999, epsilon 1e-8) for f32 parameters on the host.
pub struct Adam {
    step: i32,
    params: Vec<Param>,
}

struct Param {
    var: Var,
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// Zero for what is next to it. Penalties drive weights that see no input there, and numbers below the normal range are many times slower.
fn flush(value: f32, least: f32) -> f32 {
    if value.abs() < least { 0.0 } else { value }
}

impl Adam {
    pub fn new(vars: &VarMap) -> Result<Self> {
        let param = |(_, var): (String, Var)| {
            let zeros = vec![0f32; var.elem_count()];
            Param { var, mean: zeros.clone(), square: zeros }
        };
        Ok(Self { step: 0, params: named(vars)?.into_iter().map(param).collect() })
    }

    pub fn update(&mut self, grads: &GradStore, lr: f64) -> Result<()> {
        self.step += 1;
        let bias = |beta: f64| 1.0 / (1.0 - beta.powi(self.step));
        let (rate, scale) = ((lr * bias(0.9)) as f32, bias(0.999) as f32);
        for Param { var, mean, square } in &mut self.params {
            let Some(grad) = grads.get(var) else { bail!("a parameter {:?} got no gradient", var.dims()) };
            let mut grad = grad.flatten_all()?.to_vec1::<f32>()?;
            grad.iter_mut().for_each(|g| *g = flush(*g, 1e-18));
            let mut value = var.flatten_all()?.to_vec1::<f32>()?;
            let averages = mean.iter_mut().zip(square.iter_mut());
            for ((value, grad), (mean, square)) in value.iter_mut().zip(&grad).zip(averages) {
                *mean = flush(*mean + 0.1 * (grad - *mean), 1e-18);
                *square = flush(*square + 0.001 * (grad * grad - *square), 1e-36);
                *value = flush(*value - rate * *mean / ((*square * scale).sqrt() + 1e-8), 1e-18);
            }
            var.set(&Tensor::from_vec(value, var.shape(), var.device())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use kronwake::nn::{AdamW, Optimizer, ParamsAdamW};

    #[test]
    fn it_is_candles() {
        let pair = [0, 1].map(|_| {
            let vars = VarMap::new();
            let var = Var::new(&[0.5f32, -1.5, 2.0], &Device::Cpu).unwrap();
            vars.data().lock().unwrap().insert("w".into(), var.clone());
            (vars, var)
        });
        let loss = |w: &Var| w.powf(4.0).unwrap().sum_all().unwrap();
        let params = ParamsAdamW { lr: 0.05, weight_decay: 0.0, ..Default::default() };
        let mut theirs = AdamW::new(pair[1].0.all_vars(), params).unwrap();
        let mut ours = Adam::new(&pair[0].0).unwrap();
        for _ in 0..20 {
            ours.update(&loss(&pair[0].1).backward().unwrap(), 0.05).unwrap();
            theirs.backward_step(&loss(&pair[1].1)).unwrap();
        }
        let values = |at: usize| pair[at].1.to_vec1::<f32>().unwrap();
        assert!(
            values(0).iter().zip(values(1)).all(|(a, b)| (a - b).abs() < 1e-5),
            "{:?} {:?}",
            values(0),
            values(1)
        );
    }
}
