//! Checkpoints with random weights and a tokenizer of the full vocabulary: what benchmarks and tests run where the real
//! model is not at hand. They load, compute and serve like the real one; what they say means nothing.

mod tokenizer;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use quaver_core::checkpoint::write::place;
use quaver_core::{Error, Result, e4m3};
use serde_json::{Map, Value, json};

/// The sizes of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
    max_positions: usize,
    original_max_positions: usize,
}

impl Shape {
    /// Llama-3.2-1B: 1.24 billion parameters.
    pub const LLAMA_3_2_1B: Shape = Shape {
        hidden: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 8192,
        vocab: 128_256,
        max_positions: 131_072,
        original_max_positions: 8192,
    };

    /// The built-in demo model's: 6.6 million parameters.
    pub const TINY: Shape = Shape {
        hidden: 256,
        layers: 6,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 768,
        vocab: 4096,
        max_positions: 4096,
        original_max_positions: 512,
    };
}

/// How the linears are kept, by llm-compressor's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Not quantized.
    Bf16,
    /// A scale a tensor, static activations.
    Fp8,
    /// A scale an output channel, static activations.
    Fp8Channel,
    /// A scale an output channel, dynamic activations.
    Fp8Dynamic,
}

/// Spread of the weights, as Llama is initialized.
const SIGMA: f32 = 0.02;

/// The largest weight, in spreads: what a byte of randomness is cut at.
const CUT: f32 = 2.9;

/// The largest activation that static scales provide for; normalized rows stay far below.
const ACTIVATION_MAX: f32 = 16.0;

/// Writes a checkpoint to a folder that must not exist yet, whole or not at all.
pub fn write(folder: &Path, shape: &Shape, scheme: Scheme, seed: u64) -> Result<()> {
    place(folder, |folder| fill(folder, shape, scheme, seed))
}

fn fill(folder: &Path, shape: &Shape, scheme: Scheme, seed: u64) -> Result<()> {
    let special = tokenizer::special_ids(shape.vocab);
    for (name, value) in [
        ("config.json", config(shape, scheme, &special)),
        (
            "generation_config.json",
            json!({"bos_token_id": special.bos, "eos_token_id": special.eos, "do_sample": true,
            "temperature": 0.6, "top_p": 0.9}),
        ),
        ("tokenizer.json", tokenizer::tokenizer(shape.vocab)),
        ("tokenizer_config.json", tokenizer::config()),
    ] {
        let path = folder.join(name);
        fs::write(&path, value.to_string()).map_err(|e| Error::io("write", &path, e))?;
    }
    let path = folder.join("model.safetensors");
    write_tensors(&path, &tensors(shape, scheme), seed).map_err(|e| Error::io("write", &path, e))
}

fn config(shape: &Shape, scheme: Scheme, special: &tokenizer::SpecialIds) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": special.bos,
        "dtype": "bfloat16",
        "eos_token_id": special.eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": SIGMA,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": shape.original_max_positions,
            "rope_theta": 500_000.0,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": true,
        "vocab_size": shape.vocab,
    });
    let activations = match scheme {
        Scheme::Bf16 => return config,
        Scheme::Fp8 | Scheme::Fp8Channel => json!({"num_bits": 8, "type": "float", "symmetric": true,
            "strategy": "tensor", "dynamic": false}),
        Scheme::Fp8Dynamic => json!({"num_bits": 8, "type": "float", "symmetric": true,
            "strategy": "token", "dynamic": true}),
    };
    let strategy = if scheme == Scheme::Fp8 { "tensor" } else { "channel" };
    config["quantization_config"] = json!({
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": false},
            "input_activations": activations,
            "output_activations": null,
        }},
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    });
    config
}

/// A tensor to write.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

#[derive(Clone, Copy)]
enum Fill {
    /// bf16, all the same.
    Constant(f32),
    /// Random bf16.
    Bf16,
    /// Random E4M3 codes.
    Codes,
}

impl Tensor {
    fn new(name: impl Into<String>, shape: &[usize], fill: Fill) -> Self {
        Tensor { name: name.into(), shape: shape.to_vec(), fill }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        self.elements() * if matches!(self.fill, Fill::Codes) { 1 } else { 2 }
    }
}

