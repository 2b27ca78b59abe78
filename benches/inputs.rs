//! cargo bench --bench inputs: how a small net learns from inputs that are not standard ones, by optimizers as they come.
//!
//! An MLP 6-32-3 with tanh on 2,048 examples of a teacher with eight hidden units, batches of 64, 300 steps without a schedule, five seeds: the
//! mean loss of the last 20 steps. Chance is about 1.1.

use candle_core::{DType, Device, Result, Tensor};
use kronwake::curvature::Damping;
use kronwake::nn::{self, Module, VarBuilder, VarMap, init, loss::cross_entropy};
use kronwake::optim::{AdamW, NaturalGradient, Optimizer, Params, ParamsAdamW};
use kronwake::tape::{Likelihood, Tape};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const EXAMPLES: usize = 2048;
const BATCH: usize = 64;
const STEPS: usize = 300;
const LAST: usize = 20;
const SEEDS: std::ops::RangeInclusive<u64> = 1..=5;
const INPUTS: usize = 6;

/// What becomes of a standard normal value of input `j`.
type Change = fn(usize, f64) -> f64;

const CHANGES: [(&str, Change); 7] = [
    ("standard", |_, x| x),
    ("the sixth times 30", |j, x| if j == 5 { 30.0 * x } else { x }),
    ("the sixth times 300", |j, x| if j == 5 { 300.0 * x } else { x }),
    ("all at 300 ± 10", |_, x| 300.0 + 10.0 * x),
    ("the sixth at 300 ± 1", |j, x| if j == 5 { 300.0 + x } else { x }),
    ("all times 0.001", |_, x| 1e-3 * x),
    ("all times 1,000", |_, x| 1e3 * x),
];

#[derive(Clone, Copy)]
enum Method {
    KldWrm,
    /// With a damping set by hand.
    Damped(f64),
    KFac,
    AdamW,
}

const METHODS: [(&str, Method); 5] = [
    ("KLD-WRM", Method::KldWrm),
    ("by hand, 0.003", Method::Damped(0.003)),
    ("0.0003", Method::Damped(0.0003)),
    ("K-FAC", Method::KFac),
    ("AdamW, 0.01", Method::AdamW),
];

/// A standard normal number (Box and Muller).
fn normal(rng: &mut StdRng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Examples and the classes that the teacher gives their standard values.
fn examples(change: Change, rng: &mut StdRng) -> Result<(Tensor, Tensor)> {
    let mut normals = |n: usize| -> Vec<f64> { (0..n).map(|_| normal(rng)).collect() };
    let (x, hidden, last) = (normals(EXAMPLES * INPUTS), normals(8 * INPUTS), normals(3 * 8));
    let on = |t: Vec<f64>, dims: (usize, usize)| Tensor::from_vec(t, dims, &Device::Cpu);
    let changed = x.iter().enumerate().map(|(at, &x)| change(at % INPUTS, x)).collect();
    let hidden = on(x, (EXAMPLES, INPUTS))?.matmul(&on(hidden, (8, INPUTS))?.t()?)?.tanh()?;
    let labels = hidden.matmul(&on(last, (3, 8))?.t()?)?.argmax(1)?;
    Ok((on(changed, (EXAMPLES, INPUTS))?.to_dtype(DType::F32)?, labels))
}

/// The mean loss of the last steps.
fn train(method: Method, change: Change, seed: u64) -> Result<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (x, y) = examples(change, &mut rng)?;
    let (vars, tape) = (VarMap::new(), Tape::new());
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model = tape.build(|| {
        let hidden = nn::seq().add(nn::linear(INPUTS, 32, vb.pp("fc1"))?).add_fn(|x| x.tanh());
        Ok(hidden.add(nn::linear(32, 3, vb.pp("fc2"))?))
    })?;
    init::seeded_uniform(&init::named(&vars)?, seed)?;
    let params = match method {
        Method::KldWrm | Method::AdamW => Params::kld_wrm(&tape),
        Method::Damped(la) => Params { damping: Damping::Eigenvalue(la), ..Params::kld_wrm(&tape) },
        Method::KFac => Params::k_fac(&tape),
    };
    let mut natural = NaturalGradient::from_varmap(&vars, params)?;
    let mut adamw = AdamW::from_varmap(&vars, ParamsAdamW { lr: 0.01, ..Default::default() })?;
    let mut total = 0.0;
    for step in 0..STEPS {
        let places: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..EXAMPLES as u32)).collect();
        let places = Tensor::new(places, &Device::Cpu)?;
        let logits = model.forward(&x.index_select(&places, 0)?)?;
        let loss = cross_entropy(&logits, &y.index_select(&places, 0)?)?;
        if step >= STEPS - LAST {
            total += f64::from(loss.to_scalar::<f32>()?);
        }
        match method {
            Method::AdamW => adamw.backward_step(&loss)?,
            Method::KldWrm | Method::Damped(_) | Method::KFac => {
                natural.observe(&logits, Likelihood::Categorical)?;
                natural.backward_step(&loss)?;
            }
        }
    }
    Ok(total / LAST as f64)
}

fn main() -> Result<()> {
    println!("| inputs | {} |", METHODS.map(|(name, _)| name).join(" | "));
    println!("|---|{}", "---|".repeat(METHODS.len()));
    for (inputs, change) in CHANGES {
        let mut row = format!("| {inputs} |");
        for (_, method) in METHODS {
            let losses = SEEDS.map(|seed| train(method, change, seed)).collect::<Result<Vec<_>>>()?;
            row += &format!(" {:.3} |", losses.iter().sum::<f64>() / losses.len() as f64);
        }
        println!("{row}");
    }
    Ok(())
}
