//! Text to token ids and back, from a `tokenizer.json`.
//!
//! Invariant: ids and text equal those of Hugging Face's fast tokenizer on the same file. The file is read part by part
//! because deserializing it in one go buffers the vocabulary twice and takes twice as long.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use quaver_core::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;

use super::chat_template::{ChatTemplate, RenderOptions};
use super::detokenizer::{Decoding, Detokenizer};
use super::one_line;
use super::pieces::{can_be_cut, pieces};

const FILE: &str = "tokenizer.json";

/// Bytes of a text that are encoded at once.
const PIECE: usize = 1 << 20;

/// The vocabulary of a model and the rules of its use. A clone is cheap and shares them.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    tokenizer: tokenizers::Tokenizer,
    decoding: Decoding,
    vocab_size: usize,
    can_be_cut: bool,
    /// See [`Tokenizer::longest_token`].
    longest: OnceLock<usize>,
}

/// The file's outline. `truncation` and `padding` are left out: Hugging Face switches both off unless a call asks.
#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct ModelType {
    #[serde(rename = "type", default = "bpe")]
    name: String,
}

// The oldest files do not name the type.
fn bpe() -> String {
    "BPE".into()
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// Fails if the file is damaged, or is not a BPE tokenizer with a byte-level (Llama 3) or SentencePiece-like
    /// (Llama 2) decoder.
    pub fn from_json(tokenizer_json: &[u8]) -> Result<Self> {
        // The library indexes and unwraps while it builds from contradictory files; a stranger's file must not end us.
        catch_unwind(AssertUnwindSafe(|| build(tokenizer_json))).unwrap_or_else(|_| {
            Err(Error::text(FILE, "its parts contradict each other; download the file again or re-export it"))
        })
    }

    /// The ids of `text`. Special tokens written out in the text are recognised. `add_special` adds what the file's
    /// post-processor adds: for Llama one `<|begin_of_text|>` in front.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.encode_pieces(text, add_special, PIECE)
    }

    /// The same; `least` are the bytes of a piece.
    fn encode_pieces(&self, text: &str, add_special: bool, least: usize) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let least = if self.shared.can_be_cut { least } else { text.len() };
        for (i, piece) in pieces(text, least).enumerate() {
            let encoding = self.shared.tokenizer.encode_fast(piece, add_special && i == 0);
            let encoding = encoding.map_err(|e| {
                Error::text("prompt", format!("cannot be tokenized ({}); shorten or change the text", one_line(e)))
            })?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(ids)
    }

    /// The ids of a conversation: [`ChatTemplate::render`], then [`encode`](Self::encode) without special tokens,
    /// because the template has written them already. The one right way from messages to ids.
    pub fn encode_chat(&self, template: &ChatTemplate, messages: &Value, options: &RenderOptions) -> Result<Vec<u32>> {
        self.encode(&template.render(messages, options)?, false)
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary become nothing.
    /// `skip_special` leaves the special tokens out. Spaces before punctuation are kept whatever
    /// `clean_up_tokenization_spaces` says: transformers ignores it for BPE since 5.7, because it damages text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let text = self.shared.tokenizer.decode(ids, skip_special);
        text.map_err(|e| Error::text(FILE, format!("cannot decode ({}); re-export the tokenizer", one_line(e))))
    }

    /// A streaming decoder: what it yields adds up to what [`decode`](Self::decode) gives for all ids.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.tokenizer.token_to_id(token)
    }

    /// The token as the vocabulary spells it: a byte-level space is `Ġ`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.shared.tokenizer.id_to_token(id)
    }

    /// The bytes that a token stands for within a text; of a special token those that it is spelt with, and none of an
    /// id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.id_to_token(id) else { return Vec::new() };
        if self.is_special_token(&token) { token.into_bytes() } else { self.shared.decoding.bytes(&token) }
    }

    /// Bytes of the longest token: no text of more than so many for each token is written with these tokens. Looked for
    /// once, which takes some hundredths of a second.
    pub fn longest_token(&self) -> usize {
        let longest = || (0..self.vocab_size() as u32).map(|id| self.token_bytes(id).len()).max();
        *self.shared.longest.get_or_init(|| longest().unwrap_or(0))
    }

    /// Whether the id is a special token, which `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.id_to_token(id).is_some_and(|token| self.is_special_token(&token))
    }

    pub(super) fn is_special_token(&self, token: &str) -> bool {
        self.shared.tokenizer.get_added_vocabulary().is_special_token(token)
    }

    pub(super) fn decoding(&self) -> &Decoding {
        &self.shared.decoding
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.shared.vocab_size).finish_non_exhaustive()
    }
}

