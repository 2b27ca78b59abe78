//! How the weights of a tensor fall into groups.

use candle_core::{Result, bail};

use crate::ops::group::Tiles;

/// Which weights of a tensor belong together.
///
/// A tensor `(out, in, ..)` is seen as the matrix `(out, in * ..)`; one of a single dimension as a column, so that each of its
/// elements is a row; a scalar as a matrix of one element.
///
/// ```
/// use kronwake::penalty::Grouping;
///
/// let kernel = [16, 8, 3, 3];
/// assert_eq!(Grouping::Filters.count(&kernel)?, 16);
/// assert_eq!(Grouping::InputChannels.count(&kernel)?, 8);
/// assert_eq!(Grouping::Columns.count(&kernel)?, 72);
/// assert_eq!(Grouping::Blocks { rows: 4, columns: 9 }.count(&kernel)?, 32);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Grouping {
    /// The weights of an output unit.
    #[default]
    Rows,
    /// A column of the matrix: the weights of an input unit.
    Columns,
    /// The weights of a convolution's output channel: its rows.
    Filters,
    /// The weights `(out, .., kh, kw)` of an input channel; of a matrix, its columns.
    InputChannels,
    /// Blocks of the matrix; those at its right and lower edge may be smaller.
    Blocks {
        /// Height of a block, at least 1.
        rows: usize,
        /// Width of a block, at least 1.
        columns: usize,
    },
    /// The whole tensor.
    Whole,
}

impl Grouping {
    /// How many groups a tensor of these dimensions has.
    ///
    /// # Errors
    /// If the blocks have no rows or no columns.
    pub fn count(&self, dims: &[usize]) -> Result<usize> {
        Ok(self.tiles(dims)?.count())
    }

    /// The groups as blocks of a matrix, which all of them are.
    pub(crate) fn tiles(&self, dims: &[usize]) -> Result<Tiles> {
        let m = dims.first().copied().unwrap_or(1);
        let n = dims.get(1..).unwrap_or(&[]).iter().product::<usize>();
        let channel = dims.get(2..).unwrap_or(&[]).iter().product::<usize>();
        let (rows, columns) = match *self {
            Self::Rows | Self::Filters => (1, n),
            Self::Columns => (m, 1),
            Self::InputChannels => (m, channel),
            Self::Blocks { rows, columns } if rows == 0 || columns == 0 => {
                bail!("blocks of {rows} x {columns} weights: expected at least 1 x 1")
            }
            Self::Blocks { rows, columns } => (rows, columns),
            Self::Whole => (m, n),
        };
        Ok(Tiles::new([m, n], [rows, columns]))
    }
}

impl std::fmt::Display for Grouping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows => f.write_str("rows"),
            Self::Columns => f.write_str("columns"),
            Self::Filters => f.write_str("filters"),
            Self::InputChannels => f.write_str("input channels"),
            Self::Blocks { rows, columns } => write!(f, "blocks of {rows} x {columns}"),
            Self::Whole => f.write_str("the whole tensor"),
        }
    }
}
