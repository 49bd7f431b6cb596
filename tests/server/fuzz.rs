//! Requests damaged at random: each is answered or refused, and the server is as before. `QUAVER_FUZZ=100000` tries many.

use serde_json::{Value, json};

use super::support::mutate::{Mutator, fuzz};
use super::{HOOK, Server, chat};

/// Requests that name every field, by route.
fn requests() -> Vec<(&'static str, Value)> {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", 1]}},
        "required": ["a"], "additionalProperties": false});
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "It.", "parameters": schema}});
    let sampling = json!({"model": null, "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 3, "n": 2, "stop": ["x", "yz"],
        "stop_token_ids": [5], "ignore_eos": true, "min_tokens": 1, "logit_bias": {"7": -5, "9": 1.5}, "user": "me",
        "skip_special_tokens": false, "include_stop_str_in_output": true, "prompt_logprobs": 1});
    let with = |fields: Value| {
        let mut body = sampling.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text",
        "text": HOOK.0}]}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
        "function": {"name": "weather", "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "1"}]);
    let begun = &messages.as_array().unwrap()[..2];
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    vec![
        (chat, with(json!({"messages": messages, "logprobs": true, "top_logprobs": 2, "tools": [tool]}))),
        (chat, with(json!({"messages": messages, "tools": [tool], "tool_choice": "required", "stream": true}))),
        (
            chat,
            with(json!({"messages": begun, "response_format": {"type": "json_schema", "json_schema":
            {"name": "s", "schema": schema, "strict": true}}, "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true}})),
        ),
        (chat, json!({"messages": begun, "structured_outputs": {"regex": "[a-c]{1,3}(x|y)*"}, "max_tokens": 3})),
        (
            chat,
            json!({"messages": begun, "guided_grammar": "start: A \"b\"\nA: /[0-9]+/", "max_tokens": 3,
            "add_generation_prompt": false, "continue_final_message": true, "chat_template_kwargs": {"date_string": "x"}}),
        ),
        (text, with(json!({"prompt": "It was", "echo": true, "logprobs": 2, "stream": true}))),
        (text, with(json!({"prompt": [[1, 2, 3], [4]], "guided_choice": ["a", "bc"]}))),
        (text, json!({"prompt": ["a", "b"], "max_tokens": 2, "suffix": null, "best_of": 1, "guided_json": schema})),
        (
            "/v1/responses",
            json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "instructions": "Be brief.", "max_output_tokens": 3, "temperature": 0, "top_p": 1, "stream": true,
            "text": {"format": {"type": "text"}}, "tools": [], "metadata": {"a": "b"}}),
        ),
        ("/tokenize", json!({"messages": messages, "add_generation_prompt": true, "return_token_strs": true})),
        ("/tokenize", json!({"prompt": "It was", "add_special_tokens": false})),
        ("/detokenize", json!({"tokens": [1, 2, 4095]})),
    ]
}

#[test]
fn no_request_makes_the_server_fail() {
    let server = Server::start(&["--max-model-len", "128", "--max-num-seqs", "8", "--max-body-size", "200K"]);
    let requests = requests();
    let words =
        ["{", "}", "[", "]", "\"", ",", ":", "null", "true", "\\u0000", "\\ud800", "1e400", "-0", "[[[[[[[[[[[[[[[["];
    let make = |mutator: &mut Mutator| {
        let (path, body) = mutator.pick(&requests);
        let body = match mutator.below(3) {
            0 => mutator.bytes(body.to_string().as_bytes(), &words),
            _ => mutator.json(body).to_string().into_bytes(),
        };
        [path.as_bytes(), b"\n", &body].concat()
    };
    fuzz("request", 300, make, |input| {
        let end = input.iter().position(|byte| *byte == b'\n').unwrap();
        let path = std::str::from_utf8(&input[..end]).unwrap();
        let reply = Server::reply(server.agent.post(format!("{}{path}", server.url)).send(&input[end + 1..]));
        assert!([200, 400, 404, 413, 422].contains(&reply.status), "{reply:?}");
        // What a stream breaks off with is told, and is the request's fault.
        assert!(!reply.text.contains("server_error"), "{reply:?}");
    });
    server.wait_until(|server| server.metric("quaver:kv_pages_used") == 0.0);
    let answer = server.post("/v1/chat/completions", &chat(HOOK.0, json!({}))).json();
    assert_eq!(answer["choices"][0]["message"]["content"], HOOK.1);
    server.signal();
    let (code, log) = server.end();
    assert!(code == Some(0) && !log.iter().any(|line| line.contains("panicked")), "{log:?}");
}
