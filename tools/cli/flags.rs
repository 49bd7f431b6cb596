//! Flags that several commands share, and what they become.

use clap::{Args, ValueEnum};
use quaver::core::engine::EngineOptions;
use quaver::core::llama::{KvCache, Profile};
use quaver::text::StopStrings;
use quaver::{Llm, LlmOptions, SamplingParams};
use quaver_backends::{GPU_MEMORY_UTILIZATION, Kind, Spec};

use super::Usage;

/// Which model, where, and how large.
#[derive(Args, Debug)]
pub struct ModelFlags {
    /// A model's folder, or its Hugging Face id (org/name or org/name@revision), which is downloaded where the cache
    /// does not hold it whole and used as it is where it does; the built-in demo model where none is given.
    #[arg(long, short, value_name = "MODEL", env = "QUAVER_MODEL")]
    pub model: Option<String>,
    /// Never ask the network: take an id's model from the cache, as HF_HUB_OFFLINE=1 does.
    #[arg(long, value_parser = clap::builder::FalseyValueParser::new(), env = "QUAVER_OFFLINE")]
    pub offline: bool,
    #[command(flatten)]
    pub device: DeviceFlags,
    /// Tokens that a prompt and its answer can have together [default: what the model was made for].
    #[arg(long, value_name = "N", env = "QUAVER_MAX_MODEL_LEN")]
    pub max_model_len: Option<usize>,
    /// Memory that the KV cache may take, at most: bytes, or a number with K, M or G.
    #[arg(long, value_name = "BYTES", default_value = "4G", value_parser = bytes, env = "QUAVER_KV_CACHE_MEMORY")]
    pub kv_cache_memory: u64,
    /// What the KV cache is kept in: `auto` takes fp8 where the checkpoint has scales for it.
    #[arg(long, value_name = "TYPE", default_value = "auto", env = "QUAVER_KV_CACHE_DTYPE")]
    pub kv_cache_dtype: KvCacheFlag,
    /// Arithmetic of what is not FP8: `fast` is bf16 where it pays, `exact` is f32 throughout.
    #[arg(long, value_name = "PROFILE", default_value = "fast", env = "QUAVER_PROFILE")]
    pub profile: ProfileFlag,
    /// Give a request the same answer, to the last bit, whatever runs beside it, on GPUs too; steps of few rows are slower
    /// there.
    #[arg(long, value_parser = clap::builder::FalseyValueParser::new(), env = "QUAVER_DETERMINISTIC")]
    pub deterministic: bool,
}

/// Which device.
#[derive(Args, Debug)]
pub struct DeviceFlags {
    /// What computes: `auto` takes the best that there is.
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = kind, env = "QUAVER_BACKEND")]
    pub backend: Kind,
    /// Which of the backend's devices, as `quaver devices` counts them.
    #[arg(long, value_name = "N", default_value_t = 0, env = "QUAVER_DEVICE")]
    pub device: usize,
    /// Threads of the cpu backend [default: one a core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), env = "QUAVER_THREADS")]
    pub threads: Option<u16>,
    /// Which kernels, where the backend has several; on the cpu avx512-bf16, avx2 or portable, on wgpu wide, portable,
    /// subgroup, matrix or portable-exact, on cuda sm90, sm89 or sm80 [default: the best].
    #[arg(long, value_name = "NAME", env = "QUAVER_VARIANT")]
    pub variant: Option<String>,
    /// The share of an NVIDIA card's memory that may be used, 0.9 for most of it.
    #[arg(long, value_name = "SHARE", default_value_t = GPU_MEMORY_UTILIZATION, value_parser = share,
          env = "QUAVER_GPU_MEMORY_UTILIZATION")]
    pub gpu_memory_utilization: f64,
}

/// `--kv-cache-dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KvCacheFlag {
    Auto,
    Fp8,
}

/// `--profile`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProfileFlag {
    Exact,
    Fast,
}

impl From<ProfileFlag> for Profile {
    fn from(flag: ProfileFlag) -> Self {
        match flag {
            ProfileFlag::Exact => Profile::Exact,
            ProfileFlag::Fast => Profile::Fast,
        }
    }
}

impl ModelFlags {
    /// The library's options, for `sequences` at a time.
    pub fn options(&self, sequences: usize) -> LlmOptions {
        let engine = EngineOptions {
            profile: self.profile.into(),
            kv_cache: match self.kv_cache_dtype {
                KvCacheFlag::Auto => KvCache::Auto,
                KvCacheFlag::Fp8 => KvCache::Fp8,
            },
            max_model_len: self.max_model_len,
            max_num_seqs: sequences,
            kv_cache_memory: self.kv_cache_memory,
            deterministic: self.deterministic,
            ..EngineOptions::default()
        };
        let device = Spec { deterministic: self.deterministic, ..self.device.spec() };
        LlmOptions { device, engine, offline: self.offline, defer_tokenizer: false }
    }

