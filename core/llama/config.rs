//! `config.json` of a Llama. What is read here is bounded and consistent, so that the rest of the runtime multiplies
//! sizes without fear and never asks again.

use std::ops::RangeInclusive;

use serde_json::Value;

use crate::checkpoint::json::{Object, clipped};
use crate::error::{Error, Result};
use crate::op::Heads;

use super::Rope;

// Bounds of sizes: several times what the largest models have, and small enough that no product of three of them and
// of an element size reaches 2^63.
const VOCAB: RangeInclusive<usize> = 1..=1 << 22;
const HIDDEN: RangeInclusive<usize> = 1..=1 << 18;
const LAYERS: RangeInclusive<usize> = 1..=1 << 12;
const HEADS: RangeInclusive<usize> = 1..=1 << 12;
const HEAD_DIM: RangeInclusive<usize> = 2..=1 << 12;
const INTERMEDIATE: RangeInclusive<usize> = 1..=1 << 20;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 24;

/// The shape of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads; `heads.q * heads.dim` need not be `hidden`.
    pub heads: Heads,
    /// Width of the gated part of the MLP.
    pub intermediate: usize,
    /// Added to the mean square in every norm.
    pub rms_eps: f32,
    /// The rotary embedding.
    pub rope: Rope,
    /// Positions that the model is made for.
    pub max_positions: usize,
    /// True where the head is the embedding table.
    pub tied_head: bool,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl LlamaConfig {
    /// The name of the file.
    pub const FILE: &str = "config.json";

    /// Reads the JSON of `config.json`. Sizes must be there; where `rms_norm_eps`, `rope_theta` or
    /// `max_position_embeddings` are absent, the defaults of Hugging Face's `LlamaConfig` hold.
    pub fn from_json(value: &Value) -> Result<Self> {
        let json = Object::root(Self::FILE, value)?;
        check_architecture(json)?;
        check_variants(json)?;
        let size = |key, range| json.required(key, json.whole(key, range)?);
        let hidden = size("hidden_size", HIDDEN)?;
        Ok(LlamaConfig {
            vocab: size("vocab_size", VOCAB)?,
            hidden,
            layers: size("num_hidden_layers", LAYERS)?,
            heads: heads(json, hidden)?,
            intermediate: size("intermediate_size", INTERMEDIATE)?,
            rms_eps: json.real("rms_norm_eps", 1e-30..=1.0)?.unwrap_or(1e-6) as f32,
            rope: Rope::from_json(json)?,
            max_positions: json.whole("max_position_embeddings", POSITIONS)?.unwrap_or(2048),
            tied_head: json.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: json.token_id("bos_token_id")?,
            eos: json.token_ids("eos_token_id")?.unwrap_or_default(),
        })
    }
}

fn check_architecture(json: Object) -> Result<()> {
    let unsupported =
        |name: &str| Error::unsupported_model(format!("architecture {}", clipped(name)), "LlamaForCausalLM is");
    match json.get("architectures") {
        Some(Value::Array(names)) if !names.is_empty() => match &names[0] {
            Value::String(name) if name == "LlamaForCausalLM" => Ok(()),
            Value::String(name) => Err(unsupported(name)),
            _ => Err(json.error("architectures", "must be a list of strings")),
        },
        Some(Value::Array(_)) | None => match json.text("model_type")? {
            Some("llama") => Ok(()),
            Some(other) => Err(unsupported(other)),
            None => Err(json.error("architectures", "is missing; take the file from the model's repository")),
        },
        Some(_) => Err(json.error("architectures", "must be a list of strings")),
    }
}

/// Members of the Llama family that compute something else.
fn check_variants(json: Object) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if json.flag(key)? == Some(true) {
            return Err(Error::unsupported_model(key, "linear layers without bias are"));
        }
    }
    match json.text("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(Error::unsupported_model(format!("hidden_act {}", clipped(other)), "silu is")),
    }
}

