//! `quaver quantize`: makes an FP8 checkpoint.

use std::num::NonZero;
use std::path::PathBuf;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use quaver::core::checkpoint::Checkpoint;
use quaver::core::quantize::{Recipe, Scheme};
use quaver::quantize::{self, Options, Progress};
use quaver::samples::{Draw, Encoder};

use super::flags::{DeviceFlags, bytes};
use super::{Usage, under_way};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model to quantize: a folder or a Hugging Face id.
    #[arg(value_name = "SRC")]
    source: String,
    /// The folder to write; it must not exist yet.
    #[arg(value_name = "DST")]
    folder: PathBuf,
    /// fp8: a weight scale a tensor, static activations; fp8-channel: a weight scale a channel, static activations;
    /// fp8-dynamic: a weight scale a channel, a scale a token for activations.
    #[arg(long, value_name = "SCHEME", default_value = "fp8-dynamic")]
    scheme: Scheme,
    /// Write static FP8 scales of keys and values too.
    #[arg(long)]
    kv_cache: bool,
    /// Leave this linear layer as it is: a name, or a pattern behind re:; may be given several times; none: no
    /// layer.
    #[arg(long, value_name = "NAME", default_value = "lm_head")]
    ignore: Vec<String>,
    /// What static scales are found with: JSON lines (text, messages, prompt or input_ids), or a plain text.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Samples of it, at most; a plain text is cut into as many.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Tokens of a sample, at most; what is longer is cut.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..))]
    max_seq_len: u32,
    /// Take samples in an order that this seed decides, from the whole file, instead of the first ones.
    #[arg(long, value_name = "SEED")]
    shuffle: Option<u64>,
    /// Samples that move the averages of --kv-cache at once.
    #[arg(long, value_name = "N", default_value = "1")]
    batch_size: NonZero<usize>,
    /// Bytes of a file of weights, at most: a number, or one with K, M or G.
    #[arg(long, value_name = "BYTES", default_value = "5000000000", value_parser = bytes)]
    max_shard_size: u64,
    #[command(flatten)]
    device: DeviceFlags,
    /// Never ask the network: take an id's model from the cache, as HF_HUB_OFFLINE=1 does.
    #[arg(long, value_parser = clap::builder::FalseyValueParser::new(), env = "QUAVER_OFFLINE")]
    offline: bool,
}

pub fn run(args: Args) -> Result<()> {
    let ignore = args.ignore.iter().filter(|name| !matches!(name.as_str(), "" | "none")).cloned().collect();
    let recipe = Recipe { scheme: args.scheme, kv_cache: args.kv_cache, ignore };
    match (&args.calibration, recipe.needs_calibration()) {
        (None, true) => {
            let why = "static scales need --calibration FILE: JSON lines or a text of the kind that the model will see";
            return Err(Usage(why.into()).into());
        }
        (Some(_), false) => {
            let why = "fp8-dynamic has no static scales: leave --calibration out, or add --kv-cache";
            return Err(Usage(why.into()).into());
        }
        _ => {}
    }
    let source = quaver::files(Some(&args.source), args.offline)?;
    let draw = args.calibration.map(|file| Draw {
        file,
        most: args.samples as usize,
        length: args.max_seq_len as usize,
        seed: args.shuffle,
    });
    let texts = match &draw {
        Some(draw) => {
            let encoder = Encoder::open(&Checkpoint::open(source.clone())?)?;
            under_way("tokenizing", || draw.samples(&encoder))?
        }
        None => Vec::new(),
    };
    let options = Options {
        device: args.device.spec(),
        batch: args.batch_size,
        max_shard_bytes: args.max_shard_size,
        ..Options::new(recipe)
    };
    let style = |template| ProgressStyle::with_template(template).expect("the template is sound");
    let bar = ProgressBar::new(texts.len() as u64);
    bar.set_style(style("calibrating {wide_bar} {pos}/{len} samples, {eta} left"));
    let made = quantize::write(&source, &args.folder, &options, &texts, draw.as_ref(), |progress| match progress {
        Progress::Sample(_) => bar.inc(1),
        Progress::Total(bytes) => {
            bar.reset();
            bar.set_length(bytes);
            bar.set_style(style("writing {wide_bar} {bytes}/{total_bytes}, {eta} left"));
        }
        Progress::Written(bytes) => bar.inc(bytes),
    });
    bar.finish_and_clear();
    Ok(made?)
}
