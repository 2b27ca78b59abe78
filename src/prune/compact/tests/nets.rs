//! Nets with norms, sums, groups and pooling.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::nn::{self, BatchNorm, VarBuilder, VarMap};
use std::collections::BTreeMap;

const EPS: f64 = 1e-5;

fn config(padding: usize, stride: usize, groups: usize) -> Conv2dConfig {
    Conv2dConfig { padding, stride, groups, ..Default::default() }
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// A small ResNet of `kronwake::nn` whose layers are as wide as their weights' shapes say: a stem, a block with a shortcut that is nothing, one
/// with a projection, one with a depthwise convolution, one in groups, and a classifier.
struct ResNet {
    convs: BTreeMap<&'static str, (Conv2d, BatchNorm)>,
    fc: Linear,
}

/// The convolutions, each with its norm, `[out, in, kernel]`, padding, stride and groups.
const CONVS: [(&str, [usize; 3], [usize; 3]); 11] = [
    ("stem", [8, 3, 3], [1, 1, 1]),
    ("layer1.conv1", [6, 8, 3], [1, 1, 1]),
    ("layer1.conv2", [8, 6, 3], [1, 1, 1]),
    ("layer2.conv1", [10, 8, 3], [1, 2, 1]),
    ("layer2.conv2", [12, 10, 3], [1, 1, 1]),
    ("layer2.down", [12, 8, 1], [0, 2, 1]),
    ("layer3.expand", [16, 12, 1], [0, 1, 1]),
    ("layer3.depth", [16, 1, 3], [1, 1, 16]),
    ("layer3.project", [12, 16, 1], [0, 1, 1]),
    ("layer4.conv1", [12, 4, 3], [1, 1, 3]),
    ("layer4.conv2", [12, 12, 1], [0, 1, 1]),
];

fn whole() -> Shapes {
    let conv = |(name, [out, columns, kernel], _): (&str, [usize; 3], _)| {
        (format!("{name}.weight"), vec![out, columns, kernel, kernel])
    };
    CONVS.into_iter().map(conv).chain([("fc.weight".to_string(), vec![5, 12])]).collect()
}

impl ResNet {
    fn new(shapes: &Shapes, vb: VarBuilder) -> Result<Self> {
        let mut convs = BTreeMap::new();
        for (name, _, [padding, stride, groups]) in CONVS {
            let dims = &shapes[&format!("{name}.weight")];
            // What a convolution in groups is left with says how many.
            let groups = if groups == 1 {
                1
            } else {
                shapes[&format!("{name}.weight")][0] * groups / whole()[&format!("{name}.weight")][0]
            };
            let conv = nn::conv2d_no_bias(
                dims[1] * groups,
                dims[0],
                dims[2],
                config(padding, stride, groups),
                vb.pp(name),
            )?;
            convs.insert(name, (conv, nn::batch_norm(dims[0], EPS, vb.pp(format!("{name}.bn")))?));
        }
        let dims = &shapes["fc.weight"];
        Ok(Self { convs, fc: nn::linear(dims[1], dims[0], vb.pp("fc"))? })
    }

    fn conv(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (conv, norm) = &self.convs[name];
        norm.forward_t(&conv.forward(x)?, false)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let conv = |name, x: &Tensor| self.conv(name, x);
        let x = conv("stem", x)?.relu()?;
        let x = (conv("layer1.conv2", &conv("layer1.conv1", &x)?.relu()?)? + &x)?.relu()?;
        let body = conv("layer2.conv2", &conv("layer2.conv1", &x)?.relu()?)?;
        let x = (body + conv("layer2.down", &x)?)?.relu()?;
        let body = conv("layer3.depth", &conv("layer3.expand", &x)?.relu()?)?.relu()?;
        let x = (conv("layer3.project", &body)? + &x)?;
        let x = (conv("layer4.conv2", &conv("layer4.conv1", &x)?.relu()?)? + &x)?.relu()?;
        self.fc.forward(&x.avg_pool2d(2)?.mean((2, 3))?)
    }
}

/// The same net as stages.
fn stages(file: &Checkpoint) -> Result<Vec<Stage>> {
    let conv = |name: &str| -> Result<Vec<Stage>> {
        let (_, _, [padding, stride, groups]) = CONVS.into_iter().find(|(n, ..)| *n == name).expect("a name");
        Ok(vec![
            Stage::conv2d(file, name, config(padding, stride, groups))?,
            Stage::batch_norm(file, &format!("{name}.bn"), EPS)?,
        ])
    };
    let relu = || vec![Stage::Map(|x| x.relu())];
    let residual = |body: Vec<Vec<Stage>>, shortcut| vec![Stage::Residual { body: body.concat(), shortcut }];
    Ok([
        conv("stem")?,
        relu(),
        residual(vec![conv("layer1.conv1")?, relu(), conv("layer1.conv2")?], vec![]),
        relu(),
        residual(vec![conv("layer2.conv1")?, relu(), conv("layer2.conv2")?], conv("layer2.down")?),
        relu(),
        residual(
            vec![conv("layer3.expand")?, relu(), conv("layer3.depth")?, relu(), conv("layer3.project")?],
            vec![],
        ),
        residual(vec![conv("layer4.conv1")?, relu(), conv("layer4.conv2")?], vec![]),
        relu(),
        vec![Stage::AvgPool((2, 2), (2, 2)), Stage::GlobalAvgPool, Stage::linear(file, "fc")?],
    ]
    .concat())
}

/// A ResNet with random parameters and statistics.
fn random_net(seed: u64, dtype: DType) -> Result<(VarMap, ResNet)> {
    let vars = VarMap::new();
    let net = ResNet::new(&whole(), VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
    let data = vars.data().lock().expect("not poisoned");
    let sorted: BTreeMap<_, _> = data.iter().collect();
    for (index, (name, var)) in sorted.into_iter().enumerate() {
        let values = random(seed + index as u64, var.dims())?;
        let values = if name.ends_with("running_var") { (values.sqr()? + 0.3)? } else { values };
        var.set(&values.to_dtype(dtype)?)?;
    }
    drop(data);
    Ok((vars, net))
}

/// Sets elements of a Var along a dimension to zero.
fn clear(vars: &VarMap, name: &str, dim: usize, places: &[usize]) -> Result<()> {
    let data = vars.data().lock().expect("not poisoned");
    let var = &data[name];
    let mut mask = vec![1f64; var.dim(dim)?];
    places.iter().for_each(|&place| mask[place] = 0.);
    let mut dims = vec![1; var.rank()];
    dims[dim] = mask.len();
    let mask = Tensor::from_vec(mask, dims, &Device::Cpu)?.to_dtype(var.dtype())?;
    var.set(&var.broadcast_mul(&mask)?)
}

/// A channel of a convolution goes for all who come after: the row's weights, or the norm's factor, and the norm's offset.
fn silence(vars: &VarMap, name: &str, places: &[usize], by_factor: bool) -> Result<()> {
    match by_factor {
        true => clear(vars, &format!("{name}.bn.weight"), 0, places)?,
        false => {
            clear(vars, &format!("{name}.weight"), 0, places)?;
            clear(vars, &format!("{name}.bn.running_mean"), 0, places)?;
        }
    }
    clear(vars, &format!("{name}.bn.bias"), 0, places)
}

fn dims(file: &Checkpoint, name: &str) -> Vec<usize> {
    file.tensors[&format!("{name}.weight")].dims().to_vec()
}

#[test]
fn a_small_resnet_of_nn() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        for by_factor in [false, true] {
            let (vars, net) = random_net(3, dtype)?;
            let x = random(90, &[2, 3, 8, 8])?.to_dtype(dtype)?;
            let file = Checkpoint::from_varmap(&vars)?;
            assert_close(&run(&stages(&file)?, &x)?, &values(&net.forward(&x)?)?, tolerance);
            // Nothing is zero: nothing goes.
            let same = compact(&stages(&file)?)?.checkpoint()?;
            for (name, tensor) in &file.tensors {
                assert_eq!(values(&same.tensors[name])?, values(tensor)?, "{name}");
            }
            // Within blocks; of the first sum three channels, of which the stem and the block must both be silent; of the second one two, and one that
            // only the body leaves; of the depthwise convolution four; of the convolution in groups a whole group and one more, on each side.
            silence(&vars, "stem", &[0, 3, 7, 5], by_factor)?;
            silence(&vars, "layer1.conv2", &[0, 3, 7, 1], by_factor)?;
            silence(&vars, "layer1.conv1", &[2, 4], by_factor)?;
            silence(&vars, "layer2.conv1", &[0, 9, 5], by_factor)?;
            silence(&vars, "layer2.conv2", &[0, 1, 2, 3, 5, 11], by_factor)?;
            silence(&vars, "layer2.down", &[0, 1, 2, 3, 5], by_factor)?;
            silence(&vars, "layer3.project", &[0, 1, 2, 3, 5, 7], by_factor)?;
            silence(&vars, "layer3.expand", &[1, 2], by_factor)?;
            silence(&vars, "layer3.depth", &[1, 2, 8, 15], by_factor)?;
            silence(&vars, "layer4.conv1", &[0, 1, 2, 3, 6], by_factor)?;
            silence(&vars, "layer4.conv2", &[0, 1, 2, 3, 5], by_factor)?;
            let expected = values(&net.forward(&x)?)?;
            let small = compact(&stages(&Checkpoint::from_varmap(&vars)?)?)?;
            assert_close(&small.forward(&x)?, &expected, tolerance);
            let file = small.checkpoint()?;
            for (name, expected) in [
                ("stem", [5, 3, 3, 3].as_slice()),
                ("layer1.conv1", &[4, 5, 3, 3]),
                ("layer1.conv2", &[5, 4, 3, 3]),
                ("layer2.conv1", &[7, 5, 3, 3]),
                // A whole group of the convolution in groups goes, and of the second one a channel: the third group's has to go with a silent
                // one, so that it stays in the sum.
                ("layer2.conv2", &[8, 7, 3, 3]),
                ("layer2.down", &[8, 5, 1, 1]),
                ("layer3.expand", &[12, 8, 1, 1]),
                ("layer3.depth", &[12, 1, 3, 3]),
                ("layer3.project", &[8, 12, 1, 1]),
                ("layer4.conv1", &[8, 4, 3, 3]),
                ("layer4.conv2", &[8, 8, 1, 1]),
                ("fc", &[5, 8]),
            ] {
                assert_eq!(dims(&file, name), expected, "{name}, by factor {by_factor}");
            }
            // A model of these sizes loads the file, which has the names of the whole one's.
            let names: Vec<_> = file.tensors.keys().collect();
            assert_eq!(names, Checkpoint::from_varmap(&vars)?.tensors.keys().collect::<Vec<_>>());
            let shapes = file.tensors.iter().map(|(name, t)| (name.clone(), t.dims().to_vec())).collect();
            let small_vars = VarMap::new();
            let model = ResNet::new(&shapes, VarBuilder::from_varmap(&small_vars, dtype, &Device::Cpu))?;
            file.load_into(&small_vars)?;
            assert_close(&model.forward(&x)?, &expected, tolerance);
            let again = compact(&small.stages)?.checkpoint()?;
            for (name, tensor) in &file.tensors {
                assert_eq!(again.tensors[name].dims(), tensor.dims(), "{name}");
            }
        }
    }
    Ok(())
}

