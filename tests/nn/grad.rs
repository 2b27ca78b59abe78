//! Gradients of every layer of `kronwake::nn` that is not candle's own: central differences in f64, and candle's values.

use crate::common::assert_close;
use candle_core::{DType, Device, Result, Tensor, Var};
use kronwake::nn::{self, Conv1dConfig, Conv2dConfig, Module};
use kronwake::tape::{Keep, Tape};

fn var(dims: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::randn(0f64, 1.0, dims, &Device::Cpu)?)
}

/// Compares the gradients of `<cotangent, f>` with respect to `vars` with central differences.
fn check(what: &str, vars: &[&Var], f: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    let cotangent = f()?.detach().randn_like(0.0, 1.0)?;
    let value = || -> Result<Tensor> { (f()? * &cotangent)?.sum_all() };
    let grads = value()?.backward()?;
    for (index, var) in vars.iter().enumerate() {
        let start: Vec<f64> = var.flatten_all()?.to_vec1()?;
        let mut slopes = vec![];
        for i in 0..start.len() {
            let at = |h: f64| -> Result<f64> {
                let mut moved = start.clone();
                moved[i] += h;
                var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu)?)?;
                value()?.to_scalar()
            };
            slopes.push((at(1e-5)? - at(-1e-5)?) / 2e-5);
        }
        var.set(&Tensor::from_vec(start, var.shape(), &Device::Cpu)?)?;
        let expected = Tensor::from_vec(slopes, var.shape(), &Device::Cpu)?;
        assert_close(grads.get(var).unwrap(), &expected, 1e-7, &format!("{what}: gradient {index}"));
    }
    Ok(())
}

#[test]
fn linear() -> Result<()> {
    let (w, b) = (var(&[4, 3])?, var(&[4])?);
    for dims in [&[5, 3][..], &[2, 5, 3], &[2, 1, 5, 3]] {
        let x = var(dims)?;
        let layer = nn::Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
        check(&format!("linear {dims:?}"), &[&x, &w, &b], &|| layer.forward(&x))?;
        let plain = candle_nn::Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
        assert_close(&layer.forward(&x)?, &plain.forward(&x)?, 1e-14, "candle's linear layer");
        let layer = nn::Linear::new(w.as_tensor().clone(), None);
        check(&format!("linear without bias {dims:?}"), &[&x, &w], &|| layer.forward(&x))?;
    }
    // Views: a transposed input, a transposed weight.
    let (x, wt) = (var(&[3, 5])?, var(&[3, 4])?);
    let layer = nn::Linear::new(wt.t()?, Some(b.as_tensor().clone()));
    check("linear on views", &[&x, &wt, &b], &|| layer.forward(&x.t()?))
}

#[test]
fn conv() -> Result<()> {
    for (stride, padding, dilation, groups) in
        [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (2, 1, 2, 4)]
    {
        let what = format!("stride {stride} padding {padding} dilation {dilation} groups {groups}");
        let config = Conv2dConfig { stride, padding, dilation, groups, cudnn_fwd_algo: None };
        let (x, w, b) = (var(&[2, 4, 6, 5])?, var(&[4, 4 / groups, 3, 2])?, var(&[4])?);
        let layer = nn::Conv2d::new(w.as_tensor().clone(), Some(b.as_tensor().clone()), config);
        check(&format!("conv2d {what}"), &[&x, &w, &b], &|| layer.forward(&x))?;
        let plain = candle_nn::Conv2d::new(w.as_tensor().clone(), Some(b.as_tensor().clone()), config);
        assert_close(&layer.forward(&x)?, &plain.forward(&x)?, 1e-12, "candle's convolution");

        let config = Conv1dConfig { stride, padding, dilation, groups, cudnn_fwd_algo: None };
        let (x, w) = (var(&[2, 4, 7])?, var(&[4, 4 / groups, 3])?);
        let layer = nn::Conv1d::new(w.as_tensor().clone(), None, config);
        check(&format!("conv1d {what}"), &[&x, &w], &|| layer.forward(&x))?;
    }
    Ok(())
}

#[test]
fn half_precision_layers_follow_single_precision() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let tolerance = if dtype == DType::F16 { 4e-3 } else { 3e-2 };
        let (w, b) = (var(&[6, 8])?, var(&[6])?);
        let x = Tensor::randn(0f64, 1.0, (7, 8), &Device::Cpu)?;
        let run = |dtype: DType| -> Result<[Tensor; 3]> {
            let (w, b) = (Var::from_tensor(&w.to_dtype(dtype)?)?, Var::from_tensor(&b.to_dtype(dtype)?)?);
            let layer = nn::Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
            let y = layer.forward(&x.to_dtype(dtype)?)?;
            let grads = y.sqr()?.mean_all()?.backward()?;
            Ok([y, grads.get(&w).unwrap().clone(), grads.get(&b).unwrap().clone()])
        };
        for (half, double) in run(dtype)?.iter().zip(&run(DType::F64)?) {
            assert_eq!(half.dtype(), dtype);
            assert_close(half, double, tolerance, &format!("{dtype:?}"));
        }
    }
    Ok(())
}

#[test]
fn a_curvature_pass_records_what_the_gradient_pass_sees() -> Result<()> {
    let (w, b) = (var(&[4, 3])?, var(&[4])?);
    let tape = Tape::new();
    let layer = tape.build(|| Ok(nn::Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()))))?;
    let x = Tensor::randn(0f64, 1.0, (2, 5, 3), &Device::Cpu)?;
    let y = layer.forward(&x)?;
    let cotangent = y.detach().randn_like(0.0, 1.0)?;
    let kept = tape.reduce(&y.tanh()?, &cotangent, Keep::default())?.0;
    let [(0, record)] = kept.as_slice() else { panic!("{} records", kept.len()) };
    assert_close(&record.inputs.rows()?, &x, 0.0, "inputs");
    let slope = (1.0 - y.detach().tanh()?.sqr()?)?;
    assert_close(&record.grads, &(slope * &cotangent)?, 1e-14, "gradients");
    // The forward graph serves an ordinary pass afterwards, which records nothing.
    let grads = (y.tanh()? * &cotangent)?.sum_all()?.backward()?;
    let rows = record.grads.reshape((10, 4))?;
    assert_close(grads.get(&w).unwrap(), &rows.t()?.matmul(&x.reshape((10, 3))?)?, 1e-13, "weight gradient");

    let untapped = x.sqr()?;
    let error = tape.reduce(&untapped, &untapped, Keep::default()).unwrap_err().to_string();
    assert!(error.contains("no tapped layer"), "{error}");
    Ok(())
}
