//! Tiny checkpoints for tests: JSON to vary, safetensors files byte by byte, and folders to hold them.

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::Files;

/// The config of a Llama of one layer.
pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": 4, "hidden_act": "silu",
        "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 64, "num_attention_heads": 2,
        "num_hidden_layers": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 16
    })
}

/// A `quantization_config` as llm-compressor writes it: `weights` is `tensor` or `channel`, `activations` is `static`,
/// `dynamic` or `none`.
pub(crate) fn fp8(weights: &str, activations: &str) -> Value {
    let arguments = |strategy: &str, dynamic: bool| {
        json!({
            "actorder": null, "block_structure": null, "dynamic": dynamic, "group_size": null, "num_bits": 8,
            "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": true, "type": "float"
        })
    };
    let input_activations = match activations {
        "static" => arguments("tensor", false),
        "dynamic" => arguments("token", true),
        _ => Value::Null,
    };
    json!({
        "config_groups": {"group_0": {
            "format": "float-quantized", "input_activations": input_activations, "output_activations": null,
            "targets": ["Linear"], "weights": arguments(weights, false)
        }},
        "format": "float-quantized", "global_compression_ratio": null, "ignore": ["lm_head"], "kv_cache_scheme": null,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.19.0"
    })
}

/// `base` with the keys of `changes` replaced, at any depth.
pub(crate) fn merged(mut base: Value, changes: Value) -> Value {
    match (&mut base, changes) {
        (Value::Object(map), Value::Object(changes)) => {
            for (key, change) in changes {
                let old = map.remove(&key).unwrap_or(Value::Null);
                map.insert(key, merged(old, change));
            }
            base
        }
        (_, change) => change,
    }
}

/// A tensor of a file: name, dtype as safetensors spells it, shape, bytes.
pub(crate) type Entry<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

/// A safetensors file: tensors one after another, wherever that aligns them.
pub(crate) fn safetensors(entries: &[Entry]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in entries {
        let start = data.len();
        data.extend_from_slice(bytes);
        header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    with_header(&Value::Object(header).to_string(), &data)
}

/// A safetensors file with any text as its header.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The bytes of values as bf16; the values must be exact in it.
pub(crate) fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

/// A folder that holds these files; it vanishes with the first of the pair.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> (TempDir, Files) {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let files = Files::dir(dir.path()).unwrap();
    (dir, files)
}

/// A folder of a config with or without quantization, and one file of tensors.
pub(crate) fn model(quantization: Value, entries: &[Entry]) -> (TempDir, Files) {
    let config = merged(config(), json!({"quantization_config": quantization})).to_string();
    folder(&[("config.json", config.as_bytes()), ("model.safetensors", &safetensors(entries))])
}
