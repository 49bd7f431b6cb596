//! What a user can get wrong: each mistake is one line that says what is wrong and what to do. Mistakes in the arguments
//! exit with 2, before a model is loaded; all others with 1.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::{HOOK, greedy, quaver};

/// A file of these bytes; it vanishes with the folder.
fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn arguments_that_do_not_parse_are_usage_errors() {
    for (args, message) in [
        (&["frob"][..], "unrecognized subcommand 'frob' (see quaver --help)"),
        (
            &["generate", "--tempreature", "1", "hi"],
            "unexpected argument '--tempreature' found; tip: a similar argument exists: '--temperature' (see quaver --help)",
        ),
        (
            &["generate", "--profile", "large", "hi"],
            "invalid value 'large' for '--profile <PROFILE>'; [possible values: exact, fast] (see quaver --help)",
        ),
        (
            &["generate", "--kv-cache-memory", "lots", "hi"],
            "invalid value 'lots' for '--kv-cache-memory <BYTES>': a number of bytes is expected, such as 512M or 4G \
             (see quaver --help)",
        ),
        (
            &["generate", "--threads", "0", "hi"],
            "invalid value '0' for '--threads <N>': 0 is not in 1..=1024 (see quaver --help)",
        ),
        (
            &["generate", "--logprobs", "1", "hi"],
            "the following required arguments were not provided: --json (see quaver --help)",
        ),
        (
            &["generate", "--chat", "--raw", "hi"],
            "the argument '--chat' cannot be used with '--raw' (see quaver --help)",
        ),
        (
            &["generate", "--raw", "--system", "x", "hi"],
            "--system and --raw exclude each other: plain text has no system message",
        ),
        (&["generate"], "no prompt: give a text, - for stdin, or --messages FILE (see --help)"),
        (&["generate", "--prompt-ids", ""], "--prompt-ids is empty; give at least one token id, such as 1,2,3"),
        (&["generate", "--prompt-ids", "1,x"], "--prompt-ids 1,x: token ids are expected, such as 1,2,3"),
        (&["generate", "--prompt-ids", "-1"], "--prompt-ids -1: token ids are expected, such as 1,2,3"),
    ] {
        quaver(args).fails(2, message);
    }
    quaver(["generate", "--backend", "abacus", "hi"])
        .fails_with(2, &["invalid value 'abacus'", "has the backends auto"]);
}

