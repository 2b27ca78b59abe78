//! Values beside the Vars, such as averages.

use super::*;

/// Points of a sphere and of before a mask was set have averages that are not there; they are let through.
#[test]
fn averages_meet_the_rules() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let map = VarMap::new();
        for name in ["ball", "cut", "free", "round"] {
            let start = Tensor::zeros((2, 3), dtype, &Device::Cpu)?;
            map.data().lock().unwrap().insert(name.into(), Var::from_tensor(&start)?);
        }
        let mask = Tensor::new(&[[1u8, 0, 1], [0, 1, 1]], &Device::Cpu)?;
        let rows = Grouping::Rows;
        let (sphere, ball) =
            (FeasibleSet::Sphere { grouping: rows, radius: 2.0 }, FeasibleSet::L2 { radius: 0.5 });
        let rules = [
            ("*", Rule::Free),
            ("round", Rule::Project { set: sphere }),
            ("cut", Rule::Mask { mask }),
            ("cut", Rule::Project { set: ball }),
            ("cut", prox(0.5)),
            ("ball", Rule::Project { set: ball }),
            ("ball", lagrangian()),
        ];
        let mut constraints = Constraints::new(&map, &rules)?;
        constraints.after_step(0.0)?;
        let before = constraints.report()?[0].1.clone();
        // Averages are in f32 where the Vars are in half precision.
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let average = random(0, &[2, 3])?.to_dtype(wide)?;
        let inside = (&average * 1e-3)?;
        let through = |name: &str, value: &Tensor| -> Result<Tensor> {
            Ok(constraints.let_through(&[(name, value)])?.remove(0))
        };
        let names = [("round", &average), ("cut", &average), ("ball", &average), ("free", &average)];
        let made = constraints.let_through(&names)?;
        assert!(made.iter().all(|made| made.dtype() == wide && made.dims() == [2, 3]));
        // As the Vars would have been.
        for (name, value) in names {
            map.data().lock().unwrap()[name].set(&value.to_dtype(dtype)?)?;
        }
        constraints.clone().after_step(0.0)?;
        for ((name, _), made) in names.iter().zip(&made) {
            let stepped = map.data().lock().unwrap()[*name].clone();
            let tolerance = if dtype == DType::BF16 { 2e-2 } else { 0.0 };
            assert_close(&stepped, &values(made)?, tolerance);
        }
        assert!(sphere.violation(&made[0])? < 1e-6 && ball.violation(&made[1])? == 0.0);
        assert_eq!([values(&made[1])?[1], values(&made[1])?[3]], [0.0, 0.0]);
        assert_eq!(ball.violation(&made[2])?, 0.0);
        for (name, value) in [("free", &average), ("ball", &inside), ("ball", &made[2]), ("cut", &made[1])] {
            assert_eq!(values(&through(name, value)?)?, values(value)?, "{name}");
        }
        // NaN where the mask is, and nowhere else.
        let broken = Tensor::new(&[[0.1, f64::NAN, 0.1], [f64::INFINITY, 0.0, 0.0]], &Device::Cpu)?;
        let mended = through("cut", &broken.to_dtype(wide)?)?;
        assert_close(&mended, &[0.1, 0.0, 0.1, 0.0, 0.0, 0.0], 1e-7);
        // Multipliers are those of the Vars' own steps.
        map.data().lock().unwrap()["ball"].set(&Tensor::zeros((2, 3), dtype, &Device::Cpu)?)?;
        assert_eq!(constraints.report()?[0].1, before);
    }
    Ok(())
}

#[test]
fn refused() -> Result<()> {
    let map = varmap(&[("a", &[3.0, 4.0]), ("b", &[1.0])]);
    let constraints = Constraints::new(&map, &[("*", ball(1.0))])?;
    let pair = Tensor::new(&[3.0, 4.0], &Device::Cpu)?;
    let broken = Tensor::new(&[3.0, f64::NAN], &Device::Cpu)?;
    for (name, value, part) in [
        ("c", &pair, "constraints: c: no Var has this name"),
        ("b", &pair, "expected a value [1], got [2]"),
        ("a", &broken, "expected finite weights"),
    ] {
        let error = constraints.let_through(&[("a", &pair), (name, value)]).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(&format!("constraints: {name}")), "{error}");
    }
    assert!(constraints.let_through(&[])?.is_empty());
    Ok(())
}
