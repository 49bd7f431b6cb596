//! Tokenizer and chat template against what Hugging Face's transformers computes from the same files.

use quaver::text::{ChatTemplate, RenderOptions, Tokenizer};
use serde_json::Value;

fn fixture(path: &str) -> Vec<u8> {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn cases(name: &str) -> Vec<Value> {
    serde_json::from_slice(&fixture(&format!("tests/fixtures/goldens/{name}"))).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn demo() -> (Tokenizer, ChatTemplate) {
    let template = ChatTemplate::from_files(Some(&fixture("tools/demo/tokenizer_config.json")), None).unwrap();
    (Tokenizer::from_json(&fixture("tools/demo/tokenizer.json")).unwrap(), template.unwrap())
}

fn options(case: &Value, add_generation_prompt: bool) -> RenderOptions {
    let date = case["date_string"].as_str().map(String::from);
    RenderOptions { add_generation_prompt, date, ..RenderOptions::default() }
}

#[test]
fn text_encodes_and_decodes_as_in_transformers() {
    let (tokenizer, _) = demo();
    let cases = cases("tokenizer_goldens.json");
    assert_eq!(cases.len(), 35);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let plain = ids(&case["ids_nospecial"]);
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{text:?}");
        for (skip_special, expected) in [(false, &case["decoded"]), (true, &case["decoded_skip"])] {
            let mut detokenizer = tokenizer.detokenizer(skip_special);
            let streamed: String = plain.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
            assert_eq!(&tokenizer.decode(&plain, skip_special).unwrap(), expected, "{text:?}");
            assert_eq!(&(streamed + &detokenizer.finish()), expected, "{text:?}");
        }
    }
}

#[test]
fn messages_render_as_in_transformers() {
    let (_, template) = demo();
    let cases = cases("chat_goldens.json");
    assert_eq!(cases.len(), 8);
    for case in cases {
        let options = options(&case, case["add_generation_prompt"].as_bool().unwrap());
        assert_eq!(template.render(&case["messages"], &options).unwrap(), case["rendered"], "{case}");
    }
}

#[test]
fn prompts_become_the_ids_of_transformers() {
    let (tokenizer, template) = demo();
    let cases = cases("prompts.json");
    assert_eq!(cases.len(), 7);
    for case in cases {
        let (name, expected) = (&case["name"], ids(&case["ids"]));
        if let Some(text) = case["text"].as_str() {
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{name}");
            continue;
        }
        let options = options(&case, true);
        assert_eq!(template.render(&case["messages"], &options).unwrap(), case["rendered"], "{name}");
        assert_eq!(tokenizer.encode_chat(&template, &case["messages"], &options).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_chat_has_one_begin_of_text() {
    let (tokenizer, template) = demo();
    let messages = serde_json::json!([{"role": "user", "content": "Hi"}]);
    let ids = tokenizer.encode_chat(&template, &messages, &options(&Value::Null, true)).unwrap();
    let bos = tokenizer.token_to_id("<|begin_of_text|>").unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == bos).count(), 1);
}

#[test]
fn a_role_that_the_template_does_not_know_is_its_error() {
    let (_, template) = demo();
    let messages = serde_json::json!([{"role": "critic", "content": "Hi"}]);
    let error = template.render(&messages, &RenderOptions::default()).unwrap_err().to_string();
    assert_eq!(error, "chat template: refuses the messages: unsupported role: critic");
}
