//! `generation_config.json`: how the model's makers mean it to be sampled, and where an answer ends. Absent keys stay
//! absent, so that the command line can tell a default from a wish; the sampler judges the values.

use serde_json::Value;

use crate::error::Result;
use crate::llama::LlamaConfig;
use crate::sampler::SamplingParams;

use super::json::Object;

/// What `generation_config.json` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer; from `config.json` where this file names none.
    pub eos: Vec<u32>,
    /// The token that begins a text; from `config.json` where this file names none.
    pub bos: Option<u32>,
    /// False asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities add up to this.
    pub top_p: Option<f32>,
    /// Keeps this many tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keeps tokens that are at least this fraction as probable as the most probable one.
    pub min_p: Option<f32>,
    /// Divides positive logits of tokens that have occurred, multiplies negative ones.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// The name of the file.
    pub const FILE: &str = "generation_config.json";

    /// Reads the file's JSON, where there is a file; `config` fills in the special tokens.
    pub fn from_json(value: Option<&Value>, config: &LlamaConfig) -> Result<Self> {
        let fallback = GenerationConfig { eos: config.eos.clone(), bos: config.bos, ..Default::default() };
        let Some(value) = value else { return Ok(fallback) };
        let json = Object::root(Self::FILE, value)?;
        let number = |key| json.real(key, f64::from(f32::MIN)..=f64::from(f32::MAX)).map(|x| x.map(|x| x as f32));
        Ok(GenerationConfig {
            eos: json.token_ids("eos_token_id")?.unwrap_or(fallback.eos),
            bos: json.token_id("bos_token_id")?.or(fallback.bos),
            do_sample: json.flag("do_sample")?,
            temperature: number("temperature")?,
            top_p: number("top_p")?,
            top_k: json.token_id("top_k")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        })
    }

    /// The sampling that the file recommends; [`SamplingParams::default`] where it says nothing.
    pub fn sampling(&self) -> SamplingParams {
        let open = SamplingParams::default();
        let greedy = self.do_sample == Some(false);
        SamplingParams {
            temperature: if greedy { 0.0 } else { self.temperature.unwrap_or(open.temperature) },
            top_p: self.top_p.unwrap_or(open.top_p),
            top_k: self.top_k.unwrap_or(open.top_k),
            min_p: self.min_p.unwrap_or(open.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(open.repetition_penalty),
            ..open
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::testing;

    fn read(value: Value) -> Result<GenerationConfig> {
        let config = LlamaConfig::from_json(&testing::config()).unwrap();
        GenerationConfig::from_json(Some(&value), &config)
    }

    #[test]
    fn generation_config_is_read() {
        let got = read(json!({
            "bos_token_id": 3, "eos_token_id": [4, 5], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 50,
            "min_p": 0.05, "repetition_penalty": 1.1, "pad_token_id": 7, "transformers_version": "4.45.0"
        }));
        let want = GenerationConfig {
            eos: vec![4, 5],
            bos: Some(3),
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(50),
            min_p: Some(0.05),
            repetition_penalty: Some(1.1),
        };
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn special_tokens_fall_back_to_the_model_config() {
        let got = read(json!({})).unwrap();
        assert_eq!((got.eos, got.bos), (vec![2], Some(1)));
        assert_eq!(read(json!({"eos_token_id": 9})).unwrap().eos, vec![9]);
    }

    #[test]
    fn values_of_the_wrong_kind_are_refused() {
        assert_eq!(
            read(json!({"temperature": "hot"})).unwrap_err().to_string(),
            "generation_config.json: `temperature` must be a number from -3.4028234663852886e38 to \
             3.4028234663852886e38, found \"hot\""
        );
        assert_eq!(
            read(json!({"eos_token_id": -1})).unwrap_err().to_string(),
            "generation_config.json: `eos_token_id` must be a token id or a list of token ids, found -1"
        );
        assert_eq!(
            read(json!([])).unwrap_err().to_string(),
            "generation_config.json: must hold a JSON object, found a list of 0"
        );
    }
}
