//! What the allocator does with freed memory.

use std::sync::Once;

/// Makes glibc's allocator keep the blocks of one training step for the next.
///
/// By itself it maps large blocks anew, those above 32 MiB always, and gives the end of its heap back; so the system clears the same pages in every step.
/// Clearing them is a fifth to a third of a step of a small transformer, and of a small convolutional net about as much as its products
/// (`docs/speed.md`). The process keeps what it once needed, until it ends. Nothing happens with other allocators.
pub(crate) fn keep_freed_blocks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: `mallopt` takes two numbers and a lock of its own. -1 is "never" for the first option, 0 "no block" for the second.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            libc::mallopt(libc::M_MMAP_MAX, 0);
        }
    });
}
