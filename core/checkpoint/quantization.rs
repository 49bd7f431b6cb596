//! `quantization_config` of config.json, in the format of compressed-tensors: which linear layers are FP8, with which
//! scales. Everything that this runtime cannot run is refused here, from the config alone, before a tensor is touched.
//!
//! A tolerant raw form ([`Raw`], [`RawGroup`], [`RawArguments`]) takes what is there, unknown keys and all; files of
//! 2024 lack many keys. It then becomes a [`QuantizationConfig`], which holds nothing that is not supported.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

use super::json::{clipped, short};
use super::targets::Target;

/// Patterns and names that a config may hold; the largest real lists have some hundreds.
const MAX_TARGETS: usize = 1 << 14;

/// Patterns behind `re:` that a config may hold: each takes memory.
const MAX_PATTERNS: usize = 1 << 9;

/// The quantization of a model's linear layers and of its KV cache.
#[derive(Clone, Debug)]
pub struct QuantizationConfig {
    /// Static scales of keys and values, where the checkpoint brings them.
    pub kv_cache: Option<KvCacheScheme>,
    ignore: Vec<Target>,
    /// Those of a group that quantizes nothing have no scheme.
    targets: Vec<(Target, Option<LinearScheme>)>,
}

/// The quantization of one linear layer: E4M3 weights, and activations as said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearScheme {
    /// How far one weight scale reaches.
    pub weights: WeightStrategy,
    /// Whether and how the input is quantized.
    pub activations: Activations,
}

/// How far one weight scale reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightStrategy {
    /// Over the whole weight.
    Tensor,
    /// Over one output channel: a row of the weight.
    Channel,
}

/// Whether and how the input of a linear layer is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// It is not.
    None,
    /// To E4M3 with one scale from calibration.
    Static,
    /// To E4M3 with a scale for each token.
    Dynamic,
}

/// The quantization of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheScheme {
    /// To E4M3 with one static scale for the keys of a layer and one for its values.
    Fp8PerTensor,
}

impl QuantizationConfig {
    /// Reads the value of `quantization_config`.
    pub fn from_json(value: &Value) -> Result<Self> {
        let raw: Raw =
            Deserialize::deserialize(value).map_err(|e: serde_json::Error| damaged(clipped(&e.to_string())))?;
        raw.check_container()?;
        let mut schemes = BTreeMap::new();
        for (name, group) in raw.config_groups.iter().flatten() {
            let group: RawGroup = Deserialize::deserialize(group).map_err(|e: serde_json::Error| {
                damaged(format!("config group {}: {}", clipped(name), clipped(&e.to_string())))
            })?;
            group.check_format(raw.format.as_deref())?;
            let scheme = group.scheme(&clipped(name))?;
            // A target that two groups name is the later one's, as in the dictionary that compressed-tensors makes.
            schemes.extend(group.targets.into_iter().flatten().map(|target| (target, scheme)));
        }
        let ignore = raw.ignore.unwrap_or_default();
        let patterns = schemes.keys().chain(&ignore).filter(|target| target.starts_with("re:")).count();
        if schemes.len() + ignore.len() > MAX_TARGETS || patterns > MAX_PATTERNS {
            return Err(damaged(format!("more than {MAX_TARGETS} targets, or {MAX_PATTERNS} patterns")));
        }
        let targets = schemes.into_iter().map(|(text, scheme)| Ok((Target::new(&text)?, scheme)));
        Ok(QuantizationConfig {
            kv_cache: raw.kv_cache_scheme.map(|arguments| arguments.kv_cache()).transpose()?,
            ignore: ignore.iter().map(|text| Target::new(text)).collect::<Result<_>>()?,
            targets: targets.collect::<Result<_>>()?,
        })
    }

    /// The scheme of a linear layer, such as `model.layers.0.self_attn.q_proj` or `lm_head`; `None` where it is not
    /// quantized. Of several targets that meet it, a name goes before a pattern and a pattern before a class; of
    /// several patterns the first in alphabetical order is taken. The ignore list goes before all.
    pub fn scheme(&self, module: &str) -> Option<LinearScheme> {
        if self.ignore.iter().any(|target| target.meets(module).is_some()) {
            return None;
        }
        let met = self.targets.iter().filter_map(|(target, scheme)| Some((target.meets(module)?, target, scheme)));
        met.min_by_key(|(kind, target, _)| (*kind, target.text())).and_then(|(_, _, scheme)| *scheme)
    }

