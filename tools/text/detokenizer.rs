//! Token ids to text while they arrive.
//!
//! Invariant: the pieces add up to what decoding all ids at once gives, for any ids, and no piece holds a part of a
//! character. A push costs O(token): nothing that was given out is decoded again.

use quaver_core::{Error, Result};
use serde_json::Value;
use tokenizers::{Decoder, DecoderWrapper};

use super::one_line;
use super::tokenizer::Tokenizer;

/// How the tokens of a vocabulary become text.
pub(super) enum Decoding {
    /// A token spells bytes in GPT-2's alphabet; the text is their UTF-8.
    Bytes,
    /// A token is text, except for tokens like `<0x0A>`; the first of all loses the space in front.
    Pieces(Box<DecoderWrapper>),
}

impl Decoding {
    /// From the `decoder` of a `tokenizer.json`.
    pub(super) fn from_json(decoder: &Value) -> Result<Self> {
        let steps = match decoder["decoders"].as_array() {
            Some(steps) if decoder["type"] == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let joined = steps.iter().filter(|step| step["type"] != "Fuse");
        if joined.map(|step| &step["type"]).eq(["ByteLevel"]) {
            return Ok(Decoding::Bytes);
        }
        let mut fused = false;
        for step in steps {
            let streams = match step["type"].as_str() {
                Some("Metaspace" | "ByteFallback") => !fused,
                Some("Replace") => !fused && step["pattern"]["String"].is_string(),
                // More than one character would reach into tokens behind the first.
                Some("Strip") => step["stop"] == 0 && step["start"].as_u64().is_some_and(|n| n <= 1),
                Some("Fuse") => true,
                _ => false,
            };
            if !streams {
                let name = step["type"].as_str().unwrap_or("null");
                let supported = "ByteLevel (Llama 3) and Metaspace or ByteFallback (Llama 2) decoders are";
                return Err(Error::text("tokenizer.json", format!("the decoder {name} is not supported; {supported}")));
            }
            fused |= step["type"] == "Fuse";
        }
        let decoder = serde_json::from_value(decoder.clone());
        let decoder = decoder.map_err(|e| {
            Error::text("tokenizer.json", format!("its decoder cannot be used ({}); re-export it", one_line(e)))
        })?;
        Ok(Decoding::Pieces(Box::new(decoder)))
    }
}

impl Decoding {
    /// The bytes that a token stands for, where another comes before it.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Decoding::Bytes => {
                let mut bytes = Vec::new();
                push_bytes(token, &mut bytes);
                bytes
            }
            Decoding::Pieces(_) => {
                let byte =
                    token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('▁', " ").into_bytes(),
                }
            }
        }
    }
}

/// A streaming decoder; see [`Tokenizer::detokenizer`].
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// `Decoding::Bytes`: at most three bytes, the beginning of a character.
    bytes: Vec<u8>,
    /// `Decoding::Pieces`: a run of byte tokens. Until it ends, it is not known whether it is UTF-8 as a whole.
    run: Vec<String>,
    /// `Decoding::Pieces`: whether a token came before the run, so that the run does not begin the text.
    begun: bool,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Detokenizer { tokenizer, skip_special, bytes: Vec::new(), run: Vec::new(), begun: false }
    }

    /// Takes the next id and returns the text that it completes: nothing, or whole characters.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Ok(String::new()) };
        if self.skip_special && self.tokenizer.is_special_token(&token) {
            return Ok(String::new());
        }
        match self.tokenizer.decoding() {
            Decoding::Bytes => {
                push_bytes(&token, &mut self.bytes);
                Ok(take_characters(&mut self.bytes))
            }
            Decoding::Pieces(_) => {
                let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
                self.run.push(token);
                if is_byte { Ok(String::new()) } else { self.take_run() }
            }
        }
    }

    /// Ends the text: what was held back, with U+FFFD for an incomplete character. The decoder can then begin anew.
    pub fn finish(&mut self) -> String {
        let bytes = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        // The steps that `Decoding::from_json` lets through fail on no token.
        let run = self.take_run().unwrap_or_default();
        self.begun = false;
        bytes + &run
    }

    /// Decodes the run behind a token that stands for all that came before it.
    fn take_run(&mut self) -> Result<String> {
        let Decoding::Pieces(decoder) = self.tokenizer.decoding() else { return Ok(String::new()) };
        if self.run.is_empty() {
            return Ok(String::new());
        }
        let before = if self.begun { vec!["a".to_string()] } else { Vec::new() };
        let decode = |tokens| {
            let text = decoder.decode(tokens);
            text.map_err(|e| Error::text("tokenizer.json", format!("cannot decode ({}); re-export it", one_line(e))))
        };
        let skip = if self.begun { decode(before.clone())?.len() } else { 0 };
        let text = decode([before, std::mem::take(&mut self.run)].concat())?;
        self.begun = true;
        Ok(text.get(skip..).unwrap_or_default().to_string())
    }
}

