//! Each rule of matrices against its paper's formulas in plain loops.

use super::dense::Matrix;
use super::*;
use crate::linalg::polar::Iterations;
use crate::linalg::testing::here_and_on_a_device;

/// A Var of f64 with the gradients of its steps.
struct Trial {
    var: Var,
    dims: Vec<usize>,
    value: Matrix,
}

impl Trial {
    fn new(dims: &[usize]) -> Self {
        let value = Matrix::random(dims[0], dims[1..].iter().product(), 1);
        let var = Var::from_vec(value.values.clone(), dims, &Device::Cpu).unwrap();
        Self { var, dims: dims.to_vec(), value }
    }

    /// The gradient of step `t`, from 1.
    fn gradient(&self, t: usize) -> Matrix {
        Matrix::random(self.value.rows, self.value.columns, 10 + t as u64).map(|v| 0.3 * v)
    }

    /// Takes step `t`, and compares with what the loops have.
    fn step<P: Update>(&self, opt: &mut FirstOrder<P>, t: usize, expected: &Matrix) {
        let mut grads = self.var.sum_all().unwrap().backward().unwrap();
        let gradient = Tensor::from_vec(self.gradient(t).values, self.dims.as_slice(), &Device::Cpu).unwrap();
        grads.insert(&self.var, gradient);
        opt.step(&grads).unwrap();
        let found = self.var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_near(&found, &expected.values, 1e-9);
    }
}

/// No factor of a gradient lacks more than one rank: among vectors of the same eigenvalue SOAP's basis would be anyone's.
const SHAPES: [&[usize]; 4] = [&[4, 5], &[5, 4], &[3, 2, 2], &[4, 4]];

#[test]
fn muon_is_its_formulas() -> Result<()> {
    for dims in SHAPES {
        for (scale, nesterov) in [(MuonScale::MatchRms, true), (MuonScale::Original, false)] {
            let trial = Trial::new(dims);
            let params = ParamsMuon {
                lr: 0.03,
                momentum: 0.9,
                nesterov,
                scale,
                weight_decay: 0.2,
                ..Default::default()
            };
            let mut opt = Muon::new(vec![trial.var.clone()], params)?;
            let (mut w, mut b) = (trial.value.clone(), Matrix::zeros(trial.value.rows, trial.value.columns));
            let (rows, columns) = (w.rows as f64, w.columns as f64);
            let factor = match scale {
                MuonScale::MatchRms => 0.2 * rows.max(columns).sqrt(),
                MuonScale::Original => (rows / columns).max(1.0).sqrt(),
            };
            for t in 1..=5 {
                let g = trial.gradient(t);
                b = b.mixed(0.9, &g, 1.0);
                let m = if nesterov { g.mixed(1.0, &b, 0.9) } else { b.clone() };
                let mut x = m.map(|v| v / m.norm());
                for _ in 0..5 {
                    let cubic = x.times(&x.t()).times(&x);
                    let quintic = x.times(&x.t()).times(&cubic);
                    x = x.mixed(3.4445, &cubic, -4.7750).mixed(1.0, &quintic, 2.0315);
                }
                w = w.mixed(1.0 - 0.03 * 0.2, &x, -0.03 * factor);
                trial.step(&mut opt, t, &w);
            }
        }
    }
    Ok(())
}

#[test]
fn five_steps_bring_singular_values_near_1() -> Result<()> {
    for (rows, columns) in [(6, 6), (8, 5), (5, 9)] {
        let m = Matrix::random(rows, columns, 3);
        let given = Tensor::from_vec(m.values, (rows, columns), &Device::Cpu)?;
        let found = crate::linalg::polar::orthogonalized(&given, Iterations::Alike(5))?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let found = Matrix { rows, columns, values: found };
        let gram = if rows < columns { found.times(&found.t()) } else { found.t().times(&found) };
        let (values, _) = gram.eigen();
        assert!(values.iter().all(|v| (0.65..1.25).contains(&v.sqrt())), "{values:?}");
    }
    // Without a gradient there is no direction.
    let none = crate::linalg::polar::orthogonalized(
        &Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?,
        Iterations::Alike(5),
    )?;
    assert_eq!(none.flatten_all()?.to_vec1::<f32>()?, [0.0; 6]);
    Ok(())
}

#[test]
fn soap_is_its_formulas() -> Result<()> {
    here_and_on_a_device(soap_and_loops)
}

