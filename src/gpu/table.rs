//! Tables of tensors: one launch for all the parameters of a model.

use candle_core::{DType, Result, bail};

/// Rows of one launch, as in `kernels/step.cuh`. A table travels in the kernel's argument, which CUDA 12.1 and later let grow to 32 KiB.
pub(crate) const TABLE: usize = 96;

/// Threads of a block; as in `kernels/step.cuh`.
pub(crate) const THREADS: u32 = 256;

/// The elements of a tensor of `len` that a block of threads works on: fewer of small ones, or a small model would leave most of a GPU
/// idle. As in `kernels/step.cuh`.
const fn chunk(len: usize) -> usize {
    if len <= 1 << 18 { 1024 } else { 4096 }
}

/// A row of a table.
pub(crate) trait Item: Copy {
    /// Elements of the row's tensors.
    fn len(&self) -> u64;
    /// Blocks of threads that it takes.
    fn blocks(&self) -> usize {
        blocks_of(self.len() as usize)
    }
    /// Tells the row the first of its blocks of threads.
    fn set_first(&mut self, first: u32);
}

/// One launch: its rows, the blocks of threads they need, and the number of such blocks in earlier launches.
pub(crate) struct Part<I> {
    pub items: [I; TABLE],
    pub count: u32,
    pub blocks: usize,
    pub before: usize,
}

/// Blocks of threads for a tensor of `len` elements; at least one, so that every row has a partial sum.
pub(crate) fn blocks_of(len: usize) -> usize {
    len.div_ceil(chunk(len)).max(1)
}

/// The launches that a list of rows takes.
pub(crate) fn parts<I: Item>(items: &[I]) -> Vec<Part<I>> {
    let mut before = 0;
    let mut parts = Vec::new();
    for rows in items.chunks(TABLE) {
        let mut table = [rows[0]; TABLE];
        let mut blocks = 0;
        for (row, item) in table.iter_mut().zip(rows) {
            *row = *item;
            row.set_first(blocks as u32);
            blocks += item.blocks();
        }
        parts.push(Part { items: table, count: rows.len() as u32, blocks, before });
        before += blocks;
    }
    parts
}

/// A dtype's number in tables.
pub(crate) fn type_number(dtype: DType, name: &str) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => 0,
        DType::F64 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        other => bail!("{name}: dtype {other:?} found, expected f32, f64, f16 or bf16"),
    })
}

/// Declares a row, as [`super::args`] does an argument; it has the fields `len: u64` and `first: u32`.
macro_rules! item {
    ($(#[$doc:meta])* struct $name:ident { $($(#[$note:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        // Only kernels read most fields.
        #[allow(dead_code)]
        pub(crate) struct $name { $($(#[$note])* pub $field: $type),* }

        impl $crate::gpu::table::Item for $name {
            fn len(&self) -> u64 {
                self.len
            }
            fn set_first(&mut self, first: u32) {
                self.first = first;
            }
        }
    };
}
pub(crate) use item;
