use candle_core::Var;

use super::*;
use crate::gpu::emulate::emulate;
use crate::ops::testing::{assert_close, check_gradients, random_var, values};

const LOGITS: [[f64; 3]; 4] = [[0.3, -1.2, 2.0], [1.5, 0.25, -0.75], [-2.0, 0.5, 1.0], [0.1, 0.2, -0.3]];

fn tensor<T: candle_core::NdArray>(values: T) -> Result<Tensor> {
    Tensor::new(values, &Device::Cpu)
}

/// Values and gradients of the sum of the losses against PyTorch's, natively and by the kernels, and against differences.
fn check(f: impl Fn(&Tensor) -> Result<Tensor>, losses: &[f64], gradient: &[f64]) -> Result<()> {
    let x = Var::from_tensor(&tensor(&LOGITS)?)?;
    let run = || -> Result<()> {
        let found = f(&x)?;
        assert_close(&found, losses, 1e-13);
        let grads = found.sum_all()?.backward()?;
        assert_close(grads.get(&x).unwrap_or(&found), gradient, 1e-13);
        Ok(())
    };
    run()?;
    emulate(run)?;
    check_gradients(std::slice::from_ref(&x), |a| f(&a[0]));
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let found = f(&x.to_dtype(dtype)?)?;
        assert_eq!(found.dtype(), dtype);
        assert_close(&found, losses, tolerance);
    }
    Ok(())
}

#[test]
fn cross_entropy_is_pytorchs() -> Result<()> {
    let weights = Some(tensor(&[0.5f64, 2., 1.25])?);
    let of = |weights: &Option<Tensor>, label_smoothing: f64, reduction| CrossEntropy {
        weights: weights.clone(),
        label_smoothing,
        reduction,
        ..Default::default()
    };
    use Reduction::{Mean, None as Each, Sum};
    let (whole, ignored) = ([2i64, 0, 1, 1], [2i64, -100, 1, 0]);
    check(
        |x| of(&weights, 0., Mean).loss(x, &tensor(&whole)?),
        &[0.742308604640989],
        &[
            0.0324606222137807,
            0.00724294383307856,
            -0.0397035660468593,
            -0.0244834485955596,
            0.0178988351302306,
            0.006584613465329,
            0.010455265241591,
            -0.220454881293287,
            0.209999616051696,
            0.125320561822797,
            -0.209325446593066,
            0.0840048847702692,
        ],
    )?;
    check(
        |x| of(&weights, 0., Sum).loss(x, &tensor(&[2i64, -100, 1, 1])?),
        &[4.10293817198207],
        &[
            0.186648577729239,
            0.0416469270402017,
            -0.228295504769441,
            0.,
            0.,
            0.,
            0.060117775139148,
            -1.2676155674364,
            1.20749779229725,
            0.72059323048108,
            -1.20362131791013,
            0.483028087429048,
        ],
    )?;
    check(
        |x| of(&None, 0.1, Mean).loss(x, &tensor(&whole)?),
        &[0.706108769730556],
        &[
            0.0289963822125145,
            -3.94792529298527e-06,
            -0.0289924342872215,
            -0.0537232480455671,
            0.0431258176660796,
            0.0105974303794875,
            -0.000818611440939828,
            -0.141785279262883,
            0.142603890703823,
            0.0817408204768017,
            -0.133785998072099,
            0.0520451775952976,
        ],
    )?;
    check(
        |x| of(&weights, 0.2, Mean).loss(x, &tensor(&ignored)?),
        &[0.885101680435688],
        &[
            0.0408840651722415,
            -0.0244497083448351,
            -0.0164343568274064,
            0.,
            0.,
            0.,
            0.00594016231210096,
            -0.281567395523201,
            0.2756272332111,
            -0.0531041422471953,
            0.0334639302255667,
            0.0196402120216286,
        ],
    )?;
    check(
        |x| of(&weights, 0.2, Each).loss(x, &tensor(&ignored)?),
        &[0.735422389524321, 0., 1.90017093599989, 0.683537976109619],
        &[
            0.153315244395906,
            -0.0916864062931316,
            -0.061628838102774,
            0.,
            0.,
            0.,
            0.0222756086703786,
            -1.055877733212,
            1.03360212454162,
            -0.199140533426982,
            0.125489738345875,
            0.0736507950811072,
        ],
    )
}

