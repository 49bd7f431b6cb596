//! Texts to calibrate with and to evaluate on: JSON lines, or plain text. Each becomes token ids with the model's own
//! tokenizer and chat template. `quantize` and `eval` are the callers.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use quaver_core::checkpoint::Checkpoint;
use quaver_core::philox::philox;
use quaver_core::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::text::{ChatTemplate, RenderOptions, Tokenizer};
use crate::text_model::{Prompt, chat_template};

/// Bytes of a line, at most: a JSON line of a book has a few MiB.
const MAX_LINE: u64 = 64 << 20;

/// One text, as a file gives it.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// Plain text.
    Text(String),
    /// A file of plain text, which is as long as a book: many samples to calibrate with.
    Book(String),
    /// A conversation, an OpenAI `messages` array, to be rendered whole by the chat template.
    Messages(Value),
    /// Token ids as they are.
    Ids(Vec<u32>),
}

/// A JSON line: the first of these fields that it has is its text; others are ignored.
#[derive(Deserialize)]
struct Line {
    input_ids: Option<Vec<u32>>,
    messages: Option<Value>,
    text: Option<String>,
    prompt: Option<String>,
}

/// Reads a file: `.jsonl` and `.json` have a sample a line, `{"text"}`, `{"messages"}`, `{"prompt"}` or `{"input_ids"}`;
/// anything else is one plain text. At most `most` samples are read.
pub fn read(path: &Path, most: usize) -> Result<Vec<Sample>> {
    let name = path.display().to_string();
    let is_json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("json"));
    if !is_json {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::text(&name, format!("is not UTF-8 from byte {at} on; convert it first"))
        })?;
        return if text.is_empty() {
            Err(Error::text(name, "is empty; give a text"))
        } else {
            Ok(vec![Sample::Book(text)])
        };
    }
    let mut samples = Vec::new();
    for (i, line) in lines(path)?.enumerate() {
        let text = line?;
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text)
            .map_err(|e| Error::text(&name, format!("line {}: {e}; a JSON object a line is expected", i + 1)))?;
        samples.push(line.sample().ok_or_else(|| {
            Error::text(&name, format!("line {}: has none of text, messages, prompt and input_ids; give one", i + 1))
        })?);
        if samples.len() == most {
            break;
        }
    }
    if samples.is_empty() {
        return Err(Error::text(name, "has no sample; give a JSON object a line, such as {\"text\": ...}"));
    }
    Ok(samples)
}

/// The lines of a file, of a bounded length each.
pub fn lines(path: &Path) -> Result<impl Iterator<Item = Result<String>>> {
    let mut file = BufReader::new(File::open(path).map_err(|e| Error::io("read", path, e))?);
    let path = path.to_owned();
    Ok(std::iter::from_fn(move || {
        let mut line = Vec::new();
        let read = std::io::Read::take(&mut file, MAX_LINE).read_until(b'\n', &mut line);
        match read {
            Err(e) => Some(Err(Error::io("read", &path, e))),
            Ok(0) => None,
            Ok(n) if n as u64 == MAX_LINE => {
                Some(Err(Error::text(path.display().to_string(), "has a line of more than 64 MiB; split it")))
            }
            Ok(_) => Some(String::from_utf8(line).map_err(|_| {
                Error::text(path.display().to_string(), "has a line that is not UTF-8; convert the file first")
            })),
        }
    }))
}

impl Line {
    fn sample(self) -> Option<Sample> {
        let Line { input_ids, messages, text, prompt } = self;
        let ids = input_ids.map(Sample::Ids);
        ids.or(messages.map(Sample::Messages)).or(text.or(prompt).map(Sample::Text))
    }
}

impl Sample {
    /// Its tokens: of a text with the begin-of-text token in front, of a conversation as the template renders it.
    pub fn encode(&self, encoder: &Encoder) -> Result<Vec<u32>> {
        match self {
            Sample::Ids(ids) => encoder.known(ids.clone()),
            Sample::Text(text) | Sample::Book(text) => encoder.text(text),
            Sample::Messages(messages) => encoder.chat(messages, &RenderOptions::default()),
        }
    }
}

/// What makes token ids of texts: a model's tokenizer and chat template, without the model.
pub struct Encoder {
    name: String,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    /// The begin-of-text token.
    pub bos: Option<u32>,
    vocab: usize,
}