/// Any rows, columns, factors and offsets may be zero.
#[test]
fn outputs_of_random_zeros_stay() -> Result<()> {
    let mut removed = 0;
    for seed in 0..40 {
        let (vars, net) = random_net(1000 + seed, DType::F64)?;
        let coins = values(&random(7000 + seed, &[400])?)?;
        let mut coin = coins.iter().cycle();
        let mut some = |count: usize, share: f64| -> Vec<usize> {
            (0..count).filter(|_| coin.next().is_some_and(|c| *c < share)).collect()
        };
        for (name, [out, columns, _], _) in CONVS {
            clear(&vars, &format!("{name}.weight"), 0, &some(out, -0.5))?;
            clear(&vars, &format!("{name}.weight"), 1, &some(columns, -0.7))?;
            clear(&vars, &format!("{name}.bn.weight"), 0, &some(out, -0.5))?;
            let quiet = some(out, 0.2);
            clear(&vars, &format!("{name}.bn.bias"), 0, &quiet)?;
            clear(&vars, &format!("{name}.bn.running_mean"), 0, &quiet)?;
        }
        clear(&vars, "fc.weight", 1, &some(12, 0.))?;
        let x = random(seed, &[2, 3, 8, 8])?;
        let file = Checkpoint::from_varmap(&vars)?;
        let small = compact(&stages(&file)?)?;
        assert_close(&small.forward(&x)?, &values(&net.forward(&x)?)?, 1e-11);
        let count = |file: &Checkpoint| file.tensors.values().map(Tensor::elem_count).sum::<usize>();
        removed += count(&file) - count(&small.checkpoint()?);
    }
    assert!(removed > 40 * 500, "{removed}");
    Ok(())
}

