//! `quaver batch`: answers a file of requests in OpenAI's batch format.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use quaver::server::{self, Options};

use super::flags::ModelFlags;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Requests, one a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Where the answers go, one a line, in the order in which they come. Until all are there it is called OUT.part, and
    /// a run that was broken off goes on with that.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelFlags,
    /// What requests may call the model, separated by commas [default: its own name].
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "QUAVER_SERVED_MODEL_NAME")]
    served_model_name: Vec<String>,
    /// Sequences that run side by side.
    #[arg(long, value_name = "N", default_value_t = 32, env = "QUAVER_MAX_NUM_SEQS")]
    max_num_seqs: usize,
}

pub fn run(args: Args) -> Result<()> {
    let options = Options {
        model: args.model.name().map(str::to_owned),
        llm: args.model.options(args.max_num_seqs),
        host: String::new(),
        port: 0,
        names: args.served_model_name,
        api_keys: Vec::new(),
        cors_origins: Vec::new(),
        max_queue: 0,
        max_body_size: u64::MAX,
        // Nobody waits for a single answer.
        request_timeout: Duration::from_secs(1 << 30),
        shutdown_timeout: Duration::ZERO,
    };
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("{pos} of {len} requests, {eta} left")?);
    let summary = server::batch(options, &args.input, &args.output, |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let server::Summary { requests, found, failed } = summary;
    log::info!("{requests} requests: {found} were answered before, {failed} of the others failed");
    if failed > 0 {
        log::warn!("{failed} of {requests} answers are errors; they are in {}", args.output.display());
    }
    Ok(())
}
