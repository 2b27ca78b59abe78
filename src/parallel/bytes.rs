//! Tensors as bytes and back.

use crate::ops::element::Host;
use candle_core::{DType, Device, Result, Tensor, bail};

/// The elements, in row-major order.
pub(crate) fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.to_device(&Device::Cpu)?;
    let host = Host::of(&tensor);
    Ok(match tensor.dtype() {
        DType::F64 => little_endian(&host.values::<f64>()?, |v| v.to_le_bytes()),
        DType::F32 => little_endian(&host.values::<f32>()?, |v| v.to_le_bytes()),
        DType::F16 => little_endian(&host.values::<half::f16>()?, |v| v.to_le_bytes()),
        DType::BF16 => little_endian(&host.values::<half::bf16>()?, |v| v.to_le_bytes()),
        other => bail!("parallel: expected a tensor of f64, f32, f16 or bf16, got {other:?}"),
    })
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut written = vec![0; N * values.len()];
    for (bytes_of, &value) in written.chunks_exact_mut(N).zip(values) {
        bytes_of.copy_from_slice(&bytes(value));
    }
    written
}

/// The inverse of [`bytes_of`].
pub(crate) fn tensor_of(bytes: &[u8], dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let expected = dims.iter().product::<usize>() * dtype.size_in_bytes();
    if bytes.len() != expected {
        bail!("parallel: expected {expected} bytes of a tensor {dims:?}, got {}", bytes.len())
    }
    Tensor::from_raw_buffer(bytes, dtype, dims, &Device::Cpu)?.to_device(device)
}

/// Messages behind one another, each after its length.
#[cfg_attr(not(any(test, feature = "mpi", feature = "nccl")), allow(dead_code))]
pub(super) fn pieces(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = vec![];
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let (piece, after) = rest.split_at((u64::from_le_bytes(*length) as usize).min(rest.len()));
        found.push(piece.to_vec());
        bytes = after;
    }
    found
}

/// What is written one after the other, and read so.
#[derive(Debug, Default)]
pub(crate) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn number(&mut self, value: usize) {
        self.0.extend((value as u64).to_le_bytes());
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len());
        self.0.extend(bytes);
    }
}

/// What a [`Writer`] has written.
#[derive(Debug)]
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.0.split_at_checked(length) else {
            bail!("parallel: a message ends too early")
        };
        self.0 = rest;
        Ok(taken)
    }

    pub fn number(&mut self) -> Result<usize> {
        let bytes = self.take(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_default()) as usize)
    }

    /// A number of eight bytes after their count.
    pub fn double(&mut self) -> Result<f64> {
        Ok(f64::from_le_bytes(self.bytes()?.try_into().unwrap_or_default()))
    }

    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.number()?;
        self.take(length)
    }
}