    /// What each name, pattern or class of the groups is quantized to, in alphabetical order.
    pub fn targets(&self) -> impl Iterator<Item = (&str, Option<LinearScheme>)> {
        self.targets.iter().map(|(target, scheme)| (target.text(), *scheme))
    }

    /// Those of [`ignored`](Self::ignored) that meet none of the modules.
    pub fn idle_ignores<'a>(&'a self, modules: &'a [&str]) -> impl Iterator<Item = &'a str> {
        let idle = |target: &&Target| !modules.iter().any(|module| target.meets(module).is_some());
        self.ignore.iter().filter(idle).map(Target::text)
    }

    /// The names, patterns and classes that are left as they are.
    pub fn ignored(&self) -> impl Iterator<Item = &str> {
        self.ignore.iter().map(Target::text)
    }
}

/// `quantization_config` as it is written.
#[derive(Deserialize)]
struct Raw {
    quant_method: Option<String>,
    format: Option<String>,
    quantization_status: Option<String>,
    config_groups: Option<Map<String, Value>>,
    ignore: Option<Vec<String>>,
    kv_cache_scheme: Option<RawArguments>,
    sparsity_config: Option<Map<String, Value>>,
    transform_config: Option<Map<String, Value>>,
}

/// A config group as it is written.
#[derive(Deserialize)]
struct RawGroup {
    targets: Option<Vec<String>>,
    format: Option<String>,
    weights: Option<RawArguments>,
    input_activations: Option<RawArguments>,
    output_activations: Option<Value>,
}

/// `QuantizationArgs` as they are written; what is absent has the default of compressed-tensors, which for the type is
/// the integer.
#[derive(Deserialize)]
struct RawArguments {
    num_bits: Option<u64>,
    #[serde(rename = "type")]
    kind: Option<String>,
    symmetric: Option<bool>,
    strategy: Option<String>,
    group_size: Option<i64>,
    block_structure: Option<Value>,
    dynamic: Option<Value>,
}

impl Raw {
    /// All that is said beside the groups.
    fn check_container(&self) -> Result<()> {
        match self.quant_method.as_deref() {
            Some("compressed-tensors") => {}
            Some(other) => return refuse(format!("quant_method {}", clipped(other)), "compressed-tensors is"),
            None if self.config_groups.is_none() => {
                return refuse("quantization_config without quant_method", "compressed-tensors is");
            }
            None => {}
        }
        // A mixed checkpoint says the format of each group, see `check_format`.
        if !matches!(self.format.as_deref(), Some("mixed-precision")) {
            check_format(self.format.as_deref())?;
        }
        match self.quantization_status.as_deref() {
            None | Some("compressed" | "frozen") => {}
            Some(other) => {
                return refuse(format!("quantization_status {}", clipped(other)), "compressed and frozen are");
            }
        }
        match self.sparsity_config.as_ref().filter(|config| !config.is_empty()).map(|config| config.get("format")) {
            None => {}
            Some(Some(Value::String(format))) if format == "dense" => {}
            Some(Some(format)) => return refuse(format!("sparsity format {}", bare(format)), "dense is"),
            Some(None) => return refuse("sparsity_config without format", "dense is"),
        }
        // `{"config_groups": {}}` transforms nothing.
        let nothing = |value: &Value| matches!(value, Value::Null) || value.as_object().is_some_and(Map::is_empty);
        match &self.transform_config {
            Some(config) if !config.values().all(nothing) => {
                refuse("transform_config", "checkpoints without transforms are")
            }
            _ => Ok(()),
        }
    }
}

impl RawGroup {
    fn check_format(&self, outer: Option<&str>) -> Result<()> {
        check_format(self.format.as_deref().or(outer))
    }

