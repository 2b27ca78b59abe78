//! Time.

use rustix::time::{ClockId, Timespec, clock_gettime};
use std::time::Instant;

/// Seconds that this process has computed, on all of its threads together: other programs on the machine hardly count.
pub struct Clock {
    wall: Instant,
    computed: f64,
}

/// Seconds since a [`Clock`] was started.
#[derive(Debug, Clone, Copy)]
pub struct Seconds {
    pub wall: f64,
    pub computed: f64,
}

impl Clock {
    pub fn start() -> Self {
        Self { wall: Instant::now(), computed: computed() }
    }

    pub fn seconds(&self) -> Seconds {
        Seconds { wall: self.wall.elapsed().as_secs_f64(), computed: computed() - self.computed }
    }
}

fn computed() -> f64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::ProcessCPUTime);
    tv_sec as f64 + 1e-9 * tv_nsec as f64
}