/// More dimensions, other integers, another number to ignore.
#[test]
fn shapes_and_dtypes() -> Result<()> {
    let x = tensor(&LOGITS)?;
    let loss = CrossEntropy { ignore_index: Some(7), label_smoothing: 0.1, ..Default::default() };
    let labels = tensor(&[2u32, 7, 1, 0])?;
    let expected = values(&loss.loss(&x, &labels)?)?;
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let labels = labels.to_dtype(dtype)?;
        assert_close(&loss.loss(&x, &labels)?, &expected, 0.);
        assert_close(&loss.loss(&x.reshape((2, 2, 3))?, &labels.reshape((2, 2))?)?, &expected, 0.);
    }
    let each = CrossEntropy { reduction: Reduction::None, ..loss };
    assert_eq!(each.loss(&x.reshape((2, 2, 3))?, &labels.reshape((2, 2))?)?.dims(), [2, 2]);
    assert_eq!(each.loss(&x.get(0)?, &labels.get(0)?)?.rank(), 0);
    // Without options it is the loss of this name.
    let (plain, labels) = (CrossEntropy::default(), tensor(&[2u8, 0, 1, 0])?);
    assert_close(&plain.loss(&x, &labels)?, &values(&cross_entropy(&x, &labels)?)?, 0.);
    Ok(())
}

/// Rows that do not count take no part, whatever is in them; classes of probability and weight 0 neither.
#[test]
fn what_does_not_count() -> Result<()> {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let x = Var::from_tensor(&tensor(&[[0.3, -1.2, -inf], [nan, inf, 0.], [-inf, -inf, -inf]])?)?;
    let weights = Some(tensor(&[1f64, 2., 0.])?);
    for label_smoothing in [0., 0.3] {
        let alone = CrossEntropy { weights: weights.clone(), label_smoothing, ..Default::default() };
        let row = Var::from_tensor(&x.narrow(0, 0, 1)?.copy()?)?;
        let expected = alone.loss(&row, &tensor(&[1i64])?)?;
        let of_row = expected.backward()?;
        let of_row = of_row.get(&row).map(values).transpose()?.unwrap_or_default();
        assert!(values(&expected)?[0].is_finite() && of_row.iter().all(|g| g.is_finite()));
        let check = || -> Result<()> {
            let found = alone.loss(&x, &tensor(&[1i64, -100, -100])?)?;
            assert_close(&found, &values(&expected)?, 1e-15);
            let grads = found.backward()?;
            let grad = grads.get(&x).map(values).transpose()?.unwrap_or_default();
            assert_close(&tensor(&grad[..3])?, &of_row, 1e-15);
            assert_eq!(grad[3..], [0.; 6]);
            Ok(())
        };
        check()?;
        emulate(check)?;
    }
    // A sum of nothing is 0, with a gradient of 0; a mean of nothing is an error.
    for reduction in [Reduction::Sum, Reduction::None] {
        let none = CrossEntropy { reduction, ..Default::default() }.loss(&x, &tensor(&[-100i64; 3])?)?;
        assert!(values(&none)?.iter().all(|&v| v == 0.));
        let grads = none.sum_all()?.backward()?;
        assert_eq!(grads.get(&x).map(values).transpose()?, Some(vec![0.; 9]));
    }
    let message = |loss: CrossEntropy, labels: [i64; 3]| -> Result<String> {
        Ok(loss.loss(&x, &tensor(&labels)?).err().map(|e| e.to_string()).unwrap_or_default())
    };
    let of = |weights: Option<Tensor>| CrossEntropy { weights, ..Default::default() };
    assert!(message(of(None), [-100; 3])?.contains("none of 3 terms counts"));
    assert!(message(of(weights), [2; 3])?.contains("none of 3 terms counts"));
    for (label, shown) in [(3, "label 3 of term 1"), (-1, "label -1 of term 1")] {
        let message = message(of(None), [0, label, 0])?;
        assert!(message.contains(shown) && message.contains("3 classes"), "{message}");
    }
    let unignored = CrossEntropy { ignore_index: None, ..Default::default() };
    assert!(message(unignored, [0, -100, 0])?.contains("label -100 of term 1"));
    for wrong in [&[1f64, 2.][..], &[1., -1., 2.], &[1., nan, 2.], &[1., inf, 2.]] {
        assert!(message(of(Some(tensor(wrong)?)), [0; 3])?.contains("weight"));
    }
    for label_smoothing in [-0.1, 1.1, nan] {
        let loss = CrossEntropy { label_smoothing, ..Default::default() };
        assert!(message(loss, [0; 3])?.contains("label smoothing in 0..=1"));
    }
    let plain = CrossEntropy::default();
    assert!(plain.loss(&x, &tensor(&[0f64; 3])?).is_err() && plain.loss(&x, &tensor(&[0u32; 2])?).is_err());
    Ok(())
}

