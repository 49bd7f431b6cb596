//! A byte-level BPE tokenizer of any size in Llama-3's layout: its pre-tokenizer, its special tokens behind the ordinary
//! ones, and merges that make words of two to four letters.

use serde_json::{Map, Value, json};

/// Special tokens of Llama-3: 256 in a full vocabulary, 16 in a small one.
fn special_count(vocab: usize) -> usize {
    if vocab > 100_000 { 256 } else { 16 }
}

/// The ids that configs name.
pub struct SpecialIds {
    pub bos: usize,
    pub eos: Vec<usize>,
}

/// Where the special tokens of a vocabulary stand.
pub fn special_ids(vocab: usize) -> SpecialIds {
    let base = vocab - special_count(vocab);
    SpecialIds { bos: base, eos: vec![base + 1, base + 8, base + 9] }
}

/// The first special tokens; the others are reserved.
const SPECIAL: [(usize, &str); 6] = [
    (0, "<|begin_of_text|>"),
    (1, "<|end_of_text|>"),
    (6, "<|start_header_id|>"),
    (7, "<|end_header_id|>"),
    (8, "<|eom_id|>"),
    (9, "<|eot_id|>"),
];

/// `tokenizer.json`.
pub fn tokenizer(vocab: usize) -> Value {
    let specials = special_count(vocab);
    let base = vocab - specials;
    let (tokens, merges) = bpe(base);
    let ids: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = (0..specials)
        .map(|i| {
            let named = SPECIAL.iter().find(|(at, _)| *at == i);
            let content =
                named.map_or_else(|| format!("<|reserved_special_token_{i}|>"), |(_, name)| (*name).to_owned());
            json!({"id": base + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let bos = SPECIAL[0].1;
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [base], "tokens": [bos]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": ids, "merges": merges},
    })
}

/// Llama-3's pre-tokenizer (Meta, `llama3/tokenizer.py`).
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer_config.json`, with a chat template of Llama-3's layout.
pub fn config() -> Value {
    let template = "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + \
                    '<|end_header_id|>\\n\\n' + (m['content'] | trim) + '<|eot_id|>' }}{%- endfor %}\
                    {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}";
    json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template})
}

/// `n` tokens and the merges that make them: the 256 bytes, then pairs, triples and quadruples of letters.
fn bpe(n: usize) -> (Vec<String>, Vec<[String; 2]>) {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| byte_char(byte).to_string()).collect();
    let mut merges = Vec::new();
    // The most frequent letters of English first, so that a small vocabulary has the likelier words; Ġ is the space.
    let letters: Vec<String> = "Ġetaoinshrdlcumwfgypbvkjxqz".chars().map(String::from).collect();
    let pairs: Vec<[&String; 2]> = letters.iter().flat_map(|a| letters[1..].iter().map(move |b| [a, b])).collect();
    let join = |parts: &[&String]| parts.iter().map(|part| part.as_str()).collect::<String>();
    let doubles: Vec<String> = pairs.iter().map(|pair| join(pair)).collect();
    let singles = pairs.iter().map(|[a, b]| [(*a).clone(), (*b).clone()]);
    let triples = doubles.iter().flat_map(|a| letters[1..].iter().map(|b| [a.clone(), b.clone()]));
    let quadruples = doubles.iter().flat_map(|a| doubles[letters.len() - 1..].iter().map(|b| [a.clone(), b.clone()]));
    for merge in singles.chain(triples).chain(quadruples).take(n.saturating_sub(tokens.len())) {
        tokens.push(merge.concat());
        merges.push(merge);
    }
    tokens.truncate(n);
    (tokens, merges)
}

/// The character that stands for a byte in byte-level BPE (GPT-2): itself where it is printable, else one from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + before as u32).expect("a character of Latin Extended-A")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;

    #[test]
    fn the_full_vocabulary_encodes_and_decodes_any_text() {
        let tokenizer = Tokenizer::from_json(tokenizer(128_256).to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 128_256);
        let text = "It was a cold morning.\n\n1234 naïve “quotes” 😀\t\0";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0] as usize, special_ids(128_256).bos);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert!(ids.len() < text.len(), "words are more than their bytes");
    }

    #[test]
    fn no_token_is_made_twice() {
        let (tokens, merges) = bpe(128_000);
        assert_eq!((tokens.len(), merges.len()), (128_000, 128_000 - 256));
        let unique: std::collections::HashSet<_> = tokens.iter().collect();
        assert_eq!(unique.len(), tokens.len());
    }
}