fn build(tokenizer_json: &[u8]) -> Result<Tokenizer> {
    let outline: Outline = serde_json::from_slice(tokenizer_json)
        .map_err(|e| Error::text(FILE, format!("not a tokenizer ({}); download the file again", one_line(e))))?;
    let ModelType { name } = part("model", serde_json::from_str(outline.model.get()))?;
    if name != "BPE" {
        return Err(Error::text(FILE, format!("the model type {name} is not supported; convert the tokenizer to BPE")));
    }
    let decoding = Decoding::from_json(&outline.decoder)?;
    let model: BPE = part("model", serde_json::from_str(outline.model.get()))?;
    let (ids, tokens): (Vec<u32>, Vec<AddedToken>) = outline.added_tokens.into_iter().map(|a| (a.id, a.token)).unzip();
    let can_be_cut = can_be_cut(&outline.normalizer, &outline.pre_tokenizer, &outline.post_processor, &tokens);

    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let normalizer: Option<tokenizers::NormalizerWrapper> =
        part("normalizer", serde_json::from_value(outline.normalizer))?;
    part("normalizer", tokenizer.with_normalizer(normalizer).map(|_| ()))?;
    let pre_tokenizer: Option<tokenizers::PreTokenizerWrapper> =
        part("pre_tokenizer", serde_json::from_value(outline.pre_tokenizer))?;
    tokenizer.with_pre_tokenizer(pre_tokenizer);
    let post_processor: Option<tokenizers::PostProcessorWrapper> =
        part("post_processor", serde_json::from_value(outline.post_processor))?;
    tokenizer.with_post_processor(post_processor);
    let decoder: Option<tokenizers::DecoderWrapper> = part("decoder", serde_json::from_value(outline.decoder))?;
    tokenizer.with_decoder(decoder);

    part("added_tokens", tokenizer.add_tokens(tokens.clone()).map(|_| ()))?;
    for (id, token) in ids.into_iter().zip(tokens) {
        let content = token.content;
        match tokenizer.token_to_id(&content) {
            Some(got) if got == id => {}
            // An empty token is never found in a text, so that its id is never given out.
            None if content.is_empty() => {}
            got => {
                let got = got.map_or("none".to_string(), |got| got.to_string());
                let why = format!("the added token {content:?} has id {id}, but its place gives {got}; re-export it");
                return Err(Error::text(FILE, why));
            }
        }
    }
    let vocab_size = tokenizer.get_vocab_size(true);
    Ok(Tokenizer { shared: Arc::new(Shared { tokenizer, decoding, vocab_size, can_be_cut, longest: OnceLock::new() }) })
}

