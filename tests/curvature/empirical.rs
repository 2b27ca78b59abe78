//! The empirical Fisher's factors against their definitions, one example at a time, in candle's own operations.

use crate::common::*;
use candle_core::{D, DType, Result, Tensor, Var};
use faer::Mat;
use kronwake::curvature::Sharing;
use kronwake::nn::{self, Conv2dConfig, Module, VarBuilder};
use kronwake::optim::{Bias, Optimizer};
use kronwake::tape::{Fisher, Likelihood};

/// Rows of inputs and of output gradients of one use of a layer by one example.
struct Use {
    layer: &'static str,
    inputs: Vec<Vec<f64>>,
    /// Zeros added to the outputs, `[positions, out]`: their gradient is that of the outputs.
    probe: Var,
}

/// A forward pass of one example from candle's own operations, keeping the uses of its layers.
struct Plain<'a> {
    net: &'a Net,
    uses: Vec<Use>,
}

impl Plain<'_> {
    fn used(&mut self, layer: &'static str, inputs: Vec<Vec<f64>>, y: &Tensor) -> Result<Tensor> {
        let probe = Var::zeros(y.dims(), DType::F64, y.device())?;
        let bias = self.net.var(&format!("{layer}.bias"));
        self.uses.push(Use { layer, inputs, probe: probe.clone() });
        (y + probe.as_tensor())?.broadcast_add(bias.as_tensor())
    }

    fn linear(&mut self, layer: &'static str, x: &Tensor) -> Result<Tensor> {
        let weight = self.net.var(&format!("{layer}.weight"));
        let rows = x.reshape(((), x.dim(D::Minus1)?))?;
        let y = rows.matmul(&weight.t()?)?;
        self.used(layer, rows.to_vec2()?, &y)
    }

    /// A convolution of `[1, c, h, w]`; its outputs are `[positions, out]`.
    fn conv(&mut self, layer: &'static str, x: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
        let weight = self.net.var(&format!("{layer}.weight"));
        let (_, c, h, w) = x.dims4()?;
        let (_, _, kh, kw) = weight.dims4()?;
        let y = x.conv2d(&weight, padding, stride, 1, 1)?;
        let pixels = flat(x);
        let at = |c: usize, i: isize, j: isize| {
            let inside = (0..h as isize).contains(&i) && (0..w as isize).contains(&j);
            if inside { pixels[(c * h + i as usize) * w + j as usize] } else { 0.0 }
        };
        let mut patches = vec![];
        for (i, j) in (0..y.dim(2)?).flat_map(|i| (0..y.dim(3).unwrap()).map(move |j| (i, j))) {
            let mut patch = vec![];
            for (c, k) in (0..c).flat_map(|c| (0..kh * kw).map(move |k| (c, k))) {
                let row = (i * stride + k / kw) as isize - padding as isize;
                let column = (j * stride + k % kw) as isize - padding as isize;
                patch.push(at(c, row, column));
            }
            patches.push(patch);
        }
        self.used(layer, patches, &positions(&y)?.squeeze(0)?)
    }
}

/// Inputs and output gradients of a layer's use, a row a position.
type Rows = (Mat<f64>, Mat<f64>);

type PlainForward = for<'a, 'b> fn(&'a mut Plain<'b>, &Tensor) -> Result<Tensor>;

/// `A` and `G` of a block by their definitions, from the uses of its layer by every example.
fn by_definition(examples: &[Vec<Rows>], sharing: Sharing, part: Part) -> (Mat<f64>, Mat<f64>) {
    let n = examples.len() as f64;
    let sum = |m: &Mat<f64>| Mat::from_fn(1, m.ncols(), |_, j| m.col(j).sum());
    let square = |m: &Mat<f64>| m.transpose() * m;
    let (mut a, mut g) = (None::<Mat<f64>>, None::<Mat<f64>>);
    let add = |total: &mut Option<Mat<f64>>, part: Mat<f64>| {
        *total = Some(total.take().map_or(part.clone(), |total| total + part));
    };
    for uses in examples {
        let stack = |pick: fn(&Rows) -> &Mat<f64>| {
            let rows: Vec<Vec<f64>> = uses
                .iter()
                .flat_map(|u| pick(u).row_iter().map(|r| r.iter().copied().collect()).collect::<Vec<_>>())
                .collect();
            Mat::from_fn(rows.len(), rows[0].len(), |i, j| rows[i][j])
        };
        let (inputs, grads) = (stack(|u| &u.0), stack(|u| &u.1));
        let positions = inputs.nrows() as f64;
        let inputs = match part {
            Part::Folded => Mat::from_fn(inputs.nrows(), inputs.ncols() + 1, |i, j| {
                if j < inputs.ncols() { inputs[(i, j)] } else { 1.0 }
            }),
            Part::Weight => inputs,
            Part::Bias => Mat::full(1, 1, 1.0),
        };
        let (rows_a, rows_g, scale) = match (part, sharing) {
            (Part::Bias, _) => (inputs, sum(&grads), 1.0),
            (_, Sharing::Expand) => (inputs, grads, 1.0 / positions),
            (_, Sharing::Reduce) => (sum(&inputs) * (1.0 / positions), sum(&grads), 1.0),
        };
        add(&mut a, square(&rows_a) * (1.0 / n));
        add(&mut g, square(&rows_g) * (scale / n));
    }
    (a.unwrap(), g.unwrap())
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Folded,
    Weight,
    Bias,
}

