//! `quaver bench serve`: load on a server of OpenAI's API, this one or another.

use std::io::{self, Write};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use quaver::bench::serve::{self, Load, Percentiles};
use serde_json::json;

use super::Usage;
use super::table::{Align, Table};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The server's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// What to call the model [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// The key that the server wants.
    #[arg(long, value_name = "KEY", env = "QUAVER_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Requests at a time: the next one begins when one is over [default: 16].
    #[arg(long, value_name = "N", conflicts_with = "rate", value_parser = clap::value_parser!(u16).range(1..=4096))]
    concurrency: Option<u16>,
    /// Requests a second, at random times, whether or not earlier ones are over; their times run from when they are due.
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Requests at a time, at most, at a --rate; further ones wait, and that counts [default: no bound].
    #[arg(long, value_name = "N", requires = "rate", value_parser = clap::value_parser!(u16).range(1..))]
    max_concurrency: Option<u16>,
    /// Words of a prompt, which are about as many tokens.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_words: u32,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Which prompts, at which times.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.rate.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
        return Err(Usage("--rate must be above 0".into()).into());
    }
    let concurrency = match args.rate {
        Some(_) => args.max_concurrency,
        None => Some(args.concurrency.unwrap_or(16)),
    };
    let load = Load {
        url: args.url.trim_end_matches('/').to_owned(),
        model: args.served_model_name,
        api_key: args.api_key,
        requests: args.requests as usize,
        concurrency: concurrency.map(usize::from),
        rate: args.rate,
        prompt_words: args.prompt_words as usize,
        max_tokens: args.max_tokens as usize,
        seed: args.seed,
    };
    let bar =
        ProgressBar::new(load.requests as u64).with_style(ProgressStyle::with_template("{pos} of {len} requests")?);
    let outcome = serve::run(&load, |over| bar.set_position(over as u64))?;
    bar.finish_and_clear();
    for why in &outcome.failures {
        log::warn!("a request failed: {why}");
    }
    let mut out = io::stdout().lock();
    let failed = load.requests - outcome.answered;
    if args.json {
        let times = |p: &Percentiles| json!({"mean": p.mean, "p50": p.p50, "p90": p.p90, "p99": p.p99});
        let object = json!({
            "url": load.url, "model": outcome.model, "requests": load.requests, "failed": failed,
            "concurrency": load.concurrency, "rate": load.rate, "wall_s": outcome.wall_s,
            "prompt_tokens": outcome.prompt_tokens, "completion_tokens": outcome.completion_tokens,
            "tokens_are_counted_by": if outcome.counted { "server" } else { "pieces" },
            "requests_per_s": outcome.answered as f64 / outcome.wall_s, "output_tokens_per_s": outcome.tokens_per_s(),
            "prefill_tokens_per_s": outcome.prefill_tokens_per_s, "decode_tokens_per_s": outcome.decode_tokens_per_s(),
            "ttft_ms": times(&outcome.ttft_ms), "inter_token_ms": times(&outcome.inter_token_ms),
            "per_token_ms": times(&outcome.per_token_ms), "e2e_ms": times(&outcome.e2e_ms),
        });
        writeln!(out, "{object}")?;
    } else {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Right, Align::Right]);
        table.row(["ms", "mean", "median", "90%", "99%"].map(str::to_owned));
        let rows = [
            ("first token", outcome.ttft_ms),
            ("between tokens", outcome.inter_token_ms),
            ("per token of an answer", outcome.per_token_ms),
            ("whole request", outcome.e2e_ms),
        ];
        for (name, p) in rows {
            let [mean, p50, p90, p99] = [p.mean, p.p50, p.p90, p.p99].map(|ms| format!("{ms:.1}"));
            table.row([name.to_owned(), mean, p50, p90, p99]);
        }
        table.write(&mut out)?;
        let (answered, wall) = (outcome.answered, outcome.wall_s);
        let speed = outcome.tokens_per_s();
        writeln!(out, "{answered} answered, {failed} failed in {wall:.1} s: {speed:.1} tokens a second")?;
        let speed = |speed: Option<f64>| speed.map_or("unknown".into(), |speed| format!("{speed:.1} tokens a second"));
        let [prefill, decode] = [outcome.prefill_tokens_per_s, outcome.decode_tokens_per_s()].map(speed);
        writeln!(out, "of one request (median): prefill {prefill}, decode {decode}")?;
        if !outcome.counted {
            log::warn!("the server does not tell how many tokens it wrote; pieces of its answers are counted instead");
        }
    }
    if outcome.answered == 0 {
        anyhow::bail!("no request was answered: {}", outcome.failures.first().map_or("", String::as_str));
    }
    Ok(())
}