fn part<T, E: std::fmt::Display>(name: &str, result: std::result::Result<T, E>) -> Result<T> {
    result.map_err(|e| {
        Error::text(
            FILE,
            format!("its {name} cannot be used ({}); download the file again or re-export it", one_line(e)),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn small() -> Value {
        json!({
            "version": "1.0",
            "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
        })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut file = small();
        change(&mut file);
        Tokenizer::from_json(file.to_string().as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_small_file_tokenizes() {
        let tokenizer = Tokenizer::from_json(small().to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.encode("ab<s>ba", true).unwrap(), [2, 3, 1, 0]);
        assert_eq!(tokenizer.decode(&[2, 3, 999, 1], false).unwrap(), "ab<s>b");
        assert_eq!(tokenizer.decode(&[2, 3, 999, 1], true).unwrap(), "abb");
        assert_eq!([2, 3, 999].map(|id| tokenizer.token_bytes(id)), [&b"ab"[..], b"<s>", b""]);
        assert_eq!((tokenizer.vocab_size(), tokenizer.token_to_id("ab")), (4, Some(2)));
        assert_eq!(tokenizer.longest_token(), "<s>".len());
        assert_eq!((tokenizer.is_special(3), tokenizer.is_special(2), tokenizer.is_special(999)), (true, false, false));
        assert_eq!(format!("{tokenizer:?}"), "Tokenizer { vocab_size: 4, .. }");
    }

    #[test]
    fn a_text_has_the_tokens_of_its_pieces() {
        let tokenizer = Tokenizer::from_json(include_bytes!("../demo/tokenizer.json")).unwrap();
        assert!(tokenizer.shared.can_be_cut);
        // Words, marks and spaces of all kinds side by side, special tokens among them.
        let parts = [
            "\n",
            "\n",
            "\r\n",
            " ",
            "  ",
            "\t",
            "\u{a0}",
            "\u{2028}",
            "The",
            "don't",
            "Ärger",
            "7",
            "1234",
            "!",
            "?\n",
            "...",
            "\"",
            "'s",
            "<|eot_id|>",
            "<|begin_of_text|>",
            "\u{1f600}",
            "\u{301}",
        ];
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            parts[(state >> 16) as usize % parts.len()]
        };
        let mut cuts = 0;
        for _ in 0..200 {
            let text: String = (0..200).map(|_| next()).collect();
            cuts += pieces(&text, 1).count() - 1;
            for add_special in [true, false] {
                let whole = tokenizer.encode_pieces(&text, add_special, text.len()).unwrap();
                assert_eq!(tokenizer.encode_pieces(&text, add_special, 1).unwrap(), whole, "{text:?}");
            }
        }
        assert!(cuts > 200, "{cuts}");
    }

    #[test]
    fn a_text_is_cut_only_where_nothing_reaches_across() {
        let file: Value = serde_json::from_slice(include_bytes!("../demo/tokenizer.json")).unwrap();
        let can_be_cut = |change: &dyn Fn(&mut Value)| {
            let mut file = file.clone();
            change(&mut file);
            Tokenizer::from_json(file.to_string().as_bytes()).unwrap().shared.can_be_cut
        };
        assert!(can_be_cut(&|_| ()));
        let changes: [&dyn Fn(&mut Value); 6] = [
            &|file| file["normalizer"] = json!({"type": "NFC"}),
            &|file| file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+\w+".into(),
            &|file| file["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
            &|file| file["added_tokens"][0]["lstrip"] = true.into(),
            &|file| file["added_tokens"][0]["single_word"] = true.into(),
            &|file| {
                let single = file["post_processor"]["processors"][1]["single"].as_array_mut().unwrap();
                single.reverse();
            },
        ];
        for (i, change) in changes.into_iter().enumerate() {
            assert!(!can_be_cut(change), "change {i}");
        }
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_off() {
        let mut file = small();
        file["truncation"] = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
        let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.encode("abb", true).unwrap(), [2, 1]);
    }

    #[test]
    fn damaged_json_is_refused() {
        let error = |bytes: &[u8]| Tokenizer::from_json(bytes).unwrap_err().to_string();
        assert_eq!(
            error(b""),
            "tokenizer.json: not a tokenizer (EOF while parsing a value at line 1 column 0); download the file again"
        );
        assert_eq!(
            error(b"{}"),
            "tokenizer.json: not a tokenizer (missing field `model` at line 1 column 2); download the file again"
        );
        assert_eq!(
            error(b"version https://git-lfs.github.com/spec/v1"),
            "tokenizer.json: not a tokenizer (expected value at line 1 column 1); download the file again"
        );
    }

    #[test]
    fn every_truncation_of_a_file_is_an_error() {
        let file = small().to_string();
        for end in 0..file.len() {
            assert!(Tokenizer::from_json(&file.as_bytes()[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn other_models_and_decoders_are_refused() {
        assert_eq!(
            refused(|f| f["model"]["type"] = "Unigram".into()),
            "tokenizer.json: the model type Unigram is not supported; convert the tokenizer to BPE"
        );
        let supported = "ByteLevel (Llama 3) and Metaspace or ByteFallback (Llama 2) decoders are";
        assert_eq!(
            refused(|f| f["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            format!("tokenizer.json: the decoder WordPiece is not supported; {supported}")
        );
        assert_eq!(
            refused(|f| f["decoder"] = Value::Null),
            format!("tokenizer.json: the decoder null is not supported; {supported}")
        );
    }

    #[test]
    fn contradictions_are_refused() {
        assert_eq!(
            refused(|f| f["model"]["merges"] = json!(["a c"])),
            "tokenizer.json: its model cannot be used (Token `c` out of vocabulary at line 1 column 60); \
             download the file again or re-export it"
        );
        assert_eq!(
            refused(|f| f["added_tokens"][0]["id"] = 7.into()),
            "tokenizer.json: the added token \"<s>\" has id 7, but its place gives 3; re-export it"
        );
        assert_eq!(
            refused(|f| f["pre_tokenizer"] = json!({"type": "Nonsense"})),
            "tokenizer.json: its pre_tokenizer cannot be used (data did not match any variant of untagged enum \
             PreTokenizerUntagged); download the file again or re-export it"
        );
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        assert_eq!(
            refused(|f| {
                f["model"]["continuing_subword_prefix"] = "####".into();
            }),
            "tokenizer.json: its parts contradict each other; download the file again or re-export it"
        );
    }
}