/// Appends the bytes that `token` spells. A token that is not in the alphabet stands for its own UTF-8.
fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let before = bytes.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(before);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for (`bytes_to_unicode` of its encoder): printable Latin-1
/// stands for itself, and the 68 other bytes follow from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let byte = match c as u32 {
        printable @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => printable,
        control @ 0x100..=0x120 => control - 0x100,
        delete_and_c1 @ 0x121..=0x142 => delete_and_c1 - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Takes the characters that are complete, and leaves the beginning of one. Bytes that can become no character give
/// U+FFFD where `String::from_utf8_lossy` gives it.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(e) => {
                let (valid, tail) = rest.split_at(e.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(bad) = e.error_len() else {
                    *bytes = tail.to_vec();
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &tail[bad..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::LazyLock;

    static DEMO: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::from_json(include_bytes!("../demo/tokenizer.json")).unwrap());

    /// Llama 2's kind: pieces with `▁`, and tokens for single bytes.
    static PIECES: LazyLock<Tokenizer> = LazyLock::new(|| {
        let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
        vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        vocab.extend(["▁", "▁▁", "a", "▁Hello", "é", "▁é▁", "a▁"].map(String::from));
        let vocab: serde_json::Map<_, _> = vocab.into_iter().enumerate().map(|(id, t)| (t, id.into())).collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let file = json!({
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}
        });
        Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
    });

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
        let mut detokenizer = tokenizer.detokenizer(skip_special);
        let pieces: String = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        pieces + &detokenizer.finish()
    }

    #[test]
    fn every_byte_has_one_character_of_the_alphabet() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(|c| byte_of(char::from_u32(c).unwrap())).collect();
        bytes.sort_unstable();
        assert!(bytes.into_iter().eq(0..=255));
        assert_eq!(
            (byte_of('Ġ'), byte_of('Ċ'), byte_of('a'), byte_of('中')),
            (Some(b' '), Some(b'\n'), Some(b'a'), None)
        );
    }

    #[test]
    fn bytes_of_tokens_add_up_to_the_text() {
        for (tokenizer, text) in [(&DEMO, "Café 😀\n of it"), (&PIECES, "a▁▁é▁")] {
            let ids = tokenizer.encode(text, false).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), text.replace('▁', " "));
        }
        assert_eq!(PIECES.token_bytes(3 + 0xF0), [0xF0]);
    }

    #[test]
    fn an_emoji_over_four_tokens_comes_whole() {
        let ids = DEMO.encode("😀!", false).unwrap();
        let mut detokenizer = DEMO.detokenizer(false);
        let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        assert_eq!(pieces, ["", "", "", "😀", "!"]);
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn an_incomplete_character_is_flushed_once() {
        let ids = DEMO.encode("a😀", false).unwrap();
        let mut detokenizer = DEMO.detokenizer(false);
        let text: String = ids[..ids.len() - 1].iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        assert_eq!(
            (text.as_str(), detokenizer.finish().as_str(), detokenizer.finish().as_str()),
            ("a", "\u{fffd}", "")
        );
    }

    #[test]
    fn special_tokens_are_skipped_if_asked() {
        let ids = DEMO.encode("x<|eot_id|>y", false).unwrap();
        assert_eq!(streamed(&DEMO, &ids, false), "x<|eot_id|>y");
        assert_eq!(streamed(&DEMO, &ids, true), "xy");
    }

    #[test]
    fn pieces_lose_the_first_space_only() {
        let hello = PIECES.token_to_id("▁Hello").unwrap();
        assert_eq!(streamed(&PIECES, &[1, hello, hello], true), "Hello Hello");
        assert_eq!(streamed(&PIECES, &[3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80, hello], true), "😀 Hello");
    }

    fn any_ids(vocab: u32) -> impl Strategy<Value = Vec<u32>> {
        // The first 256 ids of both vocabularies are single bytes: half of the draws, so that runs of them occur.
        prop::collection::vec(prop_oneof![0..260u32, 0..vocab + 3], 0..40)
    }

    proptest! {
        #[test]
        fn byte_pieces_add_up_to_the_whole(ids in any_ids(4096), skip in any::<bool>()) {
            prop_assert_eq!(streamed(&DEMO, &ids, skip), DEMO.decode(&ids, skip).unwrap());
        }

        #[test]
        fn text_pieces_add_up_to_the_whole(ids in any_ids(266), skip in any::<bool>()) {
            prop_assert_eq!(streamed(&PIECES, &ids, skip), PIECES.decode(&ids, skip).unwrap());
        }

        #[test]
        fn text_survives_the_round_trip(text in any::<String>()) {
            let ids = DEMO.encode(&text, false).unwrap();
            prop_assert_eq!(streamed(&DEMO, &ids, false), text);
        }
    }
}