fn soap_and_loops() -> Result<()> {
    for dims in SHAPES {
        for (basis, period, max_dim) in [
            (SoapBasis::PowerIteration, 1, 99),
            (SoapBasis::PowerIteration, 2, 4),
            (SoapBasis::Eigenvectors, 2, 99),
        ] {
            let trial = Trial::new(dims);
            let params = ParamsSoap {
                lr: 0.02,
                beta1: 0.9,
                beta2: 0.8,
                shampoo_beta: Some(0.7),
                weight_decay: 0.1,
                period,
                basis,
                max_dim,
                ..Default::default()
            };
            let mut opt = Soap::new(vec![trial.var.clone()], params)?;
            let mut w = trial.value.clone();
            let (rows, columns) = (w.rows, w.columns);
            let zero = Matrix::zeros(rows, columns);
            let (mut m, mut v) = (zero.clone(), zero.clone());
            let mut factors = [Matrix::zeros(rows, rows), Matrix::zeros(columns, columns)];
            let mut bases = [Matrix::identity(rows), Matrix::identity(columns)];
            for t in 1..=8i32 {
                let g = trial.gradient(t as usize);
                let updates = t - 1;
                if updates > 0 {
                    let inside = |g: &Matrix, bases: &[Matrix; 2]| bases[0].t().times(g).times(&bases[1]);
                    m = m.mixed(0.9, &g, 0.1);
                    v = v.with(&inside(&g, &bases), |v, g| 0.8 * v + 0.2 * g * g);
                    let (c1, c2) = (1.0 - 0.9f64.powi(updates), 1.0 - 0.8f64.powi(updates));
                    let n = inside(&m, &bases).with(&v, |m, v| m / c1 / ((v / c2).sqrt() + 1e-8));
                    w = w.mixed(1.0 - 0.02 * 0.1, &bases[0].times(&n).times(&bases[1].t()), -0.02);
                }
                for (i, outer) in [g.times(&g.t()), g.t().times(&g)].into_iter().enumerate() {
                    let dim = outer.rows;
                    if dim > max_dim {
                        continue;
                    }
                    factors[i] = factors[i].mixed(0.7, &outer, 0.3);
                    if !(updates as usize).is_multiple_of(period) {
                        continue;
                    }
                    if t == 1 || basis == SoapBasis::Eigenvectors {
                        bases[i] = factors[i].eigen().1;
                        continue;
                    }
                    let image = factors[i].times(&bases[i]);
                    let value = |j: usize| (0..dim).map(|k| bases[i].at(k, j) * image.at(k, j)).sum::<f64>();
                    let mut order: Vec<usize> = (0..dim).collect();
                    order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
                    bases[i] = Matrix::of(dim, dim, |k, j| image.at(k, order[j])).gram_schmidt();
                    v = match i {
                        0 => Matrix::of(rows, columns, |k, j| v.at(order[k], j)),
                        _ => Matrix::of(rows, columns, |k, j| v.at(k, order[j])),
                    };
                }
                trial.step(&mut opt, t as usize, &w);
            }
        }
    }
    Ok(())
}

#[test]
fn shampoo_is_its_formulas() -> Result<()> {
    here_and_on_a_device(shampoo_and_loops)
}

fn shampoo_and_loops() -> Result<()> {
    let cases = [
        (Grafting::None, ShampooFactors::Gradient, 0.9, None, 1, 99),
        (Grafting::None, ShampooFactors::Gradient, 1.0, Some(0.5), 1, 99),
        (Grafting::Adam, ShampooFactors::Gradient, 0.8, None, 2, 4),
        (Grafting::Sgd, ShampooFactors::Gradient, 0.8, None, 3, 99),
        (Grafting::None, ShampooFactors::KlDivergence, 0.8, None, 2, 99),
        (Grafting::None, ShampooFactors::KlDivergence, 0.9, Some(0.5), 1, 4),
    ];
    for dims in SHAPES {
        for (grafting, kind, beta2, exponent, period, max_dim) in cases {
            let trial = Trial::new(dims);
            let params = ParamsShampoo {
                lr: 0.02,
                beta1: 0.6,
                beta2,
                // Large, as otherwise rounding decides in directions without a gradient.
                eps: 1e-3,
                exponent,
                grafting,
                factors: kind,
                weight_decay: 0.1,
                period,
                max_dim,
                ..Default::default()
            };
            let kl = kind == ShampooFactors::KlDivergence;
            let mut opt = Shampoo::new(vec![trial.var.clone()], params)?;
            let mut w = trial.value.clone();
            let dim = [w.rows, w.columns];
            let kept: Vec<usize> = (0..2).filter(|&i| dim[i] <= max_dim).collect();
            let power = exponent.unwrap_or(if kl || kept.len() == 1 { 0.5 } else { 0.25 });
            let (mut m, mut v) = (Matrix::zeros(dim[0], dim[1]), Matrix::zeros(dim[0], dim[1]));
            let mut factors = dim.map(|d| Matrix::zeros(d, d));
            let mut roots = dim.map(Matrix::identity);
            let share = if beta2 == 1.0 { 1.0 } else { 1.0 - beta2 };
            for t in 1..=8 {
                let g = trial.gradient(t as usize);
                let correction = if beta2 == 1.0 { 1.0 } else { 1.0 - beta2.powi(t) };
                for &i in &kept {
                    let seen = match (kl, i) {
                        (false, _) => g.clone(),
                        (true, 0) => g.times(&roots[1]).map(|v| v / (dim[1] as f64).sqrt()),
                        (true, _) => roots[0].times(&g).map(|v| v / (dim[0] as f64).sqrt()),
                    };
                    let outer = if i == 0 { seen.times(&seen.t()) } else { seen.t().times(&seen) };
                    factors[i] = factors[i].mixed(beta2, &outer, share);
                    if t as usize <= period || (t as usize - 1).is_multiple_of(period) {
                        roots[i] = factors[i].map(|v| v / correction).inverse_power(power, 1e-3);
                    }
                }
                m = m.mixed(0.6, &g, 0.4);
                v = v.with(&g, |v, g| beta2 * v + share * g * g);
                let mean = m.map(|v| v / (1.0 - 0.6f64.powi(t)));
                let mut d = roots[0].times(&mean).times(&roots[1]);
                let length = match grafting {
                    Grafting::None => d.norm(),
                    Grafting::Sgd => mean.norm(),
                    Grafting::Adam => mean.with(&v, |m, v| m / ((v / correction).sqrt() + 1e-8)).norm(),
                };
                d = d.map(|v| v * length / d.norm());
                w = w.mixed(1.0 - 0.02 * 0.1, &d, -0.02);
                trial.step(&mut opt, t as usize, &w);
            }
        }
    }
    Ok(())
}