fn layer(name: &str, seed: u64, dims: &[usize], bias: bool) -> Result<Weights> {
    let bias = if bias { Some(random(seed + 500, &dims[..1])?) } else { None };
    Ok(Weights { name: name.into(), weight: random(seed, dims)?, bias })
}

fn norm(name: &str, weight: &[f64], bias: &[f64]) -> Result<Norm> {
    let new = |values: &[f64]| Tensor::new(values, &Device::Cpu);
    let count = weight.len();
    Ok(Norm {
        name: name.into(),
        affine: Some((new(weight)?, new(bias)?)),
        running_mean: new(&vec![0.5; count])?,
        running_var: new(&vec![2.; count])?,
        eps: EPS,
    })
}

/// Norms inside of the layers before them, before or after zeros are removed; one that follows a sum stays.
#[test]
fn norms_fold() -> Result<()> {
    let (vars, net) = random_net(20, DType::F64)?;
    silence(&vars, "layer1.conv1", &[2, 4], true)?;
    silence(&vars, "stem", &[1], false)?;
    let x = random(90, &[2, 3, 8, 8])?;
    let expected = values(&net.forward(&x)?)?;
    let stages = stages(&Checkpoint::from_varmap(&vars)?)?;
    let folded = fold_norms(&stages)?;
    assert_close(&run(&folded, &x)?, &expected, 1e-12);
    let (before, after) = (fold_norms(&compact(&stages)?.stages)?, compact(&folded)?);
    assert_close(&run(&before, &x)?, &expected, 1e-12);
    assert_close(&after.forward(&x)?, &expected, 1e-12);
    let file = after.checkpoint()?;
    assert!(file.tensors.keys().all(|name| !name.contains(".bn.")));
    assert_eq!(dims(&file, "layer1.conv2"), [8, 4, 3, 3]);
    let with = [
        Stage::Residual { body: vec![Stage::Linear(layer("a", 1, &[3, 3], true)?)], shortcut: vec![] },
        Stage::BatchNorm(norm("bn", &[1., -1., 2.], &[0.1, 0.7, -0.2])?),
        Stage::Linear(layer("b", 2, &[2, 3], false)?),
        Stage::BatchNorm(norm("bn", &[1., 3.], &[0.1, 0.7])?),
    ];
    let x = random(7, &[4, 3])?;
    let folded = fold_norms(&with)?;
    assert_eq!(folded.len(), 3);
    assert_close(&run(&folded, &x)?, &values(&run(&with, &x)?)?, 1e-13);
    let wrong =
        [Stage::Linear(layer("b", 2, &[2, 3], false)?), Stage::BatchNorm(norm("bn", &[1.; 3], &[0.; 3])?)];
    let message = fold_norms(&wrong).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("BatchNorm bn of 3 channels follows layer b of 2 units"), "{message}");
    Ok(())
}

