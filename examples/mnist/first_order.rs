//! The baselines: gradient descent with momentum, and AdamW. Unlike candle_nn's they can be saved, resume exactly, and
//! keep f32 values and averages behind f16 and bf16 parameters.

use super::weights;
use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore, bail};
use kronwake::checkpoint::Checkpoint;
use kronwake::nn::VarMap;
use std::{collections::BTreeMap, path::Path};

/// What a step does with the gradient `g` of a parameter `p`.
#[derive(Clone, Copy, Debug)]
pub enum Rule {
    /// `v <- momentum v + g + decay p; p <- p - lr v`, as PyTorch's SGD.
    Sgd { momentum: f64 },
    /// Adam with bias correction (beta 0.9 and 0.999, epsilon 1e-8); decay apart from the averages (Loshchilov, Hutter
    /// 2019).
    AdamW,
}

/// An optimizer with a [`Rule`] for all parameters of a `VarMap`.
pub struct FirstOrder {
    pub rule: Rule,
    pub decay: f64,
    pub lr: f64,
    pub step: usize,
    params: Vec<Param>,
}

struct Param {
    name: String,
    var: Var,
    /// The value in f32 or f64, and the averages of the rule in the same type.
    value: Tensor,
    averages: Vec<Tensor>,
}

impl FirstOrder {
    pub fn new(vars: &VarMap, rule: Rule, lr: f64, decay: f64) -> Result<Self> {
        let slots = match rule {
            Rule::Sgd { .. } => 1,
            Rule::AdamW => 2,
        };
        let mut params = Vec::new();
        for (name, var) in weights::named(vars)? {
            let dtype = if var.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            // A copy: a conversion to the same type would share the memory that `Var::set` writes.
            let value = var.as_detached_tensor().copy()?.to_dtype(dtype)?;
            let averages = vec![value.zeros_like()?; slots];
            params.push(Param { name, var, value, averages });
        }
        Ok(Self { rule, decay, lr, step: 0, params })
    }

