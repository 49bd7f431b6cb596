//! Puts a checkpoint's weights on a backend: norms in f32, projections as they are stored, and those that share an
//! input (q, k, v; gate, up) as one `Linear` where their formats and activation scales are equal.

use bytemuck::cast_slice;

use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, InputScale, LinearWeight, Tensor, TensorDType};
use crate::error::{Error, Result};
use crate::llama::LlamaConfig;
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
    /// What it is called: the module's name; `...qkv_proj` or `...gate_up_proj` where all are one, `...q_proj+k_proj`
    /// where some are.
    pub label: String,
    /// `[n, k]`.
    pub weight: Weight,
    /// How it wants its input.
    pub input: Input,
    /// The first of the columns that it writes.
    pub first: usize,
}

/// The embedding's tensor.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// A layer's weights.
pub struct LayerWeights {
    /// `[1, d]`.
    pub input_norm: Buf,
    /// q, k and v.
    pub qkv: Vec<Projection>,
    /// `[d, heads.q * heads.dim]`.
    pub o: Vec<Projection>,
    /// `[1, d]`.
    pub post_norm: Buf,
    /// gate and up.
    pub gate_up: Vec<Projection>,
    /// `[d, intermediate]`.
    pub down: Vec<Projection>,
}

impl LayerWeights {
    /// Puts a layer on a backend.
    pub fn load(
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        config: &LlamaConfig,
        layer: usize,
    ) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (d, f, heads) = (config.hidden, config.intermediate, config.heads);
        let (q_width, kv_width) = (heads.q * heads.dim, heads.kv * heads.dim);
        let mut projections = |parts: &[(&str, usize)], k, joined: &str| {
            let parts: Vec<_> = parts.iter().map(|(part, n)| (name(part), *n)).collect();
            load_projections(checkpoint, backend, &parts, k, &name(joined))
        };
        let qkv = [("self_attn.q_proj", q_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)];
        let qkv = projections(&qkv, d, "self_attn.qkv_proj")?;
        let o = projections(&[("self_attn.o_proj", d)], q_width, "")?;
        let gate_up = projections(&[("mlp.gate_proj", f), ("mlp.up_proj", f)], d, "mlp.gate_up_proj")?;
        let down = projections(&[("mlp.down_proj", d)], f, "")?;
        let mut norm = |part| load_vector(checkpoint, backend, &name(part), d);
        let (input_norm, post_norm) = (norm("input_layernorm.weight")?, norm("post_attention_layernorm.weight")?);
        Ok(LayerWeights { input_norm, qkv, o, post_norm, gate_up, down })
    }
}

/// The weights of the head.
pub struct HeadWeights {
    /// `[1, d]`.
    pub norm: Buf,
    /// `[vocab, d]`: its own, or the embedding.
    pub head: Vec<Projection>,
}

impl HeadWeights {
    /// Puts the head on a backend; `table` is the embedding.
    pub fn load(checkpoint: &Checkpoint, backend: &mut dyn Backend, config: &LlamaConfig, table: Buf) -> Result<Self> {
        let norm = load_vector(checkpoint, backend, "model.norm.weight", config.hidden)?;
        let head = if has_own_head(checkpoint, config) {
            load_projections(checkpoint, backend, &[("lm_head".into(), config.vocab)], config.hidden, "")?
        } else {
            vec![Projection { label: "lm_head".into(), weight: Weight::Real(table), input: Input::Real, first: 0 }]
        };
        Ok(HeadWeights { norm, head })
    }
}

/// False where the head is the embedding. A tied head that the file holds all the same is the file's where it differs,
/// as loaders that read every tensor would have it.
fn has_own_head(checkpoint: &Checkpoint, config: &LlamaConfig) -> bool {
    match (checkpoint.find("lm_head.weight"), checkpoint.find(EMBEDDING)) {
        _ if !config.tied_head => true,
        (Some(head), Some(embed)) if head.data[..] != embed.data[..] => {
            log::warn!("the head is tied, but lm_head.weight differs from the embedding: using lm_head.weight");
            true
        }
        _ => false,
    }
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
        let leaf = other.module.rsplit('.').next().unwrap_or_default();
        self.module = format!("{}+{leaf}", self.module);
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
