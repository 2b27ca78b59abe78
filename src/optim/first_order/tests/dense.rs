//! Dense matrices in plain loops, to compare with.

use crate::nn::init::Stream;

#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Matrix {
    pub fn of(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows * columns).map(|i| f(i / columns, i % columns)).collect();
        Self { rows, columns, values }
    }

    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self::of(rows, columns, |_, _| 0.0)
    }

    pub fn identity(dim: usize) -> Self {
        Self::of(dim, dim, |i, j| if i == j { 1.0 } else { 0.0 })
    }

    /// Uniform numbers in (-1, 1).
    pub fn random(rows: usize, columns: usize, seed: u64) -> Self {
        let stream = Stream::new(seed, "dense", 0);
        Self::of(rows, columns, |i, j| 2.0 * stream.uniform(i * columns + j) - 1.0)
    }

    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.columns + j]
    }

    pub fn t(&self) -> Self {
        Self::of(self.columns, self.rows, |i, j| self.at(j, i))
    }

    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows);
        Self::of(self.rows, other.columns, |i, j| {
            (0..self.columns).map(|k| self.at(i, k) * other.at(k, j)).sum()
        })
    }

    /// `a self + b other`
    pub fn mixed(&self, a: f64, other: &Self, b: f64) -> Self {
        self.with(other, |x, y| a * x + b * y)
    }

    pub fn with(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self::of(self.rows, self.columns, |i, j| f(self.at(i, j), other.at(i, j)))
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self::of(self.rows, self.columns, |i, j| f(self.at(i, j)))
    }

    pub fn norm(&self) -> f64 {
        self.values.iter().map(|v| v * v).sum::<f64>().sqrt()
    }

    /// Eigenvalues, the largest first, and eigenvectors in the columns, by Jacobi's rotations.
    pub fn eigen(&self) -> (Vec<f64>, Self) {
        let (n, mut m, mut v) = (self.rows, self.clone(), Self::identity(self.rows));
        for _ in 0..60 {
            for p in 0..n {
                for q in p + 1..n {
                    if m.at(p, q).abs() < 1e-300 {
                        continue;
                    }
                    let angle = 0.5 * (2.0 * m.at(p, q)).atan2(m.at(q, q) - m.at(p, p));
                    let (s, c) = angle.sin_cos();
                    let mut turn = Self::identity(n);
                    turn.values[p * n + p] = c;
                    turn.values[q * n + q] = c;
                    turn.values[p * n + q] = s;
                    turn.values[q * n + p] = -s;
                    m = turn.t().times(&m).times(&turn);
                    v = v.times(&turn);
                }
            }
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| m.at(b, b).total_cmp(&m.at(a, a)));
        (order.iter().map(|&i| m.at(i, i)).collect(), Self::of(n, n, |i, j| v.at(i, order[j])))
    }

    /// `(self + ridge I)^-power` of a symmetric matrix, where `ridge` is `eps` times the largest eigenvalue.
    pub fn inverse_power(&self, power: f64, eps: f64) -> Self {
        let (values, vectors) = self.eigen();
        let scaled = Self::of(self.rows, self.rows, |i, j| {
            vectors.at(i, j) * (values[j].max(0.0) + eps * values[0]).powf(-power)
        });
        scaled.times(&vectors.t())
    }

    /// The columns made orthonormal, one after the other, twice over.
    pub fn gram_schmidt(&self) -> Self {
        let mut q = self.clone();
        for j in 0..self.columns {
            for _ in 0..2 {
                for k in 0..j {
                    let dot: f64 = (0..self.rows).map(|i| q.at(i, k) * q.at(i, j)).sum();
                    (0..self.rows).for_each(|i| q.values[i * self.columns + j] -= dot * q.at(i, k));
                }
                let norm = (0..self.rows).map(|i| q.at(i, j).powi(2)).sum::<f64>().sqrt();
                (0..self.rows).for_each(|i| q.values[i * self.columns + j] /= norm);
            }
        }
        q
    }
}

#[test]
fn its_eigenvectors_are_such() {
    let m = Matrix::random(4, 4, 1);
    let m = m.times(&m.t());
    let (values, vectors) = m.eigen();
    let back = Matrix::of(4, 4, |i, j| vectors.at(i, j) * values[j]).times(&vectors.t());
    assert!(back.mixed(1.0, &m, -1.0).norm() < 1e-13);
    assert!(values.is_sorted_by(|a, b| a >= b));
}