/// A constant goes into the running mean of a norm behind a layer without bias, and into the bias of one with it.
#[test]
fn constants_go_where_there_is_a_place() -> Result<()> {
    for bias in [false, true] {
        let stages = [
            Stage::Conv(layer("a", 1, &[3, 2, 1, 1], false)?, config(0, 1, 1)),
            Stage::BatchNorm(norm("a.bn", &[1., 0., 2.], &[0.1, 0.7, -0.2])?),
            Stage::Map(|x| x.tanh()),
            Stage::Conv(layer("b", 2, &[4, 3, 3, 3], bias)?, config(0, 1, 1)),
            Stage::BatchNorm(norm("b.bn", &[1., -1., 2., 0.5], &[0.1, 0.7, -0.2, 0.])?),
            Stage::Map(|x| x.relu()),
            Stage::AvgPool((2, 2), (1, 1)),
            Stage::Flatten,
            Stage::Linear(layer("c", 3, &[2, 4 * 9], bias)?),
        ];
        let x = random(5, &[3, 2, 6, 6])?;
        let small = compact(&stages)?;
        assert_close(&small.forward(&x)?, &values(&run(&stages, &x)?)?, 1e-13);
        let file = small.checkpoint()?;
        assert_eq!((dims(&file, "a"), dims(&file, "b")), (vec![2, 2, 1, 1], vec![4, 2, 3, 3]));
        assert_eq!(file.tensors.contains_key("b.bias"), bias);
        // By hand: the kernel's sum at the second channel times tanh of the offset.
        let Stage::Conv(b, _) = &stages[3] else { unreachable!() };
        let kernel = b.weight.narrow(1, 1, 1)?.sum((2, 3))?.flatten_all()?;
        let added = values(&(kernel * 0.7f64.tanh())?)?;
        let mean = values(&file.tensors["b.bn.running_mean"])?;
        let found: Vec<f64> = match &b.bias {
            Some(old) => values(&(&file.tensors["b.bias"] - old)?)?,
            None => mean.iter().map(|mean| 0.5 - mean).collect(),
        };
        found.iter().zip(added).for_each(|(found, right)| assert!((found - right).abs() < 1e-14));
    }
    Ok(())
}

