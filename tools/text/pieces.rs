//! Where a long text is cut for the tokenizer, which takes a hundred times the text's bytes of memory.
//!
//! Invariant: the pieces' tokens are the text's. A cut lies between the end of a line and a letter, and is made only where
//! nothing reaches across it: with Llama 3's pattern, of whose matches none has a letter behind the end of a line, and none
//! that ends there depends on what follows; without a normalizer; and with added tokens that hold no end of a line and look
//! at nothing in front of them.

use serde_json::Value;
use tokenizers::AddedToken;

/// How Llama 3 splits a text before it looks for tokens.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// True where texts of this tokenizer may be cut.
pub fn can_be_cut(normalizer: &Value, pre_tokenizer: &Value, post_processor: &Value, added: &[AddedToken]) -> bool {
    let Some([split, bytes]) = pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) else { return false };
    let is_split = split["type"] == "Split" && split["pattern"]["Regex"] == LLAMA_3 && split["behavior"] == "Isolated";
    let is_plain = bytes["type"] == "ByteLevel" && bytes["use_regex"] == false && bytes["add_prefix_space"] == false;
    let is_local = |token: &AddedToken| !(token.single_word || token.lstrip || token.content.contains('\n'));
    let is_alone = split["invert"] == false && normalizer.is_null();
    is_split && is_plain && is_alone && adds_in_front(post_processor) && added.iter().all(is_local)
}

/// True where special tokens are added in front of a text alone.
fn adds_in_front(post_processor: &Value) -> bool {
    let items = |key: &str| post_processor[key].as_array().map(Vec::as_slice).unwrap_or_default();
    match post_processor["type"].as_str() {
        None | Some("ByteLevel") => true,
        Some("TemplateProcessing") => items("single").last().is_some_and(|last| !last["Sequence"].is_null()),
        Some("Sequence") => items("processors").iter().all(adds_in_front),
        Some(_) => false,
    }
}

/// A text in pieces of at least so many bytes, the last one excepted; one piece where there is no place for a cut.
pub fn pieces(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let is_cut = |at: &usize| text.as_bytes()[at - 1] == b'\n' && text.as_bytes()[*at].is_ascii_alphabetic();
        let cut = (least.max(1)..text.len()).find(is_cut);
        let (piece, behind) = cut.map_or((text, None), |at| (&text[..at], Some(&text[at..])));
        rest = behind;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_its_pieces() {
        let pieces = |text, least| pieces(text, least).collect::<Vec<_>>();
        assert_eq!(pieces("a\nb\n c\r\nd\n\n", 1), ["a\n", "b\n c\r\n", "d\n\n"]);
        assert_eq!(pieces("a\nb\nc\nd", 3), ["a\nb\n", "c\nd"]);
        assert_eq!(pieces("", 1), [""]);
        assert_eq!(pieces("ä\nö", 1), ["ä\nö"]);
    }
}
