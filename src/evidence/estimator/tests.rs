//! Every estimator against values of an independent implementation in f64.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::evidence::{Evidence, Hyper, Structure};
use crate::gpu::emulate::emulate;
use crate::nn::{self, Module, VarBuilder, VarMap};
use crate::tape::{Likelihood, Tape};
use candle_core::Device;
use serde_json::Value;

/// A net of the golden files with its examples.
struct Golden {
    vars: VarMap,
    tape: Tape,
    model: Box<dyn Module>,
    likelihood: Likelihood,
    examples: Examples,
    json: Value,
}

fn path(name: &str) -> String {
    format!("{}/tests/golden/marglik/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(path(&format!("{name}.json"))).expect("a golden file");
    serde_json::from_str(&text).expect("json")
}

impl Golden {
    fn open(name: &str, dtype: DType) -> Result<Self> {
        let cpu = &Device::Cpu;
        let file = Checkpoint::read(path(&format!("{name}.safetensors")), cpu)?;
        let (vars, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&vars, dtype, cpu);
        let linear = |i: usize, from, to| nn::linear(from, to, vb.pp(i));
        let mlp = |sizes: [usize; 4]| -> Result<Box<dyn Module>> {
            let [a, b, c, d] = sizes;
            let layers = [linear(0, a, b)?, linear(1, b, c)?, linear(2, c, d)?];
            let [first, second, third] = layers;
            let net = nn::seq().add(first).add_fn(|x| x.tanh()).add(second).add_fn(|x| x.tanh()).add(third);
            Ok(Box::new(net))
        };
        let model: Box<dyn Module> = tape.build(|| match name {
            "mlp" => mlp([784, 32, 16, 10]),
            "regression" => mlp([3, 20, 12, 2]),
            _ => {
                let first = nn::conv2d(1, 4, 5, Default::default(), vb.pp(0))?;
                let padded = nn::Conv2dConfig { padding: 1, ..Default::default() };
                let (second, third) = (nn::conv2d(4, 8, 3, padded, vb.pp(1))?, linear(2, 288, 10)?);
                Ok(Box::new(move |x: &Tensor| {
                    let x = x.reshape(((), 1, 28, 28))?;
                    let x = first.forward_pooled(&x, (2, 2), (2, 2), true)?;
                    let x = second.forward_pooled(&x, (2, 2), (2, 2), true)?;
                    third.forward(&x.flatten_from(1)?)
                }) as Box<dyn Module>)
            }
        })?;
        for (name, var) in vars.data().lock().expect("a lock").iter() {
            var.set(&file.tensors[&format!("f64.{name}")].to_dtype(dtype)?)?;
        }
        let (likelihood, examples) = match name {
            "regression" => {
                let [x, y] = ["X", "Y"].map(|name| file.tensors[name].to_dtype(dtype));
                (Likelihood::Gaussian, Examples::new(x?, y?)?)
            }
            _ => {
                let x = (file.tensors["x_u8"].to_dtype(dtype)? / 255.0)?;
                (Likelihood::Categorical, Examples::new(x, file.tensors["label"].clone())?)
            }
        };
        Ok(Self { vars, tape, model, likelihood, examples, json: json(name) })
    }

    fn problem(&self) -> Result<Problem<'_>> {
        Problem::new(&self.tape, &self.vars, &*self.model, self.likelihood)
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(number).collect()
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{what}: {found}, expected {expected}"
    );
}

/// The hyperparameters of a setting.
fn hyper(problem: &Problem<'_>, setting: &Value) -> Result<Hyper> {
    let hyper =
        Hyper::new(problem, Structure::PerTensor, 1.0)?.tune_temperature(number(&setting["temperature"]))?;
    hyper.set_precisions(&numbers(&setting["prec"]))?;
    match setting.get("sigma") {
        Some(sigma) => hyper.tune_noise(number(sigma)),
        None => Ok(hyper),
    }
}

#[track_caller]
fn check(what: &str, found: &Evidence, expected: &Value, [value, grad]: [f64; 2]) {
    close(&format!("{what} loglik"), found.log_likelihood, number(&expected["loglik"]), value);
    close(&format!("{what} prior"), found.log_prior, number(&expected["prior_term"]), value);
    close(&format!("{what} logdet"), found.log_det, number(&expected["logdet"]), value);
    close(&format!("{what} evidence"), found.log_evidence, number(&expected["log_marglik"]), value);
    for (found, expected) in found.grad_log_precision.iter().zip(numbers(&expected["grad_log_prec"])) {
        close(&format!("{what} gradient"), *found, expected, grad);
    }
    close(
        &format!("{what} temperature"),
        found.grad_log_temperature,
        number(&expected["grad_log_temp"]),
        grad,
    );
    if let Some(expected) = expected.get("grad_log_sigma") {
        close(&format!("{what} noise"), found.grad_log_noise, number(expected), grad);
    }
}

