//! How kernels come to a device: as its own code or as what its driver compiles, once, and with memory that stays.

use crate::device::cuda;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::ops::pool::relu;
use libloading::{Library, Symbol};
use std::ffi::{c_int, c_void};
use std::process::Command;

/// Every device object of the first GPU, with its own stream and with the thread's.
fn devices() -> Result<Vec<Device>> {
    Ok(vec![Device::new_cuda(0)?, Device::new_cuda(0)?, Device::new_cuda_with_stream(0)?])
}

fn use_one_kernel_a_module(device: &Device) -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let x = Tensor::new(&[-1f32, 0.0, 2.0], device)?.to_dtype(dtype)?;
        assert_eq!(relu(&x)?.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
    }
    Ok(())
}

fn driver() -> Library {
    // SAFETY: the driver is loaded already.
    unsafe { Library::new("libcuda.so.1") }.expect("the driver")
}

/// The GPU on the host tells how often it has loaded code, and PTX; a real one does not.
fn loaded(driver: &Library) -> Option<(c_int, c_int)> {
    let (mut code, mut ptx) = (0, 0);
    // SAFETY: the function is tests/host_gpu/images.cpp's.
    unsafe {
        let count: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int)> =
            driver.get(b"host_gpu_loaded").ok()?;
        count(&raw mut code, &raw mut ptx);
    }
    Some((code, ptx))
}

/// Whether the GPU is that of tests/host_gpu.
pub fn on_the_host() -> bool {
    loaded(&driver()).is_some()
}

/// What the device's pool keeps when a stream is waited for.
fn kept(driver: &Library) -> u64 {
    const RELEASE_THRESHOLD: c_int = 4;
    let (mut pool, mut bytes) = (std::ptr::null_mut(), 0u64);
    // SAFETY: as the CUDA driver's manual has the two.
    unsafe {
        let pool_of: Symbol<unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int> =
            driver.get(b"cuDeviceGetDefaultMemPool").expect("the driver has pools");
        assert_eq!(pool_of(&raw mut pool, 0), 0);
        let attribute: Symbol<unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> c_int> =
            driver.get(b"cuMemPoolGetAttribute").expect("the driver has pools");
        assert_eq!(attribute(pool, RELEASE_THRESHOLD, (&raw mut bytes).cast()), 0);
    }
    bytes
}

/// Runs a test of this program that is ignored otherwise, by itself and for another GPU: what a driver reads is read once.
fn alone(test: &str, capability: &str) {
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program)
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("KRONWAKE_HOST_GPU_CAPABILITY", capability)
        .output()
        .expect("this program runs");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{test} for {capability}: {text}");
}

#[test]
fn a_module_is_loaded_once_a_gpu() {
    if cuda().is_none() {
        return;
    }
    alone("modules::code_once", "90");
    // Code for 8.0 does for what came after it.
    alone("modules::code_once", "89");
}

#[test]
fn a_gpu_that_there_is_no_code_for_takes_the_ptx() {
    if cuda().is_none() {
        return;
    }
    if !on_the_host() {
        println!("skipped: this GPU is of one kind");
        return;
    }
    alone("modules::ptx_once", "120");
    alone("modules::too_old", "75");
}

#[test]
#[ignore = "run alone by a_module_is_loaded_once_a_gpu"]
fn code_once() -> Result<()> {
    once((1, 0))
}

#[test]
#[ignore = "run alone by a_gpu_that_there_is_no_code_for_takes_the_ptx"]
fn ptx_once() -> Result<()> {
    once((0, 1))
}

fn once(expected: (c_int, c_int)) -> Result<()> {
    let devices = devices()?;
    let driver = driver();
    assert_eq!(loaded(&driver).unwrap_or_default(), (0, 0));
    std::thread::scope(|threads| {
        let all: Vec<_> =
            devices.iter().map(|device| threads.spawn(|| use_one_kernel_a_module(device))).collect();
        all.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    drop(devices);
    use_one_kernel_a_module(&Device::new_cuda(0)?)?;
    if let Some(found) = loaded(&driver) {
        assert_eq!(found, expected);
    }
    assert_eq!(kept(&driver), u64::MAX);
    Ok(())
}

#[test]
#[ignore = "run alone by a_gpu_that_there_is_no_code_for_takes_the_ptx"]
fn too_old() -> Result<()> {
    let x = Tensor::zeros(3, DType::F32, &Device::new_cuda(0)?)?;
    let error = relu(&x).expect_err("must be refused").to_string();
    assert!(error.contains("relu.cu could not be loaded") && error.contains("8.0"), "{error}");
    Ok(())
}
