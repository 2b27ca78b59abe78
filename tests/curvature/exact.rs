//! The exact Fisher's Kronecker factors against dense Gauss-Newton blocks.

use crate::common::*;
use candle_core::{DType, Result, Tensor};
use faer::Mat;
use kronwake::curvature::Sharing;
use kronwake::nn::{self, Conv1dConfig, Conv2dConfig, Module, VarBuilder};
use kronwake::optim::{Bias, Optimizer};
use kronwake::tape::{Fisher, Likelihood};

/// The mean over loss terms of `J^T H J` for the elements of one block.
fn gauss_newton(
    net: &Net,
    x: &Tensor,
    likelihood: Likelihood,
    block: &str,
    group: (usize, usize),
) -> Result<Mat<f64>> {
    let outputs = (net.forward)(x)?;
    let (terms, classes) = (likelihood.terms(&outputs)?, *outputs.dims().last().unwrap());
    let z = flat(&outputs);
    let j = jacobian(&net.elements(block, group.0, group.1), 2e-3, &|| (net.forward)(x))?;
    let mut total = Mat::zeros(j.ncols(), j.ncols());
    for term in 0..terms {
        let rows = j.subrows(term * classes, classes).to_owned();
        let h = hessian(likelihood, &z[term * classes..][..classes]);
        total += rows.transpose() * h * &rows;
    }
    Ok(total * (1.0 / terms as f64))
}

/// Compares every block of the exact Fisher with its Gauss-Newton block.
fn check_exact(
    what: &str,
    net: &Net,
    x: &Tensor,
    likelihood: Likelihood,
    (sharing, bias): (Sharing, Bias),
    tolerance: f64,
) -> Result<()> {
    let mut opt = observer(net, Fisher::Exact, sharing, bias)?;
    let outputs = (net.forward)(x)?;
    opt.observe(&outputs, likelihood)?;
    let y = targets(5, likelihood, &outputs)?;
    opt.backward_step(&mean_loss(likelihood, &outputs, &y)?)?;
    for block in opt.block_names() {
        let (a, g) = opt.factors(block).unwrap();
        let groups = a.dim(0)?;
        for group in 0..groups {
            let expected = gauss_newton(net, x, likelihood, block, (group, groups))?;
            let found = kron(&of_group(&a, group), &of_group(&g, group));
            let what = format!("{what}, {sharing:?}, {bias:?}, block {block}, group {group}");
            assert_same(&found, &expected, tolerance, &what);
        }
    }
    Ok(())
}

fn deep(vb: VarBuilder, bias: bool) -> Result<Forward> {
    let a = nn::linear_b(4, 5, bias, vb.pp("a"))?;
    let b = nn::linear_b(5, 3, bias, vb.pp("b"))?;
    let c = nn::linear_b(3, 2, bias, vb.pp("c"))?;
    Ok(Box::new(move |x| c.forward(&b.forward(&a.forward(x)?)?)))
}

/// A convolution of some geometry, then one of kernel 1, then the mean over positions if so wanted.
fn conv2(vb: VarBuilder, kernel: usize, config: Conv2dConfig, average: bool) -> Result<Forward> {
    let first = nn::conv2d(4, 6, kernel, config, vb.pp("first"))?;
    let second = nn::conv2d(6, 2, 1, Default::default(), vb.pp("second"))?;
    Ok(Box::new(move |x| {
        let z = positions(&second.forward(&first.forward(x)?)?)?;
        if average { z.mean(1) } else { Ok(z) }
    }))
}

fn conv1(vb: VarBuilder, config: Conv1dConfig, average: bool) -> Result<Forward> {
    let first = nn::conv1d(4, 6, 3, config, vb.pp("first"))?;
    let second = nn::conv1d_no_bias(6, 2, 1, Default::default(), vb.pp("second"))?;
    Ok(Box::new(move |x| {
        let z = positions(&second.forward(&first.forward(x)?)?)?;
        if average { z.mean(1) } else { Ok(z) }
    }))
}

