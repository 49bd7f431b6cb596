//! The model card of a quantized checkpoint: what it was made of, how, and how to run it. Computed from the recipe; no
//! score stands in it that was not measured.

use std::borrow::Cow;
use std::fmt::Display;

use quaver_core::checkpoint::Files;
use quaver_core::checkpoint::write::MAX_SHARD_BYTES;
use quaver_core::op::DeviceInfo;
use quaver_core::quantize::{Quantizer, Scheme};
use quaver_core::{Error, Result};

use crate::quantize::Options;
use crate::samples::Draw;

/// The file on the hub.
pub const FILE: &str = "README.md";

/// What static scales were found with.
pub struct Calibrated<'a> {
    /// Where the samples are from.
    pub draw: Option<&'a Draw>,
    /// How many there were.
    pub samples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// What ran them.
    pub device: DeviceInfo,
}

/// The card of a model.
pub fn text(
    source: &Files,
    quantizer: &Quantizer,
    options: &Options,
    calibrated: Option<&Calibrated>,
) -> Result<String> {
    let recipe = quantizer.recipe();
    let (id, name) = (hub_id(source), source.name());
    let base = id.as_ref().unwrap_or(&name).trim_end_matches('/').rsplit('/').next().unwrap_or(&name).to_owned();
    let (weights, activations) = match recipe.scheme {
        Scheme::Fp8 => ("one scale a tensor", "static, one scale a tensor, from calibration"),
        Scheme::Fp8Channel => ("one scale an output channel", "static, one scale a tensor, from calibration"),
        Scheme::Fp8Dynamic => ("one scale an output channel", "dynamic, one scale a token"),
    };
    let kv_cache = if recipe.kv_cache {
        "FP8 E4M3, static, one scale for the keys and one for the values of a layer"
    } else {
        "as the runtime keeps it"
    };
    let left: String = quantizer.ignored().iter().map(|name| format!("`{name}`, ")).collect();
    let data = calibrated.map_or("none is needed".into(), Calibrated::describe);
    Ok(format!(
        "{front}# {base}, FP8\n\n\
        {original} with its linear layers quantized to FP8 (E4M3) by quaver {version}, in the format of\n\
        compressed-tensors: quaver, vLLM and Hugging Face transformers load it.\n\n\
        | | |\n|---|---|\n\
        | weights | FP8 E4M3, {weights} |\n\
        | activations | FP8 E4M3, {activations} |\n\
        | KV cache | {kv_cache} |\n\
        | quantized | {count} linear layers |\n\
        | left as they are | {left}everything that is no linear layer |\n\
        | calibration | {data} |\n\n\
        ## Use\n\n```sh\nquaver generate --model DIR \"Give me a short introduction to large language models.\"\n\
        quaver serve --model DIR\n```\n\n\
        ## Creation\n\n```sh\nquaver quantize {command} DIR {flags}\n```\n\n\
        ## Evaluation\n\n```sh\nquaver eval compare {command} DIR --data TEXT\n```\n\n\
        The licence of the original holds for this model.\n",
        front = front_matter(source)?,
        original = id.as_ref().map_or(base.clone(), |id| format!("[{base}](https://huggingface.co/{id})")),
        command = shell([&*id.as_ref().map_or(base.clone(), |id| format!("{id}@{}", snapshot(source)))])?,
        flags = shell(flags(options, calibrated).iter().map(String::as_str))?,
        version = env!("CARGO_PKG_VERSION"),
        count = quantizer.quantized().len(),
    ))
}

impl Calibrated<'_> {
    fn describe(&self) -> String {
        let Calibrated { draw, samples, tokens, device: DeviceInfo { backend, driver, variant, .. } } = self;
        let file = draw.map_or(String::new(), |draw| format!(" of {}", file_name(draw)));
        let kernels = variant.map_or(String::new(), |variant| format!(", {variant}"));
        format!("{samples} samples, {tokens} tokens{file}, run on {backend} ({driver}{kernels})")
    }
}

/// The name of the samples' file.
fn file_name(draw: &Draw) -> Cow<'_, str> {
    draw.file.file_name().unwrap_or_default().to_string_lossy()
}

