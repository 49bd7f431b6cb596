//! A Llama of two layers and random weights, small enough to run hundreds of times, in any form that a checkpoint can
//! take. Tests change its config and its tensors, then open it.

use std::collections::BTreeMap;
use std::fs;

use half::bf16;
use quaver_backends::{Kind, Spec};
use quaver_core::checkpoint::{Checkpoint, Files};
use quaver_core::e4m3;
use quaver_core::engine::{Engine, EngineOptions};
use quaver_core::sampler::SamplingParams;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const VOCAB: usize = 96;
pub const CONTEXT: usize = 256;
const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 40;
/// (module, outputs, inputs): 4 query and 2 key-value heads of 12.
pub const LINEARS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 48, HIDDEN),
    ("self_attn.k_proj", 24, HIDDEN),
    ("self_attn.v_proj", 24, HIDDEN),
    ("self_attn.o_proj", HIDDEN, 48),
    ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
    ("mlp.up_proj", INTERMEDIATE, HIDDEN),
    ("mlp.down_proj", HIDDEN, INTERMEDIATE),
];

#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn new(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        let data = match dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::F8_E4M3 => values.iter().map(|x| e4m3::encode(*x)).collect(),
            other => panic!("no test writes {other}"),
        };
        Tensor { dtype, shape: shape.to_vec(), data }
    }

    /// The values of a BF16 or F32 tensor.
    pub fn values(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::BF16 => self.data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F32 => self.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            other => panic!("no test reads {other}"),
        }
    }

    /// The same values in another type and shape.
    pub fn cast(&self, dtype: Dtype, shape: &[usize]) -> Self {
        Tensor::new(dtype, shape, &self.values())
    }
}

/// How inputs are quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    None,
    Static,
    Dynamic,
}

/// The parts of a checkpoint.
#[derive(Clone, Debug)]
pub struct Tiny {
    pub config: Value,
    pub generation: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// A checkpoint and the folder that it lies in.
pub struct Opened {
    pub checkpoint: Checkpoint,
    _folder: TempDir,
}

impl Tiny {
    /// The model in BF16, with a tied head.
    pub fn new() -> Self {
        let mut random = Random(1);
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize], mean: f32, spread: f32| {
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| mean + spread * (random.unit() * 2.0 - 1.0)).collect();
            tensors.insert(name, Tensor::new(Dtype::BF16, shape, &values));
        };
        add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN], 0.0, 1.0);
        add("model.norm.weight".into(), &[HIDDEN], 1.0, 0.2);
        for layer in 0..2 {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("model.layers.{layer}.{norm}.weight"), &[HIDDEN], 1.0, 0.2);
            }
            for (module, n, k) in LINEARS {
                add(format!("model.layers.{layer}.{module}.weight"), &[n, k], 0.0, 3.0 / (k as f32).sqrt());
            }
        }
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": null,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        });
        Tiny { config, generation: json!({}), tensors }
    }

    /// The model with every linear but the head in FP8, one scale a channel.
    pub fn fp8(inputs: Inputs) -> Self {
        let mut tiny = Tiny::new();
        tiny.config["quantization_config"] = quantization(json!({"group_0": group(&["Linear"], "channel", inputs)}));
        for (layer, (module, ..)) in (0..2).flat_map(|layer| LINEARS.map(|linear| (layer, linear))) {
            tiny.quantize(&format!("model.layers.{layer}.{module}"), inputs);
        }
        tiny
    }

    /// Replaces a weight by codes, a BF16 scale a channel, and an input scale where inputs are static.
    pub fn quantize(&mut self, module: &str, inputs: Inputs) {
        let weight = self.tensors[&format!("{module}.weight")].clone();
        let k = weight.shape[1];
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for row in weight.values().chunks_exact(k) {
            let scale = bf16::from_f32(row.iter().fold(0f32, |amax, w| amax.max(w.abs())) / e4m3::MAX).to_f32();
            codes.extend(row.iter().map(|w| e4m3::encode(w / scale)));
            scales.push(scale);
        }
        let codes = Tensor { dtype: Dtype::F8_E4M3, shape: weight.shape.clone(), data: codes };
        self.tensors.insert(format!("{module}.weight"), codes);
        let scales = Tensor::new(Dtype::BF16, &[weight.shape[0], 1], &scales);
        self.tensors.insert(format!("{module}.weight_scale"), scales);
        if inputs == Inputs::Static {
            self.tensors.insert(format!("{module}.input_scale"), Tensor::new(Dtype::BF16, &[1], &[0.0125]));
        }
    }

    /// Changes the tensors whose names end so.
    pub fn change(&mut self, end: &str, change: impl Fn(&Tensor) -> Tensor) {
        let mut count = 0;
        for (_, tensor) in self.tensors.iter_mut().filter(|(name, _)| name.ends_with(end)) {
            *tensor = change(tensor);
            count += 1;
        }
        assert!(count > 0, "no tensor ends with {end}");
    }

    /// The safetensors file of some of the tensors.
    pub fn file<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) -> Vec<u8> {
        let views = tensors
            .into_iter()
            .map(|(name, t)| (name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    /// The checkpoint, of one file.
    pub fn open(&self) -> Opened {
        self.open_files(&[("model.safetensors", Tiny::file(&self.tensors))]).unwrap()
    }

    /// The checkpoint with its tensors in these files.
    pub fn open_files(&self, files: &[(&str, Vec<u8>)]) -> quaver_core::Result<Opened> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(folder.path().join("generation_config.json"), self.generation.to_string()).unwrap();
        Ok(Opened { checkpoint: Checkpoint::open(Files::dir(folder.path())?)?, _folder: folder })
    }
}

/// Opens, loads and answers within a little memory: what comes of it is Ok or Err.
pub fn survive(opened: quaver_core::Result<Opened>) {
    let Ok(opened) = opened else { return };
    let options = EngineOptions { kv_cache_memory: 1 << 16, max_num_batched_tokens: 16, ..EngineOptions::default() };
    let backend = quaver_backends::open(&Spec { kind: Kind::Cpu, threads: Some(1), ..Spec::default() }).unwrap();
    let Ok(mut engine) = Engine::new(&opened.checkpoint, backend, &options) else { return };
    let params = SamplingParams { max_tokens: 3, prompt_logprobs: Some(1), seed: Some(1), ..SamplingParams::default() };
    if engine.submit(&[1, 0, 2], params).is_ok() {
        while !engine.is_idle() {
            engine.step().unwrap();
        }
    }
    assert_eq!(engine.pages().0, engine.pages().1);
}

/// A `quantization_config` of some config groups.
pub fn quantization(groups: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": groups
    })
}

/// A config group.
pub fn group(targets: &[&str], strategy: &str, inputs: Inputs) -> Value {
    let arguments = |strategy: &str, dynamic: bool| json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": dynamic});
    let input_activations = match inputs {
        Inputs::None => Value::Null,
        Inputs::Static => arguments("tensor", false),
        Inputs::Dynamic => arguments("token", true),
    };
    json!({"targets": targets, "weights": arguments(strategy, false), "input_activations": input_activations})
}

/// Knuth's linear congruential generator (MMIX), its upper bits.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// From 0 up to 1.
    pub fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32
    }

    /// A prompt.
    pub fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next() % VOCAB as u32).collect()
    }
}