/// The Hessian of the loss, by differences of its gradient, is each term's times its weight.
#[test]
fn weights_of_terms_are_those_of_the_hessian() -> Result<()> {
    let labels = tensor(&[2i64, -100, 1, 0])?;
    for (reduction, label_smoothing) in
        [(Reduction::Mean, 0.), (Reduction::Sum, 0.), (Reduction::Mean, 0.2), (Reduction::Sum, 0.2)]
    {
        let weights = Some(tensor(&[0.5f64, 2., 1.25])?);
        let loss = CrossEntropy { weights, label_smoothing, reduction, ..Default::default() };
        let of_terms = values(&loss.term_weights(&labels, 3)?)?;
        for row in 0..4 {
            let gradient = |h: f64| -> Result<f64> {
                let mut moved = LOGITS;
                moved[row][0] += h;
                let x = Var::from_tensor(&tensor(&moved)?)?;
                let grads = loss.loss(&x, &labels)?.backward()?;
                Ok(grads.get(&x).map(values).transpose()?.unwrap_or_default()[3 * row])
            };
            let exps = LOGITS[row].map(f64::exp);
            let p = exps[0] / exps.iter().sum::<f64>();
            let second = (gradient(1e-5)? - gradient(-1e-5)?) / 2e-5;
            assert!((second - of_terms[row] * p * (1. - p)).abs() < 1e-9, "{reduction:?} {row}");
        }
    }
    Ok(())
}

#[test]
fn binary_cross_entropy_is_pytorchs() -> Result<()> {
    let targets = || tensor(&[[1f64, 0., 0.25], [0., 1., 1.], [0.5, 0., 0.], [1., 1., 0.]]);
    let weights = || Ok::<_, candle_core::Error>(Some(tensor(&[0.5f64, 2., 1.25])?));
    check(
        |x| BinaryCrossEntropy { pos_weight: weights()?, ..Default::default() }.loss(x, &targets()?),
        &[0.950422330828214],
        &[
            -0.0177315617995142,
            0.0192896013750819,
            0.051945574612625,
            0.0681312063494703,
            -0.0729705831857003,
            -0.0707477811641034,
            -0.013383150706951,
            0.0518716109334879,
            0.0609215482191671,
            -0.0197925338550442,
            -0.075027667114587,
            0.0354631235990284,
        ],
    )?;
    let of_rows = || Ok::<_, candle_core::Error>(Some(tensor(&[[1f64], [0.], [2.], [0.5]])?));
    check(
        |x| {
            let loss =
                BinaryCrossEntropy { weights: of_rows()?, pos_weight: weights()?, reduction: Reduction::Sum };
            loss.loss(x, &targets()?)
        },
        &[8.97680611790082],
        &[
            -0.21277874159417,
            0.231475216500982,
            0.6233468953515,
            0.,
            0.,
            0.,
            -0.321195616966824,
            1.24491866240371,
            1.46211715726001,
            -0.118755203130265,
            -0.450166002687522,
            0.212778741594171,
        ],
    )?;
    let pos_weight = || Ok::<_, candle_core::Error>(Some(tensor(3f64)?));
    check(
        |x| {
            let loss = BinaryCrossEntropy {
                weights: weights()?,
                pos_weight: pos_weight()?,
                reduction: Reduction::None,
            };
            loss.loss(x, &targets()?)
        },
        &[
            0.831532866702791,
            0.526564934676062,
            2.11299002070557,
            0.850706638991376,
            3.45563651927306,
            4.26326627293087,
            1.62692801104297,
            1.94815396836021,
            1.64157710939778,
            0.966594990110356,
            3.58883321628955,
            0.692944055585659,
        ],
        &[
            -0.638336224782512,
            0.462950433001965,
            0.713994521208529,
            0.408787238096822,
            -2.62694099468521,
            -2.54692012190772,
            -0.630797077977882,
            1.24491866240371,
            0.913823223287506,
            -0.71253121878159,
            -2.70099601612513,
            0.531946853985426,
        ],
    )?;
    let x = random_var(0, &[4, 3])?;
    let wrong = BinaryCrossEntropy { weights: Some(tensor(&[1f64; 4])?), ..Default::default() };
    let message = wrong.loss(&x, &targets()?).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("weights that broadcast to the logits [4, 3], got [4]"), "{message}");
    let empty = x.narrow(0, 0, 0)?;
    assert!(BinaryCrossEntropy::default().loss(&empty, &empty).is_err());
    Ok(())
}