    /// The model's folder or id; an empty QUAVER_MODEL is none.
    pub fn name(&self) -> Option<&str> {
        self.model.as_deref().filter(|name| !name.is_empty())
    }

    /// Opens the model for `sequences` at a time.
    pub fn open(&self, sequences: usize) -> quaver::Result<Llm> {
        Llm::with_options(self.name(), &self.options(sequences))
    }
}

impl DeviceFlags {
    /// The device that the flags name.
    pub fn spec(&self) -> Spec {
        let threads = self.threads.map(usize::from);
        let gpu_memory_utilization = Some(self.gpu_memory_utilization);
        let variant = self.variant.clone();
        Spec { kind: self.backend, device: self.device, threads, variant, gpu_memory_utilization, deterministic: false }
    }
}

/// How to choose tokens; where a flag is absent, the model's generation_config.json decides.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// 0 takes the likeliest token always; 1 is the model's own distribution.
    #[arg(long, value_name = "T", allow_negative_numbers = true, env = "QUAVER_TEMPERATURE")]
    pub temperature: Option<f32>,
    /// Keep the likeliest tokens whose probabilities sum to this.
    #[arg(long, value_name = "P", allow_negative_numbers = true, env = "QUAVER_TOP_P")]
    pub top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    #[arg(long, value_name = "K", allow_negative_numbers = true, env = "QUAVER_TOP_K")]
    pub top_k: Option<u32>,
    /// Keep tokens at least this probable, relative to the likeliest.
    #[arg(long, value_name = "P", allow_negative_numbers = true, env = "QUAVER_MIN_P")]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens that occurred by this; 1 is off.
    #[arg(long, value_name = "R", allow_negative_numbers = true, env = "QUAVER_REPETITION_PENALTY")]
    pub repetition_penalty: Option<f32>,
    /// Subtract this from the logits of tokens that were generated.
    #[arg(long, value_name = "R", allow_negative_numbers = true, env = "QUAVER_PRESENCE_PENALTY")]
    pub presence_penalty: Option<f32>,
    /// Subtract this for each time that a token was generated.
    #[arg(long, value_name = "R", allow_negative_numbers = true, env = "QUAVER_FREQUENCY_PENALTY")]
    pub frequency_penalty: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long, value_name = "N", allow_negative_numbers = true, env = "QUAVER_SEED")]
    pub seed: Option<u64>,
    /// Tokens to generate, at most.
    #[arg(
        long,
        short = 'n',
        value_name = "N",
        default_value_t = 256,
        allow_negative_numbers = true,
        env = "QUAVER_MAX_TOKENS"
    )]
    pub max_tokens: usize,
    /// End the answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on behind an end-of-text token.
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingFlags {
    /// The flags over a model's defaults.
    pub fn params(&self, defaults: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed,
            max_tokens: self.max_tokens,
            ignore_eos: self.ignore_eos,
            ..defaults
        }
    }

    /// Refuses values that mean nothing before a model is loaded.
    pub fn check(&self) -> Result<(), Usage> {
        let usage = |error: quaver::Error| Usage(error.to_string());
        self.params(SamplingParams::default()).validate().map_err(usage)?;
        StopStrings::new(&self.stop).map(drop).map_err(usage)
    }
}

/// What goes before all messages.
#[derive(Args, Debug)]
pub struct SystemFlag {
    /// The system message that goes before prompts [env: QUAVER_SYSTEM].
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

impl SystemFlag {
    /// True where the flag itself is given.
    pub fn is_given(&self) -> bool {
        self.system.is_some()
    }

    /// The flag's text, or else the environment's. The parser is not asked for the latter: it would count as given,
    /// and so exclude `--raw`.
    pub fn get(&self) -> Option<String> {
        self.system.clone().or_else(|| std::env::var("QUAVER_SYSTEM").ok())
    }
}

pub fn kind(name: &str) -> Result<Kind, String> {
    Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
        let names: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        format!("this build has the backends {}", names.join(", "))
    })
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "a share is expected, above 0 and at most 1, such as 0.9".into())
}

/// Bytes as a user writes them: `4G`, `512M`, `1.5GiB`, `1000000`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a number of bytes is expected, such as 512M or 4G".into()),
    };
    let number: f64 =
        digits.trim().parse().map_err(|_| "a number of bytes is expected, such as 512M or 4G".to_owned())?;
    let bytes = number * (1u64 << shift) as f64;
    if !(1.0..=1e18).contains(&bytes) {
        return Err("a number of bytes is expected, such as 512M or 4G".into());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_people_write_them() {
        for (text, want) in [("1000", 1000), ("4G", 4 << 30), ("1.5GiB", 3 << 29), ("512mb", 512 << 20), ("2k", 2048)] {
            assert_eq!(bytes(text), Ok(want), "{text}");
        }
        for text in ["", "G", "-1", "4X", "nan", "1e30G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
