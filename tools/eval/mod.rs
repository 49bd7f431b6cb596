//! Evaluation of models on files: perplexity, what quantization cost, and tasks. The figures are the core's
//! (`quaver_core::evaluate`); here are the texts, the tasks, and the journal that a long run goes on from.

mod journal;
mod task_lines;
mod tasks;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::UNIX_EPOCH;

use quaver_core::checkpoint::{Checkpoint, Files};
use quaver_core::engine::EngineOptions;
use quaver_core::evaluate::{self, Scorer, Tally, Window};
use quaver_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use self::journal::Journal;
pub use self::tasks::{Metric, Score, Task, TaskReport, TokenizedTask, tokenize};
use crate::llm::LlmOptions;
use crate::samples::{Encoder, Sample, split_bos};

/// How a text is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, the begin-of-text token not counted.
    pub context: usize,
    /// Tokens from the beginning of one window to that of the next.
    pub stride: usize,
    /// Tokens that are scored, at most.
    pub max_tokens: Option<usize>,
}

impl Windows {
    /// The windows of some texts; no window spans two of them.
    pub fn of(&self, samples: &[Sample], encoder: &Encoder) -> Result<Vec<Window>> {
        let mut windows = Vec::new();
        for sample in samples {
            let ids = sample.encode(encoder)?;
            let (bos, text) = split_bos(&ids, encoder.bos);
            windows.extend(evaluate::windows(bos, text, self.context, self.stride));
        }
        let mut left = self.max_tokens.unwrap_or(usize::MAX);
        for window in &mut windows {
            let scored = (window.ids.len() - window.from).min(left);
            window.ids.truncate(window.from + scored);
            left -= scored;
        }
        windows.retain(|window| window.from < window.ids.len());
        match windows.is_empty() {
            true => Err(Error::text("the text", "has no token to score; give a longer one")),
            false => Ok(windows),
        }
    }
}

/// A model to be scored, opened for windows.
pub struct Model {
    /// Its name, as a user knows it.
    pub name: String,
    /// Its tokenizer.
    pub encoder: Encoder,
    scorer: Scorer,
    /// What its figures depend on: the files, and how they are computed with.
    digest: String,
}

impl Model {
    /// Opens a model for windows of at most `context` tokens behind the begin-of-text token.
    pub fn open(files: Files, options: &LlmOptions, context: usize) -> Result<Self> {
        let checkpoint = Checkpoint::open(files)?;
        let encoder = Encoder::open(&checkpoint)?;
        let backend = quaver_backends::open(&options.device)?;
        let EngineOptions { profile, kv_cache, .. } = options.engine;
        let longest = context.saturating_add(1).min(checkpoint.config().max_positions);
        let scorer = Scorer::new(&checkpoint, backend, profile, kv_cache, longest)?;
        let arithmetic = format!("{profile:?} {kv_cache:?} {}", options.device);
        let digest = format!("{} {arithmetic}", fingerprint(checkpoint.files())?);
        Ok(Model { name: checkpoint.files().name(), encoder, scorer, digest })
    }
}

/// What a text's perplexity is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Tokens and their negative log-likelihood.
    pub tally: Tally,
    /// Windows, of which some may have been scored in an earlier run.
    pub windows: usize,
}

/// Scores a text. What `journal` holds of it already is not scored again; `on_window` is told of each window's tally.
pub fn perplexity(
    model: &mut Model,
    windows: &[Window],
    journal: Option<&Path>,
    mut on_window: impl FnMut(&Tally),
) -> Result<Perplexity> {
    #[derive(Serialize, Deserialize)]
    struct Line {
        tokens: u64,
        nll: f64,
    }
    let head = json!({"eval": "perplexity", "model": model.name, "digest": model.digest, "windows": digest(windows)});
    let mut journal = Journal::<Line>::open(journal, &head)?;
    let mut total = Tally::default();
    let mut take = |Line { tokens, nll }: &Line| {
        total = Tally { tokens: total.tokens + tokens, nll: total.nll + nll };
        on_window(&total);
    };
    journal.earlier.iter().for_each(&mut take);
    let done = journal.earlier.len().min(windows.len());
    evaluate::perplexity(&mut model.scorer, &windows[done..], |_, Tally { tokens, nll }| {
        let line = Line { tokens, nll };
        take(&line);
        journal.push(&line)
    })?;
    Ok(Perplexity { tally: total, windows: windows.len() })
}

