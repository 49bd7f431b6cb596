//! Makes an FP8 checkpoint on disk: the core's quantizer, with what belongs to a model beside its tensors.

use std::fs;
use std::num::NonZero;
use std::path::Path;

use quaver_backends::Spec;
use quaver_core::checkpoint::write::{MAX_SHARD_BYTES, Part, place, write_tensors};
use quaver_core::checkpoint::{Checkpoint, Files};
use quaver_core::quantize::{Calibration, Quantizer, Recipe};
use quaver_core::{Error, Result};

use crate::model::is_terms;
use crate::model_card;
use crate::samples::Draw;

/// Files that a quantized model keeps as they are, beside its terms: what makes and ends its texts.
const KEPT: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
];

/// How a checkpoint is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// What becomes of it.
    pub recipe: Recipe,
    /// Where the source runs for calibration.
    pub device: Spec,
    /// Samples that move the averages of keys and values at once: llm-compressor's batch size.
    pub batch: NonZero<usize>,
    /// Bytes of a file, at most.
    pub max_shard_bytes: u64,
}

impl Options {
    /// A recipe with everything else as llm-compressor has it.
    pub fn new(recipe: Recipe) -> Self {
        Options { recipe, device: Spec::default(), batch: NonZero::<usize>::MIN, max_shard_bytes: MAX_SHARD_BYTES }
    }
}

/// What is under way, for a display of progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A sample of so many tokens was run.
    Sample(usize),
    /// As many bytes as there are to write.
    Total(u64),
    /// Bytes were written.
    Written(u64),
}

/// Writes the quantized model to a folder that must not exist yet, whole or not at all. `samples` are what static scales
/// are calibrated with; they may be empty where the recipe has none. `draw` says in the model card where they are from.
pub fn write(
    source: &Files,
    folder: &Path,
    options: &Options,
    samples: &[Vec<u32>],
    draw: Option<&Draw>,
    mut on_progress: impl FnMut(Progress),
) -> Result<()> {
    let checkpoint = Checkpoint::open(source.clone())?;
    let quantizer = Quantizer::new(&checkpoint, options.recipe.clone())?;
    place(folder, |folder| {
        let calibrated = match options.recipe.needs_calibration() {
            true => {
                let mut backend = quaver_backends::open(&options.device)?;
                let on_sample = |tokens| on_progress(Progress::Sample(tokens));
                let calibration = quantizer.calibrate(&mut *backend, samples, options.batch, on_sample)?;
                Some((calibration, backend.describe()))
            }
            false => None,
        };
        let parts = quantizer.parts(calibrated.as_ref().map(|(calibration, _)| calibration));
        on_progress(Progress::Total(parts.iter().map(Part::bytes).sum()));
        write_tensors(folder, parts, options.max_shard_bytes, |bytes| on_progress(Progress::Written(bytes)))?;
        let put = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            fs::write(&path, bytes).map_err(|e| Error::io("write", path, e))
        };
        put("config.json", format!("{:#}\n", quantizer.config_json()?).as_bytes())?;
        for name in source.names()?.iter().filter(|name| KEPT.contains(&name.as_str()) || is_terms(name)) {
            if let Some(bytes) = source.get(name)? {
                put(name, &bytes)?;
            }
        }
        let calibrated = calibrated.map(|(Calibration { tokens, .. }, device)| model_card::Calibrated {
            draw,
            samples: samples.len(),
            tokens,
            device,
        });
        put(model_card::FILE, model_card::text(source, &quantizer, options, calibrated.as_ref())?.as_bytes())
    })
}
