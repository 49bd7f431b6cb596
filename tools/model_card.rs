//! The model card of a quantized checkpoint: what it was made of, how, and how to run it. Computed from the recipe; no
//! score stands in it that was not measured.

use quaver_core::Result;
use quaver_core::checkpoint::Files;
use quaver_core::quantize::{Quantizer, Scheme};

/// The file on the hub.
pub const FILE: &str = "README.md";

/// The card of a model. `calibrated` is where the samples are from, how many there were, and their tokens.
pub fn text(source: &Files, quantizer: &Quantizer, calibrated: Option<(&str, usize, usize)>) -> Result<String> {
    let recipe = quantizer.recipe();
    let base = source.name();
    let base = base.trim_end_matches('/').rsplit('/').next().unwrap_or(&base).to_owned();
    let (scheme, weights, activations) = match recipe.scheme {
        Scheme::Fp8 => ("fp8", "one scale a tensor", "static, one scale a tensor, from calibration"),
        Scheme::Fp8Channel => {
            ("fp8-channel", "one scale an output channel", "static, one scale a tensor, from calibration")
        }
        Scheme::Fp8Dynamic => ("fp8-dynamic", "one scale an output channel", "dynamic, one scale a token"),
    };
    let kv_cache = if recipe.kv_cache {
        "FP8 E4M3, static, one scale for the keys and one for the values of a layer"
    } else {
        "as the runtime keeps it"
    };
    let ignored = quantizer.ignored().iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let data = match calibrated {
        Some((data, samples, tokens)) => format!("{samples} samples, {tokens} tokens, of {data}"),
        None => "none is needed".into(),
    };
    let mut flags = format!("--scheme {scheme}");
    if recipe.kv_cache {
        flags += " --kv-cache";
    }
    for name in &recipe.ignore {
        flags += &format!(" --ignore '{name}'");
    }
    if calibrated.is_some() {
        flags += &format!(" --calibration FILE --samples {}", calibrated.map_or(0, |(_, samples, _)| samples));
    }
    Ok(format!(
        "{front}# {base}, FP8\n\n\
        {original} with its linear layers quantized to FP8 (E4M3) by quaver {version}, in the format of\n\
        compressed-tensors: quaver, vLLM and Hugging Face transformers load it.\n\n\
        | | |\n|---|---|\n\
        | weights | FP8 E4M3, {weights} |\n\
        | activations | FP8 E4M3, {activations} |\n\
        | KV cache | {kv_cache} |\n\
        | quantized | {count} linear layers |\n\
        | left as they are | {ignored} and everything that is no linear layer |\n\
        | calibration | {data} |\n\n\
        ## Use\n\n```sh\nquaver generate --model DIR \"Give me a short introduction to large language models.\"\n\
        quaver serve --model DIR\n```\n\n\
        ## Creation\n\n```sh\nquaver quantize {base} DIR {flags}\n```\n\n\
        ## Evaluation\n\n```sh\nquaver eval compare {base} DIR --data TEXT\n```\n\n\
        The licence of the original holds for this model.\n",
        front = front_matter(source)?,
        original = hub_id(source).map_or(base.clone(), |id| format!("[{base}](https://huggingface.co/{id})")),
        version = env!("CARGO_PKG_VERSION"),
        count = quantizer.quantized().len(),
    ))
}

/// What the hub reads of a card: the base model, and the terms and languages that the source's own card names.
fn front_matter(source: &Files) -> Result<String> {
    let mut front = String::from("---\n");
    if let Some(link) = hub_id(source) {
        front += &format!("base_model: {link}\n");
    }
    if let Some(card) = source.get(FILE)? {
        let card = String::from_utf8_lossy(&card);
        let kept = |line: &&str| ["license:", "license_name:", "license_link:"].iter().any(|key| line.starts_with(key));
        let matter = card.strip_prefix("---\n").and_then(|rest| rest.split("\n---").next()).unwrap_or_default();
        for line in matter.lines().filter(kept) {
            front += &format!("{line}\n");
        }
    }
    Ok(front + "tags:\n- fp8\n- compressed-tensors\n---\n\n")
}

/// The source's id on the hub, where it was named by one.
fn hub_id(source: &Files) -> Option<String> {
    let name = source.name();
    let is_id = source.path().is_some_and(|path| path.display().to_string() != name) && name.contains('/');
    is_id.then(|| name.split('@').next().unwrap_or_default().to_owned())
}
