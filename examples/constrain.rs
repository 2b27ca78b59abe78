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
    const BOUND: f64 = 3.0;
    let (x, y) = chessboard(24)?;
    let grouping = Grouping::Rows; // the weights into a unit
    let multiply = Rule::Lagrangian {
        omega: Omega::Norm(grouping),
        bound: Bound::AtMost(BOUND),
        dual: Dual::nu_pi(0.02, 1e-3, 0.9),
    };
    let project = Rule::Project { set: FeasibleSet::MaxNorm { grouping, radius: BOUND } };
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
        for _ in 0..1500 {
            let loss = cross_entropy(&fc2.forward(&fc1.forward(&x)?.tanh()?)?, &y)?;
            last = loss.to_scalar::<f32>()?;
            opt.backward_step(&(loss + constraints.loss()?)?)?; // the multipliers' terms
            constraints.after_step(LR)?; // projections, and the multipliers' own step
        }
        let largest = fc1.weight().sqr()?.sum(1)?.sqrt()?.max(0)?.to_scalar::<f32>()?;
        println!("{name}: loss {last:.4}, largest norm of a unit's weights {largest:.3}");
        for (tensor, report) in constraints.report()? {
            let mut alpha = report.alpha;
            alpha.sort_by(|a, b| b.total_cmp(a));
            println!(
                "{tensor}: the loss would fall by {:.4?} for each unit of a bound, at first",
                &alpha[..4]
            );
        }
    }
    Ok(())
}
