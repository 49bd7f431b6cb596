//! `quaver inspect`: what a model is, how it is quantized, and what it will take of memory. It opens no device.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::Result;
use quaver::core::checkpoint::{
    Activations, Checkpoint, KvCacheScheme, LinearScheme, Tensor, TensorDType, WeightStrategy,
};
use quaver::core::llama::RopeScaling;
use quaver::core::op::DType;
use quaver::core::plan::MemoryPlan;
use quaver::text::Tokenizer;
use serde_json::{Value, json};

use super::flags::ModelFlags;
use super::table::{Align, Table, human_bytes};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Sequences side by side that memory is planned for.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..),
        env = "QUAVER_MAX_NUM_SEQS")]
    max_num_seqs: u16,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// List every tensor of the checkpoint.
    #[arg(long)]
    tensors: bool,
}

pub fn run(args: Args) -> Result<()> {
    let files = quaver::files(args.model.name(), args.model.offline)?;
    let checkpoint = Checkpoint::open(files.clone())?;
    let tokenizer = files.get("tokenizer.json")?.map(|json| Tokenizer::from_json(&json)).transpose()?;
    let has_chat_template = quaver::text_model::chat_template(&files)?.is_some();
    let plan = MemoryPlan::new(&checkpoint, &args.model.options(args.max_num_seqs.into()).engine, None)?;
    let model = Model { checkpoint, tokenizer, has_chat_template, plan };
    let mut out = io::stdout().lock();
    if args.json {
        let mut object = model.to_json();
        if args.tensors {
            object["tensors"] = model.checkpoint.tensors().map(tensor_json).collect();
        }
        writeln!(out, "{object:#}")?;
        return Ok(());
    }
    model.summary().write(&mut out)?;
    if args.tensors {
        writeln!(out)?;
        tensors(&model.checkpoint).write(&mut out)?;
    }
    Ok(())
}

/// A checkpoint, and what was found out about it.
struct Model {
    checkpoint: Checkpoint,
    tokenizer: Option<Tokenizer>,
    has_chat_template: bool,
    plan: MemoryPlan,
}