/// The flags of `quaver quantize` that make this model again, on the same device.
fn flags(options: &Options, calibrated: Option<&Calibrated>) -> Vec<String> {
    let Options { recipe, device, batch, max_shard_bytes } = options;
    let mut flags = vec!["--scheme".to_owned(), recipe.scheme.name().to_owned()];
    if recipe.kv_cache {
        flags.push("--kv-cache".into());
    }
    let mut flag = |name: &str, value: &dyn Display| flags.extend([name.to_owned(), value.to_string()]);
    recipe.ignore.iter().for_each(|name| flag("--ignore", name));
    if recipe.ignore.is_empty() {
        flag("--ignore", &"none");
    }
    if let Some(Calibrated { draw, device: DeviceInfo { backend, variant, .. }, .. }) = calibrated {
        if let Some(draw @ Draw { most, length, seed, .. }) = draw {
            flag("--calibration", &file_name(draw));
            flag("--samples", most);
            flag("--max-seq-len", length);
            seed.iter().for_each(|seed| flag("--shuffle", seed));
        }
        flag("--batch-size", batch);
        flag("--backend", backend);
        if device.device != 0 {
            flag("--device", &device.device);
        }
        variant.or(device.variant.as_deref()).iter().for_each(|variant| flag("--variant", variant));
    }
    if *max_shard_bytes != MAX_SHARD_BYTES {
        flag("--max-shard-size", max_shard_bytes);
    }
    flags
}

/// Words as a shell takes them.
fn shell<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let why = |_| Error::text("the model card", "cannot name what has a NUL character; rename it");
    shlex::try_join(words).map_err(why)
}

/// What the hub reads of a card: the base model, and the terms that the source's own card names.
fn front_matter(source: &Files) -> Result<String> {
    let mut front = String::from("---\n");
    if let Some(link) = hub_id(source) {
        front += &format!("base_model: {link}\n");
    }
    if let Some(card) = source.get(FILE)? {
        front += &terms(&String::from_utf8_lossy(&card));
    }
    Ok(front + "tags:\n- fp8\n- compressed-tensors\n---\n\n")
}

/// The lines of a card's front matter that name its licence; a value goes on in lines that are indented or of a list.
fn terms(card: &str) -> String {
    let card = card.replace("\r\n", "\n");
    let matter = card.strip_prefix("---\n").and_then(|rest| rest.split("\n---").next()).unwrap_or_default();
    let (mut terms, mut kept) = (String::new(), false);
    for line in matter.lines() {
        if !line.starts_with([' ', '\t', '-']) {
            kept = ["license:", "license_name:", "license_link:"].iter().any(|key| line.starts_with(key));
        }
        if kept {
            terms += &format!("{line}\n");
        }
    }
    terms
}

/// The source's id on the hub, where it was named by one.
fn hub_id(source: &Files) -> Option<String> {
    let name = source.name();
    let is_id = source.path().is_some_and(|path| path.display().to_string() != name) && name.contains('/');
    is_id.then(|| name.split('@').next().unwrap_or_default().to_owned())
}

/// The commit of a source of the hub: the name of its folder in the cache.
fn snapshot(source: &Files) -> String {
    source.path().and_then(|path| path.file_name()).unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_is_kept_with_all_lines_of_its_values() {
        let card = "---\nlanguage:\n- en\nlicense: other\nlicense_name: >-\n  llama\n  3.2\ntags:\n- x\n\
                    license_link: LICENSE\n---\nlicense: none\n";
        let want = "license: other\nlicense_name: >-\n  llama\n  3.2\nlicense_link: LICENSE\n";
        assert_eq!(terms(card), want);
        assert_eq!(terms(&card.replace('\n', "\r\n")), want);
        assert_eq!(terms("---\nlicense:\n- mit\n- apache-2.0\n---\n"), "license:\n- mit\n- apache-2.0\n");
        assert_eq!(terms("# license: mit\n"), "");
    }

    #[test]
    fn a_command_survives_the_shell() {
        let words = ["my texts.jsonl", "re:.*'s", "lm_head", "org/name@0123"];
        assert_eq!(shlex::split(&shell(words).unwrap()).unwrap(), words);
    }
}
