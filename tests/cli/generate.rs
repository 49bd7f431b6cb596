//! `quaver generate` where nothing is wrong.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use quaver::text::Tokenizer;
use serde_json::{Value, json};

use crate::support::checkpoints::demo;
use crate::{HOOK, greedy, ids, quaver};

const SMEE: &str = "Who is Mr. Smee?";

fn tokenizer() -> Tokenizer {
    Tokenizer::from_json(&fs::read(demo().join("tokenizer.json")).unwrap()).unwrap()
}

/// The prompt that the model was given, as text.
fn prompt(object: &Value) -> String {
    tokenizer().decode(&ids(object, "prompt_token_ids"), false).unwrap()
}

#[test]
fn the_demo_model_answers() {
    assert_eq!(greedy(&[HOOK.0]).succeeds(), format!("{}\n", HOOK.1));
    assert_eq!(greedy(&["--chat", HOOK.0]).succeeds(), format!("{}\n", HOOK.1));
}

#[test]
fn a_model_in_a_folder_answers() {
    let demo = demo().display().to_string();
    assert_eq!(greedy(&["--model", &demo, HOOK.0]).succeeds(), format!("{}\n", HOOK.1));
    let object = &greedy(&["--model", &demo, "-n", "1", "--json", HOOK.0]).json()[0];
    assert_eq!(object["model"], *demo);
}

#[test]
fn several_prompts_are_answered_in_their_order() {
    let alone = greedy(&[SMEE]).succeeds();
    assert_eq!(greedy(&[SMEE, HOOK.0]).succeeds(), format!("{alone}\n{}\n", HOOK.1));
    let objects = greedy(&["--json", HOOK.0, SMEE, HOOK.0]).json();
    let texts: Vec<_> = objects.iter().map(|object| object["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [HOOK.1, alone.trim_end(), HOOK.1]);
}

#[test]
fn stdin_and_files_are_taken_as_they_are() {
    let text = "  It was\n\n";
    let want = tokenizer().encode(text, true).unwrap();
    let from_stdin = greedy(&["--raw", "--json", "-n", "0", "-"]).stdin(text).json();
    assert_eq!(ids(&from_stdin[0], "prompt_token_ids"), want);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let from_file = greedy(&["--raw", "--json", "-n", "0", "--prompt-file", file]).json();
    assert_eq!(ids(&from_file[0], "prompt_token_ids"), want);
    let all = greedy(&["--raw", "--json", "-n", "0", "It was", "-", "--prompt-file", file]).stdin(text).json();
    assert_eq!(all.iter().map(|object| prompt(object).len()).collect::<Vec<_>>(), [23, 27, 27]);
}

#[test]
fn conversations_and_system_messages_are_rendered_by_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("messages.json");
    let messages = json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": HOOK.0}]},
    ]);
    fs::write(&file, messages.to_string()).unwrap();
    let given = greedy(&["--json", "-n", "4", "--messages", file.to_str().unwrap()]).json();
    let built = greedy(&["--json", "-n", "4", "--system", "Be brief.", HOOK.0]).json();
    assert_eq!(ids(&given[0], "prompt_token_ids"), ids(&built[0], "prompt_token_ids"));
    assert_eq!(given[0]["text"], built[0]["text"]);
    let text = prompt(&built[0]);
    assert!(text.contains("Be brief.") && text.contains(HOOK.0), "{text}");
    let without = greedy(&["--json", "-n", "0", HOOK.0]).json();
    assert!(!prompt(&without[0]).contains("Be brief."));
}

#[test]
fn token_ids_go_in_as_they_are() {
    let object = &greedy(&["--json", "-n", "4", "--prompt-ids", "4080, 895,305"]).json()[0];
    assert_eq!(ids(object, "prompt_token_ids"), [4080, 895, 305]);
    let raw = &greedy(&["--json", "-n", "4", "--raw", "It was"]).json()[0];
    assert_eq!((&object["text"], &object["token_ids"]), (&raw["text"], &raw["token_ids"]));
}

#[test]
fn json_has_every_field_that_others_build_on() {
    let object = &greedy(&["--json", HOOK.0]).json()[0];
    let keys: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
    let want = ["model", "backend", "device", "text", "token_ids", "prompt_token_ids", "finish_reason", "usage"];
    assert_eq!(keys, [&want[..], &["timings"]].concat());
    assert_eq!(
        (&object["model"], &object["backend"], &object["text"]),
        (&json!("quaver-demo"), &json!("cpu"), &json!(HOOK.1))
    );
    assert!(object["device"].is_string());
    let (prompt, answer) = (ids(object, "prompt_token_ids"), ids(object, "token_ids"));
    assert_eq!(prompt[0], 4080);
    assert_eq!(object["usage"], json!({"prompt_tokens": prompt.len(), "completion_tokens": answer.len()}));
    // It ends with an end-of-text token, which is no part of the text.
    assert_eq!(object["finish_reason"], "stop");
    assert!([4081, 4088, 4089].contains(answer.last().unwrap()));
    assert_eq!(tokenizer().decode(&answer, true).unwrap(), HOOK.1);
    for timing in ["load_ms", "ttft_ms", "decode_tokens_per_s"] {
        assert!(object["timings"][timing].as_f64().unwrap() > 0.0, "{timing}");
    }
}

