//! What the allocator does with freed memory.

/// Makes glibc's allocator keep the blocks of one training step for the next.
///
/// By itself it maps each block from 128 KiB on anew, from 32 MiB on always, and gives memory at the end of its heap back: so the system clears
/// the same pages in every step, which takes about as long as a small convolutional net's products. Nothing happens with other
/// allocators, or where the environment says what glibc's is to do.
pub(crate) fn keep_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            const CHOSEN: [&str; 4] =
                ["MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"];
            if CHOSEN.iter().all(|name| std::env::var_os(name).is_none()) {
                // SAFETY: it may be called at any time, and only sets two numbers of the allocator's.
                unsafe {
                    libc::mallopt(libc::M_MMAP_MAX, 0);
                    libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
                }
            }
        });
    }
}
