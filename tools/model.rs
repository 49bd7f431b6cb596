//! Where a model is: a folder, or the demo model that is part of the binary.

use quaver_core::Result;
use quaver_core::checkpoint::Files;

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

/// The files of a model: of a folder, or of the built-in demo model where no name is given.
pub fn files(model: Option<&str>) -> Result<Files> {
    match model {
        Some(folder) => Files::dir(folder),
        None => Ok(Files::embedded("quaver-demo", DEMO)),
    }
}
