//! The evidence of several processes, each of which reads some of the parts, is that of one.

use super::harness::{ranks, sentences};
use crate::common::nets::{Kind, Net};
use candle_core::Result;
use kronwake::evidence::{Curvature, Estimator, Evidence, Hyper, Parts, Structure};
use kronwake::parallel::World;
use kronwake::tape::Likelihood;

fn evidence(world: &World, likelihood: Likelihood, curvature: Curvature, each: bool) -> Result<Evidence> {
    let net = Net::new(Kind::Mlp, 3, 11, 3)?;
    let problem = net.problem(likelihood)?;
    let problem = match likelihood {
        Likelihood::Gaussian => problem.with_output_noise(&[0.7, 1.0, 1.6])?,
        _ => problem,
    };
    let examples = net.examples(likelihood)?;
    let estimator = Estimator::new(curvature, Parts::Consecutive(4));
    let structure = if each { Structure::Diagonal } else { Structure::PerTensor };
    let hyper = Hyper::new(&problem, structure, 0.5)?;
    estimator.fit_together(world, &problem, &examples, 5)?.evidence(&hyper)
}

#[test]
fn parts_are_divided_and_add_up() -> Result<()> {
    let (categorical, gaussian) = (Likelihood::Categorical, Likelihood::Gaussian);
    for (likelihood, curvature, each) in [
        (categorical, Curvature::Full, false),
        (categorical, Curvature::Diagonal, true),
        (categorical, Curvature::Kron, false),
        (categorical, Curvature::Diagonal, false),
        (gaussian, Curvature::Full, false),
    ] {
        let one = evidence(&World::alone(), likelihood, curvature, each)?;
        // Three parts on two processes, and on four, of which one has none.
        for size in [2, 4] {
            for found in ranks(size, |world| {
                let found = evidence(&world, likelihood, curvature, each)?;
                let of = |e: &Evidence| {
                    let lists =
                        [e.effective.clone(), e.grad_log_precision.clone(), e.suggested_precision.clone()];
                    let numbers =
                        [e.log_evidence, e.log_likelihood, e.log_det, e.grad_log_temperature, e.condition];
                    [lists.concat(), numbers.to_vec()].concat()
                };
                Ok(of(&found))
            }) {
                let lists =
                    [one.effective.clone(), one.grad_log_precision.clone(), one.suggested_precision.clone()];
                let numbers = [
                    one.log_evidence,
                    one.log_likelihood,
                    one.log_det,
                    one.grad_log_temperature,
                    one.condition,
                ];
                let expected = [lists.concat(), numbers.to_vec()].concat();
                for (found, expected) in found?.iter().zip(&expected) {
                    let far = (found - expected).abs() / expected.abs().max(1.0);
                    assert!(
                        far < 1e-13,
                        "{likelihood:?}, {curvature:?}, {size} processes: {found}, expected {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_one_cannot_read_all_refuse() {
    let outcomes = ranks(3, |world| {
        let net = Net::new(Kind::Mlp, 3, 11, 3)?;
        let problem = net.problem(Likelihood::Categorical)?;
        let examples = net.examples(Likelihood::Categorical)?;
        let memory = if world.rank() == 1 { 10 } else { 4 << 30 };
        let estimator = Estimator { memory, ..Estimator::new(Curvature::Full, Parts::Consecutive(4)) };
        estimator.fit_together(&world, &problem, &examples, 5).map(drop)
    });
    for said in sentences(outcomes) {
        assert!(said.contains("rank 1: ") && said.contains("10 are allowed"), "{said}");
    }
}
