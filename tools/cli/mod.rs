//! The commands: parsed arguments become options of the library, one file a command. Results go to stdout, everything
//! else to stderr; exit codes are 0 done, 1 failure, 2 usage.

mod batch;
mod bench;
mod bench_gemm;
mod bench_serve;
mod chat;
mod devices;
mod eval;
mod flags;
mod generate;
mod inspect;
mod kernels;
mod parity;
mod quantize;
mod save;
mod serve;
mod synth;
mod table;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use indicatif::ProgressBar;

/// For instance `0.1.0 (0123456789ab)`.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("QUAVER_COMMIT"), ")");

#[derive(Parser)]
#[command(name = "quaver", version = VERSION, about = "Runs FP8 language models", max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Log what happens; twice for details. An error shows its causes.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, env = "QUAVER_VERBOSE")]
    verbose: u8,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
enum Command {
    /// Continue prompts, streamed.
    Generate(generate::Args),
    /// Talk to a model in the terminal.
    Chat(chat::Args),
    /// Serve a model over HTTP, with OpenAI's API.
    Serve(serve::Args),
    /// Answer a file of requests, in OpenAI's batch format.
    Batch(batch::Args),
    /// Show a model's config, quantization, tensors and memory plan.
    Inspect(inspect::Args),
    /// Show what this machine offers.
    Devices(devices::Args),
    /// Measure a model's speed, beside what the machine can do.
    Bench(bench::Args),
    /// Compile the CUDA kernels ahead of time.
    Kernels(kernels::Args),
    /// Hold this machine's devices against the reference, op by op and with a model.
    Parity(parity::Args),
    /// Make an FP8 checkpoint of a bf16, f16 or f32 one.
    Quantize(quantize::Args),
    /// Judge a model: perplexity, what quantization cost, scores of tasks.
    Eval(eval::Args),
    /// Make a checkpoint with random weights, for benchmarks and tests.
    Synth(synth::Args),
}

/// A mistake in the arguments that parsing alone does not find: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Does what nobody knows the length of, and shows a person that it is under way.
fn under_way<T>(what: &'static str, work: impl FnOnce() -> T) -> T {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let done = work();
    spinner.finish_and_clear();
    done
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(error) => return error,
    };
    start_log(&args);
    // At `trace` the HTTP client writes what goes over the wire, and so the token.
    log::set_max_level(log::max_level().min(log::LevelFilter::Debug));
    let result = match args.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Batch(args) => batch::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Parity(args) => parity::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Synth(args) => synth::run(args),
    };
    let Err(error) = result.and_then(|()| Ok(io::stdout().flush()?)) else { return ExitCode::SUCCESS };
    if closed_pipe(&error) {
        return ExitCode::SUCCESS;
    }
    match args.verbose {
        0 => fail(&error),
        _ => {
            eprintln!("quaver: {}", one_line(&with_causes(&error)));
            exit_code(&error)
        }
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    print_error(error);
    exit_code(error)
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// The arguments; a server's config file gives the defaults of those that are absent.
fn parse() -> Result<Args, ExitCode> {
    let args = Args::try_parse().map_err(|error| refuse(&error))?;
    let Command::Serve(serve) = &args.command else { return Ok(args) };
    let Some(path) = serve.config() else { return Ok(args) };
    let command = serve::with_config(Args::command(), path).map_err(|error| fail(&error))?;
    let matches = command.try_get_matches().map_err(|error| refuse(&error))?;
    Args::from_arg_matches(&matches).map_err(|error| refuse(&error))
}

/// The log goes to stderr: of a server what it does, of other commands warnings alone.
fn start_log(args: &Args) {
    let serve = if let Command::Serve(serve) = &args.command { Some(serve) } else { None };
    // What drivers say while adapters are looked for is no news: what matters of it becomes an error.
    let level = ["warn,wgpu_hal=off", "info,wgpu_hal=off", "debug"];
    let level = level[usize::from((args.verbose + u8::from(serve.is_some())).min(2))];
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    log.format_timestamp_millis();
    if serve.is_some_and(|serve| serve.log_format == serve::LogFormat::Json) {
        log.format(|out, record| {
            let (time, level, target) = (out.timestamp_millis().to_string(), record.level(), record.target());
            let message = record.args().to_string();
            let mut line =
                serde_json::json!({"time": time, "level": level.as_str(), "target": target, "message": message});
            if let Some(id) = quaver::server::request_id() {
                line["request_id"] = id.into();
            }
            writeln!(out, "{line}")
        });
    }
    log.init();
}

/// One line, whatever a file's name or another library's message holds. An error of the library has its cause in its
/// message.
fn print_error(error: &anyhow::Error) {
    eprintln!("quaver: {}", one_line(&error.to_string()));
}

/// An error and those of its causes that its message does not hold already.
fn with_causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.is_empty() {
        true => cause,
        false if text.contains(&cause) => text,
        false => format!("{text}: {cause}"),
    })
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What the parser of arguments has to say: help and version as they are, mistakes as one line like all others.
fn refuse(error: &clap::Error) -> ExitCode {
    let is_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || is_help {
        // Nobody is left to be told where the output is closed.
        let _ = error.print();
        return ExitCode::from(if is_help { 2 } else { 0 });
    }
    let text = error.to_string();
    let what = text.split("\n\nUsage:").next().and_then(|text| text.split("\n\nFor more").next()).unwrap_or(&text);
    // What follows a colon belongs to it; other lines are remarks.
    let lines = what.trim_start_matches("error: ").lines().map(str::trim).filter(|line| !line.is_empty());
    let what = lines.collect::<Vec<_>>().join("; ").replace(":; ", ": ");
    eprintln!("quaver: {what} (see quaver --help)");
    ExitCode::from(2)
}

/// True where the reader of stdout went away, as `head` does: nobody is left to be told.
fn closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
