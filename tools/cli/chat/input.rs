//! Where the messages of a chat come from: a line editor on a terminal, plain lines from anything else. Both read the
//! same language: a line that ends in `\` goes on in the next, and `"""` opens a block that `"""` closes.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal};

use anyhow::Result;
use quaver::Error;
use reedline::{
    Prompt, PromptEditMode, PromptHistorySearch, PromptHistorySearchStatus, Reedline, Signal, ValidationResult,
    Validator,
};

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// A line that begins with `/`, without it.
    Command(String),
    /// A message; not empty.
    Message(String),
}

/// Gives entries until there are no more.
pub enum Input {
    Terminal(Box<Reedline>),
    Lines,
}

impl Input {
    /// A line editor where a person types and reads. It draws on stderr, and sends stdout's terminal commands as well.
    pub fn open() -> Self {
        if !(io::stdin().is_terminal() && io::stdout().is_terminal() && io::stderr().is_terminal()) {
            return Input::Lines;
        }
        let editor = Reedline::create().with_validator(Box::new(Unfinished)).use_bracketed_paste(true);
        Input::Terminal(Box::new(editor))
    }

    /// True where a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    /// The next entry; None at the end. An error concerns one entry; what follows can still be read, except where
    /// the error is [`io::Error`].
    pub fn next(&mut self) -> Result<Option<Entry>> {
        loop {
            let text = match self {
                Input::Terminal(editor) => match editor.read_line(&Marks).map_err(io::Error::other)? {
                    Signal::Success(text) => text,
                    Signal::CtrlD => return Ok(None),
                    // Ctrl-C: the editor has dropped the line already.
                    _ => continue,
                },
                Input::Lines => match read_entry(&mut io::stdin().lock())? {
                    Some(text) => text,
                    None => return Ok(None),
                },
            };
            if let Some(entry) = parse(&text) {
                return Ok(Some(entry));
            }
        }
    }
}

/// Lines until they make an entry, or end.
fn read_entry(lines: &mut impl BufRead) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        let at_end = lines.read_until(b'\n', &mut bytes)? == 0;
        if at_end && bytes.is_empty() {
            return Ok(None);
        }
        let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let Ok(text) = std::str::from_utf8(text) else {
            return Err(Error::text("stdin", "this line is not UTF-8 and is left out; convert it first").into());
        };
        if at_end || !is_open(text) {
            return Ok(Some(text.to_owned()));
        }
    }
}

const FENCE: &str = "\"\"\"";

/// True where more lines belong to the text.
fn is_open(text: &str) -> bool {
    match text.trim_start().strip_prefix(FENCE) {
        Some(block) => !block.trim_end().ends_with(FENCE),
        None => text.ends_with('\\'),
    }
}

/// What a whole text means; None where it is empty.
fn parse(text: &str) -> Option<Entry> {
    let text = text.trim();
    if let Some(block) = text.strip_prefix(FENCE) {
        let block = block.strip_suffix(FENCE).unwrap_or(block);
        // The lines of the marks are no part of the message.
        let block = block.strip_prefix("\r\n").or(block.strip_prefix('\n')).unwrap_or(block);
        let block = block.strip_suffix('\n').unwrap_or(block);
        return (!block.trim().is_empty()).then(|| Entry::Message(block.to_owned()));
    }
    if let Some(command) = text.strip_prefix('/') {
        return Some(Entry::Command(unfold(command)));
    }
    let message = unfold(text);
    (!message.is_empty()).then_some(Entry::Message(message))
}

/// Lines without the marks that join them.
fn unfold(text: &str) -> String {
    let lines = text.lines().map(|line| line.strip_suffix('\\').unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}

/// Tells the editor that Enter opens another line.
struct Unfinished;

impl Validator for Unfinished {
    fn validate(&self, text: &str) -> ValidationResult {
        if is_open(text) { ValidationResult::Incomplete } else { ValidationResult::Complete }
    }
}

/// The editor's prompt.
struct Marks;

impl Prompt for Marks {
    fn render_prompt_left(&self) -> Cow<'_, str> {
        "".into()
    }

    fn render_prompt_right(&self) -> Cow<'_, str> {
        "".into()
    }

    fn render_prompt_indicator(&self, _: PromptEditMode) -> Cow<'_, str> {
        "> ".into()
    }

    fn render_prompt_multiline_indicator(&self) -> Cow<'_, str> {
        ". ".into()
    }

    fn render_prompt_history_search_indicator(&self, search: PromptHistorySearch) -> Cow<'_, str> {
        let failing = match search.status {
            PromptHistorySearchStatus::Passing => "",
            PromptHistorySearchStatus::Failing => "nothing like ",
        };
        format!("(search: {failing}{}) ", search.term).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(mut text: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        while let Some(text) = read_entry(&mut text).unwrap() {
            entries.extend(parse(&text));
        }
        entries
    }

    fn message(text: &str) -> Entry {
        Entry::Message(text.into())
    }

    #[test]
    fn lines_join_where_they_say_so() {
        assert_eq!(entries(b"one\n\n  two  \r\n"), [message("one"), message("two")]);
        assert_eq!(entries(b"one\\\ntwo\\\nthree\nfour"), [message("one\ntwo\nthree"), message("four")]);
        assert_eq!(entries(b"/set stop a\n"), [Entry::Command("set stop a".into())]);
        assert_eq!(entries(b"open\\\n"), [message("open")]);
        assert_eq!(entries(b"\\\n\n"), []);
    }

    #[test]
    fn blocks_keep_their_lines() {
        let block = b"\"\"\"\nfn main() {\\\n\n  // two\n}\n\"\"\"\nnext\n";
        assert_eq!(entries(block), [message("fn main() {\\\n\n  // two\n}"), message("next")]);
        assert_eq!(entries(b"\"\"\"/bye\"\"\"\n"), [message("/bye")]);
        assert_eq!(entries(b"\"\"\"\n\"\"\"\n"), []);
        assert_eq!(entries(b"\"\"\"never\nclosed\n"), [message("never\nclosed")]);
    }

    #[test]
    fn a_line_that_is_not_utf8_spoils_itself_alone() {
        let mut lines = &b"\xff\xfe\nfine\n"[..];
        assert!(read_entry(&mut lines).is_err());
        assert_eq!(read_entry(&mut lines).unwrap().as_deref(), Some("fine"));
    }
}
