//! Puts a checkpoint's weights on a backend: norms in f32, projections as they are stored, and those that share an
//! input (q, k, v; gate, up) as one `Linear` where their formats and activation scales are equal.

use bytemuck::cast_slice;

use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, InputScale, LinearWeight, Tensor, TensorDType};
use crate::error::{Error, Result};
use crate::op::{Backend, Buf, BufDesc, DType, Extent, StaticScale, Weight};

/// How a projection wants its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Input {
    /// f32 or bf16, as the profile says.
    Real,
    /// E4M3 with a calibrated scale.
    Static(StaticScale),
    /// E4M3 with a scale a token.
    PerToken,
}

/// One `Linear` of the program: a projection, or several side by side.
pub struct Projection {
    /// What it is called: the module's name, or `...qkv_proj`, `...gate_up_proj`.
    pub label: String,
    /// `[n, k]`.
    pub weight: Weight,
    /// How it wants its input.
    pub input: Input,
    /// The first of the columns that it writes.
    pub first: usize,
}

/// A projection as the checkpoint has it, before neighbours are joined.
struct Raw {
    module: String,
    dtype: DType,
    rows: usize,
    data: Vec<Bytes>,
    scale: Option<Vec<f32>>,
    input: Input,
}

impl Raw {
    fn read(checkpoint: &Checkpoint, module: String, n: usize, k: usize) -> Result<Self> {
        let weights = checkpoint.linear(&module, n, k)?;
        let input = match weights.input {
            InputScale::None => Input::Real,
            InputScale::Static(scale) => Input::Static(StaticScale::new(scale)),
            InputScale::Dynamic => Input::PerToken,
        };
        let (dtype, data, scale) = match weights.weight {
            LinearWeight::Real(tensor) => {
                let (dtype, bytes) = real_bytes(&tensor)?;
                (dtype, bytes, None)
            }
            LinearWeight::Fp8 { codes, scale } => (DType::E4m3, codes, Some(scale)),
        };
        Ok(Raw { module, dtype, rows: n, data: vec![data], scale, input })
    }

    fn joins(&self, other: &Raw) -> bool {
        self.dtype == other.dtype && self.input == other.input
    }

    fn join(&mut self, other: Raw) {
        self.rows += other.rows;
        self.data.extend(other.data);
        if let (Some(scale), Some(more)) = (&mut self.scale, other.scale) {
            scale.extend(more);
        }
    }

    fn load(self, backend: &mut dyn Backend, k: usize, first: usize) -> Result<Projection> {
        let Raw { module, dtype, rows, data, scale, input } = self;
        let desc = BufDesc::new(format!("{module}.weight"), dtype, Extent::Fixed(rows), k);
        let codes = backend.load(&desc, &data)?;
        let weight = match scale {
            None => Weight::Real(codes),
            Some(scale) => {
                let scale = load_f32(backend, &format!("{module}.weight_scale"), rows, 1, &scale)?;
                Weight::Fp8 { codes, scale }
            }
        };
        Ok(Projection { label: module, weight, input, first })
    }
}

/// Projections that read the same input and write side by side: `parts` are (module, rows); `joined` is what several
/// in one are called.
pub fn load_projections(
    checkpoint: &Checkpoint,
    backend: &mut dyn Backend,
    parts: &[(String, usize)],
    k: usize,
    joined: &str,
) -> Result<Vec<Projection>> {
    let mut raws: Vec<Raw> = Vec::new();
    for (module, n) in parts {
        let raw = Raw::read(checkpoint, module.clone(), *n, k)?;
        match raws.last_mut() {
            Some(last) if last.joins(&raw) => last.join(raw),
            _ => raws.push(raw),
        }
    }
    if let [all] = &mut raws[..]
        && parts.len() > 1
    {
        all.module = joined.to_owned();
    }
    let mut first = 0;
    let mut projections = Vec::new();
    for raw in raws {
        let rows = raw.rows;
        projections.push(raw.load(backend, k, first)?);
        first += rows;
    }
    Ok(projections)
}

/// A vector of the checkpoint, `[1, n]` in f32: norms.
pub fn load_vector(checkpoint: &Checkpoint, backend: &mut dyn Backend, name: &str, n: usize) -> Result<Buf> {
    let tensor = checkpoint.tensor(name)?;
    tensor.expect_shape(&[n])?;
    load_f32(backend, name, 1, n, &tensor.to_f32()?)
}

/// A matrix of the checkpoint as it is stored: the embedding.
pub fn load_matrix(checkpoint: &Checkpoint, backend: &mut dyn Backend, name: &str, n: usize, k: usize) -> Result<Buf> {
    let tensor = checkpoint.tensor(name)?;
    tensor.expect_shape(&[n, k])?;
    let (dtype, bytes) = real_bytes(tensor)?;
    backend.load(&BufDesc::new(name, dtype, Extent::Fixed(n), k), &[bytes])
}

/// f32 values computed on the host: scales, norms, rotary tables.
pub fn load_f32(backend: &mut dyn Backend, name: &str, rows: usize, cols: usize, values: &[f32]) -> Result<Buf> {
    let bytes = Bytes::from(cast_slice::<f32, u8>(values).to_vec());
    backend.load(&BufDesc::new(name, DType::F32, Extent::Fixed(rows), cols), &[bytes])
}

/// bf16 and f32 stay as they are; f16 becomes f32, which holds it exactly.
fn real_bytes(tensor: &Tensor) -> Result<(DType, Bytes)> {
    match tensor.dtype {
        TensorDType::Bf16 => Ok((DType::Bf16, tensor.data.clone())),
        TensorDType::F32 => Ok((DType::F32, tensor.data.clone())),
        TensorDType::F16 => Ok((DType::F32, Bytes::from(cast_slice::<f32, u8>(&tensor.to_f32()?).to_vec()))),
        _ => Err(Error::tensor(&tensor.name, "holds no real numbers: bf16, f16 or f32 is expected")),
    }
}