impl Encoder {
    /// Of a checkpoint. One without a tokenizer takes token ids alone.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let files = checkpoint.files();
        Ok(Encoder {
            name: files.name(),
            tokenizer: files.get("tokenizer.json")?.map(|json| Tokenizer::from_json(&json)).transpose()?,
            template: chat_template(files)?,
            bos: checkpoint.generation().bos,
            vocab: checkpoint.config().vocab,
        })
    }

    /// A text's tokens, the begin-of-text token in front where the tokenizer puts it there.
    pub fn text(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let bos = self.bos.and_then(|id| tokenizer.id_to_token(id));
        self.known(tokenizer.encode(text, !bos.is_some_and(|bos| text.starts_with(&bos)))?)
    }

    /// The tokens of what is to be answered. Of a conversation that ends with the assistant, the answer goes on with
    /// that message.
    pub fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.text(text),
            Prompt::Ids(ids) => self.known(ids.clone()),
            Prompt::Messages(messages) => {
                let last = messages.as_array().and_then(|messages| messages.last());
                let begun = last.is_some_and(|last| last["role"] == "assistant");
                let options = RenderOptions {
                    add_generation_prompt: !begun,
                    continue_final_message: begun,
                    ..RenderOptions::default()
                };
                self.chat(messages, &options)
            }
        }
    }

    fn chat(&self, messages: &Value, options: &RenderOptions) -> Result<Vec<u32>> {
        let why = "this model brings none; give texts instead of messages";
        let template = self.template.as_ref().ok_or_else(|| Error::text("chat template", why))?;
        self.known(self.tokenizer()?.encode_chat(template, messages, options)?)
    }

    /// Token ids that the model has.
    fn known(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(&id) => Err(Error::TokenOutOfRange { id, vocab: self.vocab }),
            None => Ok(ids),
        }
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::text("tokenizer.json", format!("{} has none; give input_ids", self.name));
        self.tokenizer.as_ref().ok_or_else(missing)
    }
}

/// Puts samples in an order that a seed decides (Fisher and Yates).
fn shuffle<T>(samples: &mut [T], seed: u64) {
    for i in (1..samples.len()).rev() {
        let [word, ..] = philox([i as u32, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
        samples.swap(i, ((u64::from(word) * (i as u64 + 1)) >> 32) as usize);
    }
}

/// Which samples are taken of a file, and how much of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The file, which [`read`] reads.
    pub file: PathBuf,
    /// Samples, at most.
    pub most: usize,
    /// Tokens of a sample, at most.
    pub length: usize,
    /// Draws samples of the whole file; None for its first ones.
    pub seed: Option<u64>,
}

impl Draw {
    /// The samples' token ids. Of several samples they are the beginning of each; of a book, one piece after another, each
    /// with the begin-of-text token in front.
    pub fn samples(&self, encoder: &Encoder) -> Result<Vec<Vec<u32>>> {
        let samples = read(&self.file, if self.seed.is_some() { usize::MAX } else { self.most })?;
        if let [Sample::Book(text)] = &samples[..] {
            let ids = encoder.text(text)?;
            let (bos, text) = split_bos(&ids, encoder.bos);
            let pieces = self.drawn(text.chunks(self.length - bos.len()).collect());
            return Ok(pieces.into_iter().map(|piece| [bos, piece].concat()).collect());
        }
        let cut = |sample: Sample| {
            let mut ids = sample.encode(encoder)?;
            ids.truncate(self.length);
            Ok(ids)
        };
        self.drawn(samples).into_iter().map(cut).collect()
    }

    fn drawn<T>(&self, mut samples: Vec<T>) -> Vec<T> {
        if let Some(seed) = self.seed {
            shuffle(&mut samples, seed);
        }
        samples.truncate(self.most);
        samples
    }
}

/// The begin-of-text token in front, where there is one, and the rest.
pub fn split_bos(ids: &[u32], bos: Option<u32>) -> (&[u32], &[u32]) {
    ids.split_at(usize::from(bos.is_some() && ids.first().copied() == bos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_file(name: &str, text: &str, most: usize, seed: Option<u64>) -> Vec<Vec<u32>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let encoder = Encoder::open(&Checkpoint::open(crate::files(None, true).unwrap()).unwrap()).unwrap();
        Draw { file: path, most, length: 8, seed }.samples(&encoder).unwrap()
    }

    #[test]
    fn a_plain_text_is_many_samples_and_a_json_line_is_one() {
        let text = "It was a cold morning in the old house. Nobody said a word.";
        let pieces = cut_file("a.txt", text, 512, None);
        assert!(pieces.len() > 1 && pieces.iter().all(|piece| piece[0] == 4080 && piece.len() <= 8), "{pieces:?}");
        let line = serde_json::json!({"text": text}).to_string();
        assert_eq!(cut_file("a.jsonl", &line, 512, None), pieces[..1]);
    }

    #[test]
    fn a_seed_draws_pieces_of_a_plain_text_too() {
        let text = "It was a cold morning in the old house. Nobody said a word. The fire was out. ".repeat(8);
        let all = cut_file("a.txt", &text, 512, None);
        let drawn = cut_file("a.txt", &text, 4, Some(1));
        assert_eq!(drawn, cut_file("a.txt", &text, 4, Some(1)));
        assert!(drawn != all[..4] && drawn.len() == 4 && drawn.iter().all(|piece| all.contains(piece)), "{drawn:?}");
    }
}
