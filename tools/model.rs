//! Where a model is: a folder, the Hugging Face hub, or, for the demo model, the binary.

use std::path::Path;

use quaver_core::checkpoint::Files;
use quaver_core::{Error, Result};

use crate::hub::{Hub, Repo};

macro_rules! embed {
    ($($file:literal),*) => { &[$(($file, include_bytes!(concat!("demo/", $file)).as_slice())),*] };
}

/// tiny-llama-fp8-channel: a Llama of 6.6 million parameters, trained on nineteenth-century novels and quantized by
/// llm-compressor.
static DEMO: &[(&str, &[u8])] = embed!(
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json"
);

/// The files of a model: of a folder, of a Hugging Face id (`org/name` or `org/name@revision`), or of the built-in demo
/// model where no name is given.
///
/// An existing folder wins over an id of the same name. A model that the Hugging Face cache holds whole at the revision
/// is used without a request; what it lacks is downloaded, unless `offline` or `HF_HUB_OFFLINE` forbids. The cache, the
/// hub and the token are those of huggingface_hub's variables: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`,
/// `HF_TOKEN_PATH`.
pub fn files(model: Option<&str>, offline: bool) -> Result<Files> {
    let Some(name) = model else { return Ok(Files::embedded("quaver-demo", DEMO)) };
    if !Path::new(name).exists() {
        if let Some(repo) = Repo::parse(name) {
            let folder = Hub::from_env(offline)?.folder(&repo)?;
            return Ok(Files::dir(folder)?.named(repo.to_string()));
        }
        if is_meant_as_id(name) {
            let why = "is no folder here, and no Hugging Face id, which would be org/name or org/name@revision";
            return Err(Error::checkpoint(name, why));
        }
    }
    Files::dir(name)
}

/// True for a file that says under which terms a model may be used: whoever gets the model, or what was made of it, gets
/// these as well.
pub(crate) fn is_terms(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["license", "licence", "notice", "copying", "use_policy"].iter().any(|start| name.starts_with(start))
}

/// True for what is written as neither an absolute nor an explicitly relative path, nor as a path of several steps.
fn is_meant_as_id(name: &str) -> bool {
    let id = name.split('@').next().unwrap_or(name);
    !name.starts_with(['.', '/', '~']) && !name.contains('\\') && id.matches('/').count() <= 1
}
