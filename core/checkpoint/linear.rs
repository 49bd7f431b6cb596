//! The weights of one linear layer and the scales of the KV cache: tensors, scheme and config put together, and every
//! value that would poison a result refused by name.

use crate::bytes::Bytes;
use crate::e4m3;
use crate::error::{Error, Result};

use super::quantization::{Activations, WeightStrategy};
use super::{Checkpoint, Tensor, TensorDType};

/// The weights of a linear layer `[n, k]`.
#[derive(Clone, Debug)]
pub struct LinearWeights {
    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `[n, k]`.
    pub weight: LinearWeight,
    /// How its input is quantized.
    pub input: InputScale,
}

/// A weight `[n, k]`, one row an output channel.
#[derive(Clone, Debug)]
pub enum LinearWeight {
    /// F32, F16 or BF16.
    Real(Tensor),
    /// E4M3 codes and their scales.
    Fp8 {
        /// `[n, k]`, no NaN among them.
        codes: Bytes,
        /// `[n]`, positive; a scale of the whole tensor is repeated.
        scale: Vec<f32>,
    },
}

/// How the input of a linear layer is quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InputScale {
    /// Not at all.
    None,
    /// To E4M3 with this scale: real = code x scale.
    Static(f32),
    /// To E4M3 with a scale for each token.
    Dynamic,
}

impl Checkpoint {
    /// The weights of a linear layer of `n` outputs and `k` inputs, as the config calls for them. Reads every code,
    /// because one NaN among them would spoil every output.
    pub fn linear(&self, module: &str, n: usize, k: usize) -> Result<LinearWeights> {
        let weight = self.weight(module)?;
        weight.expect_shape(&[n, k])?;
        let scheme = self.quantization().and_then(|quantization| quantization.scheme(module));
        let (weight, input) = match (scheme, weight.dtype) {
            (None, TensorDType::F32 | TensorDType::F16 | TensorDType::Bf16) => {
                (LinearWeight::Real(weight.clone()), InputScale::None)
            }
            (Some(scheme), TensorDType::E4m3) => {
                refuse_nan(weight, k)?;
                let scale = match scheme.weights {
                    WeightStrategy::Tensor => vec![self.scale(module, "weight_scale")?; n],
                    WeightStrategy::Channel => self.channel_scales(module, n)?,
                };
                let input = match scheme.activations {
                    Activations::None => InputScale::None,
                    Activations::Static => InputScale::Static(self.scale(module, "input_scale")?),
                    Activations::Dynamic => InputScale::Dynamic,
                };
                (LinearWeight::Fp8 { codes: weight.data.clone(), scale }, input)
            }
            (Some(_), dtype) => {
                let why = format!("is {dtype} where quantization_config calls for F8_E4M3; save the model compressed");
                return Err(Error::tensor(&weight.name, why));
            }
            (None, TensorDType::E4m3) => {
                let why = "is F8_E4M3, but quantization_config does not quantize this layer; take both from one model";
                return Err(Error::tensor(&weight.name, why));
            }
            (None, TensorDType::Other(other)) => {
                return Err(Error::tensor(&weight.name, format!("is {other}; F32, F16, BF16 or F8_E4M3 is needed")));
            }
        };
        Ok(LinearWeights { name: module.to_owned(), weight, input })
    }

    /// The scales of the keys and of the values of a layer, where the config says that the checkpoint brings them:
    /// `k_scale` and `v_scale`, or, in checkpoints of 2024, the output scales of the projections.
    pub fn kv_scales(&self, layer: usize) -> Result<Option<(f32, f32)>> {
        if self.quantization().is_none_or(|quantization| quantization.kv_cache.is_none()) {
            return Ok(None);
        }
        let module = format!("model.layers.{layer}.self_attn");
        let scale = |which: &str, of_2024: &str| match self.find(&format!("{module}.{which}")) {
            None if self.find(&format!("{module}.{of_2024}")).is_some() => self.scale(&module, of_2024),
            _ => self.scale(&module, which),
        };
        Ok(Some((scale("k_scale", "k_proj.output_scale")?, scale("v_scale", "v_proj.output_scale")?)))
    }