impl Model {
    /// Elements of the weights; scales are not parameters.
    fn parameters(&self) -> usize {
        let weights = self.checkpoint.tensors().filter(|tensor| tensor.name.ends_with(".weight"));
        weights.map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    /// Of each dtype: tensors and bytes.
    fn dtypes(&self) -> BTreeMap<String, (usize, usize)> {
        let mut dtypes = BTreeMap::new();
        for tensor in self.checkpoint.tensors() {
            let (count, bytes) = dtypes.entry(tensor.dtype.to_string()).or_insert((0, 0));
            *count += 1;
            *bytes += tensor.data.len();
        }
        dtypes
    }

    fn to_json(&self) -> Value {
        let (config, generation) = (self.checkpoint.config(), self.checkpoint.generation());
        let sampling = generation.sampling();
        let dtypes = self.dtypes().into_iter().map(|(dtype, (tensors, bytes))| {
            json!({"dtype": dtype, "tensors": tensors, "bytes": bytes, "loaded_as": loaded_as(&dtype)})
        });
        let plan = &self.plan;
        json!({
            "model": self.checkpoint.files().name(),
            "architecture": "LlamaForCausalLM",
            "parameters": self.parameters(),
            "vocab_size": config.vocab,
            "hidden_size": config.hidden,
            "layers": config.layers,
            "heads": config.heads.q,
            "kv_heads": config.heads.kv,
            "head_dim": config.heads.dim,
            "intermediate_size": config.intermediate,
            "rms_norm_eps": real(config.rms_eps),
            "context": config.max_positions,
            "rope": rope_json(config.rope.theta, config.rope.scaling),
            "head": head(plan.own_head),
            "dtypes": dtypes.collect::<Value>(),
            "quantization": self.quantization_json(),
            "bos_token_id": generation.bos,
            "eos_token_ids": generation.eos,
            "sampling": {
                "temperature": real(sampling.temperature), "top_p": real(sampling.top_p), "top_k": sampling.top_k,
                "min_p": real(sampling.min_p), "repetition_penalty": real(sampling.repetition_penalty),
            },
            "tokenizer": self.tokenizer.as_ref().map(|tokenizer| json!({"vocab_size": tokenizer.vocab_size()})),
            "chat_template": self.has_chat_template,
            "memory": {
                "max_model_len": plan.sizes.context,
                "max_num_seqs": plan.sizes.sequences,
                "weights_bytes": plan.weights,
                "rotary_table_bytes": plan.rotary,
                "kv_cache_dtype": dtype(plan.kv_dtype),
                "kv_cache_bytes_per_token": plan.kv_bytes_a_token(),
                "kv_cache_tokens": plan.kv_tokens(),
                "kv_cache_bytes": plan.kv_cache,
                "scratch_bytes": plan.scratch,
                "total_bytes": plan.total(),
            },
        })
    }

    fn quantization_json(&self) -> Value {
        let Some(quantization) = self.checkpoint.quantization() else { return Value::Null };
        let target = |(target, scheme): (&str, Option<LinearScheme>)| match scheme {
            None => json!({"target": target, "weights": null, "activations": null}),
            Some(LinearScheme { weights, activations }) => {
                json!({"target": target, "weights": strategy(weights), "activations": activation(activations)})
            }
        };
        json!({
            "method": "compressed-tensors",
            "targets": quantization.targets().map(target).collect::<Value>(),
            "ignored": quantization.ignored().collect::<Value>(),
            "kv_cache": quantization.kv_cache.map(kv_scheme),
        })
    }

    fn summary(&self) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Left]);
        let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
        let (config, generation) = (self.checkpoint.config(), self.checkpoint.generation());
        let heads = config.heads;
        line("model", self.checkpoint.files().name());
        line("architecture", "LlamaForCausalLM".into());
        line("parameters", format!("{} ({})", grouped(self.parameters()), short_count(self.parameters())));
        line("layers", format!("{} of width {}, MLP {}", config.layers, config.hidden, config.intermediate));
        line("attention", format!("{} heads, {} key-value heads, of {}", heads.q, heads.kv, heads.dim));
        line("vocabulary", config.vocab.to_string());
        line("context", format!("{} tokens", config.max_positions));
        line("rope", rope_text(config.rope.theta, config.rope.scaling));
        line("head", if self.plan.own_head { "its own weight" } else { "tied: the embedding" }.into());
        for (dtype, (tensors, bytes)) in self.dtypes() {
            let cast = if loaded_as(&dtype) == dtype { String::new() } else { ", cast to F32 at load".into() };
            line("stored", format!("{dtype}: {tensors} tensors, {}{cast}", human_bytes(bytes as u64)));
        }
        self.quantization_lines(&mut line);
        line(
            "bos, eos",
            format!("{}, {:?}", generation.bos.map_or("none".into(), |id| id.to_string()), generation.eos),
        );
        let s = generation.sampling();
        let sampling = format!(
            "temperature {}, top_p {}, top_k {}, min_p {}, repetition_penalty {}",
            s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty
        );
        line("sampling", sampling);
        let tokenizer = self.tokenizer.as_ref().map(|tokenizer| format!("{} tokens", tokenizer.vocab_size()));
        line("tokenizer", tokenizer.unwrap_or_else(|| "none: takes and gives token ids".into()));
        line("chat template", if self.has_chat_template { "yes" } else { "none: continues plain text" }.into());
        self.memory_lines(&mut line);
        table
    }

    fn quantization_lines(&self, line: &mut impl FnMut(&str, String)) {
        let Some(quantization) = self.checkpoint.quantization() else {
            let real: Vec<_> = self.dtypes().into_keys().collect();
            return line("quantization", format!("none ({})", real.join(", ").to_lowercase()));
        };
        line("quantization", "compressed-tensors".into());
        for (target, scheme) in quantization.targets() {
            let text = match scheme {
                None => "not quantized".into(),
                Some(LinearScheme { weights, activations }) => {
                    let weights = match weights {
                        WeightStrategy::Tensor => "one scale a tensor",
                        WeightStrategy::Channel => "one scale a channel",
                    };
                    let activations = match activations {
                        Activations::None => "not quantized",
                        Activations::Static => "E4M3, one static scale",
                        Activations::Dynamic => "E4M3, dynamic, one scale a token",
                    };
                    format!("weights E4M3, {weights}; activations {activations}")
                }
            };
            line("", format!("{target}: {text}"));
        }
        let ignored: Vec<_> = quantization.ignored().collect();
        line("ignored", if ignored.is_empty() { "nothing".into() } else { ignored.join(", ") });
        let kv = match quantization.kv_cache {
            None => "no scales",
            Some(KvCacheScheme::Fp8PerTensor) => "E4M3, static scales for keys and values",
        };
        line("kv cache", kv.into());
    }

    fn memory_lines(&self, line: &mut impl FnMut(&str, String)) {
        let plan = &self.plan;
        let bytes = |bytes: usize| human_bytes(bytes as u64);
        let sizes = plan.sizes;
        line("memory for", format!("{} sequences of up to {} tokens", sizes.sequences, sizes.context));
        line("  weights", bytes(plan.weights));
        line("  rotary table", bytes(plan.rotary));
        let (each, tokens) = (grouped(plan.kv_bytes_a_token()), grouped(plan.kv_tokens()));
        let kv = bytes(plan.kv_cache);
        line("  kv cache", format!("{kv}: {tokens} tokens of {each} bytes in {}", dtype(plan.kv_dtype)));
        line("  scratch", bytes(plan.scratch));
        line("  in all", bytes(plan.total()));
    }
}

