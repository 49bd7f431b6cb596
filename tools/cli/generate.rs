//! `quaver generate`: completions, streamed; several prompts run as one batch.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use quaver::core::engine::{FinishReason, Token};
use quaver::{Completion, Error, Llm, LlmOptions, Progress, Prompt, Request, SamplingParams};
use serde_json::{Value, json};

use super::Usage;
use super::flags::{ModelFlags, SamplingFlags, SystemFlag};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Texts to continue or, where the model has a chat template, messages to answer; `-` reads one from stdin.
    #[arg(value_name = "PROMPT")]
    prompts: Vec<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Read a prompt from a file, as it is; may be given several times.
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Answer a conversation: a file with an OpenAI `messages` array; may be given several times.
    #[arg(long, value_name = "FILE")]
    messages: Vec<PathBuf>,
    /// Continue these token ids, such as 1,2,3; may be given several times.
    #[arg(long, value_name = "IDS", allow_hyphen_values = true)]
    prompt_ids: Vec<String>,
    /// Answer prompts as messages of a user [default where the model has a chat template].
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Continue prompts as plain text.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    system: SystemFlag,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Give the log-probability of each token, and of the N likeliest ones in its place; needs --json.
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    /// The same for the tokens of the prompt; needs --json.
    #[arg(long, value_name = "N", requires = "json")]
    prompt_logprobs: Option<usize>,
    /// Print one JSON object a prompt instead of the text.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    // Prompts and parameters are read first, so that a mistake in them shows before a model is loaded.
    if args.raw && args.system.is_given() {
        return Err(Usage("--system and --raw exclude each other: plain text has no system message".into()).into());
    }
    args.sampling.check()?;
    check_logprobs(&args)?;
    let texts = texts(&args)?;
    let conversations = args.messages.iter().map(|path| read_messages(path)).collect::<Result<Vec<_>>>()?;
    let ids = args.prompt_ids.iter().map(|ids| parse_ids(ids)).collect::<Result<Vec<_>>>()?;
    let count = texts.len() + conversations.len() + ids.len();
    if count == 0 {
        return Err(Usage("no prompt: give a text, - for stdin, or --messages FILE (see --help)".into()).into());
    }
    let start = Instant::now();
    let only_ids = texts.is_empty() && conversations.is_empty();
    let options = LlmOptions { defer_tokenizer: only_ids, ..args.model.options(count.min(MAX_BATCH)) };
    let mut llm = Llm::with_options(args.model.name(), &options)?;
    if only_ids && !llm.has_tokenizer() && !args.json {
        let why = format!("{} has none, so that answers have no text; use --json for token ids", llm.name());
        return Err(Error::text("tokenizer.json", why).into());
    }
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let chat = !args.raw && (args.chat || args.system.is_given() || llm.has_chat_template());
    let system = args.system.get();
    let texts = texts.into_iter().map(|text| if chat { message(system.as_deref(), text) } else { Prompt::Text(text) });
    let prompts = texts.chain(conversations.into_iter().map(Prompt::Messages)).chain(ids.into_iter().map(Prompt::Ids));
    let mut params = args.sampling.params(llm.sampling_defaults());
    params.logprobs = args.logprobs;
    params.prompt_logprobs = args.prompt_logprobs;
    let stop = &args.sampling.stop;
    let requests = prompts.map(|prompt| Request { prompt, params: params.clone(), stop: stop.clone() }).collect();

    let mut printer = Printer::new(!args.json, count);
    let completions = llm.run(requests, |i, progress| printer.take(i, progress))?;
    if let Some(error) = printer.failed {
        return Err(error.into());
    }
    if args.json {
        let mut out = io::stdout().lock();
        for completion in completions {
            writeln!(out, "{}", to_json(&llm, &completion, load_ms))?;
        }
    }
    Ok(())
}

/// Sequences that run side by side; further prompts wait for a place.
const MAX_BATCH: usize = 64;

/// The texts of the command line, of files, and of stdin, in this order.
fn texts(args: &Args) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    if args.prompts.iter().filter(|prompt| *prompt == "-").count() > 1 {
        return Err(Usage("stdin can be read once: give - once".into()).into());
    }
    for prompt in &args.prompts {
        texts.push(if prompt == "-" { read_stdin()? } else { prompt.clone() });
    }
    for path in &args.prompt_file {
        texts.push(utf8(&path.display().to_string(), read_file(path)?)?);
    }
    Ok(texts)
}