fn heads(json: Object, hidden: usize) -> Result<Heads> {
    let q = json.required("num_attention_heads", json.whole("num_attention_heads", HEADS)?)?;
    let kv = json.whole("num_key_value_heads", HEADS)?.unwrap_or(q);
    if q % kv != 0 {
        return Err(json.error("num_attention_heads", format_args!("{q} is not a multiple of {kv} key-value heads")));
    }
    let dim = match json.whole("head_dim", HEAD_DIM)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(q) && HEAD_DIM.contains(&(hidden / q)) => hidden / q,
        None => {
            let why = format_args!("is missing, and `hidden_size` {hidden} does not divide into {q} heads");
            return Err(json.error("head_dim", why));
        }
    };
    if dim % 2 != 0 {
        return Err(json.error("head_dim", format_args!("{dim} is odd; the rotary embedding turns pairs")));
    }
    Ok(Heads { q, kv, dim })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::testing;
    use crate::llama::RopeScaling;

    /// The test config with keys replaced; `null` is as good as absent.
    fn read(changes: Value) -> Result<LlamaConfig> {
        LlamaConfig::from_json(&testing::merged(testing::config(), changes))
    }

    fn refusal(changes: Value) -> String {
        read(changes).unwrap_err().to_string()
    }

    #[test]
    fn both_spellings_of_llama_3_2_read_alike() {
        let scaling = json!({
            "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"
        });
        let sizes = json!({
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true, "vocab_size": 128256
        });
        let old = testing::merged(sizes.clone(), json!({"rope_theta": 500000.0, "rope_scaling": scaling}));
        let scaling = testing::merged(scaling, json!({"rope_theta": 500000.0}));
        let new = testing::merged(sizes, json!({"rope_parameters": scaling}));
        let want = LlamaConfig {
            vocab: 128_256,
            hidden: 2048,
            layers: 16,
            heads: Heads { q: 32, kv: 8, dim: 64 },
            intermediate: 8192,
            rms_eps: 1e-5,
            rope: Rope {
                theta: 500_000.0,
                scaling: RopeScaling::Llama3 {
                    factor: 32.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position: 8192,
                },
            },
            max_positions: 131_072,
            tied_head: true,
            bos: Some(128_000),
            eos: vec![128_001, 128_008, 128_009],
        };
        assert_eq!(LlamaConfig::from_json(&old).unwrap(), want);
        assert_eq!(LlamaConfig::from_json(&new).unwrap(), want);
    }

    #[test]
    fn absent_keys_have_the_defaults_of_transformers() {
        let got = LlamaConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 12
        }));
        let want = LlamaConfig {
            vocab: 10,
            hidden: 8,
            layers: 1,
            heads: Heads { q: 2, kv: 2, dim: 4 },
            intermediate: 12,
            rms_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            max_positions: 2048,
            tied_head: false,
            bos: None,
            eos: vec![],
        };
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn rope_is_read_in_every_spelling() {
        let none = RopeScaling::None;
        let linear = RopeScaling::Linear { factor: 2.0 };
        for (changes, theta, scaling) in [
            (json!({"rope_scaling": null, "rope_theta": 5e5}), 5e5, none),
            (json!({"rope_scaling": {"rope_type": "default"}, "rope_theta": 7}), 7.0, none),
            (json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}), 5e5, none),
            (json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7, "partial_rotary_factor": 1.0}), 5e5, none),
            (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), 10_000.0, linear),
            (json!({"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_theta": 7}), 7.0, linear),
        ] {
            assert_eq!(read(changes.clone()).unwrap().rope, Rope { theta, scaling }, "{changes}");
        }
    }

    #[test]
    fn other_architectures_are_refused_by_name() {
        for (changes, what, supported) in [
            (
                json!({"architectures": ["MixtralForCausalLM"]}),
                "architecture MixtralForCausalLM",
                "LlamaForCausalLM is",
            ),
            (json!({"architectures": null, "model_type": "mistral"}), "architecture mistral", "LlamaForCausalLM is"),
            (json!({"attention_bias": true}), "attention_bias", "linear layers without bias are"),
            (json!({"mlp_bias": true}), "mlp_bias", "linear layers without bias are"),
            (json!({"hidden_act": "gelu"}), "hidden_act gelu", "silu is"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5", "rotation of whole heads is"),
            (json!({"rope_scaling": {"rope_type": "yarn"}}), "rope type yarn", "default, linear and llama3 are"),
            (json!({"rope_scaling": {"type": "dynamic"}}), "rope type dynamic", "default, linear and llama3 are"),
            (
                json!({"rope_parameters": {"rope_type": "longrope"}}),
                "rope type longrope",
                "default, linear and llama3 are",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
                "`rope_parameters` with an object a layer kind",
                "one rope for all layers is",
            ),
        ] {
            assert_eq!(refusal(changes), format!("{what} is not supported: {supported}"));
        }
    }

    #[test]
    fn sizes_that_make_no_model_are_refused_with_their_key() {
        let llama3 = |low: f64| {
            json!({"rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192
            }})
        };
        for (changes, why) in [
            (json!({"vocab_size": null}), "`vocab_size` is missing; take the file from the model's repository"),
            (json!({"vocab_size": 0}), "`vocab_size` must be a whole number from 1 to 4194304, found 0"),
            (
                json!({"hidden_size": u64::MAX}),
                "`hidden_size` must be a whole number from 1 to 262144, found 18446744073709551615",
            ),
            (json!({"hidden_size": -8}), "`hidden_size` must be a whole number from 1 to 262144, found -8"),
            (
                json!({"num_hidden_layers": "12"}),
                "`num_hidden_layers` must be a whole number from 1 to 4096, found \"12\"",
            ),
            (
                json!({"num_attention_heads": 6, "num_key_value_heads": 4}),
                "`num_attention_heads` 6 is not a multiple of 4 key-value heads",
            ),
            (
                json!({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": null}),
                "`head_dim` is missing, and `hidden_size` 8 does not divide into 3 heads",
            ),
            (json!({"head_dim": 3}), "`head_dim` 3 is odd; the rotary embedding turns pairs"),
            (json!({"rms_norm_eps": 0}), "`rms_norm_eps` must be a number from 1e-30 to 1.0, found 0"),
            (json!({"rope_theta": 0.5}), "`rope_theta` must be a number from 1.0 to 1000000000000000.0, found 0.5"),
            (llama3(4.0), "`low_freq_factor` must be less than `high_freq_factor` 4, found 4"),
            (
                json!({"rope_scaling": {"type": "linear"}}),
                "`factor` is missing; take the file from the model's repository",
            ),
            (json!({"architectures": "LlamaForCausalLM"}), "`architectures` must be a list of strings"),
            (json!({"architectures": [1]}), "`architectures` must be a list of strings"),
            (
                json!({"architectures": [], "model_type": null}),
                "`architectures` is missing; take the file from the model's repository",
            ),
        ] {
            assert_eq!(refusal(changes), format!("config.json: {why}"));
        }
    }
}
