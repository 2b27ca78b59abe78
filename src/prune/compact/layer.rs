//! A layer's weights on the host.

/// A layer's weights `[out, columns, run]`, where a run belongs to one channel of what is read; `columns` are those of a group.
pub(super) struct Layer {
    pub weight: Vec<f64>,
    pub bias: Option<Vec<f64>>,
    pub out: usize,
    pub columns: usize,
    pub run: usize,
    pub groups: usize,
    pub reads: usize,
    pub writes: usize,
}

impl Layer {
    pub fn row(&self, row: usize) -> &[f64] {
        let width = self.columns * self.run;
        &self.weight[row * width..(row + 1) * width]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f64] {
        let width = self.columns * self.run;
        &mut self.weight[row * width..(row + 1) * width]
    }

    /// The group of an output channel.
    pub fn group(&self, row: usize) -> usize {
        row / (self.out / self.groups)
    }

    /// Zeros the weights of constant channels; what these add to each output.
    pub fn fold(&mut self, constant: &[Option<f64>], padded: bool) -> Vec<f64> {
        let mut shift = vec![0.; self.out];
        let (columns, run) = (self.columns, self.run);
        for (row, shift) in shift.iter_mut().enumerate() {
            let first = self.group(row) * columns;
            for column in 0..columns {
                // A constant that is not zero is none where padding is.
                let Some(value) = constant[first + column].filter(|value| *value == 0. || !padded) else {
                    continue;
                };
                let weights = &mut self.row_mut(row)[column * run..(column + 1) * run];
                let sum: f64 = weights.iter().sum();
                // Not 0 times an infinite constant.
                if sum != 0. {
                    *shift += sum * value;
                }
                weights.fill(0.);
            }
        }
        shift
    }
}
