//! What the operations and whole training steps reach on a device: bytes and operations a second beside ceilings measured in
//! the same run, and step times beside candle's AdamW.
//!
//! ```text
//! cargo bench --bench kernels -- [--device cpu|cuda[:N]] [--json FILE] [--only PART] [--quick]
//! ```
//!
//! `--only` takes a part of a name: `ceilings`, `second_moment`, `step: lenet300`, ..; it may come several times. `--quick` takes
//! the smallest sizes and two repeats, to see that all of it runs. Times are medians of repeats, each of as many calls as
//! take some milliseconds, after a warm-up, with the device's queue empty at both ends. A call includes the allocation of its result.

#[cfg(feature = "cuda")]
mod blas;
mod grouped;
mod machine;
mod ops;
mod report;
mod steps;
mod timing;

use candle_core::{Device, Result, bail};
use report::Report;
use std::process::ExitCode;

/// The command line.
struct Options {
    device: Device,
    json: Option<String>,
    only: Vec<String>,
    quick: bool,
}

impl Options {
    fn read() -> Result<Self> {
        let mut options = Self { device: Device::Cpu, json: None, only: vec![], quick: false };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || match words.next() {
                Some(value) => Ok(value),
                None => bail!("{word}: expected a value after it"),
            };
            match word.as_str() {
                "--device" => options.device = device(&value()?)?,
                "--json" => options.json = Some(value()?),
                "--only" => options.only.push(value()?),
                "--quick" => options.quick = true,
                // What cargo adds.
                "--bench" => {}
                _ => bail!("{word}: expected --device, --json, --only or --quick"),
            }
        }
        Ok(options)
    }

    /// Whether something of this name is asked for.
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }
}

fn device(name: &str) -> Result<Device> {
    match name.split_once(':').map_or((name, "0"), |(kind, index)| (kind, index)) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", index) => match index.parse() {
            Ok(index) => Device::new_cuda(index),
            Err(_) => bail!("--device {name}: expected cpu, cuda or cuda:N"),
        },
        _ => bail!("--device {name}: expected cpu, cuda or cuda:N"),
    }
}

fn work() -> Result<bool> {
    let options = Options::read()?;
    // This thread is one of the pool's: from outside of it every parallel loop would be handed over and waited for.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().map_err(candle_core::Error::wrap)?;
    let mut report = Report::new(machine::describe(&options.device), options.json.clone());
    ops::measure(&options, &mut report)?;
    steps::measure(&options, &mut report)?;
    report.write()?;
    Ok(report.complete())
}

fn main() -> ExitCode {
    match work() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {}", error.to_string().lines().next().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
