//! `quaver chat`: a conversation in the terminal, or one that a script drives through stdin. Answers go to stdout; what
//! is for a person alone (banner, hints, notes) goes to stderr and only to a terminal. No turn ends the program.

mod input;
mod settings;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use quaver::core::engine::FinishReason;
use quaver::{Error, Llm, Progress, Prompt, Request};
use serde_json::{Value, json};

use self::input::{Entry, Input};
use self::settings::Settings;
use super::flags::{ModelFlags, SamplingFlags, SystemFlag};
use super::save::save;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    system: SystemFlag,
    #[command(flatten)]
    sampling: SamplingFlags,
}

const HELP: &str = r#"/help               this
/system TEXT        set the system message; without TEXT there is none
/set NAME VALUE     set a sampling parameter; without arguments, show all
/reset              forget the conversation
/save FILE          write the conversation as OpenAI messages
/bye                end
A line that ends in \ goes on in the next; """ opens a block of lines that """ closes.
Ctrl-C stops an answer, Ctrl-D ends."#;

pub fn run(args: Args) -> Result<()> {
    args.sampling.check()?;
    let llm = args.model.open(1)?;
    if !llm.has_tokenizer() {
        let why = format!("{} has none, so that it cannot chat; use quaver generate --prompt-ids", llm.name());
        return Err(Error::text("tokenizer.json", why).into());
    }
    if !llm.has_chat_template() {
        let why = format!("{} brings none, so that it cannot chat; use quaver generate --raw", llm.name());
        return Err(Error::text("chat template", why).into());
    }
    let mut input = Input::open();
    let mut chat = Chat {
        settings: Settings { params: args.sampling.params(llm.sampling_defaults()), stop: args.sampling.stop.clone() },
        llm,
        system: args.system.get(),
        turns: Vec::new(),
        stopped: Arc::default(),
        terminal: input.is_terminal(),
    };
    if chat.terminal {
        // A script's Ctrl-C ends the script.
        let stopped = Arc::clone(&chat.stopped);
        ctrlc::set_handler(move || stopped.store(true, Ordering::Relaxed))?;
        eprintln!("{} on {}; /help says what there is", chat.llm.name(), chat.llm.device().name);
    }
    loop {
        let result = match input.next() {
            Ok(None) => return Ok(()),
            Ok(Some(Entry::Command(command))) => chat.command(&command),
            Ok(Some(Entry::Message(message))) => chat.turn(message),
            Err(error) => Err(error),
        };
        match result {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return Ok(()),
            // The terminal, the pipe or the reader is gone.
            Err(error) if error.is::<io::Error>() => return Err(error),
            Err(error) => super::print_error(&error),
        }
    }
}

/// A conversation under way.
struct Chat {
    llm: Llm,
    system: Option<String>,
    /// Messages of user and assistant in turn; between turns the last is the assistant's.
    turns: Vec<Value>,
    settings: Settings,
    /// Set by Ctrl-C.
    stopped: Arc<AtomicBool>,
    terminal: bool,
}

impl Chat {
    /// An OpenAI `messages` array.
    fn messages(&self) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Tells a person, and no script.
    fn note(&self, text: &str) {
        if self.terminal {
            eprintln!("({text})");
        }
    }

    /// Answers a message. Where that fails, the conversation is what it was.
    fn turn(&mut self, message: String) -> Result<ControlFlow<()>> {
        self.turns.push(json!({"role": "user", "content": message}));
        match self.answer() {
            Ok(answer) => {
                self.turns.push(json!({"role": "assistant", "content": answer}));
                Ok(ControlFlow::Continue(()))
            }
            Err(error) => {
                self.turns.pop();
                Err(error)
            }
        }
    }

    /// Streams an answer to the conversation and gives its text, which is a part of one where Ctrl-C ended it.
    fn answer(&mut self) -> Result<String> {
        let Settings { params, stop } = self.settings.clone();
        let max_tokens = params.max_tokens;
        let request = Request { prompt: Prompt::Messages(self.messages()), params, stop };
        self.stopped.store(false, Ordering::Relaxed);
        let (stopped, mut out, mut failed) = (Arc::clone(&self.stopped), io::stdout().lock(), None);
        let completions = self.llm.run(vec![request], |_, progress| {
            let Progress::Text(text) = progress else { return ControlFlow::Continue(()) };
            if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            if stopped.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        let completion = match completions {
            Ok(mut completions) => completions.remove(0),
            Err(Error::PromptTooLong { got, max }) => {
                let why = format!(
                    "has {got} tokens, the context holds {max} and needs room for an answer; \
                     start over with /reset, or raise --max-model-len"
                );
                return Err(Error::text("the conversation", why).into());
            }
            Err(error) => return Err(error.into()),
        };
        writeln!(out)?;
        if self.stopped.load(Ordering::Relaxed) {
            self.note("stopped");
        } else if completion.finish_reason == FinishReason::Length {
            let is_full = completion.token_ids.len() < max_tokens;
            self.note(if is_full {
                "the context is full; /reset starts over"
            } else {
                "cut off by max_tokens; see /set"
            });
        }
        Ok(completion.text)
    }

    fn command(&mut self, command: &str) -> Result<ControlFlow<()>> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "help" => writeln!(io::stdout(), "{HELP}")?,
            "bye" => return Ok(ControlFlow::Break(())),
            "reset" => {
                self.turns.clear();
                self.note("the conversation is forgotten");
            }
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.note(if rest.is_empty() { "no system message" } else { "the system message is set" });
            }
            "set" => self.set(rest)?,
            "save" if rest.is_empty() => return Err(Error::text("/save", "give the name of a file").into()),
            "save" => {
                save(Path::new(rest), &format!("{:#}\n", self.messages())).map_err(|e| Error::io("write", rest, e))?;
                self.note(&format!("saved to {rest}"));
            }
            _ => return Err(Error::text(format!("/{name}"), "is no command; see /help").into()),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn set(&mut self, arguments: &str) -> Result<()> {
        if arguments.is_empty() {
            let mut out = io::stdout().lock();
            for (name, value) in self.settings.list() {
                writeln!(out, "{name:<18}  {value}")?;
            }
            return Ok(());
        }
        let (name, value) = arguments.split_once(char::is_whitespace).unwrap_or((arguments, ""));
        if value.is_empty() {
            return Err(Error::text("/set", "give a name and a value, such as /set temperature 0.6").into());
        }
        Ok(self.settings.set(name, value.trim())?)
    }
}