fn tensors(shape: &Shape, scheme: Scheme) -> Vec<Tensor> {
    let (d, f) = (shape.hidden, shape.intermediate);
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut tensors = vec![Tensor::new("model.embed_tokens.weight", &[shape.vocab, d], Fill::Bf16)];
    for layer in 0..shape.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push(Tensor::new(name(&format!("{norm}.weight")), &[d], Fill::Constant(1.0)));
        }
        for (module, n, k) in [
            ("self_attn.q_proj", q, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, q),
            ("mlp.gate_proj", f, d),
            ("mlp.up_proj", f, d),
            ("mlp.down_proj", d, f),
        ] {
            let fill = if scheme == Scheme::Bf16 { Fill::Bf16 } else { Fill::Codes };
            tensors.push(Tensor::new(name(&format!("{module}.weight")), &[n, k], fill));
            let mut scale = |end: &str, shape: &[usize], max: f32| {
                tensors.push(Tensor::new(name(&format!("{module}.{end}")), shape, Fill::Constant(max / e4m3::MAX)));
            };
            match scheme {
                Scheme::Bf16 => {}
                Scheme::Fp8 => scale("weight_scale", &[1], SIGMA * CUT),
                Scheme::Fp8Channel | Scheme::Fp8Dynamic => scale("weight_scale", &[n, 1], SIGMA * CUT),
            }
            if matches!(scheme, Scheme::Fp8 | Scheme::Fp8Channel) {
                scale("input_scale", &[1], ACTIVATION_MAX);
            }
        }
    }
    tensors.push(Tensor::new("model.norm.weight", &[d], Fill::Constant(1.0)));
    tensors
}

fn write_tensors(path: &Path, tensors: &[Tensor], seed: u64) -> std::io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let dtype = if matches!(tensor.fill, Fill::Codes) { "F8_E4M3" } else { "BF16" };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // The data starts at a multiple of 64, so that whoever maps the file finds it aligned.
    let padding = (8 + header.len()).next_multiple_of(64) - 8 - header.len();
    header.extend(std::iter::repeat_n(' ', padding));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut random = Random::new(seed);
    for tensor in tensors {
        let n = tensor.elements();
        match tensor.fill {
            Fill::Constant(value) => (0..n).try_for_each(|_| file.write_all(&bf16::from_f32(value).to_le_bytes()))?,
            Fill::Bf16 => random.write(&mut file, n, &random_table(|x| bf16::from_f32(x * SIGMA).to_le_bytes()))?,
            Fill::Codes => random.write(&mut file, n, &random_table(|x| [e4m3::encode(x / CUT * e4m3::MAX)]))?,
        }
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

/// What each byte of randomness stands for: the middles of 256 equally likely parts of a normal distribution.
fn random_table<const N: usize>(encode: impl Fn(f32) -> [u8; N]) -> [[u8; N]; 256] {
    std::array::from_fn(|byte| encode(normal_quantile((byte as f64 + 0.5) / 256.0).clamp(-CUT, CUT)))
}

/// The quantile of the normal distribution, by bisection of its distribution function.
fn normal_quantile(p: f64) -> f32 {
    // The logistic approximation of Bowling et al. 2009 is within 1.4e-4, which random weights do not mind.
    let cdf = |x: f64| 1.0 / (1.0 + (-0.07056 * x.powi(3) - 1.5976 * x).exp());
    let (mut low, mut high) = (-6.0, 6.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if cdf(middle) < p { low = middle } else { high = middle }
    }
    low as f32
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn next(&mut self) -> [u8; 8] {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    }

    /// Writes `n` random elements of a table.
    fn write<const N: usize>(&mut self, out: &mut impl Write, n: usize, table: &[[u8; N]; 256]) -> std::io::Result<()> {
        let mut left = n;
        while left > 0 {
            let mut elements = [[0; N]; 8];
            let count = left.min(8);
            for (element, byte) in elements.iter_mut().zip(self.next()) {
                *element = table[usize::from(byte)];
            }
            out.write_all(elements[..count].as_flattened())?;
            left -= count;
        }
        Ok(())
    }
}
