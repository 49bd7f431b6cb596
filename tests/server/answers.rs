//! What is answered: texts, tokens, log-probabilities, calls, forms; and what is refused.

use std::io::BufRead;

use serde_json::{Value, json};

use super::{HOOK, Server, chat, chunks};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[test]
fn a_chat_is_answered_whole_and_in_pieces_that_add_up() {
    let server = Server::start(&["--served-model-name", "demo,other"]);
    let whole =
        server.post(CHAT, &chat(HOOK.0, json!({"model": "other", "user": null, "no_such_field": {"a": 1}}))).json();
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("other")));
    let choice = &whole["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(HOOK.1), &json!("stop")));
    let fields = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let mut stream = chunks(server.stream(CHAT, &chat(HOOK.0, fields)));
    let last = stream.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    // The second time most of the prompt was in the cache.
    let tokens =
        |usage: &Value| ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| usage[key].as_u64().unwrap());
    assert_eq!(tokens(&last["usage"]), tokens(&whole["usage"]));
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 32);
    assert_eq!(stream[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(stream.windows(2).all(|pair| tokens(&pair[0]["usage"]) <= tokens(&pair[1]["usage"])));
    let text: String = stream.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!((text.as_str(), &stream.last().unwrap()["choices"][0]["finish_reason"]), (HOOK.1, &json!("stop")));
    // Scores of the prompt come with the end of the answer, and without a usage that was not asked for.
    let scored = chunks(server.stream(CHAT, &chat(HOOK.0, json!({"prompt_logprobs": 0}))));
    assert!(scored.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"][0].is_object()));
    assert!(scored.last().unwrap()["prompt_logprobs"].as_array().unwrap().len() > 32);
    // Parts, and a last message that is gone on with.
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": HOOK.0}]},
        {"role": "assistant", "content": "Captain Hook is"}], "temperature": 0, "continue_final_message": true});
    assert_eq!(
        server.post(CHAT, &parts).json()["choices"][0]["message"]["content"],
        &HOOK.1["Captain Hook is".len()..]
    );
}