/// A channel of a sum stays for the one layer that reads it, and goes when none does, whatever is written to it.
#[test]
fn channels_of_a_sum_go_together() -> Result<()> {
    let config = config(0, 1, 1);
    let mut reader = layer("out", 4, &[2, 4], true)?;
    // The last layer reads only the first and the third one.
    reader.weight = (reader.weight * Tensor::new(&[[1f64, 0., 1., 0.], [1., 0., 1., 0.]], &Device::Cpu)?)?;
    for (inner, left) in [(3, vec![0, 1, 2]), (1, vec![0, 2])] {
        let mut first = layer("in", 2, &[3, 4, 1, 1], true)?;
        // The block reads the second channel too, or all do but this one's.
        let mask: Vec<f64> = (0..4).map(|c| if c == 3 || (inner == 1 && c == 1) { 0. } else { 1. }).collect();
        first.weight = first.weight.broadcast_mul(&Tensor::from_vec(mask, (1, 4, 1, 1), &Device::Cpu)?)?;
        let stages = [
            Stage::Conv(layer("stem", 1, &[4, 3, 1, 1], true)?, config),
            Stage::Residual {
                body: vec![
                    Stage::Conv(first, config),
                    Stage::Map(|x| x.relu()),
                    Stage::Conv(layer("back", 3, &[4, 3, 1, 1], false)?, config),
                ],
                shortcut: vec![],
            },
            Stage::GlobalAvgPool,
            Stage::Linear(reader.clone()),
        ];
        let small = compact(&stages)?;
        assert_eq!(small.units, [left.clone(), vec![0, 1, 2], left, vec![0, 1]]);
        let x = random(6, &[2, 3, 2, 2])?;
        assert_close(&small.forward(&x)?, &values(&run(&stages, &x)?)?, 1e-13);
    }
    Ok(())
}

/// Linear layers with norms and sums; inputs that only a sum and a norm take.
#[test]
fn features_and_inputs() -> Result<()> {
    let mut out = layer("out", 4, &[2, 4], true)?;
    out.weight = out.weight.broadcast_mul(&Tensor::new(&[[1f64, 0., 1., 0.]], &Device::Cpu)?)?;
    let mut inner = layer("a", 1, &[3, 4], true)?;
    inner.weight = inner.weight.broadcast_mul(&Tensor::new(&[[1f64, 1., 1., 0.]], &Device::Cpu)?)?;
    let stages = [
        Stage::BatchNorm(norm("norm", &[1., 0., 2., 1.], &[0.1, 0.7, -0.2, 0.3])?),
        Stage::Residual {
            body: vec![
                Stage::Linear(inner),
                Stage::Map(|x| x.relu()),
                Stage::Linear(layer("b", 2, &[4, 3], false)?),
                Stage::BatchNorm(Norm { affine: None, ..norm("b.bn", &[1.; 4], &[0.; 4])? }),
            ],
            shortcut: vec![],
        },
        Stage::Linear(out),
    ];
    let small = compact(&stages)?;
    assert_eq!(small.inputs, [0, 2]);
    let x = random(6, &[5, 4])?;
    assert_close(&small.forward(&x)?, &values(&run(&stages, &x)?)?, 1e-13);
    let file = small.checkpoint()?;
    assert_eq!((dims(&file, "a"), dims(&file, "out")), (vec![3, 2], vec![2, 2]));
    assert!(!file.tensors.contains_key("b.bn.weight"));
    Ok(())
}

