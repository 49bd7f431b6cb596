//! `quaver eval`: perplexity, what quantization cost, and scores of tasks. Tables for people, `--json` for machines.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use quaver::Error;
use quaver::core::evaluate::{Tally, Window};
use quaver::eval::{self, Comparison, Metric, Model, Perplexity, Task, TaskReport, Windows};
use quaver::samples;
use serde_json::{Map, Value, json};

use super::flags::ModelFlags;
use super::table::{Align, Table};
use super::{Usage, under_way};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
enum What {
    /// Negative log-likelihood and perplexity of a text.
    Perplexity(PerplexityArgs),
    /// What quantization cost: perplexity, divergence and agreement of a model beside its base.
    Compare(CompareArgs),
    /// Scores of tasks in local JSON lines, as lm-evaluation-harness defines them.
    Tasks(TasksArgs),
}

/// Which text, and how it is cut.
#[derive(clap::Args, Debug)]
struct TextFlags {
    /// A text, or JSON lines with text, messages, prompt or input_ids.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens of a window; the begin-of-text token, or where there is none the token before, goes before them.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    context: u32,
    /// Tokens from one window to the next; what a window shares with the one before is context [default: --context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Score this many tokens, at most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    /// Keep what is scored in this file, and go on from what it holds.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct PerplexityArgs {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    text: TextFlags,
}

#[derive(clap::Args, Debug)]
struct CompareArgs {
    /// The model that is the measure: a folder or a Hugging Face id.
    #[arg(value_name = "BASE")]
    base: String,
    /// The model that is measured.
    #[arg(value_name = "QUANT")]
    quant: String,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    text: TextFlags,
}

#[derive(clap::Args, Debug)]
struct TasksArgs {
    /// Files of JSON lines (docs/model-card.md says what is in them); FILE:METRIC makes another metric than the first
    /// of exact_match, mc2 and acc the one that counts for the average.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Lines of each file, at most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// The --json output of the base model: its scores stand beside, with the recovery.
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Perplexity(args) => perplexity(args),
        What::Compare(args) => compare(args),
        What::Tasks(args) => tasks(args),
    }
}

impl TextFlags {
    fn cut(&self) -> Result<Windows> {
        let (context, stride) = (self.context as usize, self.stride.unwrap_or(self.context) as usize);
        if stride > context {
            let why =
                format!("--stride {stride} is more than --context {context}: tokens between windows would be lost");
            return Err(Usage(why).into());
        }
        Ok(Windows { context, stride, max_tokens: self.max_tokens.map(|n| n as usize) })
    }

    fn windows(&self, model: &Model) -> Result<Vec<Window>> {
        let (samples, cut) = (samples::read(&self.data, usize::MAX)?, self.cut()?);
        Ok(under_way("tokenizing", || cut.of(&samples, &model.encoder))?)
    }
}

/// A bar over windows that shows the perplexity so far.
fn bar(length: usize, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta} left").expect("the template is sound");
    ProgressBar::new(length as u64).with_style(style).with_message(what.to_owned())
}

fn show(bar: &ProgressBar, tally: &Tally) {
    bar.set_message(format!("perplexity {:.4}", tally.perplexity()));
    bar.inc(1);
}

fn perplexity(args: PerplexityArgs) -> Result<()> {
    let cut = args.text.cut()?;
    let options = args.model.options(1);
    let files = quaver::files(args.model.name(), args.model.offline)?;
    let mut model = Model::open(files, &options, cut.context)?;
    let windows = args.text.windows(&model)?;
    let bar = bar(windows.len(), "perplexity");
    let scored = eval::perplexity(&mut model, &windows, args.text.resume.as_deref(), |tally| show(&bar, tally));
    bar.finish_and_clear();
    let Perplexity { tally, windows } = scored?;
    let mut out = io::stdout().lock();
    if args.text.json {
        let mut object = tally_json(&model.name, &tally, &cut);
        object["windows"] = windows.into();
        writeln!(out, "{object:#}")?;
        return Ok(());
    }
    let mut table = Table::new(&[Align::Left, Align::Left]);
    let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
    line("model", model.name.clone());
    line("text", format!("{} tokens in {windows} windows of {}, {} apart", tally.tokens, cut.context, cut.stride));
    line("nll", format!("{:.6} nats a token", tally.mean()));
    line("perplexity", format!("{:.4}", tally.perplexity()));
    table.write(&mut out)?;
    Ok(())
}

