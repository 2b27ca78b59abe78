//! What the figures were measured on.

use candle_core::Device;
use serde_json::{Value, json};
use std::process::Command;

/// The device, its driver and CUDA version, and the processor, as far as they can be found out.
pub fn describe(device: &Device) -> Value {
    let smi = |arguments: &[&str]| -> Option<String> {
        let out = Command::new("nvidia-smi").args(arguments).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let query = |what: &str| {
        let index = match device.location() {
            candle_core::DeviceLocation::Cuda { gpu_id } => gpu_id.to_string(),
            _ => return None,
        };
        smi(&["-i", &index, &format!("--query-gpu={what}"), "--format=csv,noheader"])
    };
    let cuda_version = || {
        let table = smi(&[])?;
        let rest = table.split("CUDA Version:").nth(1)?;
        rest.split_whitespace().next().map(str::to_string)
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    json!({
        "device": if device.is_cpu() { Some("cpu".to_string()) } else { query("name") },
        "driver": query("driver_version"),
        "cuda": if device.is_cpu() { None } else { cuda_version() },
        "compute_capability": query("compute_cap"),
        "memory": query("memory.total"),
        "processor": processor.map(|(_, name)| name),
        "threads": rayon::current_num_threads(),
        "kronwake": env!("CARGO_PKG_VERSION"),
        "optimized": !cfg!(debug_assertions),
    })
}