#[test]
fn what_does_not_fit_is_said() -> Result<()> {
    let conv = |name: &str, dims: &[usize], groups| -> Result<Stage> {
        Ok(Stage::Conv(layer(name, 0, dims, false)?, config(0, 1, groups)))
    };
    let linear = |dims: &[usize]| layer("fc", 0, dims, false).map(Stage::Linear);
    let bn = |count: usize| norm("bn", &vec![1.; count], &vec![0.; count]).map(Stage::BatchNorm);
    let mut variance = norm("bn", &[1.; 4], &[0.; 4])?;
    variance.running_var = Tensor::new(&[1f64, -1., 1., 1.], &Device::Cpu)?;
    let stem = || conv("stem", &[4, 3, 1, 1], 1);
    let sum = |body: Vec<Stage>, shortcut: Vec<Stage>| Stage::Residual { body, shortcut };
    for (stages, part) in [
        (
            vec![stem()?, Stage::Map(|x| x.avg_pool2d(2)), conv("b", &[2, 4, 1, 1], 1)?],
            "stage 1 (Map) is not a function of each element: unexpected rank",
        ),
        (
            vec![
                stem()?,
                Stage::Map(|x| crate::nn::ops::softmax(x, candle_core::D::Minus1)),
                conv("b", &[2, 4, 1, 1], 1)?,
            ],
            "stage 1 (Map) is not a function of each element: what it makes of one depends on others",
        ),
        (
            vec![stem()?, Stage::Map(|x| x.sum_keepdim(0)), conv("b", &[2, 4, 1, 1], 1)?],
            "stage 1 (Map) is not a function of each element: of 6 numbers it makes [1]",
        ),
        (vec![stem()?, bn(3)?], "BatchNorm bn: expected [4] after layer stem of 4 units, got [3]"),
        (vec![stem()?, Stage::BatchNorm(variance)], "BatchNorm bn: running_var holds -1"),
        (
            vec![stem()?, Stage::Flatten, bn(4)?, linear(&[2, 4])?],
            "BatchNorm bn: after Flatten of maps it is not supported",
        ),
        (
            vec![stem()?, sum(vec![conv("b", &[3, 4, 1, 1], 1)?], vec![]), linear(&[2, 3])?],
            "stage 1 (Residual) adds [n, c, h, w] of layer b of 3 units to [n, c, h, w] of layer stem of 4 units",
        ),
        (
            vec![stem()?, sum(vec![Stage::GlobalAvgPool, linear(&[4, 4])?], vec![])],
            "stage 1 (Residual) adds [n, c] of layer fc of 4 units to [n, c, h, w] of layer stem",
        ),
        (
            vec![stem()?, Stage::GlobalAvgPool, Stage::AvgPool((2, 2), (2, 2)), linear(&[2, 4])?],
            "stage 2 (AvgPool) takes [n, c, h, w], got [n, c] of layer stem",
        ),
        (
            vec![stem()?, sum(vec![Stage::GlobalAvgPool, Stage::GlobalAvgPool, linear(&[4, 4])?], vec![])],
            "stage 1, body, stage 1 (GlobalAvgPool) takes [n, c, h, w]",
        ),
        (vec![conv("stem", &[4, 3, 1, 1], 3)?], "layer stem: expected 4 dimensions, none empty, in 3 groups"),
        (
            vec![stem()?, conv("b", &[4, 4, 1, 1], 2)?],
            "layer b [4, 4, 1, 1] does not follow layer stem of 4 units",
        ),
    ] {
        let message = compact(&stages).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    let twice = compact(&[stem()?, Stage::Map(|x| x.relu()), conv("stem", &[4, 4, 1, 1], 1)?])?;
    let message = twice.checkpoint().err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("two layers have a stem.weight"), "{message}");
    let message =
        Stage::batch_norm(&twice_less()?, "bn", EPS).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("the checkpoint has no bn.bias"), "{message}");
    Ok(())
}

fn twice_less() -> Result<Checkpoint> {
    let ones = Tensor::ones(4, DType::F64, &Device::Cpu)?;
    let parts = ["weight", "running_mean", "running_var"].map(|part| (format!("bn.{part}"), ones.clone()));
    Ok(Checkpoint { tensors: parts.into(), ..Default::default() })
}
