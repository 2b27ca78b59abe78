//! Bounds the weights of hidden units, and finds what each bound costs: `cargo run --release --example constrain`.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::nn::{self, Module, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::optim::{AdamW, Optimizer, ParamsAdamW};
use kronwake::penalty::{Bound, Constraints, Dual, FeasibleSet, Grouping, Omega, Rule};

/// Points `[n, 2]` of a square, and whether each is in a black field of a chessboard of 3 x 3 fields.
fn chessboard(n: usize) -> Result<(Tensor, Tensor)> {
    let at = |i: usize| (i as f32 + 0.5) / n as f32;
    let points = (0..n * n).flat_map(|i| [2.0 * at(i % n) - 1.0, 2.0 * at(i / n) - 1.0]);
    let black = (0..n * n).map(|i| ((3 * (i % n) / n + 3 * (i / n) / n) % 2) as u32);
    let x = Tensor::from_iter(points, &Device::Cpu)?.reshape((n * n, 2))?;
    Ok((x, Tensor::from_iter(black, &Device::Cpu)?))
}

fn main() -> Result<()> {
    const LR: f64 = 0.02;
    const LIMIT: f64 = 3.0;
    let (x, y) = chessboard(15)?;
    let grouping = Grouping::Rows; // the weights into a unit
    let omega = Omega::Norm(grouping);
    let dual = Dual::nu_pi(0.1, 1e-2, 0.9);
    let multiply = Rule::Lagrangian { omega, bound: Bound::AtMost(LIMIT), dual };
    let project = Rule::Project { set: FeasibleSet::MaxNorm { grouping, radius: LIMIT } };
    for (name, rule) in [("no bound", Rule::Free), ("projected", project), ("with multipliers", multiply)] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (fc1, fc2) = (nn::linear(2, 24, vb.pp("fc1"))?, nn::linear(24, 2, vb.pp("fc2"))?);
        init::seeded_uniform(&init::named(&vars)?, 0)?;
        // Of several rules for a name the last counts.
        let mut constraints = Constraints::new(&vars, &[("*", Rule::Free), ("fc1.weight", rule)])?;
        let mut opt =
            AdamW::from_varmap(&vars, ParamsAdamW { lr: LR, weight_decay: 0.0, ..Default::default() })?;
        let mut last = 0.0;
        for _ in 0..1000 {
            let loss = cross_entropy(&fc2.forward(&fc1.forward(&x)?.tanh()?)?, &y)?;
            last = loss.to_scalar::<f32>()?;
            opt.backward_step(&(loss + constraints.loss()?)?)?; // the multipliers' terms
            constraints.after_step(LR)?; // projections, and the multipliers' own step
        }
        let largest = fc1.weight().sqr()?.sum(1)?.sqrt()?.max(0)?.to_scalar::<f32>()?;
        println!("{name}: loss {last:.4}, largest norm of a unit's weights {largest:.3}");
        for (_, report) in constraints.report()? {
            let active = report.alpha.iter().filter(|&&alpha| alpha > 0.0).count();
            let most = report.alpha.iter().copied().fold(0.0, f64::max);
            println!(
                "{active} bounds hold units back; a unit more of one lowers the loss by {most:.4} at most"
            );
        }
    }
    Ok(())
}
