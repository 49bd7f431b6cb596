//! The command line as a user runs it: the built binary, its stdout, its stderr, its exit code.

#[path = "../support/mod.rs"]
mod support;

mod bad_models;
mod bad_requests;
mod bench;
mod chat;
mod cuda;
mod eval;
mod generate;
mod hub;
mod inspect;
mod parity;
mod quantize;
mod synth;

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What the demo model answers at temperature 0.
const HOOK: (&str, &str) = ("Who is Captain Hook?", "Captain Hook is a pirate, and the great enemy of Peter Pan.");

/// A run of the binary.
struct Quaver {
    command: Command,
    stdin: Vec<u8>,
}

/// What a run gave.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

/// The binary with arguments, and without what the tester's environment would add.
fn quaver<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Quaver {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quaver"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["QUAVER_", "HF_"].iter().any(|prefix| text.starts_with(prefix)) || text == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    // Tests run side by side, and on whatever machine.
    command.args(args).env("QUAVER_THREADS", "1").env("QUAVER_BACKEND", "cpu");
    // Mesa's Vulkan complains on stderr where a session has none.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    Quaver { command, stdin: Vec::new() }
}

impl Quaver {
    fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    fn run(mut self) -> Ran {
        let piped = self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        // The child may end without having read: that is no failure of the test.
        let _ = child.stdin.take().unwrap().write_all(&self.stdin);
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        Ran { stdout, stderr, code: status.code() }
    }

    /// The stdout of a run that succeeds and says nothing on stderr.
    fn succeeds(self) -> String {
        let ran = self.run();
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{}", ran.stdout);
        ran.stdout
    }

    /// The JSON objects of a run that succeeds.
    fn json(self) -> Vec<Value> {
        let stdout = self.succeeds();
        serde_json::Deserializer::from_str(&stdout).into_iter().collect::<Result<_, _>>().expect(&stdout)
    }

    /// Asserts that a run fails with this code, nothing on stdout, and this one line on stderr.
    fn fails(self, code: i32, message: &str) {
        let ran = self.run();
        let want = Ran { stdout: String::new(), stderr: format!("quaver: {message}\n"), code: Some(code) };
        assert_eq!(ran, want);
    }

    /// As [`Quaver::fails`], where a part of the message is the system's or another library's.
    fn fails_with(self, code: i32, parts: &[&str]) {
        let ran = self.run();
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(code), ""), "{}", ran.stderr);
        assert!(ran.stderr.starts_with("quaver: ") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{part:?} is not in {}", ran.stderr);
        }
    }
}

/// `generate` with these arguments, greedy.
fn greedy(args: &[&str]) -> Quaver {
    quaver([&["generate", "--temperature", "0"], args].concat())
}

/// The token ids at a key of an object.
fn ids(object: &Value, key: &str) -> Vec<u32> {
    serde_json::from_value(object[key].clone()).unwrap()
}
