//! Types of tensors in files and in candle, and conversions between them.

use candle_core::{DType, Device, Result, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A tensor of a file, in the next larger type if candle lacks its own; else what it is, to be said after its name.
pub(super) fn tensor(view: &TensorView, device: &Device) -> Result<std::result::Result<Tensor, String>> {
    use Dtype::*;
    let (bytes, dims) = (view.data(), view.shape());
    Ok(Ok(match view.dtype() {
        U8 | U16 | U32 | I16 | I32 | I64 | F16 | BF16 | F32 | F64 | F8_E4M3 => {
            candle_core::safetensors::Load::load(view, device)?
        }
        BOOL => Tensor::from_vec(bytes.iter().map(|&b| u8::from(b != 0)).collect::<Vec<_>>(), dims, device)?,
        I8 => {
            let values: Vec<i16> = bytes.iter().map(|&b| i16::from(b as i8)).collect();
            Tensor::from_vec(values, dims, device)?
        }
        U64 => {
            let (values, _) = bytes.as_chunks::<8>();
            let values = values.iter().map(|b| i64::try_from(u64::from_le_bytes(*b)));
            match values.collect::<std::result::Result<Vec<_>, _>>() {
                Ok(values) => Tensor::from_vec(values, dims, device)?,
                Err(_) => {
                    return Ok(Err("U64 with values of 2^63 and more, which no type of candle holds".into()));
                }
            }
        }
        // The upper half of an f16.
        F8_E5M2 => {
            let values: Vec<half::f16> =
                bytes.iter().map(|&b| half::f16::from_bits(u16::from(b) << 8)).collect();
            Tensor::from_vec(values, dims, device)?
        }
        other => return Ok(Err(format!("{other:?}, which candle has no type for"))),
    }))
}

/// `tensor` in another type and on another device. From fp8 by way of f32: candle's conversion to f64 does not return.
pub(crate) fn cast(tensor: &Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    let tensor = match tensor.dtype() {
        DType::F8E4M3 if dtype != DType::F8E4M3 => &tensor.to_dtype(DType::F32)?,
        _ => tensor,
    };
    tensor.to_dtype(dtype)?.to_device(device)
}

/// [`cast`] of values that the type holds: finite ones stay finite, and whole numbers what they are. Else the reason, to be said after the
/// tensor's name.
pub(super) fn checked(
    tensor: &Tensor,
    dtype: DType,
    device: &Device,
) -> Result<std::result::Result<Tensor, String>> {
    let found = cast(tensor, dtype, device)?;
    if tensor.dtype().is_int() && tensor.dtype() != dtype {
        let same =
            found.to_dtype(DType::I64)?.to_device(tensor.device())?.eq(&tensor.to_dtype(DType::I64)?)?;
        let others = tensor.elem_count() - count(&same)?;
        if others > 0 {
            return Ok(Err(format!(
                "{:?} with {others} values that {dtype:?} does not hold",
                tensor.dtype()
            )));
        }
        return Ok(Ok(found));
    }
    // The first number that is rounded to infinity, or to NaN.
    let limit = match dtype {
        DType::F8E4M3 => 464.0,
        DType::F16 => 65520.0,
        DType::BF16 => 2f64.powi(128) - 2f64.powi(119),
        DType::F32 => 2f64.powi(128) - 2f64.powi(103),
        _ => return Ok(Ok(found)),
    };
    let narrower = match tensor.dtype() {
        DType::F64 => true,
        DType::F32 => dtype != DType::F32,
        DType::BF16 => matches!(dtype, DType::F16 | DType::F8E4M3),
        DType::F16 => dtype == DType::F8E4M3,
        _ => false,
    };
    if !narrower || tensor.elem_count() == 0 {
        return Ok(Ok(found));
    }
    let wide = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let sizes = tensor.detach().to_dtype(wide)?.abs()?;
    let finite = sizes.ne(f64::INFINITY)?;
    let beyond = count(&(sizes.ge(limit)? * finite)?)?;
    if beyond == 0 {
        return Ok(Ok(found));
    }
    Ok(Err(format!(
        "{:?} with {beyond} of {} elements beyond the largest number of {dtype:?}, where they would be infinite; clamp them, or load into a model of a wider type",
        tensor.dtype(),
        tensor.elem_count()
    )))
}

/// How many elements of a tensor of 0 and 1 are 1.
fn count(flags: &Tensor) -> Result<usize> {
    Ok(flags.to_dtype(DType::U32)?.flatten_all()?.sum_all()?.to_scalar::<u32>()? as usize)
}
