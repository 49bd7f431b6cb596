//! Makes an FP8 checkpoint in the format of compressed-tensors out of a bf16, f16 or f32 one, with llm-compressor's
//! arithmetic: [`Recipe`] says what is wanted, [`Quantizer`] holds it against a checkpoint and finds the static scales
//! where the recipe has some, and [`Quantizer::parts`] are the tensors of the result, computed when they are written. The command line is the caller.

mod calibrate;
mod weights;

use std::collections::BTreeMap;
use std::str::FromStr;

use safetensors::Dtype;
use serde_json::{Value, json};

use self::calibrate::site;
pub use self::calibrate::{Calibration, KvScales};
pub use self::weights::{QuantizedWeight, Real, quantize_weight};
use crate::bytes::Bytes;
use crate::checkpoint::{Checkpoint, LinearWeight, Part, QuantizationConfig, Tensor, TensorDesc};
use crate::error::{Error, Result};

/// The version of compressed-tensors whose format is written.
const FORMAT_VERSION: &str = "0.19.0";

/// What the linear layers become, by llm-compressor's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// A weight scale a tensor, static activations: llm-compressor's `FP8`.
    Fp8,
    /// A weight scale an output channel, static activations.
    Fp8Channel,
    /// A weight scale an output channel, a scale a token for activations: llm-compressor's `FP8_DYNAMIC`.
    Fp8Dynamic,
}

impl Scheme {
    /// All of them.
    pub const ALL: [Scheme; 3] = [Scheme::Fp8, Scheme::Fp8Channel, Scheme::Fp8Dynamic];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Scheme::Fp8 => "fp8",
            Scheme::Fp8Channel => "fp8-channel",
            Scheme::Fp8Dynamic => "fp8-dynamic",
        }
    }

    /// True where activations have one scale for all tokens, which calibration finds.
    pub const fn is_static(self) -> bool {
        matches!(self, Scheme::Fp8 | Scheme::Fp8Channel)
    }
}

impl FromStr for Scheme {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        Scheme::ALL.into_iter().find(|scheme| scheme.name() == name).ok_or_else(|| {
            let names = Scheme::ALL.map(Scheme::name).join(", ");
            format!("the schemes are {names}")
        })
    }
}

/// What is wanted of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// What the linear layers become.
    pub scheme: Scheme,
    /// Static FP8 scales of keys and values too, a pair a layer.
    pub kv_cache: bool,
    /// Linear layers that stay as they are: names, and patterns behind `re:`.
    pub ignore: Vec<String>,
}

impl Recipe {
    /// True where there are static scales to find.
    pub const fn needs_calibration(&self) -> bool {
        self.scheme.is_static() || self.kv_cache
    }

    /// The value of `quantization_config`, as compressed-tensors writes it.
    fn config(&self, ignore: &[&str]) -> Value {
        let arguments = |strategy: &str, dynamic: bool, observer: Value| {
            json!({
                "actorder": null, "block_structure": null, "dynamic": dynamic, "group_size": null, "num_bits": 8,
                "observer": observer, "observer_kwargs": {}, "scale_dtype": null, "strategy": strategy,
                "symmetric": true, "type": "float", "zp_dtype": null
            })
        };
        let weights = if self.scheme == Scheme::Fp8 { "tensor" } else { "channel" };
        let inputs = match self.scheme.is_static() {
            true => arguments("tensor", false, json!("static_minmax")),
            false => arguments("token", true, Value::Null),
        };
        let kv_cache = self.kv_cache.then(|| arguments("tensor", false, Value::Null));
        json!({
            "config_groups": {"group_0": {
                "format": "float-quantized", "input_activations": inputs, "output_activations": null,
                "targets": ["Linear"], "weights": arguments(weights, false, json!("memoryless_minmax"))
            }},
            "format": "float-quantized", "global_compression_ratio": null, "ignore": ignore,
            "kv_cache_scheme": kv_cache, "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "sparsity_config": {}, "transform_config": {}, "version": FORMAT_VERSION
        })
    }
}

/// A linear layer of the source that becomes FP8.
#[derive(Clone, Debug)]
struct Linear {
    weight: Tensor,
    real: Real,
}

/// A recipe that fits a checkpoint.
#[derive(Debug)]
pub struct Quantizer<'a> {
    source: &'a Checkpoint,
    recipe: Recipe,
    ignored: Vec<String>,
    /// By the names of their modules.
    linears: BTreeMap<String, Linear>,
}

