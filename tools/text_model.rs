//! What a model is besides its engine: its name, how its text becomes tokens and back, and how it is meant to be sampled.

use std::sync::Arc;

use quaver_core::checkpoint::{Files, GenerationConfig};
use quaver_core::sampler::SamplingParams;
use quaver_core::{Error, Result};
use serde_json::Value;

use crate::text::{ChatTemplate, RenderOptions, Tokenizer, TokenizerReading};

/// What to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text as it is. The begin-of-text token is put before it unless it starts with that already.
    Text(String),
    /// Token ids as they are.
    Ids(Vec<u32>),
    /// A conversation, an OpenAI `messages` array, rendered by the model's chat template.
    Messages(Value),
}

/// See the module.
pub struct TextModel {
    pub(crate) name: String,
    pub(crate) defaults: GenerationConfig,
    pub(crate) tokenizer: Option<Arc<TokenizerReading>>,
    pub(crate) template: Option<ChatTemplate>,
    /// Tokens that a sequence can have. A text that cannot fit is refused before it is tokenized, which costs time and
    /// many times the text's memory.
    pub(crate) context: usize,
}

impl TextModel {
    /// The model's name: its folder as it was given, its Hugging Face id, or `quaver-demo`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sampling that the model's `generation_config.json` recommends.
    pub fn sampling_defaults(&self) -> SamplingParams {
        self.defaults.sampling()
    }

    /// Tokens that end an answer.
    pub fn eos(&self) -> &[u32] {
        &self.defaults.eos
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    /// Where it is longer than the context can be, or the model has no tokenizer or chat template for it.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Ids(ids) => self.check_count(ids.len()).map(|()| ids.clone()),
            Prompt::Text(text) => {
                let tokenizer = self.tokenizer()?;
                let bos = self.defaults.bos.and_then(|id| tokenizer.id_to_token(id));
                self.encode_text(text, !bos.is_some_and(|bos| text.starts_with(&bos)))
            }
            Prompt::Messages(messages) => {
                let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                self.encode_chat(messages, &options)
            }
        }
    }

    /// The tokens of a conversation, rendered with options.
    pub fn encode_chat(&self, messages: &Value, options: &RenderOptions) -> Result<Vec<u32>> {
        let why = "this model brings none; give a plain text (generate --raw, or /v1/completions)";
        let template = self.template.as_ref().ok_or_else(|| Error::text("chat template", why))?;
        // The template has written the special tokens.
        self.encode_text(&template.render(messages, options)?, false)
    }

    /// The tokens of a text, with those that the tokenizer adds where `add_special`.
    pub fn encode_text(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let most = self.context.saturating_mul(tokenizer.longest_token());
        if text.len() > most {
            return Err(Error::TextTooLong { bytes: text.len(), most, context: self.context });
        }
        tokenizer.encode(text, add_special)
    }

    /// Refuses so many token ids where the context holds fewer, before anybody looks at them.
    pub fn check_count(&self, ids: usize) -> Result<()> {
        match ids > self.context {
            true => Err(Error::PromptTooLong { got: ids, max: self.context }),
            false => Ok(()),
        }
    }

    /// The tokenizer; waits until it is read.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing =
            || Error::text("tokenizer.json", format!("{} has none; give token ids (--prompt-ids)", self.name));
        self.tokenizer.as_ref().ok_or_else(missing)?.get()
    }
}

/// The chat template of a model's files, with the special tokens that it may name; None where they hold none.
pub fn chat_template(files: &Files) -> Result<Option<ChatTemplate>> {
    let (config, jinja) = (files.get("tokenizer_config.json")?, files.get("chat_template.jinja")?);
    let Some(template) = ChatTemplate::from_files(config.as_deref(), jinja.as_deref())? else { return Ok(None) };
    match files.get("special_tokens_map.json")? {
        Some(map) => template.with_special_tokens_map(&map).map(Some),
        None => Ok(Some(template)),
    }
}
