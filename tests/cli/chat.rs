//! `quaver chat`, driven through a pipe: stdout holds answers alone, stderr errors alone.

use std::fs;

use serde_json::{Value, json};

use crate::{HOOK, Ran, quaver};

/// A greedy chat over these lines.
fn chat(args: &[&str], lines: &str) -> Ran {
    quaver([&["chat", "--temperature", "0"], args].concat()).stdin(lines).run()
}

/// The same, saved at the end: the messages.
fn saved(args: &[&str], lines: &str) -> (Ran, Value) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("chat.json");
    let ran = chat(args, &format!("{lines}\n/save {}\n/bye\nnever read\n", file.display()));
    // Nothing but the file is left.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{}", ran.stderr);
    (ran, serde_json::from_slice(&fs::read(file).unwrap()).unwrap())
}

fn roles(messages: &Value) -> Vec<&str> {
    messages.as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect()
}

#[test]
fn two_turns_are_answered_and_saved() {
    let (ran, messages) = saved(&[], &format!("{}\nWho is Peter Pan?", HOOK.0));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let answers: Vec<_> = ran.stdout.lines().collect();
    assert_eq!((answers.len(), answers[0]), (2, HOOK.1));
    assert_eq!(roles(&messages), ["user", "assistant", "user", "assistant"]);
    assert_eq!((&messages[0]["content"], &messages[1]["content"]), (&json!(HOOK.0), &json!(HOOK.1)));
    assert_eq!(messages[3]["content"], answers[1]);
    // What is saved can be given to `generate`.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("messages.json");
    fs::write(&file, json!([messages[0], messages[1], messages[2]]).to_string()).unwrap();
    let again = quaver(["generate", "--temperature", "0", "--messages", file.to_str().unwrap()]).succeeds();
    assert_eq!(again.trim_end(), answers[1]);
}

#[test]
fn the_end_of_stdin_ends_it() {
    assert_eq!(chat(&[], ""), Ran { stdout: String::new(), stderr: String::new(), code: Some(0) });
    // The last line counts without its line break.
    assert_eq!(chat(&[], HOOK.0).stdout, format!("{}\n", HOOK.1));
    // So does what still waits for more lines.
    assert_eq!(chat(&[], &format!("{}\\\n", HOOK.0)).stdout, format!("{}\n", HOOK.1));
    assert_eq!(chat(&[], &format!("\"\"\"\n{}\n", HOOK.0)).stdout, format!("{}\n", HOOK.1));
}

#[test]
fn the_system_message_is_set_and_taken_away() {
    let (_, messages) = saved(&["--system", "Be brief."], HOOK.0);
    assert_eq!((roles(&messages), &messages[0]["content"]), (vec!["system", "user", "assistant"], &json!("Be brief.")));
    let (_, messages) = saved(&["--system", "Be brief."], "/system Be long.\n/reset");
    assert_eq!(messages, json!([{"role": "system", "content": "Be long."}]));
    let (_, messages) = saved(&["--system", "Be brief."], "/system");
    assert_eq!(messages, json!([]));
}

#[test]
fn reset_forgets_the_turns() {
    let (ran, messages) = saved(&[], &format!("Who are you?\n/reset\n{}", HOOK.0));
    assert_eq!(roles(&messages), ["user", "assistant"]);
    assert!(ran.stdout.ends_with(&format!("{}\n", HOOK.1)));
}

#[test]
fn parameters_are_set_and_shown() {
    let ran = chat(&["--seed", "5"], &format!("/set max_tokens 2\n/set top-k 40\n/set\n{}\n", HOOK.0));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let lines: Vec<_> = ran.stdout.lines().collect();
    assert_eq!(lines.len(), 12);
    for line in ["temperature         0", "top_p               0.9", "top_k               40", "seed                5"]
    {
        assert!(lines.contains(&line), "{line:?} is not in {}", ran.stdout);
    }
    assert_eq!(lines[11], "Cap");
    let ran = chat(&[], &format!("/set stop pirate\n{}\n", HOOK.0));
    assert_eq!(ran.stdout, "Captain Hook is a \n");
}

