//! Chat templates: messages to the text of a prompt.
//!
//! Invariant: the text equals what `apply_chat_template` of transformers renders. A template comes with the model, so a
//! stranger wrote it: endless loops, recursion, growing strings and deep values end with an error. What minijinja takes
//! no fuel for is comparing lists that hold one list many times over, and adding a list to itself again and again: a
//! template is therefore never taken from a client of the server.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value as Jinja};
use quaver_core::{Error, Result};
use serde_json::{Map, Value};

use super::messages::{Messages, cut, kind, to_jinja};
use super::one_line;
use super::tojson::tojson;

const WHAT: &str = "chat template";

/// Steps that a template may take; 64 bytes of text are one step too, so that a rendering ends within 128 MB. Llama 3's
/// template takes 60 steps a message: 131,072 tokens in messages of six tokens each are 1.3 million steps.
const FUEL: u64 = 2_000_000;

/// The stack of a rendering. Freeing a list takes stack for each level of it, and `FUEL` pays for two million levels:
/// half of this (measured; memory that is not touched costs nothing).
const STACK: usize = 256 << 20;

/// Levels of a value that is written out. JSON readers accept as many.
const MAX_DEPTH: usize = 128;

/// Nested macros, includes and recursive loops: far more than any template of a model has.
const RECURSION: usize = 100;

/// The tokens that a template knows by name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What [`RenderOptions`] has a field for, or [`ChatTemplate::render`] an argument.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "continue_final_message"];

/// The chat template of a model, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: Map<String, Value>,
}

/// What a template is given besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// End with the header of the answer, so that the model writes one.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the model goes on with it. Excludes `add_generation_prompt`.
    pub continue_final_message: bool,
    /// The functions that the model may call: an array in OpenAI's form.
    pub tools: Option<Value>,
    /// `date_string`: the day that the prompt calls today, such as `26 Jul 2024`. If absent, the template decides; most
    /// take the clock.
    pub date: Option<String>,
    /// More variables by name (`chat_template_kwargs`), such as `documents`.
    pub extra: Map<String, Value>,
}

impl ChatTemplate {
    /// The template of a model's files, or `None` where they hold none. `chat_template.jinja` wins over the
    /// `chat_template` of `tokenizer_config.json`, which is one template or a list of `{name, template}`.
    pub fn from_files(tokenizer_config: Option<&[u8]>, chat_template_jinja: Option<&[u8]>) -> Result<Option<Self>> {
        let config = match tokenizer_config {
            Some(json) => object("tokenizer_config.json", json)?,
            None => Map::new(),
        };
        let templates = match chat_template_jinja {
            Some(source) => {
                let source = std::str::from_utf8(source);
                let source = source.map_err(|_| Error::text("chat_template.jinja", "not UTF-8; save it as UTF-8"))?;
                vec![("default".to_string(), source.to_string())]
            }
            None => templates(config.get("chat_template").unwrap_or(&Value::Null))?,
        };
        if templates.is_empty() {
            return Ok(None);
        }
        let mut env = environment()?;
        for (name, source) in templates {
            env.add_template_owned(name, without_generation_tags(&source)).map_err(template_error)?;
        }
        let mut template = ChatTemplate { env, special_tokens: Map::new() };
        template.add_special_tokens(&config);
        Ok(Some(template))
    }

    /// Adds the tokens of a `special_tokens_map.json` that `tokenizer_config.json` does not name.
    pub fn with_special_tokens_map(mut self, special_tokens_map: &[u8]) -> Result<Self> {
        self.add_special_tokens(&object("special_tokens_map.json", special_tokens_map)?);
        Ok(self)
    }

    /// The prompt for `messages`, an array of `{"role", "content"}` objects in OpenAI's form.
    ///
    /// The text has its `<|begin_of_text|>` already: encode it without special tokens, or use
    /// [`Tokenizer::encode_chat`](super::Tokenizer::encode_chat), which does. Lists of text parts are joined to one
    /// string. Fails if the messages are malformed, if the template refuses them (`raise_exception`), or if it takes
    /// too much work.
    pub fn render(&self, messages: &Value, options: &RenderOptions) -> Result<String> {
        let mut messages = Messages::check(messages)?;
        if options.continue_final_message {
            if options.add_generation_prompt {
                let why = "excludes add_generation_prompt; choose one of the two";
                return Err(Error::text("continue_final_message", why));
            }
            messages.mark_last()?;
        }
        let context = self.context(&messages, options)?;
        let template = self.env.get_template(self.name(options)?).map_err(template_error)?;
        let rendered = on_a_large_stack(|| template.render(context).map_err(template_error))?;
        if options.continue_final_message { cut(&rendered) } else { Ok(rendered) }
    }

