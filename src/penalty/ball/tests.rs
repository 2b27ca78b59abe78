use super::*;
use crate::gpu::emulate::emulate;
use crate::ops::testing::random;
use proptest::prelude::*;

fn sets(k: f64, grouping: Grouping) -> [FeasibleSet; 7] {
    [
        FeasibleSet::L2 { radius: k },
        FeasibleSet::Box { bound: k },
        FeasibleSet::L1 { radius: k },
        FeasibleSet::GroupBall { grouping, radius: k },
        FeasibleSet::Simplex { sum: k },
        FeasibleSet::MaxNorm { grouping, radius: k },
        FeasibleSet::Sphere { grouping, radius: k },
    ]
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(t: &Tensor) -> Vec<u64> {
    values(t).iter().map(|v| v.to_bits()).collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn norm(a: &[f64]) -> f64 {
    a.iter().map(|a| a * a).sum::<f64>().sqrt()
}

/// A tensor of one of several shapes, with zeros, whole zero rows and ties, and a grouping.
fn weights() -> impl Strategy<Value = (Vec<f64>, Vec<usize>, Grouping)> {
    let shape = prop_oneof![
        (1..5usize, 1..6usize).prop_map(|(m, n)| vec![m, n]),
        (1..4usize, 1..4usize).prop_map(|(o, i)| vec![o, i, 2, 3]),
    ];
    let grouping = prop_oneof![
        Just(Grouping::Rows),
        Just(Grouping::Columns),
        Just(Grouping::InputChannels),
        Just(Grouping::Whole),
        (1..4usize, 1..4usize).prop_map(|(rows, columns)| Grouping::Blocks { rows, columns }),
    ];
    (shape, grouping).prop_flat_map(|(shape, grouping)| {
        let count = shape.iter().product::<usize>();
        let element = prop_oneof![2 => Just(0.0), 1 => Just(0.5), 1 => Just(-0.5), 6 => -2.0..2f64];
        (prop::collection::vec(element, count), Just(shape), Just(grouping))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// `<w - p, z - p> <= 0` for all `z` of a convex set, which characterizes the nearest point `p`; and projections of two points are
    /// no farther apart than the points.
    #[test]
    fn nearest_points((x, shape, grouping) in weights(), k in 0.0..3f64, seed in prop::collection::vec(-1.0..1f64, 72), scale in -20..21i32) {
        let unit = 10f64.powi(scale);
        let k = if k < 0.3 { 0.0 } else { k * unit };
        let x: Vec<f64> = x.iter().map(|v| v * unit).collect();
        let w = Tensor::from_vec(x.clone(), shape.clone(), &Device::Cpu).unwrap();
        let other: Vec<f64> = seed[..x.len()].iter().map(|v| v * k.max(1e-3 * unit)).collect();
        let other_w = Tensor::from_vec(other.clone(), shape, &Device::Cpu).unwrap();
        for set in sets(k, grouping) {
            let p = values(&set.project(&w).unwrap());
            let z = values(&set.project(&other_w).unwrap());
            if matches!(set, FeasibleSet::Sphere { .. }) {
                // Not convex: no point of it is nearer.
                prop_assert!(distance(&x, &p) <= distance(&x, &z) + 1e-12 * unit, "{set:?}");
                continue;
            }
            let inner: f64 = x.iter().zip(&p).zip(&z).map(|((x, p), z)| (x - p) * (z - p)).sum();
            prop_assert!(inner <= 1e-12 * unit * (unit + k), "{set:?} {inner}");
            prop_assert!(distance(&p, &z) <= distance(&x, &other) + 1e-12 * (unit + k), "{set:?}");
            prop_assert!(distance(&p, &z) <= distance(&x, &z) + 1e-12 * (unit + k), "{set:?}");
        }
    }

    /// In every dtype: the result is in the set, a second projection changes no bit, nor does the projection of a point of the set.
    #[test]
    fn in_the_set_and_there_to_stay((x, shape, grouping) in weights(), k in 0.0..3f64, scale in -20..21i32) {
        for (dtype, unit) in [
            (DType::F64, 10f64.powi(scale)),
            (DType::F32, 10f64.powi(scale)),
            (DType::BF16, 10f64.powi(scale)),
            (DType::F16, 10f64.powi(scale / 5)),
        ] {
            let k = if k < 0.3 { 0.0 } else { k * unit };
            let scaled: Vec<f64> = x.iter().map(|v| v * unit).collect();
            let w = Tensor::from_vec(scaled, shape.clone(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let (relative, smallest) = rounding(dtype);
            let n = x.len() as f64;
            for set in sets(k, grouping) {
                let p = set.project(&w).unwrap();
                prop_assert_eq!((p.dims(), p.dtype()), (w.dims(), dtype));
                let slack = match set {
                    FeasibleSet::Simplex { .. } | FeasibleSet::Sphere { .. } => {
                        4.0 * relative * k + n * f64::EPSILON * k + n * smallest
                    }
                    _ => 0.0,
                };
                prop_assert!(set.violation(&p).unwrap() <= slack, "{set:?} {dtype:?} {}", set.violation(&p).unwrap());
                prop_assert_eq!(bits(&set.project(&p).unwrap()), bits(&p), "{:?} {:?}", set, dtype);
                if set.violation(&w).unwrap() == 0.0 {
                    prop_assert_eq!(bits(&p), bits(&w), "{:?} {:?}", set, dtype);
                }
                // Not moved further than what is exact, plus rounding.
                let exact = values(&set.project(&w.to_dtype(DType::F64).unwrap()).unwrap());
                let bound = 8.0 * relative * (k + 2.0 * unit) * n.sqrt() + 8.0 * n * smallest;
                prop_assert!(distance(&exact, &values(&p)) <= bound, "{set:?} {dtype:?}");
            }
        }
    }
}

#[test]
fn by_hand() {
    let w = Tensor::new(&[[3.0, -4.0], [0.0, 0.5]], &Device::Cpu).unwrap();
    let rows = Grouping::Rows;
    for (set, expected) in [
        (FeasibleSet::Box { bound: 2.0 }, [2.0, -2.0, 0.0, 0.5]),
        // Threshold 2.5: 0.5 and 1.5 stay.
        (FeasibleSet::L1 { radius: 2.0 }, [0.5, -1.5, 0.0, 0.0]),
        // Norms 5 and 0.5 less 0.25 make 5.
        (FeasibleSet::GroupBall { grouping: rows, radius: 5.0 }, [2.85, -3.8, 0.0, 0.25]),
        (FeasibleSet::Simplex { sum: 1.0 }, [1.0, 0.0, 0.0, 0.0]),
        (FeasibleSet::MaxNorm { grouping: rows, radius: 1.0 }, [0.6, -0.8, 0.0, 0.5]),
        (FeasibleSet::Sphere { grouping: rows, radius: 1.0 }, [0.6, -0.8, 0.0, 1.0]),
        (FeasibleSet::L2 { radius: 0.0 }, [0.0; 4]),
    ] {
        let p = values(&set.project(&w).unwrap());
        assert!(distance(&p, &expected) < 1e-14, "{set:?} {p:?}");
    }
    let zero = w.zeros_like().unwrap();
    let equal = values(&FeasibleSet::Sphere { grouping: rows, radius: 2.0 }.project(&zero).unwrap());
    assert!(distance(&equal, &[2f64.sqrt(); 4]) < 1e-14);
    assert_eq!(values(&FeasibleSet::Simplex { sum: 2.0 }.project(&zero).unwrap()), [0.5; 4]);
}

/// A view is read in its own order, and large values beside a small radius keep it.
#[test]
fn views_and_far_points() {
    let w = Tensor::new(&[[3f32, 0.1], [4., 0.2]], &Device::Cpu).unwrap().t().unwrap();
    let p = FeasibleSet::MaxNorm { grouping: Grouping::Rows, radius: 1.0 }.project(&w).unwrap();
    assert!(distance(&values(&p), &[0.6, 0.8, 0.1, 0.2]) < 1e-6);
    let far = Tensor::new(&[1e20, -1e20, 1.0], &Device::Cpu).unwrap();
    assert!(
        distance(&values(&FeasibleSet::L1 { radius: 1.0 }.project(&far).unwrap()), &[0.5, -0.5, 0.0]) < 1e-15
    );
    let far = Tensor::new(&[3e200, -4e200], &Device::Cpu).unwrap();
    assert!(distance(&values(&FeasibleSet::L2 { radius: 5.0 }.project(&far).unwrap()), &[3.0, -4.0]) < 1e-14);
}

#[test]
fn refusals() {
    let w = Tensor::new(&[1.0, 2.0], &Device::Cpu).unwrap();
    for k in [-1.0, f64::NAN, f64::INFINITY] {
        for set in sets(k, Grouping::Whole) {
            assert!(
                set.project(&w).is_err() && set.check().is_err() && set.violation(&w).is_err(),
                "{set:?}"
            );
        }
    }
    for bad in [f64::NAN, f64::NEG_INFINITY] {
        let w = Tensor::new(&[1.0, bad], &Device::Cpu).unwrap();
        for set in sets(1.0, Grouping::Whole) {
            let error = set.project(&w).unwrap_err().to_string();
            assert!(error.contains("expected finite weights") && error.contains("at place 1"), "{error}");
        }
    }
    let whole = Tensor::new(&[1u32], &Device::Cpu).unwrap();
    assert!(FeasibleSet::Box { bound: 1.0 }.project(&whole).is_err());
}

/// Where the weights stay on the device the same comes out, in the set, and there it stays; composed of the loops of the CPU and of the
/// kernels.
#[test]
fn on_the_device_as_on_the_host() {
    let shapes = [(vec![5, 7], 1.0), (vec![3, 4, 3, 3], 0.2), (vec![300], 3.0)];
    for (stream, (shape, k)) in shapes.into_iter().enumerate() {
        for (dtype, tolerance) in
            [(DType::F64, 1e-12), (DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)]
        {
            let w = random(stream as u64, &shape).unwrap().to_dtype(dtype).unwrap();
            let groupings = [
                Grouping::Rows,
                Grouping::Columns,
                Grouping::InputChannels,
                Grouping::Blocks { rows: 3, columns: 4 },
            ];
            for set in groupings.into_iter().flat_map(|grouping| sets(k, grouping)) {
                if matches!(set, FeasibleSet::Simplex { .. }) {
                    assert!(
                        device::moved(&set, &w).unwrap().is_none()
                            && device::violation(&set, &w).unwrap().is_none()
                    );
                    continue;
                }
                let expected = set.moved(&w).unwrap().unwrap_or_else(|| w.clone());
                let check = || {
                    let found = device::moved(&set, &w).unwrap().expect("no need of the host");
                    let found = found.unwrap_or_else(|| w.clone());
                    assert_eq!((found.dims(), found.dtype()), (w.dims(), dtype));
                    let off = distance(&values(&expected), &values(&found));
                    assert!(off <= tolerance * norm(&values(&expected)).max(k), "{set:?} {dtype:?}: {off}");
                    let again = device::moved(&set, &found).unwrap().expect("no need of the host");
                    assert!(again.is_none(), "{set:?} {dtype:?}");
                    let (there, here) = (device::violation(&set, &w).unwrap(), set.violation(&w).unwrap());
                    assert!(
                        (there.unwrap() - here).abs() <= 1e-12 * here,
                        "{set:?} {dtype:?} {there:?} {here}"
                    );
                    // The sums of the two are not added up in the same order.
                    let (left, order) =
                        (set.violation(&found).unwrap(), w.elem_count() as f64 * f64::EPSILON * k);
                    let sphere = matches!(set, FeasibleSet::Sphere { .. });
                    let slack = if sphere { slack(dtype, w.elem_count(), k) } else { order };
                    assert!(left <= slack, "{set:?} {dtype:?} {left}");
                };
                check();
                if dtype == DType::F32 {
                    emulate(check);
                }
            }
        }
    }
}

/// What sums of squares in f64 do not tell is left to the host, and so are its messages.
#[test]
fn what_only_the_host_can_tell() {
    let project = |set: FeasibleSet, w: &[f64]| {
        emulate(|| set.project(&Tensor::new(w, &Device::Cpu)?)).map(|p| values(&p)).map_err(|e| e.to_string())
    };
    let whole = Grouping::Whole;
    for (set, w, expected) in [
        (FeasibleSet::L1 { radius: 1.0 }, [1e20, -1e20, 1.0], [0.5, -0.5, 0.0]),
        (FeasibleSet::L1 { radius: 0.0 }, [1.0, -2.0, 0.0], [0.0; 3]),
        (FeasibleSet::L2 { radius: 5.0 }, [3e200, -4e200, 0.0], [3.0, -4.0, 0.0]),
        (FeasibleSet::L2 { radius: 5e-200 }, [3e-199, -4e-199, 0.0], [3e-200, -4e-200, 0.0]),
        (FeasibleSet::Sphere { grouping: whole, radius: 3f64.sqrt() }, [0.0; 3], [1.0; 3]),
        (FeasibleSet::Simplex { sum: 1.0 }, [3.0, -4.0, 0.5], [1.0, 0.0, 0.0]),
        (FeasibleSet::Box { bound: 1e200 }, [3e200, -1e199, 0.0], [1e200, -1e199, 0.0]),
    ] {
        let found = project(set, &w).unwrap();
        assert!(distance(&found, &expected) <= 1e-14 * norm(&expected), "{set:?} {found:?}");
    }
    for set in sets(1.0, whole) {
        let error = project(set, &[1.0, f64::NAN, 0.0]).unwrap_err();
        assert!(error.contains("expected finite weights") && error.contains("at place 1"), "{error}");
    }
}