#[test]
fn messages_of_several_lines_are_one() {
    let (_, messages) = saved(&["-n", "1"], "Who is\\\nCaptain Hook?\n\"\"\"\n/bye is\n\n  no command\n\"\"\"");
    assert_eq!(
        (&messages[0]["content"], &messages[2]["content"]),
        (&json!("Who is\nCaptain Hook?"), &json!("/bye is\n\n  no command"))
    );
}

#[test]
fn help_lists_every_command() {
    let ran = chat(&[], "/help\n");
    for command in ["/help", "/system TEXT", "/set NAME VALUE", "/reset", "/save FILE", "/bye"] {
        assert!(ran.stdout.lines().any(|line| line.starts_with(command)), "{command}");
    }
    assert_eq!(ran.stderr, "");
}

#[test]
fn mistakes_are_told_and_end_nothing() {
    let lines = [
        "/frob 1",
        "/set",
        "/set temperature hot",
        "/set top_p 7",
        "/set warmth 1",
        "/set seed",
        "/save",
        "/save /absent/folder/file",
        HOOK.0,
    ];
    let lines = [lines.join("\n").as_bytes(), b"\n\xff\xfe\n/reset\n", HOOK.0.as_bytes()].concat();
    let ran = quaver(["chat", "--temperature", "0"]).stdin(lines).run();
    let answers = format!("{0}\n{0}\n", HOOK.1);
    assert!(ran.code == Some(0) && ran.stdout.ends_with(&answers), "{ran:?}");
    let errors: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(
        errors[..3],
        [
            "quaver: /frob: is no command; see /help",
            "quaver: temperature: \"hot\" is not a number",
            "quaver: top_p is 7; it must be above 0 and at most 1 (1 turns it off)",
        ]
    );
    assert!(errors[3].starts_with("quaver: warmth: is no sampling parameter; there are temperature, top_p,"));
    assert_eq!(errors[4], "quaver: /set: give a name and a value, such as /set temperature 0.6");
    assert_eq!(errors[5], "quaver: /save: give the name of a file");
    assert!(errors[6].starts_with("quaver: cannot write /absent/folder/file: "));
    assert_eq!(errors[7..], ["quaver: stdin: this line is not UTF-8 and is left out; convert it first"]);
}

#[test]
fn a_conversation_that_no_longer_fits_goes_on_after_reset() {
    // The template alone takes some 40 tokens: one turn fits, two do not.
    let (ran, messages) = saved(&["--max-model-len", "80"], &format!("{0}\n{0}\n/reset\n{0}", HOOK.0));
    assert_eq!((ran.code, ran.stdout), (Some(0), format!("{0}\n{0}\n", HOOK.1)));
    let errors: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("quaver: the conversation: has ") && errors[0].contains("the context holds 80 "));
    assert!(errors[0].ends_with("start over with /reset, or raise --max-model-len"), "{}", errors[0]);
    assert_eq!(roles(&messages), ["user", "assistant"]);
    // The message that did not fit is taken back.
    let (_, messages) = saved(&["--max-model-len", "80"], &format!("{0}\n{0}", HOOK.0));
    assert_eq!(roles(&messages), ["user", "assistant"]);
}

#[test]
fn a_seed_makes_a_conversation_reproducible() {
    let run = || {
        quaver(["chat", "--seed", "3", "--temperature", "1.5", "-n", "12"]).stdin("Who are you?\nAnd I?\n").succeeds()
    };
    assert_eq!(run(), run());
}

#[test]
fn saving_replaces_a_file_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("chat.json");
    fs::write(&file, "x".repeat(10_000)).unwrap();
    assert_eq!(chat(&[], &format!("/save {}\n", file.display())).stderr, "");
    assert_eq!(fs::read_to_string(&file).unwrap(), "[]\n");
}
