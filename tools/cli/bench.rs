//! `quaver bench`: how fast a model runs here, and how near that is to what the machine can do.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use quaver::bench::{self, Case, CaseReport, Figure, History, Options, Phase, Report, Spread, Subject};
use serde_json::{Value, json};

use super::flags::ModelFlags;
use super::table::{Align, Table, human_bytes};
use super::{bench_gemm, bench_serve};

#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Of>,
    /// The model, as --model names it; it goes before that.
    #[arg(value_name = "MODEL")]
    name: Option<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Sequences side by side; every number here is run with every length of --prompt-tokens.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,16",
        value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Vec<u16>,
    /// Tokens of each prompt.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128,512",
        value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: Vec<u32>,
    /// Tokens that each sequence generates behind its first one.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    gen_tokens: u32,
    /// Runs of each case, of which the median counts; one more goes before them.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Rows of a step, at most: longer prompts are computed in several.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536),
        env = "QUAVER_MAX_NUM_BATCHED_TOKENS")]
    max_num_batched_tokens: u32,
    /// Show the time of every op too, from a run in which each is waited for.
    #[arg(long)]
    per_op: bool,
    /// Append the figures to a CSV file, and show them relative to the last ones there of the same model and machine.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

/// What else than a model in this process can be measured.
#[derive(clap::Subcommand, Debug)]
enum Of {
    /// Put load on a server with OpenAI's API, and measure when its tokens come.
    Serve(bench_serve::Args),
    /// Time the matrix products of a model by themselves.
    Gemm(bench_gemm::Args),
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Some(Of::Serve(args)) => return bench_serve::run(args),
        Some(Of::Gemm(args)) => return bench_gemm::run(args),
        None => {}
    }
    let history = args.csv.as_deref().map(History::open).transpose()?;
    let mut llm = args.model.options(1);
    llm.engine.max_num_batched_tokens = args.max_num_batched_tokens as usize;
    let case = |batch: u16, prompt: u32| Case {
        batch: batch.into(),
        prompt_tokens: prompt as usize,
        gen_tokens: args.gen_tokens as usize,
    };
    let prompts = &args.prompt_tokens;
    let cases = args.batch.iter().flat_map(|&batch| prompts.iter().map(move |&prompt| case(batch, prompt))).collect();
    let options = Options { llm, cases, repeat: args.repeat.into(), per_op: args.per_op };
    let bar = progress();
    let model = args.name.as_deref().or(args.model.name());
    let report = bench::run(model, &options, |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let report = report?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", to_json(&report))?;
    } else {
        head(&report).write(&mut out)?;
        writeln!(out)?;
        figures(&report.subject(), &report.figures(), history.as_ref()).write(&mut out)?;
        for case in report.cases.iter().filter(|_| args.per_op) {
            for (name, phase) in [("prefill", &case.prefill), ("decode", &case.decode)] {
                writeln!(out, "\n{name} {}", case.case)?;
                ops(phase).write(&mut out)?;
            }
        }
    }
    if let Some(history) = history {
        history.append(&report.subject(), &report.figures())?;
    }
    Ok(())
}

/// Drawn on a terminal alone, and only when a run begins, so that it takes no time of one.
pub(super) fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} ({elapsed})").expect("the template is sound");
    ProgressBar::no_length().with_style(style)
}

/// What was measured, and on what.
fn head(report: &Report) -> Table {
    let mut table = Table::new(&[Align::Left, Align::Left]);
    let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
    let (device, machine, memory) = (&report.device, &report.machine, &report.memory);
    let (bandwidth, flops) = (machine.bandwidth.median / 1e9, machine.flops.median / 1e9);
    let copies = machine.copy.map(|copy| format!(", copies {:.1} GB/s", copy.median / 1e9)).unwrap_or_default();
    line("model", format!("{}, {}", report.model, report.scheme));
    line("device", format!("{}: {} ({})", device.backend, device.name, device.driver));
    line("machine", format!("reads {bandwidth:.1} GB/s{copies}, computes {flops:.1} GFLOP/s"));
    line("loaded in", format!("{:.0} ms", report.load_ms));
    let (weights, kv_cache) = (human_bytes(memory.weights), human_bytes(memory.kv_cache));
    let peak = match memory.peak.zip(memory.ratio()) {
        Some((peak, ratio)) => format!("; at most {} in use, {ratio:.2} times as much", human_bytes(peak)),
        None => String::new(),
    };
    let device =
        memory.device.map(|bytes| format!("; {} of the device in use", human_bytes(bytes))).unwrap_or_default();
    line("memory", format!("weights {weights}, KV cache {kv_cache}{peak}{device}"));
    table
}