impl<'a> Quantizer<'a> {
    /// Holds a recipe against a checkpoint. Fails where that is quantized already, where its linear layers are not all
    /// there in bf16, f16 or f32, and where the recipe ignores what does not exist, or everything.
    pub fn new(source: &'a Checkpoint, recipe: Recipe) -> Result<Self> {
        if source.quantization().is_some() {
            return Err(Error::unsupported_model("a checkpoint that is quantized already", "its bf16 original is"));
        }
        let ignore: Vec<&str> = recipe.ignore.iter().map(String::as_str).collect();
        let wanted = QuantizationConfig::from_json(&recipe.config(&ignore))?;
        let shapes = linear_shapes(source);
        let modules: Vec<&str> = shapes.iter().map(|(module, ..)| module.as_str()).collect();
        if let Some(text) = wanted.idle_ignores(&modules).next() {
            let why =
                "matches no linear layer; give names such as model.layers.0.mlp.down_proj or a pattern behind re:";
            return Err(Error::text(format!("--ignore {text}"), why));
        }
        let (mut linears, mut ignored) = (BTreeMap::new(), Vec::new());
        for (module, n, k) in shapes {
            if wanted.scheme(&module).is_none() {
                ignored.push(module);
                continue;
            }
            if module == HEAD && source.config().tied_head {
                let why = "is the embedding in this model (tie_word_embeddings), which stays as it is; --ignore it";
                return Err(Error::tensor(HEAD, why));
            }
            let LinearWeight::Real(weight) = source.linear(&module, n, k)?.weight else {
                unreachable!("a checkpoint without quantization_config has real weights")
            };
            let real = Real::of(&weight)?;
            linears.insert(module, Linear { weight, real });
        }
        if linears.is_empty() {
            return Err(Error::text("--ignore", "leaves no linear layer to quantize; ignore less"));
        }
        Ok(Quantizer { source, recipe, ignored, linears })
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Modules that become FP8.
    pub fn quantized(&self) -> impl ExactSizeIterator<Item = &str> {
        self.linears.keys().map(String::as_str)
    }

    /// Linear layers that stay as they are, in the order of the model.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// The source's `config.json` with the `quantization_config` of the result, keys in alphabetical order.
    pub fn config_json(&self) -> Result<Value> {
        let mut config = self.source.config_json()?;
        let ignored: Vec<&str> = self.ignored.iter().map(String::as_str).collect();
        config["quantization_config"] = self.recipe.config(&ignored);
        config.sort_all_objects();
        Ok(config)
    }

    /// The tensors of the result, those of one source tensor together. `calibration` has the static scales, and may be
    /// None where the recipe has none.
    ///
    /// # Panics
    /// Where the recipe has static scales and `calibration` is None.
    pub fn parts(&'a self, calibration: Option<&'a Calibration>) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        for tensor in self.source.tensors() {
            let module = tensor.name.strip_suffix(".weight").unwrap_or_default();
            parts.push(match self.linears.get(module) {
                Some(linear) => self.linear(module, linear, calibration),
                None => Part::copy(tensor),
            });
        }
        if self.recipe.kv_cache {
            let kv = &calibration.expect("the KV scales come from calibration").kv;
            for (layer, KvScales { real, k, v }) in kv.iter().enumerate() {
                let desc = |name| TensorDesc::new(format!("model.layers.{layer}.self_attn.{name}"), real.dtype(), &[1]);
                let scales = [k, v].map(|scale| Bytes::from(real.to_bytes(&[*scale])));
                parts.push(Part::new(vec![desc("k_scale"), desc("v_scale")], move || Ok(scales.into())));
            }
        }
        parts
    }

    /// Codes, weight scales and, where it is static, the input scale of one linear layer.
    fn linear(&'a self, module: &str, linear: &'a Linear, calibration: Option<&Calibration>) -> Part<'a> {
        let Linear { weight, real } = linear;
        let per_row = self.recipe.scheme != Scheme::Fp8;
        let scale_shape = if per_row { vec![weight.shape[0], 1] } else { vec![1] };
        let mut descs = vec![
            TensorDesc::new(weight.name.clone(), Dtype::F8_E4M3, &weight.shape),
            TensorDesc::new(format!("{module}.weight_scale"), real.dtype(), &scale_shape),
        ];
        let input_scale = self.recipe.scheme.is_static().then(|| {
            descs.push(TensorDesc::new(format!("{module}.input_scale"), real.dtype(), &[1]));
            let inputs = &calibration.expect("the input scales come from calibration").inputs;
            real.to_bytes(&[real.scale(inputs[site(module)])])
        });
        Part::new(descs, move || {
            let QuantizedWeight { scales, codes } = quantize_weight(weight, per_row)?;
            weight.data.release();
            let tensors = [Some(codes), Some(scales), input_scale];
            Ok(tensors.into_iter().flatten().map(Bytes::from).collect())
        })
    }
}

/// The module of the head.
const HEAD: &str = "lm_head";

/// The linear layers of a Llama: module, outputs, inputs.
fn linear_shapes(checkpoint: &Checkpoint) -> Vec<(String, usize, usize)> {
    let config = checkpoint.config();
    let (d, f, heads) = (config.hidden, config.intermediate, config.heads);
    let (q, kv) = (heads.q * heads.dim, heads.kv * heads.dim);
    let layer = [
        ("self_attn.q_proj", q, d),
        ("self_attn.k_proj", kv, d),
        ("self_attn.v_proj", kv, d),
        ("self_attn.o_proj", d, q),
        ("mlp.gate_proj", f, d),
        ("mlp.up_proj", f, d),
        ("mlp.down_proj", d, f),
    ];
    let layers = (0..config.layers).flat_map(|i| layer.map(|(part, n, k)| (format!("model.layers.{i}.{part}"), n, k)));
    layers.chain([(HEAD.to_owned(), config.vocab, d)]).collect()
}
