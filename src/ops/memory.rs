//! What the allocator does with freed memory.

use std::sync::Once;

/// Larger blocks than this are given back to the system in any case.
const LARGEST: usize = 31 << 20;

/// Makes glibc's allocator keep the blocks of one training step for the next.
///
/// It maps blocks from 128 KiB on anew, and so the system clears their pages once more, until it has seen a larger one
/// freed; then it raises that limit, to 32 MiB at most. A block that is freed unused raises it at once. Without this the
/// page faults of a small convolutional net take about as long as its products. Nothing happens with other allocators.
pub(crate) fn keep_freed_blocks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGEST))));
}