/// The cases' figures; what they share with the head is not repeated.
pub(super) fn figures(subject: &Subject, list: &[Figure], history: Option<&History>) -> Table {
    let head = ["case", "figure", "", "", "least", "most", "of bandwidth", "of arithmetic", "of floor", "to last"];
    let columns = head.len() - usize::from(history.is_none());
    let mut table = Table::new(&[&[Align::Left; 2][..], &[Align::Right], &[Align::Left], &[Align::Right; 6]].concat());
    table.row(head[..columns].iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>());
    for figure in list {
        let Figure { case, name, unit, value, spread, phase } = figure;
        let of = |share: fn(&Phase) -> f64| phase.as_ref().map(|phase| percent(share(phase))).unwrap_or_default();
        let end = |end: fn(&Spread) -> f64| spread.as_ref().map(|spread| number(end(spread))).unwrap_or_default();
        let mut row = vec![case.clone(), name.replace('_', " "), number(*value), (*unit).to_owned()];
        row.extend([end(|spread| spread.min), end(|spread| spread.max)]);
        row.extend([Phase::share_of_bandwidth, Phase::share_of_arithmetic, Phase::share_of_floor].map(of));
        let to_last = |history: &History| history.to_last(subject, figure);
        row.extend(history.map(|history| to_last(history).map_or("-".to_owned(), |ratio| format!("{ratio:.3}"))));
        table.row(row);
    }
    table
}

/// The ops of a phase.
fn ops(phase: &Phase) -> Table {
    let mut table = Table::new(&[&[Align::Left][..], &[Align::Right; 5]].concat());
    table.row(["op", "ms", "of all", "GB/s", "GFLOP/s", "of floor"].map(str::to_owned));
    let all: f64 = phase.ops.iter().map(|op| op.seconds).sum();
    for op in &phase.ops {
        let rate = |count: u64| if count == 0 { String::new() } else { number(count as f64 / op.seconds / 1e9) };
        let floor = op.floor.seconds();
        let of_floor = if floor == 0.0 { String::new() } else { percent(floor / op.seconds) };
        let (ms, share) = (format!("{:.3}", op.seconds * 1e3), percent(op.seconds / all));
        table.row([op.place.clone(), ms, share, rate(op.cost.bytes), rate(op.cost.flops), of_floor]);
    }
    table
}

/// Enough digits to tell runs apart.
fn number(value: f64) -> String {
    match value {
        0.0..10.0 => format!("{value:.3}"),
        0.0..10_000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn to_json(report: &Report) -> Value {
    let Report { device, machine, memory, .. } = report;
    json!({
        "model": report.model,
        "scheme": report.scheme,
        "commit": quaver::COMMIT,
        "backend": device.backend,
        "device": device.name,
        "variant": device.variant.unwrap_or(&device.driver),
        "machine": {
            "bandwidth_gb_s": machine.bandwidth.median / 1e9,
            "bandwidth_gb_s_spread": [machine.bandwidth.min / 1e9, machine.bandwidth.max / 1e9],
            "gflops": machine.flops.median / 1e9,
            "gflops_spread": [machine.flops.min / 1e9, machine.flops.max / 1e9],
            "threads": machine.threads,
            "copy_gb_s": machine.copy.map(|copy| copy.median / 1e9),
        },
        "load_ms": report.load_ms,
        "weights_bytes": memory.weights,
        "kv_cache_bytes": memory.kv_cache,
        "peak_memory_bytes": memory.peak,
        "device_memory_bytes": memory.device,
        "rows": report.cases.iter().map(case_json).collect::<Value>(),
    })
}

fn case_json(report: &CaseReport) -> Value {
    let CaseReport { case, prefill, decode, ttft_ms } = report;
    json!({
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "gen_tokens": case.gen_tokens,
        "prefill_tokens_per_s": prefill.tokens_per_s.median,
        "decode_tokens_per_s": decode.tokens_per_s.median,
        "ttft_ms": ttft_ms.median,
        "ttft_ms_spread": spread_json(ttft_ms),
        "bytes_per_token": decode.bytes_per_token(),
        "share_of_bandwidth": decode.share_of_bandwidth(),
        "share_of_arithmetic": prefill.share_of_arithmetic(),
        "prefill": phase_json(prefill),
        "decode": phase_json(decode),
    })
}

fn phase_json(phase: &Phase) -> Value {
    let op = |op: &bench::OpReport| {
        json!({
            "op": op.place, "seconds": op.seconds, "bytes": op.cost.bytes, "flops": op.cost.flops,
            "floor_seconds": op.floor.seconds(),
        })
    };
    json!({
        "tokens": phase.tokens,
        "seconds": phase.seconds.median,
        "tokens_per_s_spread": spread_json(&phase.tokens_per_s),
        "bytes": phase.cost.bytes,
        "flops": phase.cost.flops,
        "floor_seconds": phase.floor.seconds(),
        "share_of_bandwidth": phase.share_of_bandwidth(),
        "share_of_arithmetic": phase.share_of_arithmetic(),
        "share_of_floor": phase.share_of_floor(),
        "ops": phase.ops.iter().map(op).collect::<Value>(),
    })
}

fn spread_json(spread: &Spread) -> Value {
    json!([spread.min, spread.max])
}