fn tally_json(model: &str, tally: &Tally, cut: &Windows) -> Value {
    json!({
        "model": model, "tokens": tally.tokens, "nll": tally.mean(), "perplexity": tally.perplexity(),
        "context": cut.context, "stride": cut.stride,
    })
}

fn compare(args: CompareArgs) -> Result<()> {
    if args.model.name().is_some() {
        return Err(Usage("eval compare takes its two models without --model: eval compare BASE QUANT".into()).into());
    }
    let cut = args.text.cut()?;
    let options = args.model.options(1);
    let open = |name: &str| Model::open(quaver::files(Some(name), args.model.offline)?, &options, cut.context);
    let (mut base, mut quant) = (open(&args.base)?, open(&args.quant)?);
    let windows = args.text.windows(&base)?;
    let bar = bar(windows.len(), "comparing");
    let resume = args.text.resume.as_deref();
    let compared = eval::compare(&mut base, &mut quant, &windows, resume, |tally| show(&bar, tally));
    bar.finish_and_clear();
    let compared = compared?;
    let mut out = io::stdout().lock();
    if args.text.json {
        writeln!(out, "{:#}", comparison_json(&base, &quant, &compared, &cut))?;
        return Ok(());
    }
    let mut table = Table::new(&[Align::Left, Align::Right, Align::Right]);
    let mut row = |cells: [String; 3]| table.row(cells);
    let perplexity = |tally: &Tally| format!("{:.4}", tally.perplexity());
    row(["".into(), base.name.clone(), quant.name.clone()]);
    row(["perplexity".into(), perplexity(&compared.base), perplexity(&compared.quant)]);
    row(["recovery".into(), "".into(), format!("{:.3}%", 100.0 / compared.perplexity_ratio())]);
    row(["KL, mean".into(), "".into(), format!("{:.3e} nats", compared.kl_mean())]);
    row(["KL, median".into(), "".into(), format!("{:.3e} nats", compared.kl_quantile(0.5))]);
    row(["KL, 99th percentile".into(), "".into(), format!("{:.3e} nats", compared.kl_quantile(0.99))]);
    row(["same likeliest token".into(), "".into(), format!("{:.3}%", 100.0 * compared.top1_agreement())]);
    table.write(&mut out)?;
    writeln!(out, "{} tokens, windows of {}, {} apart", compared.base.tokens, cut.context, cut.stride)?;
    Ok(())
}

fn comparison_json(base: &Model, quant: &Model, compared: &Comparison, cut: &Windows) -> Value {
    json!({
        "base": tally_json(&base.name, &compared.base, cut),
        "quant": tally_json(&quant.name, &compared.quant, cut),
        "perplexity_ratio": compared.perplexity_ratio(),
        "kl_mean": compared.kl_mean(),
        "kl_median": compared.kl_quantile(0.5),
        "kl_p99": compared.kl_quantile(0.99),
        "top1_agreement": compared.top1_agreement(),
        "recovery_percent": 100.0 / compared.perplexity_ratio(),
    })
}

fn tasks(args: TasksArgs) -> Result<()> {
    let limit = args.limit.map_or(usize::MAX, |n| n as usize);
    let baseline = args
        .baseline
        .as_deref()
        .map(|path| {
            let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
            serde_json::from_slice::<Value>(&bytes).map_err(|e| {
                Error::text(
                    path.display().to_string(),
                    format!("is not JSON: {e}; give the output of eval tasks --json"),
                )
            })
        })
        .transpose()?;
    let (mut files, mut wanted) = (Vec::new(), Vec::new());
    for text in &args.files {
        let (path, metric) = with_metric(text)?;
        let task = Task::read(path.as_ref(), limit)?;
        wanted.push(Wanted::of(&task, metric, baseline.as_ref())?);
        files.push(task);
    }
    let options = args.model.options(MAX_BATCH);
    let bar = bar(files.iter().map(Task::len).sum(), "tokenizing");
    let files = eval::tokenize(files, args.model.name(), &options, || bar.inc(1))?;
    bar.reset();
    let mut rows = Vec::new();
    for (task, Wanted { headline, base }) in files.iter().zip(wanted) {
        bar.set_message(task.name.clone());
        let report = task.run(args.model.name(), &options, || bar.inc(1))?;
        rows.push(Row { report, headline, base });
    }
    bar.finish_and_clear();
    let model = quaver::files(args.model.name(), args.model.offline)?.name();
    let mean = |of: fn(&Row) -> Option<f64>| {
        let values: Option<Vec<f64>> = rows.iter().map(of).collect();
        values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
    };
    let average = mean(|row| Some(row.report.scores[&row.headline].value)).unwrap_or_default();
    let base_average = mean(|row| row.base);
    let mut out = io::stdout().lock();
    if args.json {
        let mut object =
            json!({"model": model, "tasks": rows.iter().map(Row::to_json).collect::<Value>(), "average": average});
        if let Some(base) = base_average {
            object["base_average"] = base.into();
            object["recovery_percent"] = recovery(base, average).into();
        }
        writeln!(out, "{object:#}")?;
        return Ok(());
    }
    let mut table = Table::new(&[&[Align::Left; 2][..], &[Align::Right; 4]].concat());
    table.row(["task", "metric", "lines", "base", "score", "recovery"].map(str::to_owned));
    let percent = |x: f64| format!("{:.2}", 100.0 * x);
    for Row { report, headline, base } in &rows {
        for (metric, score) in &report.scores {
            let base = base.filter(|_| metric == headline);
            let cells = [
                report.name.clone(),
                metric.name().to_owned(),
                report.lines.to_string(),
                base.map(percent).unwrap_or_default(),
                format!("{} ± {}", percent(score.value), percent(score.stderr)),
                base.map(|base| format!("{:.2}%", recovery(base, score.value))).unwrap_or_default(),
            ];
            table.row(cells);
        }
    }
    table.row([
        "average".to_owned(),
        String::new(),
        String::new(),
        base_average.map(percent).unwrap_or_default(),
        percent(average),
        base_average.map(|base| format!("{:.2}%", recovery(base, average))).unwrap_or_default(),
    ]);
    table.write(&mut out)?;
    Ok(())
}

