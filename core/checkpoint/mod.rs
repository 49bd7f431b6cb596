//! A model on disk: `config.json`, quantization, generation defaults and tensors, checked and mapped, nothing copied.
//! [`Checkpoint::open`] reports what the small files say before it touches the large ones, so that an unsupported
//! model is refused in milliseconds. The loader of programs is the caller.

mod files;
mod generation;
pub(crate) mod json;
mod linear;
mod quantization;
mod targets;
mod tensors;
pub mod write;

#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::llama::LlamaConfig;

pub use files::Files;
pub use generation::GenerationConfig;
pub use linear::{InputScale, LinearWeight, LinearWeights};
pub use quantization::{Activations, KvCacheScheme, LinearScheme, QuantizationConfig, WeightStrategy};
pub use tensors::{Tensor, TensorDType};
pub use write::{Part, TensorDesc};

/// A model's files, read and checked.
///
/// ```no_run
/// # fn main() -> quaver_core::Result<()> {
/// use quaver_core::checkpoint::{Checkpoint, Files};
///
/// let checkpoint = Checkpoint::open(Files::dir("Llama-3.2-1B-Instruct-FP8")?)?;
/// let config = checkpoint.config();
/// let (n, k) = (config.heads.q * config.heads.dim, config.hidden);
/// let q_proj = checkpoint.linear("model.layers.0.self_attn.q_proj", n, k)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    files: Files,
    config: LlamaConfig,
    quantization: Option<QuantizationConfig>,
    generation: GenerationConfig,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Reads the configs, then maps the tensors. Fails where a file is missing or damaged and where the model is not
    /// supported; what the tensors hold is checked as they are asked for.
    pub fn open(files: Files) -> Result<Self> {
        let (config, quantization, generation) = configs(&files)?;
        let tensors = tensors::open(&files)?;
        Ok(Checkpoint { files, config, quantization, generation, tensors })
    }

    /// Reads the configs alone, and fails as [`Checkpoint::open`] does: for a caller who has yet to fetch the tensors.
    pub fn check(files: &Files) -> Result<()> {
        configs(files).map(drop)
    }

    /// The files it was opened from.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// All that `config.json` says, read again.
    pub fn config_json(&self) -> Result<Value> {
        json::parse(LlamaConfig::FILE, &self.files.require(LlamaConfig::FILE)?)
    }

    /// How it is quantized, where it is.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// How its makers mean it to be sampled.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// A tensor that the model cannot do without.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let why = "is missing; take the model's files from one source, whole";
        self.find(name).ok_or_else(|| Error::tensor(name, why))
    }

    /// A tensor, where there is one of that name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All tensors, in the order of their names.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &Tensor> {
        self.tensors.values()
    }
}

fn configs(files: &Files) -> Result<(LlamaConfig, Option<QuantizationConfig>, GenerationConfig)> {
    let value = json::parse(LlamaConfig::FILE, &files.require(LlamaConfig::FILE)?)?;
    let config = LlamaConfig::from_json(&value)?;
    let quantization = value.get("quantization_config").filter(|value| !value.is_null());
    let quantization = quantization.map(QuantizationConfig::from_json).transpose()?;
    let generation = GenerationConfig::from_json(files.json(GenerationConfig::FILE)?.as_ref(), &config)?;
    Ok((config, quantization, generation))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_checkpoint_opens_with_all_its_files() {
        let config = testing::merged(testing::config(), json!({"quantization_config": testing::fp8("tensor", "none")}));
        let tensors = testing::safetensors(&[("b", "U8", &[1], &[2]), ("a", "F32", &[], &1f32.to_le_bytes())]);
        let (_dir, files) = testing::folder(&[
            ("config.json", config.to_string().as_bytes()),
            ("generation_config.json", br#"{"eos_token_id": [7, 8]}"#),
            ("model.safetensors", &tensors),
        ]);
        let checkpoint = Checkpoint::open(files).unwrap();
        assert_eq!((checkpoint.config().hidden, &checkpoint.generation().eos[..]), (8, &[7, 8][..]));
        assert!(checkpoint.quantization().is_some());
        assert_eq!(checkpoint.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.tensor("a").unwrap().to_f32().unwrap(), [1.0]);
        assert_eq!(
            checkpoint.tensor("c").unwrap_err().to_string(),
            "tensor c: is missing; take the model's files from one source, whole"
        );
    }

    #[test]
    fn config_problems_are_reported_before_a_tensor_file_is_opened() {
        let read = |config: Value| {
            let files = [("config.json", config.to_string()), ("model.safetensors", "not safetensors".into())];
            let files: Vec<_> = files.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
            let (_dir, files) = testing::folder(&files);
            Checkpoint::open(files).unwrap_err().to_string()
        };
        let base = testing::config();
        assert_eq!(
            read(testing::merged(base.clone(), json!({"architectures": ["MixtralForCausalLM"]}))),
            "architecture MixtralForCausalLM is not supported: LlamaForCausalLM is"
        );
        assert_eq!(
            read(testing::merged(base.clone(), json!({"quantization_config": {"quant_method": "gptq"}}))),
            "quant_method gptq is not supported: compressed-tensors is"
        );
        assert_eq!(
            read(base),
            "model.safetensors: claims a header of 7306634592548843374 bytes and has 7 behind the claim; download \
             the file again"
        );
    }

    #[test]
    fn a_config_that_is_no_json_is_refused() {
        let (_dir, files) = testing::folder(&[("config.json", b"{")]);
        assert_eq!(
            Checkpoint::open(files).unwrap_err().to_string(),
            "config.json: is not valid JSON: EOF while parsing an object at line 1 column 1; download the model again"
        );
        let (_dir, files) = testing::folder(&[("config.json", b"[]")]);
        assert_eq!(
            Checkpoint::open(files).unwrap_err().to_string(),
            "config.json: must hold a JSON object, found a list of 0"
        );
        let deep = "[".repeat(100_000);
        let (_dir, files) = testing::folder(&[("config.json", deep.as_bytes())]);
        assert_eq!(
            Checkpoint::open(files).unwrap_err().to_string(),
            "config.json: is not valid JSON: recursion limit exceeded at line 1 column 128; download the model again"
        );
    }

    proptest! {
        #[test]
        fn no_change_of_config_json_makes_it_panic(
            at in any::<prop::sample::Index>(),
            to in "[\\[\\]{}\",:a-z0-9 .-]{0,3}",
        ) {
            let mut text = testing::config().to_string();
            let at = at.index(text.len());
            text.replace_range(at..at + 1, &to);
            if let Ok(value) = serde_json::from_str(&text)
                && let Ok(config) = LlamaConfig::from_json(&value)
            {
                let _ = GenerationConfig::from_json(Some(&value), &config);
                let _ = config.rope.table(config.heads.dim, 1);
            }
        }
    }
}