fn read_stdin() -> Result<String> {
    if io::stdin().is_terminal() {
        eprintln!("reading the prompt from the terminal; end it with Ctrl-D");
    }
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Error::io("read", "stdin", e))?;
    utf8("stdin", bytes)
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    Ok(fs::read(path).map_err(|e| Error::io("read", path, e))?)
}

fn utf8(what: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::text(what, format!("is not UTF-8 from byte {at} on; convert it first")).into()
    })
}

fn read_messages(path: &Path) -> Result<Value> {
    let parsed = serde_json::from_slice(&read_file(path)?);
    Ok(parsed.map_err(|e| {
        Error::text(path.display().to_string(), format!("is not JSON: {e}; give an OpenAI messages array"))
    })?)
}

fn parse_ids(ids: &str) -> Result<Vec<u32>> {
    if ids.trim().is_empty() {
        return Err(Usage("--prompt-ids is empty; give at least one token id, such as 1,2,3".into()).into());
    }
    let parsed: Result<Vec<u32>, _> = ids.split(',').map(|id| id.trim().parse()).collect();
    parsed.map_err(|_| Usage(format!("--prompt-ids {ids}: token ids are expected, such as 1,2,3")).into())
}

fn check_logprobs(args: &Args) -> Result<()> {
    let (logprobs, prompt_logprobs) = (args.logprobs, args.prompt_logprobs);
    let params = SamplingParams { logprobs, prompt_logprobs, ..SamplingParams::default() };
    Ok(params.validate().map_err(|error| Usage(error.to_string()))?)
}

fn message(system: Option<&str>, text: String) -> Prompt {
    let system = system.iter().map(|system| json!({"role": "system", "content": system}));
    Prompt::Messages(system.chain([json!({"role": "user", "content": text})]).collect())
}

/// Prints answers one behind the other, in the order of the prompts: the first that is not complete as it comes, later
/// ones when it is their turn.
struct Printer {
    stream: bool,
    current: usize,
    pending: Vec<String>,
    done: Vec<bool>,
    failed: Option<io::Error>,
}

impl Printer {
    fn new(stream: bool, count: usize) -> Self {
        Printer { stream, current: 0, pending: vec![String::new(); count], done: vec![false; count], failed: None }
    }

    fn take(&mut self, i: usize, progress: Progress) -> ControlFlow<()> {
        if self.stream && self.failed.is_none() {
            match progress {
                Progress::Text(text) if i == self.current => self.print(text),
                Progress::Text(text) => self.pending[i].push_str(text),
                Progress::Done => self.done(i),
            }
        }
        // Nobody reads on: there is no point in computing on.
        if self.failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn done(&mut self, i: usize) {
        self.done[i] = true;
        while self.done.get(self.current) == Some(&true) {
            self.current += 1;
            match self.pending.get_mut(self.current).map(std::mem::take) {
                Some(pending) => self.print(&format!("\n\n{pending}")),
                None => self.print("\n"),
            }
        }
    }

    fn print(&mut self, text: &str) {
        let mut out = io::stdout().lock();
        self.failed = out.write_all(text.as_bytes()).and_then(|()| out.flush()).err();
    }
}

/// An answer as one JSON object.
fn to_json(llm: &Llm, completion: &Completion, load_ms: f64) -> Value {
    let device = llm.device();
    let mut object = json!({
        "model": llm.name(),
        "backend": device.backend,
        "device": device.name,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_token_ids": completion.prompt_token_ids,
        "finish_reason": match completion.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        },
        "usage": {
            "prompt_tokens": completion.prompt_token_ids.len(),
            "completion_tokens": completion.token_ids.len(),
        },
        "timings": {
            "load_ms": load_ms,
            "ttft_ms": completion.ttft_ms,
            "decode_tokens_per_s": completion.decode_tokens_per_s,
        },
    });
    if let Some(logprobs) = &completion.logprobs {
        object["logprobs"] = logprobs.iter().map(token_json).collect();
    }
    if let Some(logprobs) = &completion.prompt_logprobs {
        object["prompt_logprobs"] =
            logprobs.iter().map(|token| token.as_ref().map_or(Value::Null, token_json)).collect();
    }
    object
}

fn token_json(token: &Token) -> Value {
    let top = token.top.iter().map(|(id, logprob)| json!({"token_id": id, "logprob": logprob}));
    json!({"token_id": token.id, "logprob": token.logprob, "top": top.collect::<Value>()})
}