/// One layer used twice; the uses are loss terms of their own, or averaged.
fn twice(vb: VarBuilder, average: bool) -> Result<Forward> {
    let shared = nn::linear(4, 3, vb.pp("shared"))?;
    let last = nn::linear(3, 2, vb.pp("last"))?;
    Ok(Box::new(move |x| {
        let use_of = |i: usize| last.forward(&shared.forward(&x.get_on_dim(1, i)?.contiguous()?)?);
        let z = Tensor::stack(&[use_of(0)?, use_of(1)?], 1)?;
        if average { z.mean(1) } else { Ok(z) }
    }))
}

/// In a net without activations the gradient of an output with respect to a layer's outputs is the same for every input,
/// so with squared loss the mean of products is the product of means. Over positions that share a weight this needs, as in
/// Eschenhagen et al. 2023, (expand) a loss term per position and no mixing of positions after the layer, or (reduce) outputs
/// averaged over positions, again without mixing after the layer. Hence convolutions of any geometry come first here, and
/// only kernels of 1 follow; or the first has one output position, where there is nothing to mix.
#[test]
fn deep_linear_nets() -> Result<()> {
    let expand = [(Sharing::Expand, Bias::Folded), (Sharing::Expand, Bias::Split)];
    let reduce = [(Sharing::Reduce, Bias::Folded), (Sharing::Reduce, Bias::Split)];
    let both = [expand, reduce].concat();
    let mean_of_positions = |vb: VarBuilder| -> Result<Forward> {
        let inner = deep(vb, true)?;
        Ok(Box::new(move |x| inner(x)?.mean(1)))
    };
    let strided = Conv2dConfig { stride: 2, padding: 2, dilation: 2, ..Default::default() };
    let padded = Conv2dConfig { padding: 1, ..Default::default() };
    let grouped = Conv2dConfig { stride: 2, padding: 1, groups: 2, ..Default::default() };
    let row = Conv1dConfig { stride: 2, padding: 2, dilation: 2, ..Default::default() };
    let row_grouped = Conv1dConfig { padding: 1, groups: 2, ..Default::default() };
    type Build<'a> = Box<dyn Fn(VarBuilder) -> Result<Forward> + 'a>;
    type Case<'a> = (&'a str, Build<'a>, Vec<usize>, &'a [(Sharing, Bias)]);
    let cases: Vec<Case> = vec![
        ("linear", Box::new(|vb| deep(vb, true)), vec![7, 4], &both),
        ("linear without bias", Box::new(|vb| deep(vb, false)), vec![7, 4], &both),
        ("sequence, a term a position", Box::new(|vb| deep(vb, true)), vec![3, 5, 4], &expand),
        ("sequence, two dimensions", Box::new(|vb| deep(vb, true)), vec![2, 2, 3, 4], &expand),
        ("sequence, averaged", Box::new(mean_of_positions), vec![3, 5, 4], &reduce),
        ("conv2d", Box::new(|vb| conv2(vb, 3, padded, false)), vec![2, 4, 4, 3], &expand),
        ("conv2d strided", Box::new(|vb| conv2(vb, 3, strided, false)), vec![2, 4, 7, 6], &expand),
        ("conv2d grouped", Box::new(|vb| conv2(vb, 3, grouped, false)), vec![2, 4, 5, 4], &expand),
        ("conv2d averaged", Box::new(|vb| conv2(vb, 3, strided, true)), vec![2, 4, 7, 6], &reduce),
        ("conv2d grouped, averaged", Box::new(|vb| conv2(vb, 3, grouped, true)), vec![2, 4, 5, 4], &reduce),
        (
            "conv2d, one position",
            Box::new(|vb| conv2(vb, 3, Default::default(), false)),
            vec![4, 4, 3, 3],
            &both,
        ),
        ("conv1d strided", Box::new(|vb| conv1(vb, row, false)), vec![3, 4, 9], &expand),
        ("conv1d grouped, averaged", Box::new(|vb| conv1(vb, row_grouped, true)), vec![3, 4, 6], &reduce),
        ("a layer twice", Box::new(|vb| twice(vb, false)), vec![5, 2, 4], &expand),
        ("a layer twice, averaged", Box::new(|vb| twice(vb, true)), vec![5, 2, 4], &reduce),
    ];
    for (seed, (what, build, dims, options)) in cases.iter().enumerate() {
        let net = Net::of(DType::F64, seed as u64, build)?;
        let x = random(100 + seed as u64, dims)?;
        for &option in options.iter() {
            check_exact(what, &net, &x, Likelihood::Gaussian, option, 1e-11)?;
        }
    }
    Ok(())
}