fn tensors(checkpoint: &Checkpoint) -> Table {
    let mut table = Table::new(&[Align::Left, Align::Left, Align::Right, Align::Right]);
    table.row(["tensor", "dtype", "shape", "bytes"].map(str::to_owned));
    for Tensor { name, dtype, shape, data } in checkpoint.tensors() {
        // A name is a stranger's text: no control character of it reaches the terminal.
        let name = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        table.row([name, dtype.to_string(), format!("{shape:?}"), data.len().to_string()]);
    }
    table
}

fn tensor_json(tensor: &Tensor) -> Value {
    let Tensor { name, dtype, shape, data } = tensor;
    json!({"name": name, "dtype": dtype.to_string(), "shape": shape, "bytes": data.len()})
}

/// What a dtype is kept in on a device: f32 holds f16 exactly.
fn loaded_as(dtype: &str) -> String {
    if dtype == TensorDType::F16.to_string() { TensorDType::F32.to_string() } else { dtype.to_owned() }
}

const fn head(own: bool) -> &'static str {
    if own { "own" } else { "tied" }
}

const fn dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::E4m3 => "fp8",
        DType::U32 => "u32",
    }
}

const fn strategy(weights: WeightStrategy) -> &'static str {
    match weights {
        WeightStrategy::Tensor => "tensor",
        WeightStrategy::Channel => "channel",
    }
}

const fn activation(activations: Activations) -> &'static str {
    match activations {
        Activations::None => "none",
        Activations::Static => "static",
        Activations::Dynamic => "dynamic",
    }
}

const fn kv_scheme(scheme: KvCacheScheme) -> &'static str {
    match scheme {
        KvCacheScheme::Fp8PerTensor => "fp8 static tensor",
    }
}

fn rope_json(theta: f64, scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => json!({"theta": theta, "type": "default"}),
        RopeScaling::Linear { factor } => json!({"theta": theta, "type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => json!({
            "theta": theta, "type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_max_position,
        }),
    }
}

fn rope_text(theta: f64, scaling: RopeScaling) -> String {
    let scaling = match scaling {
        RopeScaling::None => "no scaling".into(),
        RopeScaling::Linear { factor } => format!("linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            format!(
                "llama3 scaling by {factor} (low {low_freq_factor}, high {high_freq_factor}, \
                 original context {original_max_position})"
            )
        }
    };
    format!("theta {theta}, {scaling}")
}

/// An f32 as the shortest decimal that reads back as it, rather than as all digits of its f64.
fn real(x: f32) -> Value {
    serde_json::from_str(&x.to_string()).unwrap_or(Value::Null)
}

/// Digits in groups of three: `1,235,814,400`.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into_owned());
    groups.collect::<Vec<_>>().join(",")
}

/// A count as models are called by: `1.2B`.
fn short_count(n: usize) -> String {
    let n = n as f64;
    match n {
        1e9.. => format!("{:.1}B", n / 1e9),
        1e6.. => format!("{:.1}M", n / 1e6),
        _ => format!("{:.1}K", n / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!(["0", "999", "1,000", "1,235,814,400"], [0, 999, 1000, 1_235_814_400].map(grouped).each_ref()[..]);
        assert_eq!((short_count(1_235_814_400), short_count(6_558_976)), ("1.2B".into(), "6.6M".into()));
        assert_eq!(real(0.6).to_string(), "0.6");
    }
}