/// How a model compares with its base on a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The base's likelihoods.
    pub base: Tally,
    /// The other's.
    pub quant: Tally,
    /// Kullback-Leibler divergences a token, in nats, in ascending order.
    pub kl: Vec<f32>,
    /// Tokens before which both models hold the same one for the likeliest.
    pub agree: u64,
}

impl Comparison {
    /// The mean divergence.
    pub fn kl_mean(&self) -> f64 {
        self.kl.iter().map(|kl| f64::from(*kl)).sum::<f64>() / self.kl.len() as f64
    }

    /// The divergence that a share of the tokens stays at or below: the nearest rank.
    pub fn kl_quantile(&self, share: f64) -> f64 {
        let rank = (share * self.kl.len() as f64).ceil() as usize;
        self.kl.get(rank.max(1) - 1).map_or(0.0, |kl| f64::from(*kl))
    }

    /// The share of tokens before which both agree.
    pub fn top1_agreement(&self) -> f64 {
        self.agree as f64 / self.kl.len() as f64
    }

    /// Quant perplexity over base perplexity.
    pub fn perplexity_ratio(&self) -> f64 {
        (self.quant.mean() - self.base.mean()).exp()
    }
}

/// Runs two models side by side over a text, as [`perplexity`] runs one.
pub fn compare(
    base: &mut Model,
    quant: &mut Model,
    windows: &[Window],
    journal: Option<&Path>,
    mut on_window: impl FnMut(&Tally),
) -> Result<Comparison> {
    #[derive(Serialize, Deserialize)]
    struct Line {
        base_nll: f64,
        quant_nll: f64,
        kl: Vec<f32>,
        agree: u64,
    }
    let head = json!({
        "eval": "compare", "base": base.name, "base_digest": base.digest, "quant": quant.name,
        "quant_digest": quant.digest, "windows": digest(windows)
    });
    let mut journal = Journal::<Line>::open(journal, &head)?;
    let mut total = Comparison { base: Tally::default(), quant: Tally::default(), kl: Vec::new(), agree: 0 };
    let mut take = |line: &Line| {
        let tokens = line.kl.len() as u64;
        total.base = Tally { tokens: total.base.tokens + tokens, nll: total.base.nll + line.base_nll };
        total.quant = Tally { tokens: total.quant.tokens + tokens, nll: total.quant.nll + line.quant_nll };
        total.kl.extend(&line.kl);
        total.agree += line.agree;
        on_window(&total.quant);
    };
    journal.earlier.iter().for_each(&mut take);
    let done = journal.earlier.len().min(windows.len());
    evaluate::compare(&mut base.scorer, &mut quant.scorer, &windows[done..], |_, pairs| {
        let line = Line {
            base_nll: pairs.iter().map(|pair| pair.base_nll).sum(),
            quant_nll: pairs.iter().map(|pair| pair.quant_nll).sum(),
            kl: pairs.iter().map(|pair| pair.kl as f32).collect(),
            agree: pairs.iter().filter(|pair| pair.agree).count() as u64,
        };
        take(&line);
        journal.push(&line)
    })?;
    total.kl.sort_by(f32::total_cmp);
    Ok(total)
}

/// What windows hold, in few characters.
fn digest(windows: &[Window]) -> String {
    let mut digest = Sha256::new();
    for Window { ids, from } in windows {
        digest.update([ids.len() as u64, *from as u64].map(u64::to_le_bytes).as_flattened());
        ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
    }
    short(digest)
}

/// Which model's files these are, without reading them whole: the config, and of each file of tensors its name, size,
/// time and header.
fn fingerprint(files: &Files) -> Result<String> {
    let mut digest = Sha256::new();
    digest.update(&*files.require("config.json")?);
    let mut paths = Vec::new();
    if let Some(folder) = files.path() {
        for entry in fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))? {
            paths.push(entry.map_err(|e| Error::io("read", folder, e))?.path());
        }
    }
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    paths.sort();
    for path in paths {
        let fail = |e| Error::io("read", &path, e);
        let mut file = File::open(&path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        digest.update(format!("{:?} {} {modified:?} ", path.file_name(), metadata.len()));
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(fail)?;
        let mut header = Vec::new();
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header).map_err(fail)?;
        digest.update(&header);
    }
    Ok(short(digest))
}

/// The first 8 bytes of a digest, in hexadecimal digits.
fn short(digest: Sha256) -> String {
    digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