/// The factors that `observe` and the loss's own backward pass give, against the definitions, one example at a time.
#[test]
fn empirical_factors() -> Result<()> {
    let mlp = |vb: VarBuilder| -> Result<Forward> {
        let (a, b) = (nn::linear(4, 5, vb.pp("a"))?, nn::linear(5, 3, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(x)?.tanh()?)))
    };
    let cnn = |vb: VarBuilder| -> Result<Forward> {
        let config = Conv2dConfig { stride: 2, padding: 1, ..Default::default() };
        let a = nn::conv2d(2, 3, 3, config, vb.pp("a"))?;
        let b = nn::conv2d(3, 2, 2, Default::default(), vb.pp("b"))?;
        let c = nn::linear(8, 3, vb.pp("c"))?;
        Ok(Box::new(move |x| {
            let x = positions(&b.forward(&a.forward(x)?.relu()?)?)?;
            c.forward(&x.flatten_from(1)?.relu()?)
        }))
    };
    let twice = |vb: VarBuilder| -> Result<Forward> {
        let (a, b) = (nn::linear(4, 4, vb.pp("a"))?, nn::linear(4, 3, vb.pp("b"))?);
        Ok(Box::new(move |x| b.forward(&a.forward(&a.forward(x)?.tanh()?)?.tanh()?)))
    };
    let plain: [PlainForward; 3] = [
        |p, x| {
            let x = p.linear("a", x)?.tanh()?;
            p.linear("b", &x)
        },
        |p, x| {
            let x = p.conv("a", x, 2, 1)?.relu()?.t()?.reshape((1, 3, 3, 3))?;
            let x = p.conv("b", &x, 1, 0)?.relu()?.reshape((1, 8))?;
            p.linear("c", &x)
        },
        |p, x| {
            let x = p.linear("a", x)?.tanh()?;
            let x = p.linear("a", &x)?.tanh()?;
            p.linear("b", &x)
        },
    ];
    let nets = [Net::of(DType::F64, 1, mlp)?, Net::of(DType::F64, 2, cnn)?, Net::of(DType::F64, 3, twice)?];
    for ((net, plain), dims) in nets.iter().zip(plain).zip([&[6, 4][..], &[4, 2, 5, 5], &[6, 4]]) {
        let likelihood = Likelihood::Categorical;
        let x = random(9, dims)?;
        let y = labels(10, dims[0], 3)?;
        let mut uses: Vec<Vec<(&str, Rows)>> = vec![];
        for i in 0..dims[0] {
            let mut pass = Plain { net, uses: vec![] };
            let z = plain(&mut pass, &x.narrow(0, i, 1)?)?;
            let grads = mean_loss(likelihood, &z, &y.narrow(0, i, 1)?)?.backward()?;
            let of = |u: Use| {
                let inputs = Mat::from_fn(u.inputs.len(), u.inputs[0].len(), |i, j| u.inputs[i][j]);
                (u.layer, (inputs, matrix(grads.get(&u.probe).unwrap())))
            };
            uses.push(pass.uses.into_iter().map(of).collect());
        }
        for (sharing, bias) in [
            (Sharing::Expand, Bias::Folded),
            (Sharing::Expand, Bias::Split),
            (Sharing::Reduce, Bias::Folded),
            (Sharing::Reduce, Bias::Split),
        ] {
            let mut opt = observer(net, Fisher::Empirical, sharing, bias)?;
            let z = (net.forward)(&x)?;
            opt.observe(&z, likelihood)?;
            opt.backward_step(&mean_loss(likelihood, &z, &y)?)?;
            for block in opt.block_names() {
                let (layer, part) = match block.split_once('.') {
                    None => (block, Part::Folded),
                    Some((layer, "weight")) => (layer, Part::Weight),
                    Some((layer, _)) => (layer, Part::Bias),
                };
                let of_layer: Vec<_> = uses
                    .iter()
                    .map(|u| u.iter().filter(|u| u.0 == layer).map(|u| u.1.clone()).collect())
                    .collect();
                let (a, g) = by_definition(&of_layer, sharing, part);
                let found = opt.factors(block).unwrap();
                let what = format!("{sharing:?}, {bias:?}, block {block}");
                assert_same(&of_group(&found.0, 0), &a, 1e-12, &format!("A, {what}"));
                assert_same(&of_group(&found.1, 0), &g, 1e-12, &format!("G, {what}"));
            }
        }
    }
    Ok(())
}
