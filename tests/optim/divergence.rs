//! The divergence of a step: measured against the definition, and as the factors have it where they are exact.

use super::inner_steps::symmetric_kl;
use crate::common::wakes::{net, params};
use crate::common::*;
use candle_core::{DType, Result, Tensor, bail};
use kronwake::curvature::Damping;
use kronwake::nn::{self, Module};
use kronwake::optim::{Group, Groups, NaturalGradient, Params, Qe, So, StepDivergence, UpdateRule, Wake};
use kronwake::tape::{Fisher, Likelihood, Terms};

/// A step on a batch, and the divergences that it says.
fn measured(
    net: &Net,
    opt: &mut NaturalGradient,
    likelihood: Likelihood,
    (x, y): (&Tensor, &Tensor),
) -> Result<StepDivergence> {
    let z = (net.forward)(x)?;
    opt.observe(&z, likelihood)?;
    opt.step_measured(&mean_loss(likelihood, &z, y)?, likelihood, &Terms::equal(), &mut || (net.forward)(x))
}

#[test]
fn a_linear_model_of_normal_outputs_does_what_its_factors_predict() -> Result<()> {
    let net = Net::of(DType::F64, 3, |vb| {
        let linear = nn::linear(4, 3, vb.pp("fc"))?;
        Ok(Box::new(move |x: &Tensor| linear.forward(x)))
    })?;
    let mut opt = NaturalGradient::from_varmap(
        &net.varmap,
        Params { fisher: Fisher::Exact, ..Params::kld_wrm(&net.tape) },
    )?;
    let (x, y) = (random(1, &[7, 4])?, random(2, &[7, 3])?);
    let old = (net.forward)(&x)?;
    let found = measured(&net, &mut opt, Likelihood::Gaussian, (&x, &y))?;
    let exact = symmetric_kl(Likelihood::Gaussian, &(net.forward)(&x)?, &old);
    assert!(exact > 1e-4, "{exact}");
    for value in [found.measured, found.predicted(), found.apart(), found.blocks[0].measured] {
        assert!((value / exact - 1.0).abs() < 1e-9, "{value}, expected {exact}");
    }
    assert_eq!((found.rest, found.blocks.len()), (0.0, 1));
    assert!(found.to_string().contains("the whole step"), "{found}");
    Ok(())
}

/// Every part against the definition, for a member with a closure and one without; the steps are those without measuring.
#[test]
fn the_parts_are_those_of_the_definition() -> Result<()> {
    let wakes = [Wake::from(So::default()), Wake::from(Qe::default())];
    for (wake, likelihood) in wakes.iter().zip([Likelihood::Categorical, Likelihood::Bernoulli]) {
        let (net, twin) = (net(5)?, net(5)?);
        let options = |net: &Net| Params { lr: 0.3, ..params(net, wake.clone(), Damping::Eigenvalue(0.05)) };
        let mut opt = NaturalGradient::from_varmap(&net.varmap, options(&net))?;
        let mut plain = NaturalGradient::from_varmap(&twin.varmap, options(&twin))?;
        for k in 0..3 {
            let x = random(40 + k, &[6, 3])?;
            let y = targets(50 + k, likelihood, &(net.forward)(&x)?)?;
            let z = (twin.forward)(&x)?;
            plain.observe(&z, likelihood)?;
            plain.step_with(&mean_loss(likelihood, &z, &y)?, likelihood, &mut || (twin.forward)(&x))?;

            let (before, old) = (net.values()?, (net.forward)(&x)?);
            let found = measured(&net, &mut opt, likelihood, (&x, &y))?;
            let after = net.values()?;
            for (found, expected) in after.iter().zip(twin.values()?) {
                assert_eq!(flat(found), flat(&expected));
            }
            let same = |found: f64, what: &str| -> Result<()> {
                let exact = symmetric_kl(likelihood, &(net.forward)(&x)?, &old);
                assert!((found - exact).abs() < 1e-12 + 1e-9 * exact, "{what}: {found}, expected {exact}");
                Ok(())
            };
            same(found.measured, "the step")?;
            assert_eq!(found.blocks.len(), 2);
            for block in &found.blocks {
                let names = net.names();
                let values = names.iter().zip(before.iter().zip(&after));
                let moved = |name: &str| name.starts_with(&format!("{}.", block.name));
                let values: Vec<Tensor> =
                    values.map(|(name, (old, new))| if moved(name) { new } else { old }.clone()).collect();
                net.set(&values)?;
                same(block.measured, &block.name)?;

                let (a, g) = opt.factors(&block.name).unwrap();
                net.set(&after)?;
                let elements = net.elements(&block.name, 0, 1);
                let end = values_at(&elements);
                net.set(&before)?;
                let step = end - values_at(&elements);
                net.set(&after)?;
                let curved = kron(&of_group(&a, 0), &of_group(&g, 0)) * &step;
                let exact = 0.5 * (step.transpose() * curved)[(0, 0)];
                let predicted = block.predicted.unwrap();
                assert!(
                    (predicted / exact - 1.0).abs() < 1e-9,
                    "{}: {predicted}, expected {exact}",
                    block.name
                );
            }
            assert!(
                (found.apart() - found.rest - found.blocks.iter().map(|b| b.measured).sum::<f64>()).abs()
                    < 1e-15
            );
        }
    }
    Ok(())
}

/// What no block holds is moved alone too; a step that fails leaves all as it was.
#[test]
fn the_rest_is_measured_and_failures_change_nothing() -> Result<()> {
    let net = net(5)?;
    let groups = Groups(vec![Group { rule: Some(UpdateRule::Adam), ..Group::named("b.*") }]);
    let options = Params { groups, ..params(&net, So::default(), Damping::Eigenvalue(0.05)) };
    let mut opt = NaturalGradient::from_varmap(&net.varmap, options)?;
    let (x, likelihood) = (random(40, &[6, 3])?, Likelihood::Categorical);
    let y = targets(50, likelihood, &(net.forward)(&x)?)?;
    let found = measured(&net, &mut opt, likelihood, (&x, &y))?;
    assert_eq!(found.blocks.len(), 1);
    assert!(found.rest > 0.0 && found.measured > 0.0);

    let before = net.values()?;
    let z = (net.forward)(&x)?;
    opt.observe(&z, likelihood)?;
    let loss = mean_loss(likelihood, &z, &y)?;
    assert_says(
        opt.step_measured(&loss, likelihood, &Terms::equal(), &mut || bail!("no outputs today")),
        &["no outputs today"],
    );
    for (found, expected) in net.values()?.iter().zip(&before) {
        assert_eq!(flat(found), flat(expected));
    }
    Ok(())
}