    fn name(&self, options: &RenderOptions) -> Result<&'static str> {
        if options.tools.is_some() && self.env.get_template("tool_use").is_ok() {
            return Ok("tool_use");
        }
        if self.env.get_template("default").is_ok() {
            return Ok("default");
        }
        Err(Error::text(WHAT, "none is named default; add one to tokenizer_config.json"))
    }

    fn context(&self, messages: &Messages, options: &RenderOptions) -> Result<Jinja> {
        if let Some(name) = options.extra.keys().find(|name| RESERVED.contains(&name.as_str())) {
            let why = format!("{name} cannot be set here; use the request's own field");
            return Err(Error::text("chat_template_kwargs", why));
        }
        let tools = options.tools.as_ref().unwrap_or(&Value::Null);
        if !matches!(tools, Value::Null | Value::Array(_)) {
            return Err(Error::text("tools", format!("{}; give an array of functions", kind(tools))));
        }
        let mut context: Vec<(&str, Jinja)> = vec![("documents", Jinja::from(()))];
        let named = self.special_tokens.iter().chain(&options.extra);
        context.extend(named.map(|(name, value)| (name.as_str(), to_jinja(value))));
        if let Some(date) = &options.date {
            context.push(("date_string", Jinja::from(date.as_str())));
        }
        context.push(("messages", messages.to_jinja()));
        context.push(("tools", to_jinja(tools)));
        context.push(("add_generation_prompt", Jinja::from(options.add_generation_prompt)));
        // Of a name that comes twice, the last counts.
        Ok(Jinja::from_pairs(context))
    }

    fn add_special_tokens(&mut self, config: &Map<String, Value>) {
        for name in SPECIAL_TOKENS {
            let token = config.get(name).map(|token| token.get("content").unwrap_or(token));
            if let Some(Value::String(token)) = token {
                self.special_tokens.entry(name).or_insert_with(|| token.as_str().into());
            }
        }
    }
}

/// What transformers gives every template.
fn environment() -> Result<Environment<'static>> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_debug(false);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_formatter(|out, state, value| {
        pay(state, value, 0)?;
        minijinja::escape_formatter(out, state, value)
    });
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", tojson);
    // Python's strings and mappings are sequences too.
    env.add_test("sequence", |value: Jinja| {
        matches!(value.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::String)
    });
    env.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Refused))
    });
    env.add_function("strftime_now", |format: &str| {
        jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now())
            .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    Ok(env)
}

/// Takes the fuel for writing `value` out. minijinja takes it afterwards, which is too late where a list holds itself,
/// or holds one list twice, that list another twice, and so on.
fn pay(state: &State, value: &Jinja, depth: usize) -> std::result::Result<(), minijinja::Error> {
    if depth > MAX_DEPTH {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "a value has more than 128 levels"));
    }
    let is_map = value.kind() == ValueKind::Map;
    if !is_map && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Ok(());
    }
    for child in value.try_iter()?.checked() {
        state.consume_fuel(1)?;
        let child = child?;
        let child = if is_map { value.get_item(&child)? } else { child };
        pay(state, &child, depth + 1)?;
    }
    Ok(())
}

/// Runs a rendering, whatever stack its caller has left.
fn on_a_large_stack<T: Send>(render: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, render);
        let thread =
            thread.map_err(|e| Error::text(WHAT, format!("no thread to render it ({e}); free some memory")))?;
        let crashed = || Err(Error::text(WHAT, "crashes the template engine; use another template"));
        thread.join().unwrap_or_else(|_| crashed())
    })
}

/// Marks an error as the template's own `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Refused;

fn template_error(error: minijinja::Error) -> Error {
    let mut refusal = Some(&error as &dyn std::error::Error);
    let mut detail = error.detail();
    while let Some(cause) = refusal {
        if let Some(cause) = cause.downcast_ref::<minijinja::Error>() {
            if cause.kind() == ErrorKind::OutOfFuel {
                let why = format!("takes more than {FUEL} steps; send fewer messages or use another template");
                return Error::text(WHAT, why);
            }
            detail = cause.detail();
        }
        if cause.is::<Refused>() {
            let why = format!("refuses the messages: {}", one_line(detail.unwrap_or_default()));
            return Error::text(WHAT, why);
        }
        refusal = cause.source();
    }
    let line = error.line().unwrap_or(0);
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    let why = format!("line {line}: {}{detail}; correct it or use another template", error.kind());
    Error::text(WHAT, one_line(why))
}

fn object(file: &str, json: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(json)
        .map_err(|e| Error::text(file, format!("not a JSON object ({}); download the file again", one_line(e))))
}

/// `chat_template` of a `tokenizer_config.json`: names and sources.
fn templates(chat_template: &Value) -> Result<Vec<(String, String)>> {
    const FILE: &str = "tokenizer_config.json";
    match chat_template {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![("default".into(), source.clone())]),
        Value::Array(list) => {
            let named = list.iter().enumerate().map(|(index, entry)| {
                let (name, source) = (entry["name"].as_str(), entry["template"].as_str());
                let (Some(name), Some(source)) = (name, source) else {
                    let why = format!("chat_template[{index}] must have a string name and template; correct it");
                    return Err(Error::text(FILE, why));
                };
                Ok((name.to_string(), source.to_string()))
            });
            named.collect()
        }
        other => {
            let why = format!("chat_template {}; give a string or a list of {{name, template}}", kind(other));
            Err(Error::text(FILE, why))
        }
    }
}

/// Turns `{% generation %}` and `{% endgeneration %}`, with which transformers marks what the assistant said for
/// training masks, into an `if` that always holds: they change nothing of the text.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let Some((inside, after)) = tag[2..].split_once("%}") else {
            rest = tag;
            break;
        };
        let trimmed = |c: char| c.is_whitespace() || c == '-' || c == '+';
        let replacement = match inside.trim_matches(trimmed) {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(with) => {
                text.push_str("{%");
                text.push_str(&inside.replace(inside.trim_matches(trimmed), with));
                text.push_str("%}");
                rest = after;
            }
            None => {
                text.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    text + rest
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;
