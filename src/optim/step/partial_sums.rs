//! Places of partial sums on a GPU.

use crate::gpu::Operand;
use crate::gpu::table::blocks_of;

/// Where partial sums begin, and how many there are.
pub(super) type Sums = (u64, u64);

/// Partial sums of tensors, one behind the other in an array of f64.
pub(super) struct Parts<'a> {
    array: &'a Operand,
    start: usize,
    /// Where the next sums will begin.
    pub next: usize,
}

impl<'a> Parts<'a> {
    pub fn of(array: &'a Operand, start: usize) -> Self {
        Self { array, start, next: start }
    }

    /// Where the first tensor's sums begin.
    pub fn first(&self) -> u64 {
        self.array.at(self.start)
    }

    /// Where the sums of the next tensor will begin.
    pub fn next(&self) -> u64 {
        self.array.at(self.next)
    }

    /// Where the sums of the next tensor, of `len` elements, begin, and how many there are.
    pub fn take(&mut self, len: usize) -> Sums {
        let count = blocks_of(len);
        let at = self.reserve(count);
        (self.at(at), count as u64)
    }

    /// The first of `count` places for the next sums.
    pub fn reserve(&mut self, count: usize) -> usize {
        let at = self.next;
        self.next += count;
        at
    }

    pub fn at(&self, place: usize) -> u64 {
        self.array.at(place)
    }
}
