//! `quaver parity`: whether this machine's devices compute what the reference does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use quaver::Error;
use quaver::core::checkpoint::Checkpoint;
use quaver::parity::{
    BisectedLine, DEFAULT_SEED, DeviceReport, Gaps, Model, Outcome, Suite, bisect, bisection_json, json, markdown,
    title,
};
use quaver_backends::{Kind, Spec};
use serde_json::Value;

use super::Usage;
use super::flags::{ProfileFlag, kind};
use super::save::save;
use super::table::{Align, Table};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Run only the cases whose device and name, written wgpu-portable::linear::m17, hold one of these.
    #[arg(value_name = "FILTER")]
    filter: Vec<String>,
    /// Run only this backend's devices [default: all but the reference].
    #[arg(long, value_name = "NAME", value_parser = kind)]
    backend: Option<Kind>,
    /// Run only this one of a backend's devices, as `quaver devices` counts them.
    #[arg(long, value_name = "N")]
    device: Option<usize>,
    /// Run only this variant of the kernels [default: all that a device runs].
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Draw other numbers and other shapes: the seed that a report names gives the same cases again.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SEED, env = "QUAVER_PARITY_SEED")]
    seed: u64,
    /// The model that is run end to end: a folder or a Hugging Face id; the built-in demo model where none is given.
    #[arg(long, short, value_name = "MODEL")]
    model: Option<String>,
    /// Never ask the network for the model.
    #[arg(long, value_parser = clap::builder::FalseyValueParser::new(), env = "QUAVER_OFFLINE")]
    offline: bool,
    /// Cases that may fail, and must: lines of `device | case | why` instead of the built-in list.
    #[arg(long, value_name = "FILE")]
    known_gaps: Option<PathBuf>,
    /// Run the model line by line on the reference and the device, and name the first op that differs.
    #[arg(long, conflicts_with_all = ["filter", "markdown", "known_gaps", "list"])]
    bisect: bool,
    /// The profile of --bisect.
    #[arg(long, value_name = "PROFILE", default_value = "exact", requires = "bisect")]
    profile: ProfileFlag,
    /// List the cases, and run none.
    #[arg(long, conflicts_with = "markdown")]
    list: bool,
    /// Write a report to a file, to attach to a bug report.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Print one JSON object instead of tables.
    #[arg(long, conflicts_with = "list")]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let specs = specs(&args)?;
    let model = model(&args)?;
    if args.bisect {
        return run_bisect(&args, &specs, model);
    }
    let gaps = match &args.known_gaps {
        None => Gaps::built_in(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
            Gaps::parse(&path.display().to_string(), &text)?
        }
    };
    let suite = Suite::new(args.seed, model, gaps, args.filter.clone())?;
    let names = suite.names();
    let mut taken = names.iter().filter(|name| specs.iter().any(|spec| suite.takes(spec, name))).peekable();
    if taken.peek().is_none() {
        return Err(Usage(format!("no case holds {} (see quaver parity --list)", args.filter.join(" or "))).into());
    }
    let mut out = io::stdout().lock();
    if args.list {
        taken.try_for_each(|name| writeln!(out, "{name}"))?;
        return Ok(());
    }
    let bar = progress();
    let reports = suite.run(&specs, |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let reports = reports?;
    if let Some(path) = &args.markdown {
        save(path, &markdown(args.seed, &reports)).map_err(|e| Error::io("write", path, e))?;
    }
    if args.json {
        writeln!(out, "{:#}", json(args.seed, &reports))?;
    } else {
        reports.iter().try_for_each(|report| print(&mut out, report))?;
    }
    let failed: usize = reports.iter().map(DeviceReport::failed).sum();
    if failed > 0 {
        let all: usize = reports.iter().map(|report| report.outcomes.len()).sum();
        return Err(anyhow!("{failed} of {all} cases failed; replay with --seed {}", args.seed));
    }
    Ok(())
}

/// What the flags name of this machine.
fn specs(args: &Args) -> Result<Vec<Spec>> {
    let all = quaver_backends::variants();
    let kind = match args.backend {
        Some(Kind::Auto) => Some(all[0].kind),
        kind => kind,
    };
    let takes = |spec: &Spec| {
        kind.map_or(spec.kind != Kind::Reference, |kind| spec.kind == kind)
            && args.device.is_none_or(|device| spec.device == device)
            && args.variant.as_ref().is_none_or(|name| spec.variant.as_ref() == Some(name))
    };
    let specs: Vec<Spec> = all.into_iter().filter(takes).collect();
    if specs.is_empty() {
        return Err(anyhow!("no device here is what --backend, --device and --variant name (see quaver devices)"));
    }
    Ok(specs)
}