    pub fn update(&mut self, grads: &GradStore) -> Result<()> {
        self.step += 1;
        let (lr, decay) = (self.lr, self.decay);
        for param in &mut self.params {
            let Some(grad) = grads.get(&param.var) else { bail!("{} got no gradient", param.name) };
            let grad = grad.to_dtype(param.value.dtype())?;
            let (value, averages) = match (self.rule, param.averages.as_slice()) {
                (Rule::Sgd { momentum }, [v]) => {
                    let v = (((v * momentum)? + grad)? + (&param.value * decay)?)?;
                    ((&param.value - (&v * lr)?)?, vec![v])
                }
                (Rule::AdamW, [m, v]) => {
                    let (beta1, beta2, t) = (0.9f64, 0.999f64, self.step as i32);
                    let m = ((m * beta1)? + (&grad * (1.0 - beta1))?)?;
                    let v = ((v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
                    let mean = (&m / (1.0 - beta1.powi(t)))?;
                    let scale = ((&v / (1.0 - beta2.powi(t)))?.sqrt()? + 1e-8)?;
                    let kept = (&param.value * (1.0 - lr * decay))?;
                    ((kept - ((mean / scale)? * lr)?)?, vec![m, v])
                }
                _ => bail!("{}: the state does not belong to the rule {:?}", param.name, self.rule),
            };
            param.var.set(&value.to_dtype(param.var.dtype())?)?;
            (param.value, param.averages) = (value, averages);
        }
        Ok(())
    }

    /// Goes on from the parameters where something else has changed them; those that are kept in a wider type stay.
    pub fn read_back(&mut self) -> Result<()> {
        for param in self.params.iter_mut().filter(|param| param.var.dtype() == param.value.dtype()) {
            param.value = param.var.as_detached_tensor().copy()?;
        }
        Ok(())
    }

    /// Writes values, averages and the step number as safetensors.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors =
            BTreeMap::from([("step".to_string(), Tensor::new(self.step as i64, &Device::Cpu)?)]);
        for param in &self.params {
            tensors.insert(format!("value.{}", param.name), param.value.clone());
            for (i, average) in param.averages.iter().enumerate() {
                tensors.insert(format!("average{i}.{}", param.name), average.clone());
            }
        }
        Checkpoint { tensors, ..Default::default() }.write(path)
    }

    /// Goes on from what [`Self::save`] wrote for the same model, rule and element type. On an error nothing is changed.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let file = path.display();
        let mut tensors = Checkpoint::read(path, &Device::Cpu)?.tensors;
        let mut take = |key: &str, like: &Tensor| match tensors.remove(key) {
            Some(t) if t.dims() == like.dims() && t.dtype() == like.dtype() => t.to_device(like.device()),
            Some(t) => {
                let (found, expected) = ((t.dtype(), t.dims()), (like.dtype(), like.dims()));
                bail!("--resume {file}: {key} is {found:?}, expected {expected:?}")
            }
            None => bail!("--resume {file}: {key} is missing: another model or optimizer wrote this file"),
        };
        let step = take("step", &Tensor::new(0i64, &Device::Cpu)?)?.to_scalar::<i64>()?;
        let mut read = Vec::new();
        for param in &self.params {
            let value = take(&format!("value.{}", param.name), &param.value)?;
            let averages =
                (0..param.averages.len()).map(|i| take(&format!("average{i}.{}", param.name), &param.value));
            read.push((value, averages.collect::<Result<Vec<_>>>()?));
        }
        if let Some(extra) = tensors.keys().next() {
            bail!("--resume {file}: {extra} has no place here: another model or optimizer wrote this file");
        }
        for (param, (value, averages)) in self.params.iter_mut().zip(read) {
            param.var.set(&value.to_dtype(param.var.dtype())?)?;
            (param.value, param.averages) = (value, averages);
        }
        self.step = step as usize;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::sentence::sentence;
    use super::*;
    use candle_nn::{AdamW, Optimizer, ParamsAdamW};

    /// Two parameters, and the loss `sum (w^3 / 3 + w b^2)` of them.
    fn problem() -> (VarMap, Var, Var) {
        let vars = VarMap::new();
        let var = |name: &str, values: &[f64]| {
            let var = Var::new(values, &Device::Cpu).unwrap();
            vars.data().lock().unwrap().insert(name.into(), var.clone());
            var
        };
        let (w, b) = (var("w", &[0.5, -1.5, 2.0]), var("b", &[1.0, 0.3, -0.7]));
        (vars, w, b)
    }

    fn gradients(w: &Var, b: &Var) -> GradStore {
        let cube = (w.powf(3.0).unwrap() / 3.0).unwrap();
        (cube + w.mul(&b.sqr().unwrap()).unwrap()).unwrap().sum_all().unwrap().backward().unwrap()
    }

    fn values(var: &Var) -> Vec<f64> {
        var.to_vec1().unwrap()
    }

    #[test]
    fn adamw_agrees_with_candle_nn() {
        let ((vars, w, b), (_, w2, b2)) = (problem(), problem());
        let mut ours = FirstOrder::new(&vars, Rule::AdamW, 0.03, 0.1).unwrap();
        let params = ParamsAdamW { lr: 0.03, weight_decay: 0.1, ..Default::default() };
        let mut theirs = AdamW::new(vec![w2.clone(), b2.clone()], params).unwrap();
        for _ in 0..20 {
            ours.update(&gradients(&w, &b)).unwrap();
            theirs.step(&gradients(&w2, &b2)).unwrap();
        }
        for (a, e) in values(&w).iter().chain(&values(&b)).zip(values(&w2).iter().chain(&values(&b2))) {
            assert!((a - e).abs() < 1e-13, "{a} {e}");
        }
    }

    #[test]
    fn sgd_follows_its_recursion() {
        let (vars, w, b) = problem();
        let mut opt = FirstOrder::new(&vars, Rule::Sgd { momentum: 0.9 }, 0.02, 0.1).unwrap();
        let (mut p, mut q) = (values(&w), values(&b));
        let (mut v, mut u) = (vec![0.0; 3], vec![0.0; 3]);
        for _ in 0..10 {
            opt.update(&gradients(&w, &b)).unwrap();
            for i in 0..3 {
                let (dp, dq) = (p[i] * p[i] + q[i] * q[i], 2.0 * p[i] * q[i]);
                v[i] = 0.9 * v[i] + dp + 0.1 * p[i];
                u[i] = 0.9 * u[i] + dq + 0.1 * q[i];
                p[i] -= 0.02 * v[i];
                q[i] -= 0.02 * u[i];
            }
        }
        for (a, e) in values(&w).iter().chain(&values(&b)).zip(p.iter().chain(&q)) {
            assert!((a - e).abs() < 1e-13, "{a} {e}");
        }
    }

    #[test]
    fn resumes_exactly_and_refuses_what_does_not_fit() {
        let path = std::env::temp_dir().join(format!("kronwake-first-{}.safetensors", std::process::id()));
        let sgd = Rule::Sgd { momentum: 0.9 };
        for rule in [sgd, Rule::AdamW] {
            let ((vars, w, b), (vars2, w2, b2)) = (problem(), problem());
            let mut straight = FirstOrder::new(&vars, rule, 0.02, 0.1).unwrap();
            (0..5).for_each(|_| straight.update(&gradients(&w, &b)).unwrap());
            straight.save(&path).unwrap();
            let mut resumed = FirstOrder::new(&vars2, rule, 0.02, 0.1).unwrap();
            resumed.resume(&path).unwrap();
            assert_eq!(resumed.step, 5);
            for _ in 0..5 {
                straight.update(&gradients(&w, &b)).unwrap();
                resumed.update(&gradients(&w2, &b2)).unwrap();
            }
            assert_eq!((values(&w), values(&b)), (values(&w2), values(&b2)));
        }
        let (vars, w, _) = problem();
        let before = values(&w);
        let mut other = FirstOrder::new(&vars, sgd, 0.1, 0.0).unwrap();
        let error = sentence(&other.resume(&path).unwrap_err());
        assert!(error.contains("average1.b has no place here"), "{error}");
        assert_eq!((values(&w), other.step), (before, 0));
        std::fs::remove_file(&path).unwrap();
    }
}
