//! What strangers supply and a model is read from, damaged at random: checkpoints and chat templates. What comes of it is
//! a result or an error. `QUAVER_FUZZ=1000000 cargo test --release --test fuzz` tries many; requests are in tests/server.

mod support;

use quaver::text::{ChatTemplate, RenderOptions};
use serde_json::{Value, json};
use support::checkpoints::demo;
use support::mutate::{Mutator, fuzz};
use support::tiny::{Inputs, Tiny, survive};

#[test]
fn no_checkpoint_header_makes_a_model_panic() {
    let words = [
        "{",
        "}",
        "[",
        "]",
        "\"",
        ",",
        ":",
        "F8_E4M3",
        "BF16",
        "F32",
        "I64",
        "U8",
        "F4",
        "data_offsets",
        "shape",
        "dtype",
        "__metadata__",
        "model.embed_tokens.weight",
        "lm_head.weight",
        ".weight_scale",
        ".k_scale",
        "0,0",
        "[[[[[[[[",
    ];
    let files = [Inputs::Static, Inputs::Dynamic].map(|inputs| Tiny::file(&Tiny::fp8(inputs).tensors));
    let model = Tiny::fp8(Inputs::Static);
    let make = |mutator: &mut Mutator| {
        let file = mutator.pick(&files);
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut changed = mutator.bytes(&file[8..header], &words);
        // The length before it is true, so that the header is read at all, or as strange as the rest.
        let length =
            if mutator.below(8) > 0 { (changed.len() as u64).to_le_bytes() } else { file[..8].try_into().unwrap() };
        changed.splice(0..0, length);
        changed.extend(&file[header..]);
        changed
    };
    fuzz("checkpoint", 4000, make, |file| survive(model.open_files(&[("model.safetensors", file.to_vec())])));
}

#[test]
fn no_chat_template_makes_a_rendering_panic() {
    let words = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{%-",
        "{#",
        "#}",
        " for x in messages ",
        " endfor ",
        " if ",
        " else ",
        " endif ",
        " set ",
        " macro m(a) ",
        " endmacro ",
        " m(m) ",
        " recursive ",
        "loop",
        "namespace(",
        "range(99999999)",
        " | tojson",
        " | join(",
        " * 99999999",
        " ~ ",
        "[-1]",
        "[::0]",
        ".strip()",
        ".split(",
        "strftime_now(",
        "raise_exception(",
        "messages",
        "tools",
        " is defined",
        " in ",
        "not ",
        "\"",
        "(",
        ")",
        "é",
    ];
    let config: Value = serde_json::from_slice(&std::fs::read(demo().join("tokenizer_config.json")).unwrap()).unwrap();
    let templates = [
        config["chat_template"].as_str().unwrap(),
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
        "{% macro t(x, n) %}{{ x[:n] }}{% if n > 0 %}{{ t(x, n - 1) }}{% endif %}{% endmacro %}{{ t(messages[0].content, 3) }}",
        "{% set ns = namespace(l=[], s='') %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% set ns.s = ns.s * 2 ~ 'a' \
         %}{% endfor %}{{ ns.l | tojson(indent=2) }}{{ ns.s }}{{ strftime_now('%d %b %Y') }}",
    ];
    let conversation = json!({
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"}
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
    });
    // A template, then behind a zero byte a conversation: one of them is damaged, or both.
    let make = |mutator: &mut Mutator| {
        let which = mutator.below(3);
        let template = *mutator.pick(&templates);
        let mut input = if which != 1 { mutator.bytes(template.as_bytes(), &words) } else { template.into() };
        input.retain(|byte| *byte != 0);
        input.push(0);
        let conversation = if which != 0 { mutator.json(&conversation) } else { conversation.clone() };
        input.extend(conversation.to_string().bytes());
        input
    };
    fuzz("chat-template", 4000, make, |input| {
        let end = input.iter().position(|byte| *byte == 0).unwrap();
        let Ok(Some(template)) = ChatTemplate::from_files(None, Some(&input[..end])) else { return };
        // Deeper than any reader of JSON goes, it never comes to a template.
        let Ok(conversation) = serde_json::from_slice::<Value>(&input[end + 1..]) else { return };
        let tools = conversation.get("tools").cloned();
        let options = RenderOptions { add_generation_prompt: true, tools, ..RenderOptions::default() };
        // Text or an error; either is bounded.
        let text = template.render(&conversation["messages"], &options).unwrap_or_default();
        assert!(text.len() <= 128 << 20);
    });
}