#[test]
fn logprobs_are_those_of_the_tokens() {
    let object = &greedy(&["--json", "-n", "3", "--logprobs", "2", "--prompt-logprobs", "1", HOOK.0]).json()[0];
    let logprobs = object["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 3);
    for (id, token) in ids(object, "token_ids").into_iter().zip(logprobs) {
        assert_eq!(token["token_id"], id);
        // The greedy token is the likeliest.
        assert_eq!(token["top"][0], json!({"token_id": id, "logprob": token["logprob"]}));
        assert_eq!(token["top"].as_array().unwrap().len(), 2);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
    let prompt = ids(object, "prompt_token_ids");
    let scores = object["prompt_logprobs"].as_array().unwrap();
    assert_eq!((scores.len(), &scores[0]), (prompt.len(), &Value::Null));
    for (id, score) in prompt.into_iter().zip(scores).skip(1) {
        assert_eq!((&score["token_id"], score["top"].as_array().unwrap().len()), (&json!(id), 1));
    }
    let none = &greedy(&["--json", "-n", "1", "--logprobs", "0", HOOK.0]).json()[0];
    assert_eq!((&none["logprobs"][0]["top"], none.get("prompt_logprobs")), (&json!([]), None));
}

#[test]
fn no_tokens_can_be_asked_for() {
    let object = &greedy(&["--json", "--max-tokens", "0", "--prompt-logprobs", "0", HOOK.0]).json()[0];
    assert_eq!(
        (&object["text"], &object["token_ids"], &object["finish_reason"]),
        (&json!(""), &json!([]), &json!("length"))
    );
    assert!(object["prompt_logprobs"].as_array().unwrap().len() > 1);
    assert_eq!(greedy(&["--max-tokens", "0", HOOK.0]).succeeds(), "\n");
}

#[test]
fn an_answer_ends_before_a_stop_string_and_at_max_tokens() {
    let stopped = &greedy(&["--json", "--stop", "never", "--stop", " enemy", HOOK.0]).json()[0];
    assert_eq!(
        (&stopped["text"], &stopped["finish_reason"]),
        (&json!("Captain Hook is a pirate, and the great"), &json!("stop"))
    );
    assert_eq!(greedy(&["--stop", "pirate", HOOK.0]).succeeds(), "Captain Hook is a \n");
    let short = &greedy(&["--json", "-n", "2", HOOK.0]).json()[0];
    assert_eq!((&short["finish_reason"], &short["usage"]["completion_tokens"]), (&json!("length"), &json!(2)));
}

#[test]
fn the_end_of_text_can_be_ignored() {
    let object = &greedy(&["--json", "--ignore-eos", "-n", "40", HOOK.0]).json()[0];
    assert_eq!((ids(object, "token_ids").len(), &object["finish_reason"]), (40, &json!("length")));
    assert!(object["text"].as_str().unwrap().starts_with(HOOK.1));
}

#[test]
fn a_seed_gives_the_same_text_again() {
    let run = |seed: &str| {
        quaver(["generate", "--raw", "-n", "12", "--temperature", "1.5", "--seed", seed, "It was"]).succeeds()
    };
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1"), run("2"));
}

/// The deployment example of Llama-3.2-1B-Instruct-FP8's model card: a system prompt, temperature 0.6, top_p 0.9, 256
/// tokens, a list of prompts.
#[test]
fn the_model_card_s_deployment_runs() {
    let system = "You are a pirate chatbot who always responds in pirate speak!";
    let sampling = ["--temperature", "0.6", "--top-p", "0.9", "--max-tokens", "256", "--seed", "7"];
    let run = || {
        let args = [&["generate", "--json", "--system", system], &sampling[..], &["Who are you?", HOOK.0]].concat();
        quaver(args).json()
    };
    let (first, second) = (run(), run());
    assert_eq!(first.len(), 2);
    for (a, b) in first.iter().zip(&second) {
        assert!(prompt(a).contains(system) && !a["text"].as_str().unwrap().is_empty());
        assert_eq!(a["token_ids"], b["token_ids"]);
    }
}

#[test]
fn the_environment_sets_flags_and_flags_win() {
    let run = |args: &[&str]| {
        let run = quaver([&["generate", "--json", HOOK.0], args].concat());
        run.env("QUAVER_MAX_TOKENS", "3").env("QUAVER_TEMPERATURE", "0").env("QUAVER_BACKEND", "reference")
    };
    let object = &run(&[]).json()[0];
    assert_eq!((&object["backend"], &object["usage"]["completion_tokens"]), (&json!("reference"), &json!(3)));
    let object = &run(&["--backend", "cpu", "--max-tokens", "5"]).json()[0];
    assert_eq!((&object["backend"], &object["usage"]["completion_tokens"]), (&json!("cpu"), &json!(5)));
    run(&[]).env("QUAVER_TOP_P", "7").fails(2, "top_p is 7; it must be above 0 and at most 1 (1 turns it off)");
    let system = || greedy(&["--json", "-n", "0", HOOK.0]).env("QUAVER_SYSTEM", "Be brief.");
    assert!(prompt(&system().json()[0]).contains("Be brief."));
    let raw = greedy(&["--json", "-n", "0", "--raw", "It was"]).env("QUAVER_SYSTEM", "Be brief.").json();
    assert_eq!(ids(&raw[0], "prompt_token_ids"), [4080, 895, 305]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut run = greedy(&["--ignore-eos", "-n", "200", HOOK.0]).command;
    let mut child = run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut start = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((&start, output.status.code(), &output.stderr[..]), (b"Capta", Some(0), &b""[..]));
}

#[test]
fn help_and_version_are_results() {
    let version = quaver(["--version"]).succeeds();
    let commit = version.strip_prefix(concat!("quaver ", env!("CARGO_PKG_VERSION"), " (")).expect(&version);
    let commit = commit.strip_suffix(")\n").expect(&version).trim_end_matches("-dirty");
    let digits = commit.len() >= 12 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    assert!(digits || commit == "unknown", "{version}");
    assert!(quaver(["generate", "--help"]).succeeds().contains("--prompt-logprobs <N>"));
}