/// One example, or the same one several times: the product is exact in any net.
#[test]
fn one_example() -> Result<()> {
    let mlp = |vb: VarBuilder| -> Result<Forward> {
        let (a, b) = (nn::linear(4, 5, vb.pp("a"))?, nn::linear(5, 3, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
    };
    let cnn = |vb: VarBuilder| -> Result<Forward> {
        let config = Conv2dConfig { stride: 3, groups: 2, ..Default::default() };
        let (a, b) = (nn::conv2d(2, 4, 3, config, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(x)?.flatten_from(1)?.tanh()?)))
    };
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian] {
        for (what, net, dims) in [
            ("mlp", Net::of(DType::F64, 1, mlp)?, &[1, 4][..]),
            ("cnn", Net::of(DType::F64, 2, cnn)?, &[1, 2, 3, 4]),
        ] {
            let x = random(3, dims)?;
            for x in [x.clone(), Tensor::cat(&[&x, &x, &x], 0)?] {
                for bias in [Bias::Folded, Bias::Split] {
                    let what = format!("{what}, {likelihood:?}");
                    check_exact(&what, &net, &x, likelihood, (Sharing::Expand, bias), 1e-9)?;
                }
            }
        }
    }
    Ok(())
}

/// The last layer's `G` is the mean Hessian of the loss terms, exactly, and the mean over draws comes to it.
#[test]
fn last_layer_and_draws() -> Result<()> {
    let (n, draws) = (6, 3000);
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian] {
        let net = Net::of(DType::F64, 4, |vb| {
            let (a, b) = (nn::linear(3, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?);
            Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
        })?;
        let x = random(5, &[n, 3])?;
        let factors = |fisher: Fisher, block: &str| -> Result<Mat<f64>> {
            let mut opt = observer(&net, fisher, Sharing::Expand, Bias::Folded)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, likelihood)?;
            opt.backward_step(&mean_loss(likelihood, &z, &targets(6, likelihood, &z)?)?)?;
            Ok(of_group(&opt.factors(block).unwrap().1, 0))
        };
        let z = matrix(&(net.forward)(&x)?);
        let mut mean = Mat::zeros(3, 3);
        for i in 0..n {
            mean += hessian(likelihood, &z.row(i).iter().copied().collect::<Vec<_>>()) * (1.0 / n as f64);
        }
        assert_same(&factors(Fisher::Exact, "b")?, &mean, 1e-13, "G of the last layer");
        for block in ["a", "b"] {
            let exact = factors(Fisher::Exact, block)?;
            let sampled = factors(Fisher::Sampled { draws, seed: 7 }, block)?;
            // The variance of a product of two gradients is at most their kurtosis, here below 10, times their variances;
            // 18,000 terms are independent. A wrong factor of 1.2 would be seen.
            let largest = exact.norm_max();
            let error = 5.0 * (10.0 / (n * draws) as f64).sqrt() * largest;
            let apart = (&sampled - &exact).norm_max();
            assert!(apart < error, "{likelihood:?}, block {block}: {apart} against {error}");
        }
    }
    Ok(())
}
