//! Batches on the device that trains: gathered on the host for the CPU, from images that stay there for any other.

use crate::data::{Data, Part};
use crate::idx::SIDE;
use candle_core::{DType, Device, Result, Tensor};

/// The examples of one part of the data, on a device.
pub struct Feed<'a> {
    data: &'a Data,
    part: &'a Part,
    dtype: DType,
    device: &'a Device,
    /// Pixels as bytes `[n, 784]` and labels `[n]`, away from the CPU.
    resident: Option<(Tensor, Tensor)>,
}

impl<'a> Feed<'a> {
    pub fn new(data: &'a Data, part: &'a Part, dtype: DType, device: &'a Device) -> Result<Self> {
        let resident = if device.is_cpu() {
            None
        } else {
            let images = Tensor::from_slice(&part.pixels[..], (part.len(), SIDE * SIDE), device)?;
            let labels: Vec<u32> = part.labels.iter().map(|&label| u32::from(label)).collect();
            Some((images, Tensor::from_vec(labels, part.len(), device)?))
        };
        Ok(Self { data, part, dtype, device, resident })
    }

    pub fn len(&self) -> usize {
        self.part.len()
    }

    /// The images `[n, 1, 28, 28]`, normalized, and the labels `[n]` (u32) of the examples at `places`.
    pub fn batch(&self, places: &[usize]) -> Result<(Tensor, Tensor)> {
        let Some((images, labels)) = &self.resident else {
            return self.data.batch(self.part, places, self.dtype, self.device);
        };
        let places: Vec<u32> = places.iter().map(|&place| place as u32).collect();
        let places = Tensor::from_slice(&places, places.len(), self.device)?;
        let (mean, std) = self.data.moments;
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let images = images.index_select(&places, 0)?.to_dtype(wide)?;
        let images = images.affine(1.0 / (255.0 * std), -mean / std)?.to_dtype(self.dtype)?;
        Ok((images.reshape(((), 1, SIDE, SIDE))?, labels.index_select(&places, 0)?))
    }
}
