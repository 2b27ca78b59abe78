//! Devices with streams of the user's own, and several threads.

use crate::common::*;
use crate::device::cuda;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::ops::dense::mix;
use kronwake::ops::pool::relu;

const LEN: usize = 5000;

/// `x <- 0.5 x + y` some times over, which only a queue in order gets right, and the exact values.
fn chain(device: &Device) -> Result<(Tensor, Vec<f64>)> {
    let (x, y) = (random(1, &[LEN])?, random(2, &[LEN])?);
    let run = |mut x: Tensor, y: Tensor| -> Result<Tensor> {
        for _ in 0..5 {
            x = relu(&mix(&x, 0.5, &y, 1.0)?)?;
        }
        Ok(x)
    };
    Ok((run(x.to_device(device)?, y.to_device(device)?)?, flat(&run(x, y)?)))
}

#[test]
fn a_tensor_of_ones_own_stream_is_there_on_another() -> Result<()> {
    let Some(other) = cuda() else { return Ok(()) };
    let own = Device::new_cuda_with_stream(0)?;
    let third = Device::new_cuda_with_stream(0)?;
    for there in [&other, &third] {
        let (x, expected) = chain(&own)?;
        // The copy is on the other device's stream.
        let copy = x.to_device(there)?;
        drop(x);
        // What is freed may be somebody else's now.
        let _next = Tensor::zeros(LEN, DType::F64, &own)?;
        assert_eq!(flat(&copy.to_device(&Device::Cpu)?), expected);
    }
    Ok(())
}

#[test]
fn a_tensor_that_another_thread_drops_after_a_wait() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    for device in [device, Device::new_cuda_with_stream(0)?] {
        let (x, expected) = chain(&device)?;
        let y = mix(&x, 2.0, &x, 0.0)?;
        device.synchronize()?;
        let elsewhere = std::thread::spawn(move || -> Result<Vec<f64>> {
            let found = flat(&x.to_device(&Device::Cpu)?);
            drop(x);
            Ok(found)
        });
        assert_eq!(elsewhere.join().expect("no panic")?, expected);
        let twice: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
        assert_eq!(flat(&y.to_device(&Device::Cpu)?), twice);
    }
    Ok(())
}
