//! Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's `prompt_logprobs`.

use quaver_core::engine::Token;
use serde_json::{Map, Value, json};

use super::model::Model;

/// Spells tokens.
pub struct Speller<'a> {
    model: &'a Model,
}

impl<'a> Speller<'a> {
    /// With a model's tokenizer; without one a token is spelt by its number.
    pub fn new(model: &'a Model) -> Self {
        Speller { model }
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        match self.model.text.tokenizer() {
            Ok(tokenizer) => tokenizer.token_bytes(id),
            Err(_) => format!("token_id:{id}").into_bytes(),
        }
    }

    /// The token's text where it is text, else its bytes: what is no text by itself still has a name of its own.
    pub fn name(&self, id: u32) -> String {
        match String::from_utf8(self.bytes(id)) {
            Ok(text) => text,
            Err(error) => {
                error.as_bytes().iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
            }
        }
    }

    /// `choices[].logprobs.content[]` of a chat.
    pub fn chat(&self, token: &Token) -> Value {
        let entry = |id: u32, logprob: f32| {
            let bytes = self.bytes(id);
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": finite(logprob), "bytes": bytes})
        };
        let mut value = entry(token.id, token.logprob);
        value["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
        value
    }

    /// A value of vLLM's `prompt_logprobs`: by token id, the prompt's own token and the likeliest.
    pub fn prompt(&self, token: &Token) -> Value {
        let entry = |id: u32, logprob: f32, rank: usize| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.name(id)});
        let mut map = Map::new();
        map.insert(token.id.to_string(), entry(token.id, token.logprob, token.rank as usize));
        for (i, &(id, logprob)) in token.top.iter().enumerate() {
            map.entry(id.to_string()).or_insert_with(|| entry(id, logprob, i + 1));
        }
        Value::Object(map)
    }
}

/// `choices[].logprobs` of a text completion, token by token.
#[derive(Default)]
pub struct TextLogprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters so far.
    offset: usize,
}

impl TextLogprobs {
    /// Begins at a place of the text, in characters.
    pub fn at(offset: usize) -> Self {
        TextLogprobs { offset, ..Self::default() }
    }

    /// A token without a score: the first of a prompt.
    pub fn push_unscored(&mut self, speller: &Speller, id: u32) {
        self.push_name(&speller.name(id));
        self.token_logprobs.push(Value::Null);
        self.top_logprobs.push(Value::Null);
    }

    /// A token with its score.
    pub fn push(&mut self, speller: &Speller, token: &Token) {
        let name = speller.name(token.id);
        self.push_name(&name);
        self.token_logprobs.push(finite(token.logprob));
        // OpenAI's word for these is: the likeliest, and the token itself where it is not among them.
        let mut top: Map<String, Value> = Map::new();
        for &(id, logprob) in &token.top {
            top.entry(speller.name(id)).or_insert_with(|| finite(logprob));
        }
        top.entry(name).or_insert_with(|| finite(token.logprob));
        self.top_logprobs.push(Value::Object(top));
    }

    fn push_name(&mut self, name: &str) {
        self.tokens.push(name.into());
        self.text_offset.push(self.offset);
        self.offset += name.chars().count();
    }

    /// Where the next token begins, in characters.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The object.
    pub fn json(self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.token_logprobs, "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset
        })
    }
}

/// JSON has no infinity; -9999 is what OpenAI gives instead.
fn finite(logprob: f32) -> Value {
    let logprob = if logprob.is_finite() { logprob } else { -9999.0 };
    f64::from(logprob).into()
}