    /// `None` for a group that quantizes nothing.
    fn scheme(&self, group: &str) -> Result<Option<LinearScheme>> {
        if self.output_activations.as_ref().is_some_and(|value| !value.is_null()) {
            return refuse(format!("output_activations ({group})"), "weights and input_activations are");
        }
        match (&self.weights, &self.input_activations) {
            (None, None) => Ok(None),
            (None, Some(_)) => refuse(format!("input_activations without weights ({group})"), "FP8 weights are"),
            (Some(weights), input) => Ok(Some(LinearScheme {
                weights: weights.weights(group)?,
                activations: input.as_ref().map_or(Ok(Activations::None), |input| input.activations(group))?,
            })),
        }
    }
}

impl RawArguments {
    fn weights(&self, group: &str) -> Result<WeightStrategy> {
        self.check_type("weight", group)?;
        if self.is_dynamic() {
            return refuse(format!("dynamic weight quantization ({group})"), "static is");
        }
        match self.strategy() {
            "tensor" => Ok(WeightStrategy::Tensor),
            "channel" => Ok(WeightStrategy::Channel),
            other => refuse(format!("weight strategy {} ({group})", clipped(other)), "tensor and channel are"),
        }
    }

    fn activations(&self, group: &str) -> Result<Activations> {
        self.check_type("activation", group)?;
        match (self.strategy(), self.is_dynamic()) {
            ("tensor", false) => Ok(Activations::Static),
            ("token", true) => Ok(Activations::Dynamic),
            (other, dynamic) => {
                let kind = if dynamic { "dynamic" } else { "static" };
                let what = format!("activation strategy {kind} {} ({group})", clipped(other));
                refuse(what, "static tensor and dynamic token are")
            }
        }
    }

    fn kv_cache(&self) -> Result<KvCacheScheme> {
        let place = "kv_cache_scheme";
        self.check_type("KV cache", place)?;
        match (self.strategy(), self.is_dynamic()) {
            ("tensor", false) => Ok(KvCacheScheme::Fp8PerTensor),
            (other, dynamic) => {
                let kind = if dynamic { "dynamic" } else { "static" };
                refuse(format!("KV cache strategy {kind} {} ({place})", clipped(other)), "static tensor is")
            }
        }
    }

    fn check_type(&self, what: &str, place: &str) -> Result<()> {
        let (bits, kind) = (self.num_bits.unwrap_or(8), self.kind.as_deref().unwrap_or("int"));
        if bits != 8 || kind != "float" {
            return refuse(format!("{what} type {bits}-bit {} ({place})", clipped(kind)), "8-bit float is");
        }
        if self.symmetric == Some(false) {
            return refuse(format!("asymmetric {what} quantization ({place})"), "symmetric is");
        }
        Ok(())
    }

    /// The strategy; where none is named, what compressed-tensors infers.
    fn strategy(&self) -> &str {
        match (&self.strategy, self.group_size, &self.block_structure) {
            (Some(strategy), ..) => strategy,
            (None, Some(-1), _) => "channel",
            (None, Some(_), _) => "group",
            (None, None, Some(_)) => "block",
            (None, None, None) => "tensor",
        }
    }

    /// True for `true`, and for `"local"`: scales of which a part is dynamic.
    fn is_dynamic(&self) -> bool {
        !matches!(self.dynamic, None | Some(Value::Null | Value::Bool(false)))
    }
}

/// The formats that hold codes and scales side by side; files of 2024 may name none.
fn check_format(format: Option<&str>) -> Result<()> {
    match format {
        None | Some("float-quantized" | "naive-quantized") => Ok(()),
        Some(other) => refuse(format!("format {}", clipped(other)), "float-quantized and naive-quantized are"),
    }
}

fn refuse<T>(what: impl Into<String>, supported: &str) -> Result<T> {
    Err(Error::unsupported_model(what, supported))
}

fn damaged(why: String) -> Error {
    Error::checkpoint("config.json", format!("`quantization_config` cannot be read: {why}"))
}

/// A string without its quotation marks, anything else as JSON.
fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| short(value), clipped)
}

#[cfg(test)]
mod tests;