    /// `<module>.weight`; where it is missing, the name of what stands in its place.
    fn weight(&self, module: &str) -> Result<&Tensor> {
        let name = format!("{module}.weight");
        if let Some(tensor) = self.find(&name) {
            return Ok(tensor);
        }
        let (parent, leaf) = module.rsplit_once('.').unwrap_or(("", module));
        let fused = match leaf {
            "q_proj" | "k_proj" | "v_proj" => format!("{parent}.qkv_proj.weight"),
            "gate_proj" | "up_proj" => format!("{parent}.gate_up_proj.weight"),
            _ => String::new(),
        };
        for instead in [fused, format!("{module}.weight_packed")] {
            if self.find(&instead).is_some() {
                let why = format!(
                    "is missing, and {instead} in its place is not supported; save the layers unfused, \
                                   in format float-quantized"
                );
                return Err(Error::tensor(name, why));
            }
        }
        self.tensor(&name)
    }

    /// One scale: shape `[]`, `[1]` or `[1, 1]`.
    fn scale(&self, module: &str, which: &str) -> Result<f32> {
        let tensor = self.tensor(&format!("{module}.{which}"))?;
        if !matches!(tensor.shape[..], [] | [1] | [1, 1]) {
            let why = format!("has shape {}, quantization_config calls for one scale", tensor.shape_text());
            return Err(Error::tensor(&tensor.name, why));
        }
        let scales = scales(tensor)?;
        Ok(scales[0])
    }

    /// A scale a row: shape `[n, 1]` or `[n]`.
    fn channel_scales(&self, module: &str, n: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(&format!("{module}.weight_scale"))?;
        if tensor.shape != [n, 1] && tensor.shape != [n] {
            let why = format!("has shape {}, quantization_config calls for [{n}, 1]", tensor.shape_text());
            return Err(Error::tensor(&tensor.name, why));
        }
        scales(tensor)
    }
}

/// The values of a tensor of scales. Subnormal ones are refused with zero, because their reciprocals overflow.
fn scales(tensor: &Tensor) -> Result<Vec<f32>> {
    let scales = tensor.to_f32()?;
    match scales.iter().position(|scale| !(*scale >= f32::MIN_POSITIVE && scale.is_finite())) {
        None => Ok(scales),
        Some(i) => {
            let why =
                format!("scale {i} is {:e}; scales must be positive and finite: quantize the model again", scales[i]);
            Err(Error::tensor(&tensor.name, why))
        }
    }
}

fn refuse_nan(weight: &Tensor, k: usize) -> Result<()> {
    match find_nan(&weight.data) {
        None => Ok(()),
        Some(at) => {
            let why = format!("holds NaN at row {}, column {}; quantize the model again", at / k, at % k);
            Err(Error::tensor(&weight.name, why))
        }
    }
}

/// The first NaN code. Where there are many codes, all cores read them: together they have more bandwidth.
fn find_nan(codes: &[u8]) -> Option<usize> {
    const FEW: usize = 1 << 20;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(codes.len() / FEW);
    if threads < 2 {
        return find_nan_of(codes);
    }
    let part = codes.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let find = |(i, codes)| scope.spawn(move || find_nan_of(codes).map(|at| i * part + at));
        let threads: Vec<_> = codes.chunks(part).enumerate().map(find).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).fold(None, Option::or)
    })
}

/// Whole blocks are scanned without a branch, which compiles to vector instructions.
fn find_nan_of(codes: &[u8]) -> Option<usize> {
    const BLOCK: usize = 1 << 12;
    let is_nan = |block: &[u8]| block.iter().fold(false, |any, code| any | e4m3::is_nan(*code));
    let block = codes.chunks(BLOCK).position(is_nan)?;
    let start = block * BLOCK;
    codes[start..].iter().position(|code| e4m3::is_nan(*code)).map(|at| start + at)
}

#[cfg(test)]
mod tests;
