//! `quaver serve`: an HTTP server with OpenAI's API. Every flag can be set by its `QUAVER_…` variable or in a file of
//! `--config` too; a flag wins over its variable, and that over the file.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{ArgAction, Command};
use quaver::Error;
use quaver::server::{self, Event, Options};

use super::Usage;
use super::flags::{ModelFlags, bytes};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Read flags from a TOML file: their names without dashes in front, as in `max-model-len = 4096`.
    #[arg(long, value_name = "FILE", env = "QUAVER_CONFIG")]
    config: Option<PathBuf>,
    /// The address to listen at; 0.0.0.0 is every one of this machine's.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", env = "QUAVER_HOST")]
    host: String,
    /// The port; 0 takes a free one.
    #[arg(long, value_name = "N", default_value_t = 8000, env = "QUAVER_PORT")]
    port: u16,
    /// A key that requests must bring, all but those for /health; several are separated by commas.
    #[arg(long, value_name = "KEY", value_delimiter = ',', env = "QUAVER_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// What clients may call the model, separated by commas [default: its own name].
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "QUAVER_SERVED_MODEL_NAME")]
    served_model_name: Vec<String>,
    /// An origin whose pages may ask, such as https://example.org; * for all [default: none].
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', env = "QUAVER_CORS_ORIGIN")]
    cors_origin: Vec<String>,
    /// Sequences that run side by side.
    #[arg(long, value_name = "N", default_value_t = 32, env = "QUAVER_MAX_NUM_SEQS")]
    max_num_seqs: usize,
    /// Rows of a step: how much of prompts is computed at once.
    #[arg(long, value_name = "N", default_value_t = 512, env = "QUAVER_MAX_NUM_BATCHED_TOKENS")]
    max_num_batched_tokens: usize,
    /// The same beside sequences that decode: a longer step would hold up their streams.
    #[arg(long, value_name = "N", default_value_t = 64, env = "QUAVER_MAX_PROMPT_TOKENS_BESIDE")]
    max_prompt_tokens_beside: usize,
    /// Compute every prompt from its first token on, even where another began alike.
    #[arg(long, value_parser = clap::builder::FalseyValueParser::new(), env = "QUAVER_NO_PREFIX_CACHING")]
    no_prefix_caching: bool,
    /// Requests that may wait for a place; further ones are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 256, env = "QUAVER_MAX_QUEUE")]
    max_queue: usize,
    /// Bytes of a request, or a number with K, M or G.
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = bytes, env = "QUAVER_MAX_BODY_SIZE")]
    max_body_size: u64,
    /// Seconds that a request may take.
    #[arg(long, value_name = "S", default_value_t = 600, env = "QUAVER_REQUEST_TIMEOUT")]
    request_timeout: u64,
    /// Seconds that requests under way may take behind the first SIGTERM or Ctrl-C; a second one ends them.
    #[arg(long, value_name = "S", default_value_t = 60, env = "QUAVER_SHUTDOWN_TIMEOUT")]
    shutdown_timeout: u64,
    /// Lines of the log: text, or an object of JSON each.
    #[arg(long, value_name = "FORMAT", default_value = "text", env = "QUAVER_LOG_FORMAT")]
    pub log_format: LogFormat,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

impl Args {
    /// The file of `--config`.
    pub fn config(&self) -> Option<&PathBuf> {
        self.config.as_ref()
    }
}

/// The command with what a config file says for its defaults.
pub fn with_config(command: Command, path: &PathBuf) -> Result<Command> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let wrong = |why: String| Usage(format!("{}: {why}", path.display()));
    let table: toml::Table = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let mut serve = command.find_subcommand("serve").expect("there is such a command").clone();
    for (key, value) in table {
        let id = key.replace('-', "_");
        let Some(arg) = serve.get_arguments().find(|arg| arg.get_id() == id.as_str() && id != "config") else {
            return Err(wrong(format!("{key} is no flag of quaver serve")).into());
        };
        let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
        let values: Vec<String> = match value {
            toml::Value::String(text) => vec![text],
            toml::Value::Integer(number) => vec![number.to_string()],
            toml::Value::Float(number) => vec![number.to_string()],
            toml::Value::Boolean(flag) if is_flag => vec![flag.to_string()],
            toml::Value::Array(items) if items.iter().all(|item| item.is_str()) => {
                items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
            }
            _ => {
                return Err(wrong(format!("{key} must be a text, a number, true or false, or a list of texts")).into());
            }
        };
        serve = serve.mut_arg(id, |arg| arg.default_values(values));
    }
    Ok(command.mut_subcommand("serve", |_| serve))
}

pub fn run(args: Args) -> Result<()> {
    let mut llm = args.model.options(args.max_num_seqs);
    llm.engine.max_num_batched_tokens = args.max_num_batched_tokens;
    llm.engine.max_prompt_tokens_beside = args.max_prompt_tokens_beside;
    llm.engine.prefix_caching = !args.no_prefix_caching;
    let options = Options {
        model: args.model.name().map(str::to_owned),
        llm,
        host: args.host,
        port: args.port,
        names: args.served_model_name,
        api_keys: args.api_key.into_iter().filter(|key| !key.is_empty()).collect(),
        cors_origins: args.cors_origin,
        max_queue: args.max_queue,
        max_body_size: args.max_body_size,
        request_timeout: Duration::from_secs(args.request_timeout),
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
    };
    Ok(server::run(options, signals, |event| match event {
        Event::Listening(address) => log::info!("listening on http://{address}; loading the model"),
        Event::Ready => log::info!("ready"),
        Event::Draining { under_way } => {
            log::info!("draining: {under_way} requests under way; a second signal ends them")
        }
        Event::Ended { broken_off: 0 } => log::info!("ended"),
        Event::Ended { broken_off } => log::warn!("ended; {broken_off} requests were broken off"),
    })?)
}

/// Gives SIGTERM and SIGINT, from now on, one a call: none is lost between two calls.
#[cfg(unix)]
fn signals() -> impl AsyncFnMut() {
    use tokio::signal::unix::{SignalKind, signal};
    let [mut terminate, mut interrupt] = [SignalKind::terminate(), SignalKind::interrupt()]
        .map(|kind| signal(kind).expect("these signals can be listened to"));
    async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// The same where Ctrl-C is the only one.
#[cfg(not(unix))]
fn signals() -> impl AsyncFnMut() {
    async || {
        // Where it cannot be listened to, nothing ends the server but its end.
        let _ = tokio::signal::ctrl_c().await;
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn every_flag_has_its_variable() {
        let command = super::super::Args::command();
        let serve = command.find_subcommand("serve").unwrap();
        for arg in serve.get_arguments().filter(|arg| arg.get_long().is_some()) {
            let name = format!("QUAVER_{}", arg.get_id().as_str().to_ascii_uppercase());
            assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(name.as_str()));
        }
    }
}
