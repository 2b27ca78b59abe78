//! Which weights of a tensor belong together.

/// The groups that a tensor of weights falls into. A weight `(out, in, kh, kw)` of a convolution counts as the matrix
/// `(out, in kh kw)`, a vector as a matrix of one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// A group an output unit.
    Rows,
    /// A group a column of the matrix: an input unit of a linear layer.
    Columns,
    /// A group an output channel of a convolution; another name of [`Grouping::Rows`].
    Filters,
    /// A group an input channel of a convolution: all that reads it.
    InputChannels,
    /// Blocks of the matrix; those at its right and lower edges may be smaller.
    Blocks {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        columns: usize,
    },
    /// One group.
    Whole,
}