/// Sequences side by side; further ones wait for a place.
const MAX_BATCH: usize = 64;

/// A task's line of the report.
struct Row {
    report: TaskReport,
    headline: Metric,
    base: Option<f64>,
}

/// What a task is judged by.
struct Wanted {
    headline: Metric,
    base: Option<f64>,
}

impl Wanted {
    /// The metric that was named, or the first of those that the lines give, and what the baseline has of it.
    fn of(task: &Task, named: Option<Metric>, baseline: Option<&Value>) -> Result<Self> {
        let metrics = task.metrics();
        let first = [Metric::ExactMatch, Metric::Mc2, Metric::Acc].into_iter().find(|m| metrics.contains(m));
        let headline = named.or(first).expect("every line gives one of these");
        if !metrics.contains(&headline) {
            let has: Vec<_> = metrics.iter().map(|metric| metric.name()).collect();
            let why = format!("{}: its lines give {}, not {}", task.name, has.join(", "), headline.name());
            return Err(Usage(why).into());
        }
        let base = baseline.map(|baseline| {
            let tasks = baseline["tasks"].as_array();
            let task_of = tasks.and_then(|tasks| tasks.iter().find(|of| of["task"] == task.name));
            task_of.and_then(|of| of["scores"][headline.name()]["value"].as_f64()).ok_or_else(|| {
                let why = format!("has no {} of {}; run the base over the same files", headline.name(), task.name);
                Error::text("--baseline", why)
            })
        });
        Ok(Wanted { headline, base: base.transpose()? })
    }
}

impl Row {
    fn to_json(&self) -> Value {
        let score = |(metric, score): (&Metric, &eval::Score)| {
            (metric.name().to_owned(), json!({"value": score.value, "stderr": score.stderr}))
        };
        let scores: Map<String, Value> = self.report.scores.iter().map(score).collect();
        let mut object = json!({
            "task": self.report.name, "lines": self.report.lines, "metric": self.headline.name(), "scores": scores
        });
        if let Some(base) = self.base {
            object["base"] = base.into();
            object["recovery_percent"] = recovery(base, self.report.scores[&self.headline].value).into();
        }
        object
    }
}

/// In percent; of a base of 0 there is nothing to recover.
fn recovery(base: f64, quant: f64) -> f64 {
    if base > 0.0 { 100.0 * quant / base } else { 100.0 }
}

/// A file, and the metric behind a colon. A file whose own name has a colon is told by its being there.
fn with_metric(text: &str) -> Result<(&str, Option<Metric>)> {
    let Some((path, name)) = text.rsplit_once(':').filter(|_| !Path::new(text).exists()) else {
        return Ok((text, None));
    };
    match Metric::ALL.into_iter().find(|metric| metric.name() == name) {
        Some(metric) => Ok((path, Some(metric))),
        None if !Path::new(path).exists() => Ok((text, None)),
        None => {
            let names = Metric::ALL.map(Metric::name).join(", ");
            Err(Usage(format!("{text}: {name} is no metric; the metrics are {names}")).into())
        }
    }
}