fn estimators(n: usize) -> Vec<(String, Estimator)> {
    use Curvature::*;
    let whole = |curvature| Estimator::new(curvature, Parts::Whole);
    let joint = Kernel(Outputs::Joint);
    let mut list = vec![
        ("ntk_full".to_string(), whole(joint)),
        ("ntk_grouped_by_label".into(), Estimator::new(joint, Parts::ByLabel(n))),
        ("indep".into(), whole(Kernel(Outputs::Independent(Split::Diagonal)))),
        ("indep_factored".into(), whole(Kernel(Outputs::Independent(Split::Root)))),
        ("ggn_full".into(), whole(Full)),
        ("ggn_blockdiag_tensor".into(), whole(BlockPerTensor)),
        ("ggn_blockdiag_layer".into(), whole(BlockPerLayer)),
        ("kfac".into(), whole(Kron)),
        ("ggn_diag".into(), whole(Diagonal)),
        ("sod_blockdiag_tensor_b64".into(), Estimator::new(BlockPerTensor, Parts::Consecutive(64))),
        ("sod_kfac_b64".into(), Estimator::new(Kron, Parts::Consecutive(64))),
        ("sod_diag_b64".into(), Estimator::new(Diagonal, Parts::Consecutive(64))),
    ];
    for b in [16, 32, 48, 64, 128] {
        list.push((format!("ntk_b{b}"), Estimator::new(joint, Parts::Consecutive(b))));
    }
    list
}

/// Compares what the golden file has; the number of comparisons.
fn compare(name: &str, dtype: DType, settings: usize, tolerances: [f64; 2]) -> Result<usize> {
    let golden = Golden::open(name, dtype)?;
    let problem = golden.problem()?;
    let mut compared = 0;
    let settings: Vec<_> =
        golden.json["settings"].as_object().expect("settings").iter().take(settings).collect();
    for (quantity, estimator) in estimators(golden.examples.len()) {
        // The net has too many parameters to write the matrix out; the file has the kernel's value there.
        if (name, quantity.as_str()) == ("mlp", "ggn_full") {
            continue;
        }
        let mut fit = None;
        for (setting, values) in &settings {
            let Some(expected) = values["quantities"].get(&quantity) else { continue };
            if fit.is_none() {
                fit = Some(estimator.fit(&problem, &golden.examples, 0)?);
            }
            let Some(fit) = &fit else { continue };
            let found = fit.evidence(&hyper(&problem, values)?)?;
            check(&format!("{name} {setting} {quantity} {dtype:?}"), &found, expected, tolerances);
            compared += 1;
        }
    }
    Ok(compared)
}

#[test]
fn values_and_gradients_of_the_mlp() -> Result<()> {
    assert_eq!(compare("mlp", DType::F64, 4, [1e-9; 2])?, 4 * 15);
    Ok(())
}

#[test]
fn values_and_gradients_of_the_cnn() -> Result<()> {
    assert_eq!(compare("cnn", DType::F64, 4, [1e-9; 2])?, 4 * 16);
    Ok(())
}

#[test]
fn values_and_gradients_of_a_regression() -> Result<()> {
    assert_eq!(compare("regression", DType::F64, 4, [1e-9; 2])?, 4 * 10);
    Ok(())
}

/// The same through the kernels of a GPU.
#[test]
fn on_a_gpu() -> Result<()> {
    emulate(|| assert_eq!(compare("regression", DType::F64, 1, [1e-9; 2]).expect("no error"), 10));
    Ok(())
}

#[test]
fn single_precision() -> Result<()> {
    for name in ["mlp", "cnn"] {
        assert!(compare(name, DType::F32, 2, [3e-5, 2e-3])? > 20);
    }
    Ok(())
}

