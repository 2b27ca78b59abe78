//! Time.

use std::time::Instant;

/// Seconds that this process has computed, on all of its threads together: other programs on the machine hardly count. Wall seconds
/// where the system does not say.
pub struct Clock {
    wall: Instant,
    computed: Option<f64>,
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
        let wall = self.wall.elapsed().as_secs_f64();
        let computed = computed().zip(self.computed).map_or(wall, |(now, then)| now - then);
        Seconds { wall, computed }
    }
}

/// The kernel's count of every thread's nanoseconds on a core.
fn computed() -> Option<f64> {
    let mut sum = 0.0;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let line = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        sum += line.split(' ').next()?.parse::<f64>().ok()?;
    }
    Some(sum * 1e-9)
}
