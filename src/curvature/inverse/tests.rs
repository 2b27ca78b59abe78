use super::*;
use crate::gpu::emulate::emulate;
use crate::linalg::sketch::tests::sketch_of;
use crate::linalg::testing::{max_abs, random_symmetric, spd};

const METHODS: [(DampingKind, Inverse); 4] = [
    (DampingKind::Eigenvalue, Inverse::Eigen),
    (DampingKind::Pi, Inverse::Eigen),
    (DampingKind::Pi, Inverse::Cholesky),
    (DampingKind::Pi, Inverse::Newton),
];

#[test]
fn a_device_inverts_as_the_host_does() -> Result<()> {
    let shapes = [(1, 5, 3), (3, 9, 1), (1, 70, 33), (2, 1, 20), (2, 9, 5)];
    for (dtype, tolerance) in [(DType::F32, 2e-3), (DType::F64, 1e-9)] {
        let mut blocks = vec![];
        for (groups, a, g) in shapes {
            let gradient = random_symmetric(groups, a.max(g), 3)?.narrow(1, 0, g)?.narrow(2, 0, a)?;
            let factors = (spd(groups, a, 50.0, 1)?, spd(groups, g, 20.0, 2)?);
            let (a, g) = (factors.0.to_dtype(dtype)?, factors.1.to_dtype(dtype)?);
            blocks.push((a, g, gradient.contiguous()?.to_dtype(dtype)?));
        }
        for (kind, inverse) in METHODS {
            let recipe = Recipe { kind, damping: 0.1, inverse, floor: 0.0 };
            let directions = |last: &[Preconditioner]| -> Result<Vec<(Preconditioner, Tensor)>> {
                let mut tasks = vec![];
                for (i, (a, g, gradient)) in blocks.iter().enumerate() {
                    tasks.push(Task {
                        a: a.clone(),
                        g: g.clone(),
                        shape: gradient.dims3()?.into(),
                        recipe,
                        last: last.get(i).cloned(),
                        inputs: None,
                        name: "fc".into(),
                    });
                }
                let found = damped_inverses(&tasks, None).into_iter().zip(&blocks);
                found
                    .map(|(found, (_, _, gradient))| {
                        let found = found?;
                        let v = found.apply(gradient)?;
                        Ok((found, v))
                    })
                    .collect()
            };
            let host = directions(&[])?;
            let cold = emulate(|| directions(&[]))?;
            let last: Vec<_> = cold.iter().map(|(last, _)| last.clone()).collect();
            for found in [&cold, &emulate(|| directions(&last))?] {
                for ((_, found), (_, host)) in found.iter().zip(&host) {
                    let scale = max_abs(host)?;
                    let off = max_abs(&(found - host)?)? / scale;
                    assert!(off < tolerance, "{kind:?} {inverse:?} {dtype:?} {off}");
                }
            }
        }
    }
    Ok(())
}

/// The inverse for gradients as they are, where the damping is that of standard inputs: `(A' (x) G + la)^-1`, with low ranks too.
#[test]
fn the_damping_of_standard_inputs() -> Result<()> {
    let mut a = spd(1, 5, 50.0, 1)?;
    a = a.broadcast_div(&a.narrow(1, 4, 1)?.narrow(2, 4, 1)?)?;
    let inputs = Tensor::new(&[[[40.0, 0.0, 0.0, -3.0, 0.0], [3.0, 0.1, 1.0, 2.0, 1.0]]], &Device::Cpu)?;
    let gradient = random_symmetric(1, 5, 3)?.narrow(1, 0, 4)?.contiguous()?;
    let full = spd(1, 4, 20.0, 2)?;
    let sketch = sketch_of(&full, 2)?;
    for (kind, inverse) in METHODS {
        for g in [&full, &sketch] {
            let recipe = Recipe { kind, damping: 0.1, inverse, floor: 0.0 };
            let (shape, last, name) = (gradient.dims3()?.into(), None, "fc".to_string());
            let task =
                Task { a: a.clone(), g: g.clone(), shape, recipe, last, inputs: Some(inputs.clone()), name };
            let made = next(&mut damped_inverses(&[task], None).into_iter())?;
            let direction = standard::inside(&inputs, &made.apply(&gradient)?)?;
            let solved = damped_product(&a, g, kind, 0.1, &direction, "fc")?;
            let off = max_abs(&(solved - standard::gradient_inside(&inputs, &gradient)?)?)?;
            assert!(off < 1e-7, "{kind}, {inverse:?}: {off}");
        }
    }
    Ok(())
}

#[test]
fn an_error_names_its_block_and_spares_the_others() -> Result<()> {
    let (good, bad) = (spd(1, 4, 10.0, 1)?, (spd(1, 4, 10.0, 2)? * -3.0)?);
    let large = (spd(1, 70, 10.0, 2)? * -3.0)?;
    for (inverse, part) in
        [(Inverse::Cholesky, "pivot 0"), (Inverse::Newton, "residual"), (Inverse::Eigen, "finite")]
    {
        let kind = if inverse == Inverse::Eigen { DampingKind::Eigenvalue } else { DampingKind::Pi };
        let recipe = Recipe { kind, damping: 0.1, inverse, floor: 0.0 };
        let broken = [&bad, &large].map(|m| if inverse == Inverse::Eigen { m.log() } else { Ok(m.clone()) });
        for bad in broken {
            let bad = bad?;
            let tasks = [(&good, "conv1"), (&bad, "conv2"), (&good, "fc")];
            let tasks = tasks.map(|(a, name)| {
                let shape = [1, 4, if a.dims() == large.dims() { 70 } else { 4 }];
                Task {
                    a: a.clone(),
                    g: good.clone(),
                    shape,
                    recipe,
                    last: None,
                    inputs: None,
                    name: name.into(),
                }
            });
            for found in [damped_inverses(&tasks, None), emulate(|| damped_inverses(&tasks, None))] {
                assert!(found[0].is_ok() && found[2].is_ok());
                let message = found[1].as_ref().err().map(ToString::to_string).unwrap_or_default();
                assert!(message.contains("conv2") && message.contains(part), "{message}");
            }
        }
    }
    Ok(())
}
