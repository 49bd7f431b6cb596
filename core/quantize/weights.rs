//! llm-compressor's arithmetic for weights, in the dtype of the weight: a scale is amax / 448, and a code is the quotient
//! of weight and scale, rounded to that dtype first and to E4M3 then (compressed-tensors, `calculate_qparams` and
//! `quantize`). Rows are shared out among all cores.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::checkpoint::{Tensor, TensorDType};
use crate::e4m3;
use crate::error::{Error, Result};

/// The dtype of a weight, in which its scales are computed and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Real {
    /// bf16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
}

impl Real {
    /// The dtype of a tensor of real numbers.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        match tensor.dtype {
            TensorDType::Bf16 => Ok(Real::Bf16),
            TensorDType::F16 => Ok(Real::F16),
            TensorDType::F32 => Ok(Real::F32),
            other => Err(Error::tensor(&tensor.name, format!("is {other}; BF16, F16 or F32 is quantized"))),
        }
    }

    /// As safetensors spells it.
    pub const fn dtype(self) -> Dtype {
        match self {
            Real::Bf16 => Dtype::BF16,
            Real::F16 => Dtype::F16,
            Real::F32 => Dtype::F32,
        }
    }

    /// The nearest value of this dtype, ties to even.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Real::Bf16 => bf16::from_f32(x).to_f32(),
            Real::F16 => f16::from_f32(x).to_f32(),
            Real::F32 => x,
        }
    }

    /// Values of this dtype as bytes.
    pub fn to_bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Real::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Real::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Real::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// The scale of values up to `amax`: amax / 448, both rounded to this dtype. Where that is 0 it is the dtype's
    /// epsilon, as in compressed-tensors, and so it is where it is subnormal in f32: no runtime could divide by it.
    pub fn scale(self, amax: f32) -> f32 {
        let scale = self.round(self.round(amax) / e4m3::MAX);
        match self {
            _ if scale >= f32::MIN_POSITIVE => scale,
            Real::Bf16 => bf16::EPSILON.to_f32(),
            Real::F16 => f16::EPSILON.to_f32(),
            Real::F32 => f32::EPSILON,
        }
    }
}

/// A weight in FP8.
pub struct QuantizedWeight {
    /// One a row, or one for all, in the dtype of the weight.
    pub scales: Vec<u8>,
    /// E4M3, shaped as the weight.
    pub codes: Vec<u8>,
}

/// Quantizes a weight `[n, k]` with a scale a row, or one for all. Fails where it is not of real numbers, or not finite.
pub fn quantize_weight(weight: &Tensor, per_row: bool) -> Result<QuantizedWeight> {
    let real = Real::of(weight)?;
    let rows = weight.shape[0];
    let row = weight.data.len() / rows;
    let bytes = |i: usize| &weight.data[i * row..][..row];
    let mut amax = vec![0; rows];
    in_parallel(&mut amax, 1, |i, amax| {
        amax[0] = match real {
            Real::Bf16 => largest(bytes(i), |b| u32::from(u16::from_le_bytes(b)) << 16),
            Real::F16 => largest(bytes(i), |b| f16::from_le_bytes(b).to_f32().to_bits()),
            Real::F32 => largest(bytes(i), u32::from_le_bytes),
        }
    });
    if let Some(row) = amax.iter().position(|amax| !f32::from_bits(*amax).is_finite()) {
        let why = format!("holds NaN or infinity in row {row}: the model is damaged; download it again");
        return Err(Error::tensor(&weight.name, why));
    }
    if !per_row {
        amax = vec![amax.into_iter().max().unwrap_or(0)];
    }
    let scales: Vec<f32> = amax.into_iter().map(|amax| real.scale(f32::from_bits(amax))).collect();
    let mut codes = vec![0; weight.shape.iter().product()];
    in_parallel(&mut codes, weight.shape[1], |i, out| {
        let scale = scales[if per_row { i } else { 0 }];
        match real {
            Real::Bf16 => {
                let value = |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
                encode(bytes(i), out, |b| round_to_bf16(value(b) / scale));
            }
            Real::F16 => encode(bytes(i), out, |b| real.round(f16::from_le_bytes(b).to_f32() / scale)),
            Real::F32 => encode(bytes(i), out, |b| f32::from_le_bytes(b) / scale),
        }
    });
    Ok(QuantizedWeight { scales: real.to_bytes(&scales), codes })
}

/// The bits of the largest magnitude, as f32. They are ordered as magnitudes are, and those of NaN are above all.
fn largest<const N: usize>(bytes: &[u8], bits: impl Fn([u8; N]) -> u32) -> u32 {
    bytes.as_chunks::<N>().0.iter().fold(0, |max, b| max.max(bits(*b) & 0x7fff_ffff))
}

/// The zero point is added to every quotient, so that -0 becomes 0.
fn encode<const N: usize>(bytes: &[u8], out: &mut [u8], quotient: impl Fn([u8; N]) -> f32) {
    for (code, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *code = e4m3::encode(quotient(*b) + 0.0);
    }
}

/// As `bf16::from_f32` for what is not NaN, without a branch: loops over this become vector instructions.
fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Calls `fill` with every row of `out` and its number, on all cores where there is much to do.
fn in_parallel<T: Send>(out: &mut [T], row: usize, fill: impl Fn(usize, &mut [T]) + Sync) {
    let rows = out.len() / row;
    let share = rows.div_ceil(threads()).max(1);
    std::thread::scope(|scope| {
        for (i, part) in out.chunks_mut(share * row).enumerate() {
            let fill = &fill;
            scope.spawn(move || part.chunks_mut(row).enumerate().for_each(|(j, row)| fill(i * share + j, row)));
        }
    });
}
