//! A tokenizer that is read while other things happen: the 128k entries of Llama 3's take as long as mapping the weights
//! and computing a first token.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use quaver_core::bytes::Bytes;
use quaver_core::{Error, Result};

use super::Tokenizer;

/// See the module.
pub struct TokenizerReading {
    state: Mutex<State>,
    read: OnceLock<Tokenizer>,
}

enum State {
    Waiting(Bytes),
    Reading(JoinHandle<Result<Tokenizer>>),
    Done,
}

impl TokenizerReading {
    /// Reads the bytes of a `tokenizer.json` when they are needed first, and from now on in a thread where `beside`.
    pub fn new(json: Bytes, beside: bool) -> Self {
        let state = match beside {
            true => State::Reading(std::thread::spawn(move || Tokenizer::from_json(&json))),
            false => State::Waiting(json),
        };
        TokenizerReading { state: Mutex::new(state), read: OnceLock::new() }
    }

    /// The tokenizer; waits until it is read.
    pub fn get(&self) -> Result<&Tokenizer> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let tokenizer = match std::mem::replace(&mut *state, State::Done) {
            State::Waiting(json) => Tokenizer::from_json(&json)?,
            State::Reading(thread) => thread.join().unwrap_or_else(|_| Err(failed()))?,
            State::Done => return self.read.get().ok_or_else(failed),
        };
        Ok(self.read.get_or_init(|| tokenizer))
    }
}

fn failed() -> Error {
    Error::text("tokenizer.json", "could not be read; download the file again or re-export it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_the_file_is_said_by_the_first_use_and_no_later_one_succeeds() {
        for beside in [true, false] {
            let reading = TokenizerReading::new(Bytes::from(b"{".to_vec()), beside);
            let first = reading.get().map(drop).expect_err("damaged").to_string();
            assert_eq!(first, Tokenizer::from_json(b"{").map(drop).expect_err("damaged").to_string());
            assert_eq!(reading.get().map(drop).expect_err("damaged").to_string(), failed().to_string());
        }
    }
}