#[test]
fn prompts_are_texts_token_ids_and_lists_of_either_and_are_echoed_with_their_scores() {
    let server = Server::start(&[]);
    let complete = |fields: Value| {
        let mut body = json!({"temperature": 0, "max_tokens": 5});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post(TEXT, &body).json()
    };
    let one = complete(json!({"prompt": "It was"}));
    let text = one["choices"][0]["text"].as_str().unwrap();
    for prompt in [json!([4080, 895, 305]), json!(["It was"]), json!([[4080, 895, 305]])] {
        assert_eq!(complete(json!({"prompt": prompt}))["choices"][0]["text"], text);
    }
    let both = complete(json!({"prompt": ["The old", [4080, 895, 305]], "n": 2, "echo": true, "logprobs": 2}));
    let choices = both["choices"].as_array().unwrap();
    assert_eq!(
        (choices.len(), choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>()),
        (4, vec![0, 1, 2, 3])
    );
    assert_eq!(choices[3]["text"], format!("It was{text}"));
    assert_eq!(choices[2]["logprobs"], choices[3]["logprobs"]);
    let logprobs = &choices[3]["logprobs"];
    let lengths =
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|key| logprobs[key].as_array().unwrap().len());
    assert_eq!(lengths, [8; 4]);
    assert_eq!(
        (&logprobs["token_logprobs"][0], &logprobs["text_offset"][1]),
        (&json!(null), &json!("<|begin_of_text|>".len()))
    );
    // Each token's score equals the likeliest's where the model chose it.
    for i in 3..8 {
        let best = logprobs["top_logprobs"][i]
            .as_object()
            .unwrap()
            .values()
            .map(|v| v.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert_eq!(logprobs["token_logprobs"][i], best);
    }
    // A prompt that is only scored, whole and streamed, and vLLM's own shape.
    let scored =
        json!({"prompt": "It was a cold morning", "max_tokens": 0, "echo": true, "logprobs": 1, "prompt_logprobs": 1});
    let whole = complete(scored.clone());
    let streamed = chunks(server.stream(TEXT, &scored));
    let scores = |of: &Value, at: &str| of["choices"][0]["logprobs"][at].as_array().unwrap().clone();
    for key in ["tokens", "token_logprobs", "text_offset"] {
        let pieces: Vec<Value> = streamed.iter().flat_map(|chunk| scores(chunk, key)).collect();
        assert_eq!(scores(&whole, key), pieces);
    }
    let own = whole["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((own.len(), &own[0]), (scores(&whole, "tokens").len(), &json!(null)));
    assert!(
        own[1..].iter().all(|entry| entry
            .as_object()
            .unwrap()
            .values()
            .all(|token| token["rank"].as_u64().unwrap() >= 1))
    );
}

#[test]
fn an_answer_ends_where_the_request_says() {
    let server = Server::start(&[]);
    let choice = |fields: Value| server.post(CHAT, &chat(HOOK.0, fields)).json()["choices"][0].clone();
    let stopped = choice(json!({"stop": [" great", "never"]}));
    assert_eq!(stopped["message"]["content"], "Captain Hook is a pirate, and the");
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!(" great")));
    let with = choice(json!({"stop": " great", "include_stop_str_in_output": true}));
    assert_eq!(with["message"]["content"], "Captain Hook is a pirate, and the great");
    let cut = choice(json!({"max_completion_tokens": 3, "max_tokens": 9}));
    assert_eq!((&cut["message"]["content"], &cut["finish_reason"]), (&json!("Captain"), &json!("length")));
    let on = server.post(CHAT, &chat(HOOK.0, json!({"ignore_eos": true, "max_tokens": 60}))).json();
    assert_eq!((&on["choices"][0]["finish_reason"], &on["usage"]["completion_tokens"]), (&json!("length"), &json!(60)));
    let later = choice(json!({"stop": [" is", " the"], "min_tokens": 5}));
    assert_eq!(later["message"]["content"], "Captain Hook is a pirate, and");
    // One that begins before, and ends behind.
    let across = choice(json!({"stop": "Captain Hook is a pirate, and", "min_tokens": 5}));
    assert_eq!((&across["message"]["content"], &across["finish_reason"]), (&json!(""), &json!("stop")));
    let on = server.post(CHAT, &chat(HOOK.0, json!({"min_tokens": 40, "max_tokens": 60}))).json();
    assert!(on["usage"]["completion_tokens"].as_u64().unwrap() > 40);
    // Seeds give the same again, and different ones to each of n.
    let sampled = || {
        let body = chat(HOOK.0, json!({"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 12}));
        let choices = server.post(CHAT, &body).json()["choices"].clone();
        [0, 1, 2].map(|i: usize| choices[i]["message"]["content"].clone())
    };
    let texts = sampled();
    assert_eq!(texts, sampled());
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
}

#[test]
fn an_answer_has_the_form_that_is_asked_for() {
    let server = Server::start(&[]);
    let content = |fields: Value| {
        let reply = server.post(CHAT, &chat("Who is Peter Pan?", fields));
        let message = reply.json()["choices"][0]["message"].clone();
        message["content"].as_str().unwrap_or_else(|| panic!("{reply:?}")).to_owned()
    };
    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": false});
    for fields in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}}),
        json!({"structured_outputs": {"json": schema}}),
        json!({"guided_json": schema.to_string()}),
        // Chosen at random and told apart by penalties, it still has the form.
        json!({"guided_json": schema, "temperature": 1.3, "seed": 3, "repetition_penalty": 1.2}),
    ] {
        let person: Value = serde_json::from_str(&content(fields)).unwrap();
        assert!(person["name"].is_string() && (1..100).contains(&person["age"].as_u64().unwrap()), "{person}");
    }
    for fields in
        [json!({"structured_outputs": {"choice": ["red", "green"]}}), json!({"guided_choice": ["red", "green"]})]
    {
        assert!(["red", "green"].contains(&content(fields).as_str()));
    }
    let date = content(json!({"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}}));
    assert!(date.len() == 7 && date.as_bytes()[4] == b'-', "{date}");
    let sum = content(json!({"guided_grammar": "start: NUMBER \" + \" NUMBER\nNUMBER: /[0-9]{1,3}/"}));
    assert!(sum.split(" + ").all(|number| number.parse::<u32>().is_ok()), "{sum}");
    for fields in [
        json!({"structured_outputs": {"regex": "("}}),
        json!({"guided_grammar": "start: nothing"}),
        json!({"guided_choice": []}),
        json!({"guided_choice": ["a"], "guided_regex": "b"}),
        json!({"response_format": {"type": "xml"}}),
        json!({"structured_outputs": {"structural_tag": {}}}),
    ] {
        assert_eq!(server.post(CHAT, &chat("Hi", fields.clone())).status, 400, "{fields}");
    }
}

#[test]
fn a_call_that_must_be_made_is_made_whole_and_in_pieces() {
    let server = Server::start(&[]);
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"],
        "additionalProperties": false});
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let tools = json!([tool("weather"), tool("time")]);
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "time"}})] {
        let fields = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false});
        let body = chat("What now?", fields);
        let whole = server.post(CHAT, &body).json()["choices"][0].clone();
        assert_eq!((&whole["finish_reason"], &whole["message"]["content"]), (&json!("tool_calls"), &json!(null)));
        let function = &whole["message"]["tool_calls"][0]["function"];
        assert!(choice == "required" || function["name"] == "time");
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["city"].is_string());
        let stream = chunks(server.stream(CHAT, &body));
        let deltas: Vec<&Value> =
            stream.iter().map(|c| &c["choices"][0]["delta"]["tool_calls"][0]).filter(|d| !d.is_null()).collect();
        assert_eq!(deltas[0]["function"]["name"], function["name"]);
        let pieces: String = deltas.iter().map(|d| d["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(pieces, function["arguments"].as_str().unwrap());
        assert!(deltas.len() > 3, "arguments come while they are written");
        assert_eq!(stream.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
        // What was called can be told back.
        let mut messages = body["messages"].as_array().unwrap().clone();
        messages.push(whole["message"].clone());
        messages
            .push(json!({"role": "tool", "tool_call_id": whole["message"]["tool_calls"][0]["id"], "content": "fine"}));
        let reply =
            server.post(CHAT, &json!({"messages": messages, "tools": tools, "tool_choice": "none", "max_tokens": 4}));
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[test]
fn a_response_is_given_whole_and_as_events() {
    let server = Server::start(&[]);
    let ask = |fields: Value| {
        let mut body = json!({"input": HOOK.0, "temperature": 0});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let whole = server.post("/v1/responses", &ask(json!({}))).json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("completed")));
    assert_eq!(whole["output"][0]["content"][0]["text"], HOOK.1);
    let parts = json!([{"role": "user", "content": [{"type": "input_text", "text": HOOK.0}]}]);
    assert_eq!(
        server.post("/v1/responses", &ask(json!({"input": parts}))).json()["output"][0]["content"][0]["text"],
        HOOK.1
    );
    let cut = server.post("/v1/responses", &ask(json!({"max_output_tokens": 3, "instructions": "Be brief."}))).json();
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(cut["usage"]["output_tokens"], 3);
    let lines: Vec<String> = server.stream("/v1/responses", &ask(json!({}))).lines().map(Result::unwrap).collect();
    let events: Vec<Value> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let names: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert!(lines.windows(2).all(|pair| !pair[0].starts_with("event: ") || pair[1].starts_with("data: ")));
    assert!(names.iter().zip(&events).all(|(name, event)| event["type"] == *name) && names.len() == events.len());
    assert!(events.iter().enumerate().all(|(i, event)| event["sequence_number"] == i));
    let text: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!((text.as_str(), &events.last().unwrap()["type"]), (HOOK.1, &json!("response.completed")));
    assert_eq!(events.last().unwrap()["response"]["output"], {
        let mut output = whole["output"].clone();
        output[0]["id"] = events.last().unwrap()["response"]["output"][0]["id"].clone();
        output
    });
    assert_eq!(server.post("/v1/responses", &ask(json!({"previous_response_id": "x"}))).status, 400);
    assert_eq!(server.post("/v1/responses", &ask(json!({"input": 3}))).status, 400);
}

#[test]
fn what_means_nothing_is_refused_in_openais_shape() {
    let server = Server::start(&["--max-model-len", "64", "--max-body-size", "20K"]);
    let message = json!([{"role": "user", "content": "Hi"}]);
    for (path, body, status, part) in [
        (CHAT, json!({}), 400, "messages is missing"),
        (CHAT, json!({"messages": []}), 400, "give at least one message"),
        (CHAT, json!({"messages": message, "model": "gpt-4"}), 404, "`gpt-4` does not exist here"),
        (CHAT, json!({"messages": message, "temperature": -1}), 400, "temperature is -1"),
        (CHAT, json!({"messages": message, "temperature": "hot"}), 400, "invalid type"),
        (CHAT, json!({"messages": message, "top_logprobs": 2}), 400, "needs logprobs"),
        (CHAT, json!({"messages": message, "logprobs": true, "top_logprobs": 21}), 400, "at most 20"),
        (CHAT, json!({"messages": message, "n": 0}), 400, "n is 0"),
        (CHAT, json!({"messages": message, "chat_template": "{{ 1 }}"}), 400, "chat_template is not supported"),
        (CHAT, json!({"messages": message, "tool_choice": "required"}), 400, "there are no tools"),
        (CHAT, json!({"messages": message, "stop": ["a", ""]}), 400, "is empty"),
        (CHAT, json!({"messages": message, "logit_bias": {"x": 1}}), 400, "no token id"),
        (CHAT, json!({"messages": [{"role": "user", "content": "Hi ".repeat(100)}]}), 400, "the context holds 64"),
        (TEXT, json!({"prompt": null}), 400, "a list of token ids"),
        (TEXT, json!({"prompt": []}), 400, "0 prompts"),
        (TEXT, json!({"prompt": [1, -2]}), 400, "whole numbers"),
        (TEXT, json!({"prompt": [9999]}), 400, "token id 9999 is out of range"),
        (TEXT, json!({"prompt": [[]]}), 400, "the prompt is empty"),
        (TEXT, json!({"prompt": vec!["Hi"; 100], "n": 10}), 400, "1000 answers are asked for, at most 288"),
        (TEXT, json!({"prompt": "Hi", "suffix": "!"}), 400, "suffix is not supported"),
        (TEXT, json!({"prompt": "Hi", "best_of": 3}), 400, "best_of"),
        (TEXT, json!({"prompt": "x".repeat(30_000)}), 413, "larger than 20480 bytes"),
        (TEXT, json!({"prompt": "Hi", "bad_words": ["a"]}), 400, "bad_words is not supported"),
        (TEXT, json!({"prompt": "Hi", "return_token_ids": true}), 400, "return_token_ids is not supported"),
        (CHAT, json!({"messages": message, "functions": [{"name": "f"}]}), 400, "functions is not supported"),
        ("/v1/responses", json!({"input": "Hi", "background": true}), 400, "background is not supported"),
        ("/v1/responses", json!({"input": "Hi", "truncation": "auto"}), 400, "truncation is not supported"),
        ("/v1/responses", json!({"input": "Hi", "n": 2}), 400, "a response is one answer"),
        ("/detokenize", json!({"tokens": [9999]}), 400, "token id 9999 is out of range"),
        ("/v1/embeddings", json!({"input": "Hi"}), 404, "embeddings are not supported"),
        ("/v1/audio", json!({}), 404, "no such route"),
        ("/detokenize", json!({"tokens": ["a"]}), 400, "whole numbers"),
    ] {
        let reply = server.post(path, &body);
        let (got, message) = reply.error();
        assert!(got == status && message.contains(part), "{body}: {got} {message}");
        let error = &reply.json()["error"];
        let kind = if status == 404 { "not_found_error" } else { "invalid_request_error" };
        assert!(error["type"] == kind && error.as_object().unwrap().len() == 4, "{error}");
    }
    assert_eq!(server.post_text(CHAT, "{\"messages\": [", &[]).status, 400);
    assert_eq!(server.post_text(CHAT, &"[".repeat(9000), &[]).status, 400);
    assert_eq!(server.get(CHAT).error(), (405, "this route does not take that method".into()));
}

#[test]
fn tokens_models_and_versions_are_told() {
    let server = Server::start(&["--served-model-name", "a/b"]);
    let tokens = server.post("/tokenize", &json!({"prompt": "It was", "return_token_strs": true})).json();
    assert_eq!((&tokens["tokens"], &tokens["count"]), (&json!([4080, 895, 305]), &json!(3)));
    assert_eq!(tokens["token_strs"], json!(["<|begin_of_text|>", "It", "Ġwas"]));
    let begun = server.post("/tokenize", &json!({"prompt": "<|begin_of_text|>It was"})).json();
    assert_eq!(begun["tokens"], tokens["tokens"]);
    let asked = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": HOOK.0}]})).json();
    let text =
        server.post("/detokenize", &json!({"tokens": asked["tokens"]})).json()["prompt"].as_str().unwrap().to_owned();
    assert!(text.starts_with("<|begin_of_text|>") && text.contains(HOOK.0), "{text}");
    let models = server.get("/v1/models").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["root"]), (&json!("a/b"), &json!("quaver-demo")));
    assert_eq!(server.get("/v1/models/a/b").json()["max_model_len"], 4096);
    assert_eq!(server.get("/v1/models/c").status, 404);
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    assert!(server.get("/tokenizer_info").json()["chat_template"].as_str().unwrap().contains("message"));
    let page = server.get("/");
    assert!(page.header("content-security-policy").unwrap().contains("connect-src 'self'"));
    // It names no other server.
    assert!(page.text.contains("v1/chat/completions") && !page.text.contains("//"), "{}", page.text);
}