/// The checkpoint, and the tokens that it reads.
fn model(args: &Args) -> Result<(Checkpoint, Vec<u32>)> {
    let files = quaver::files(args.model.as_deref(), args.offline)?;
    let ids = Model::text(&files.require("tokenizer.json")?)?;
    Ok((Checkpoint::open(files)?, ids))
}

/// Drawn on a terminal alone.
fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} ({elapsed})").expect("the template is sound");
    ProgressBar::no_length().with_style(style)
}

/// A device's cases, op by op, and what failed.
fn print(out: &mut impl Write, report: &DeviceReport) -> io::Result<()> {
    let mut ops: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    report.outcomes.iter().for_each(|outcome| ops.entry(outcome.op).or_default().push(outcome));
    let mut table = Table::new(&[&[Align::Left][..], &[Align::Right; 5]].concat());
    table.row(["op", "cases", "passed", "failed", "nearest to its bound", "ms"].map(str::to_owned));
    for (op, outcomes) in ops {
        let count = |status: &str| outcomes.iter().filter(|outcome| outcome.status() == status).count().to_string();
        // Those that must be equal have no bound to be near to.
        let used = |outcome: &&&Outcome| if outcome.bound > 0.0 { outcome.error / outcome.bound } else { 0.0 };
        let nearest =
            outcomes.iter().filter(|outcome| outcome.passed).map(|outcome| used(&outcome)).fold(0.0, f64::max);
        let ms = outcomes.iter().map(|outcome| outcome.us).sum::<f64>() / 1e3;
        let (nearest, ms) = (format!("{:.0}%", 100.0 * nearest), format!("{ms:.1}"));
        table.row([op.to_owned(), outcomes.len().to_string(), count("passed"), count("FAILED"), nearest, ms]);
    }
    writeln!(out, "{}", report.title())?;
    table.write(out)?;
    for outcome in report.outcomes.iter().filter(|outcome| !outcome.passed) {
        writeln!(out, "{} {}: {}", outcome.status(), outcome.name, outcome.detail)?;
    }
    writeln!(out)
}

fn run_bisect(args: &Args, specs: &[Spec], (checkpoint, ids): (Checkpoint, Vec<u32>)) -> Result<()> {
    let mut found = Vec::new();
    let bar = progress();
    for spec in specs {
        bar.set_message(format!("line by line on {spec}"));
        let title = title(spec, &quaver_backends::open(spec)?.describe());
        let lines = bisect(&checkpoint, &ids, args.profile.into(), || quaver_backends::open(spec))?;
        found.push((title, lines));
    }
    bar.finish_and_clear();
    let mut out = io::stdout().lock();
    if args.json {
        let devices = found.iter().map(|(title, lines)| bisection_json(title, lines)).collect::<Value>();
        writeln!(out, "{:#}", serde_json::json!({ "devices": devices }))?;
    }
    let mut wrong = Vec::new();
    for (title, lines) in &found {
        if !args.json {
            print_lines(&mut out, title, lines)?;
        }
        let first = lines.iter().find(|line| !line.passed());
        wrong.extend(first.map(|line| format!("{title}: the first op that differs is {} {}", line.op, line.label)));
    }
    if wrong.is_empty() { Ok(()) } else { Err(anyhow!(wrong.join("; "))) }
}

fn print_lines(out: &mut impl Write, title: &str, lines: &[BisectedLine]) -> io::Result<()> {
    let mut table = Table::new(&[&[Align::Left; 2][..], &[Align::Right; 3], &[Align::Left]].concat());
    table.row(["op", "line", "error", "bound", "drift so far", ""].map(str::to_owned));
    for line in lines {
        let [error, bound, drift] = [line.error, line.bound, line.drift].map(|x| format!("{x:.1e}"));
        let verdict = if line.passed() { String::new() } else { format!("WRONG: {}", line.detail) };
        table.row([line.op.to_owned(), line.label.clone(), error, bound, drift, verdict]);
    }
    writeln!(out, "{title}")?;
    table.write(out)?;
    writeln!(out)
}