#[test]
fn absurd_sampling_parameters_are_usage_errors() {
    for (args, message) in [
        (["--temperature", "-1"], "temperature is -1; it must be between 0 (greedy) and 100"),
        (["--temperature", "nan"], "temperature is NaN; it must be between 0 (greedy) and 100"),
        (["--temperature", "inf"], "temperature is inf; it must be between 0 (greedy) and 100"),
        (["--top-p", "0"], "top_p is 0; it must be above 0 and at most 1 (1 turns it off)"),
        (["--top-p", "1.5"], "top_p is 1.5; it must be above 0 and at most 1 (1 turns it off)"),
        (["--min-p", "-0.5"], "min_p is -0.5; it must be between 0 (off) and 1"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0; it must be above 0 and at most 100 (1 turns it off)"),
        (["--presence-penalty", "3"], "presence_penalty is 3; it must be between -2 and 2 (0 turns it off)"),
        (["--frequency-penalty", "-3"], "frequency_penalty is -3; it must be between -2 and 2 (0 turns it off)"),
        (["--top-k", "-1"], "invalid value '-1' for '--top-k <K>': -1 is not in 0..=4294967295 (see quaver --help)"),
        (["--stop", ""], "stop string 0: is empty; give at least one character"),
    ] {
        quaver([&["generate", "--model", "/absent"], &args[..], &["hi"]].concat()).fails(2, message);
    }
    for flag in ["--seed", "--max-tokens"] {
        for value in ["-1", "1e99", "many"] {
            quaver(["generate", flag, value, "hi"]).fails_with(2, &["invalid value", value, flag]);
        }
    }
    for flag in ["--logprobs", "--prompt-logprobs"] {
        let name = flag.trim_start_matches("--").replace('-', "_");
        greedy(&["--json", flag, "99", "hi"]).fails(2, &format!("{name} is 99; it must be at most 20 alternatives"));
    }
}

#[test]
fn prompts_that_the_model_cannot_take_are_refused() {
    greedy(&["--prompt-ids", "4080,4096"]).fails(1, "token id 4096 is out of range: the vocabulary has 4096 entries");
    greedy(&["--prompt-ids", "4294967296"]).fails(2, "--prompt-ids 4294967296: token ids are expected, such as 1,2,3");
    let room = "and needs room for an answer; shorten it, or raise --max-model-len or --kv-cache-memory";
    let ids = ["4080"; 32].join(",");
    let run = |context: &str, more: &[&str]| {
        greedy(&[&["--max-model-len", context, "--prompt-ids", &ids, "-n", "1"], more].concat())
    };
    run("31", &[]).fails(1, &format!("prompt has 32 tokens, the context holds 31 {room}"));
    run("32", &[]).fails(1, &format!("prompt has 32 tokens, the context holds 32 {room}"));
    run("33", &[]).succeeds();
    // One page of 16 tokens is 48 KiB in bf16.
    run("64", &["--kv-cache-memory", "50K"]).fails(
        1,
        "the KV cache of 64 tokens needs 196608 bytes, 51200 are available; raise --kv-cache-memory or lower \
         --max-model-len",
    );
    greedy(&["--max-model-len", "16", "short", HOOK.0]).fails_with(1, &["prompt has ", "the context holds 16 "]);
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    let message = "is not UTF-8 from byte 2 on; convert it first";
    greedy(&["-"]).stdin(*b"ab\xff").fails(1, &format!("stdin: {message}"));
    let (_dir, path) = file(b"ab\xffcd");
    let path = path.to_str().unwrap();
    greedy(&["--prompt-file", path]).fails(1, &format!("{path}: {message}"));
}

#[cfg(unix)]
#[test]
fn an_argument_that_is_not_utf8_is_refused() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let args = [OsStr::new("generate"), OsStr::from_bytes(b"\xff")];
    quaver(args).fails(2, "invalid UTF-8 was detected in one or more arguments (see quaver --help)");
}

#[test]
fn files_that_are_not_there_are_named() {
    for flag in ["--prompt-file", "--messages"] {
        greedy(&[flag, "/absent/file"]).fails_with(1, &["cannot read /absent/file: "]);
    }
}

#[test]
fn messages_that_are_no_conversation_are_refused() {
    for (json, message) in [
        (r#"{"role": "user"}"#, "messages: is an object; give an array of messages"),
        ("[]", "messages: empty; give at least one message"),
        (r#"[{"content": "hi"}]"#, "messages[0]: has no role; give one, such as \"user\""),
        (r#"[{"role": 1, "content": "hi"}]"#, "messages[0].role: is a number; give a string"),
        (r#"[{"role": "critic", "content": "hi"}]"#, "chat template: refuses the messages: unsupported role: critic"),
        (
            r#"[{"role": "user", "content": 1}]"#,
            "messages[0].content: is a number; give a string or an array of {\"type\": \"text\", \"text\": ..}",
        ),
    ] {
        let (_dir, path) = file(json.as_bytes());
        greedy(&["--messages", path.to_str().unwrap()]).fails(1, message);
    }
    for bytes in [&b"[{"[..], b"", b"\xff", b"hello"] {
        let (_dir, path) = file(bytes);
        greedy(&["--messages", path.to_str().unwrap()])
            .fails_with(1, &["file: is not JSON: ", "; give an OpenAI messages array"]);
    }
}

#[test]
fn devices_and_sizes_that_are_not_there_are_refused() {
    greedy(&["--backend", "reference", "--device", "3", "hi"])
        .fails(1, "reference: there is no device 3; this machine has 1 (see `quaver devices`)");
    for context in ["0", "4097"] {
        greedy(&["--max-model-len", context, "hi"])
            .fails(1, &format!("--max-model-len {context}: the model is made for 4096 tokens; give 1 to 4096"));
    }
    greedy(&["--kv-cache-memory", "1K", "hi"])
        .fails(1, "one page of the KV cache needs 49152 bytes, 1024 are available; raise --kv-cache-memory");
}

#[test]
fn verbose_errors_show_their_causes_and_a_log() {
    let ran = greedy(&["-v", "--model", "/absent", "hi"]).run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("/absent: is not there"), "{}", ran.stderr);
}