/// The kernels of fixed outputs, whatever would be drawn.
#[test]
fn single_outputs() -> Result<()> {
    for name in ["mlp", "cnn"] {
        let golden = Golden::open(name, DType::F64)?;
        let problem = golden.problem()?;
        let setting = &golden.json["settings"]["s1_layerwise"];
        let hyper = hyper(&problem, setting)?;
        let (s, precisions) = (1.0 / hyper.temperature()?, hyper.precisions()?);
        for (split, single, all) in [
            (Split::Diagonal, "single_iid_sel", "indep"),
            (Split::Root, "single_iid_sel_factored", "indep_factored"),
        ] {
            let values = &setting["quantities"];
            let kernels = |examples: &Examples, outputs, draw: &dyn Fn(u64) -> f64| {
                let mut data = DataFit::zero(Likelihood::Categorical);
                let mut read = Reader {
                    problem: &problem,
                    part: examples,
                    data: &mut data,
                    weight: 1.0,
                    columns: 9,
                    memory: 1 << 30,
                    for_rows: 1 << 30,
                };
                let mut sum = 0.0;
                for (weight, rows) in &read.kernels(outputs, draw)? {
                    sum += weight * rows.log_det(s, &precisions)?.value;
                }
                Ok::<_, candle_core::Error>(sum)
            };
            let selected = |n: u64| (((7 * n + 3) % 10) as f64 + 0.5) / 10.0;
            let found = kernels(&golden.examples, Outputs::OneEach(split), &selected)?;
            close(name, found, number(&values[single]["logdet"]), 1e-9);
            let classes = numbers(&values[all]["logdet_per_class"]);
            let group = if split == Split::Root { "factored" } else { "authors" };
            let stochastic = &values["doubly_stochastic_b64_logdet_batch_class"][group];
            for class in [0, 4, 9] {
                let drawn = |_| (class as f64 + 0.5) / 10.0;
                for outputs in [Outputs::One(split), Outputs::Given(split, class)] {
                    let found = kernels(&golden.examples, outputs, &drawn)?;
                    close(name, found, 10.0 * classes[class], 1e-9);
                }
                for batch in [0, 3] {
                    let numbers: Vec<usize> = (64 * batch..64 * batch + 64).collect();
                    let found = kernels(&golden.examples.select(&numbers)?, Outputs::One(split), &drawn)?;
                    close(name, found, 10.0 * number(&stochastic[batch][class]), 1e-9);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_precision_a_weight() -> Result<()> {
    let golden = Golden::open("cnn", DType::F64)?;
    let problem = golden.problem()?;
    let (expected, tensors) =
        (json("cnn_diagprior"), Checkpoint::read(path("cnn_diagprior.safetensors"), &Device::Cpu)?.tensors);
    let hyper = Hyper::new(&problem, Structure::Diagonal, 1.0)?.with_temperature(0.8)?;
    let mut at = 0;
    let each = problem.parameters().iter().map(|p| {
        let size = p.tensor.elem_count();
        at += size;
        tensors["prec"].narrow(0, at - size, size)?.reshape(p.tensor.shape())
    });
    hyper.set_each(&each.collect::<Result<Vec<_>>>()?)?;
    for (quantity, estimator) in estimators(golden.examples.len()) {
        let Some(expected) = expected.get(&quantity) else { continue };
        let found = estimator.fit(&problem, &golden.examples, 0)?.evidence(&hyper)?;
        close(&quantity, found.log_det, number(&expected["logdet"]), 1e-9);
        close(&quantity, found.log_evidence, number(&expected["log_marglik"]), 1e-9);
        let grads = found.value.backward()?;
        let slopes = hyper
            .vars()
            .iter()
            .map(|var| grads.get(var).expect("a gradient").flatten_all())
            .collect::<Result<Vec<_>>>()?;
        let slopes = Tensor::cat(&slopes, 0)?.to_vec1::<f64>()?;
        let exact = tensors[&format!("grad_log_prec.{quantity}")].to_vec1::<f64>()?;
        for (found, exact) in slopes.into_iter().zip(exact) {
            close(&quantity, found, exact, 1e-9);
        }
    }
    Ok(())
}

/// The kernel of the first images, tensor by tensor.
#[test]
fn kernels_of_tensors() -> Result<()> {
    for name in ["mlp", "cnn"] {
        let golden = Golden::open(name, DType::F64)?;
        let problem = golden.problem()?;
        let file = Checkpoint::read(path(&format!("{name}.safetensors")), &Device::Cpu)?;
        let eight = golden.examples.select(&[0, 1, 2, 3, 4, 5, 6, 7])?;
        let pass = problem.pass(&eight)?;
        for (kind, likelihood) in [("K8", Likelihood::Gaussian), ("M8", Likelihood::Categorical)] {
            let rows = pass.gather(likelihood.cotangents(&pass.outputs, Root::PerOutput)?, usize::MAX)?;
            for (index, p) in problem.parameters().iter().enumerate() {
                let expected = file.tensors[&format!("{kind}.{}", p.name)].to_vec2::<f64>()?;
                let of_one = rows.of_tensors(|tensor| tensor == index).expect("a layer");
                let ones = vec![super::super::log_det::Precision::Uniform(1.0); index + 1];
                let found = of_one.shifted_kernel(1.0, &ones)?.0.to_vec2::<f64>()?;
                for (i, row) in found.iter().enumerate() {
                    for j in 0..=i {
                        let one = if i == j { 1.0 } else { 0.0 };
                        close(&p.name, row[j] - one, expected[i][j], 1e-9);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Rows that come as gradients an example make the kernel of those that come in factors: of a convolution without a bias that is used three
/// times, of which one use has a record all the same, of one with groups, at a precision a tensor and one a weight.
#[test]
fn rows_that_come_written() -> Result<()> {
    use super::super::log_det::Precision;
    use crate::ops::pool::max_pool2d;
    let cpu = &Device::Cpu;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F64, cpu);
    let model: Box<dyn Module> = tape.build(|| {
        let shared = nn::conv2d_no_bias(2, 4, 3, Default::default(), vb.pp(0))?;
        let grouped = nn::Conv2dConfig { groups: 2, padding: 1, ..Default::default() };
        let (second, third) = (nn::conv2d(4, 6, 3, grouped, vb.pp(1))?, nn::linear(54, 3, vb.pp(2))?);
        Ok(Box::new(move |x: &Tensor| {
            let one = |x: &Tensor| shared.forward_pooled(x, (2, 2), (2, 2), true);
            let plain = max_pool2d(&shared.forward(&(x * 0.5)?)?.tanh()?, (2, 2), (2, 2))?;
            let x = (one(x)? + one(&x.transpose(2, 3)?.contiguous()?)? + plain)?;
            third.forward(&second.forward_pooled(&x, (2, 2), (2, 2), false)?.flatten_from(1)?)
        }) as Box<dyn Module>)
    })?;
    let x = Tensor::rand(-1f64, 1., (7, 2, 14, 14), cpu)?;
    let examples = Examples::new(x, Tensor::new(&[0u32, 1, 2, 0, 1, 2, 0], cpu)?)?;
    let problem = Problem::new(&tape, &vars, &*model, Likelihood::Categorical)?;
    let pass = problem.pass(&examples)?;
    let written = pass.gather_written(pass.columns(Root::Reduced)?, usize::MAX)?;
    let factors = pass.gather(pass.columns(Root::Reduced)?, usize::MAX)?;
    let positions = |rows: &Rows| rows.layers.iter().map(|l| l.positions()).collect::<Result<Vec<_>>>();
    assert_eq!((positions(&written)?, positions(&factors)?), (vec![0, 0, 1], vec![432, 36, 1]));
    let each = |p: &crate::evidence::Parameter| Ok(Precision::Each((p.tensor.ones_like()? * 3.0)?));
    let uniform = problem.parameters().iter().enumerate().map(|(i, _)| Precision::Uniform(1.0 + i as f64));
    let each = problem.parameters().iter().map(each).collect::<Result<Vec<_>>>()?;
    for precisions in [uniform.collect(), each] {
        for (start, len) in [(0, 7), (2, 4)] {
            let [found, exact] =
                [&written, &factors].map(|rows| rows.narrow(start, len)?.log_det(0.7, &precisions));
            let (found, exact) = (found?, exact?);
            close("log det", found.value, exact.value, 1e-12);
            for (found, exact) in found.effective.iter().zip(&exact.effective) {
                let total = |share: &Option<super::super::log_det::Effective>| match share {
                    Some(share) => share.total(),
                    None => Ok(f64::NAN),
                };
                close("effective", total(found)?, total(exact)?, 1e-11);
            }
        }
    }
    // Rows that would not fit are refused, however they come.
    let error = pass.gather_written(pass.columns(Root::Reduced)?, 1000).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| e.contains("1000 are allowed")));
    Ok(())
}

/// The rotated diagonal bounds every tensor's block, and is tighter than the estimate by Kronecker factors and than the diagonal.
#[test]
fn the_rotated_bound_is_tight() -> Result<()> {
    for name in ["mlp", "cnn"] {
        let golden = Golden::open(name, DType::F64)?;
        let problem = golden.problem()?;
        let hyper = Hyper::new(&problem, Structure::Scalar, 1.0)?;
        let half = |curvature| -> Result<f64> {
            let fit = Estimator::new(curvature, Parts::Whole).fit(&problem, &golden.examples, 0)?;
            Ok(fit.evidence(&hyper)?.log_det / 2.0)
        };
        let [exact, blocks, rotated, kron, diagonal] = [
            Curvature::Kernel(Outputs::Joint),
            Curvature::BlockPerTensor,
            Curvature::Rotated,
            Curvature::Kron,
            Curvature::Diagonal,
        ]
        .map(half);
        let (exact, blocks, rotated, kron, diagonal) = (exact?, blocks?, rotated?, kron?, diagonal?);
        println!(
            "{name}: exact {exact:.1}, blocks {blocks:.1}, rotated {rotated:.1}, Kron {kron:.1}, diagonal {diagonal:.1}"
        );
        assert!(exact <= blocks && blocks <= rotated && rotated < kron && kron < diagonal, "{name}");
    }
    Ok(())
}
