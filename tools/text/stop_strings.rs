//! Stop strings over streamed text.
//!
//! Invariant: how the text is cut into pieces changes nothing. A stop is found at the character that completes it; of
//! several that end there, the longest counts. Its caller is whoever streams the pieces of a `Detokenizer`.

use std::sync::Arc;

use quaver_core::{Error, Result};

/// Ends a text at the first stop string, and holds back what may become one. A clone shares the stop strings.
///
/// ```
/// use quaver::text::StopStrings;
///
/// let mut stops = StopStrings::new(&["\nUser:".to_string()])?;
/// assert_eq!(stops.push("Aye!\nUs").text, "Aye!");
/// let piece = stops.push("er: and you?");
/// assert_eq!((piece.text.as_str(), piece.stopped), ("", Some(0)));
/// # Ok::<(), quaver_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<Stop>,
    /// The longest end of the text so far that begins a stop.
    held: String,
    stopped: Option<usize>,
}

/// Text that is safe to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// The text, without the stop string and what follows it.
    pub text: String,
    /// The index of the stop string that ended the text.
    pub stopped: Option<usize>,
}

/// One stop string as Knuth, Morris and Pratt match it: a step a byte, whatever the text.
#[derive(Clone, Debug)]
struct Stop {
    text: Arc<[u8]>,
    /// At `i`: the length of the longest proper prefix of `text` that ends at byte `i`.
    fallback: Arc<[usize]>,
    /// Bytes of `text` that the text so far ends with; less than all of them.
    matched: usize,
}

impl StopStrings {
    /// Stops at any of `stops`; with none, text passes unchanged. An empty stop string is refused.
    pub fn new(stops: &[String]) -> Result<Self> {
        if let Some(empty) = stops.iter().position(String::is_empty) {
            return Err(Error::text(format!("stop string {empty}"), "is empty; give at least one character"));
        }
        let stops = stops.iter().map(|stop| Stop::new(stop.as_bytes())).collect();
        Ok(StopStrings { stops, held: String::new(), stopped: None })
    }

    /// Takes the next text and returns what no stop string can claim any more. After a stop, all text is dropped.
    pub fn push(&mut self, text: &str) -> Piece {
        self.take(text, true)
    }

    /// The same for text in which no stop string ends; one that begins there may end behind it.
    pub fn pass(&mut self, text: &str) -> Piece {
        self.take(text, false)
    }

    fn take(&mut self, text: &str, may_stop: bool) -> Piece {
        if self.stopped.is_some() {
            return Piece { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for at in before..self.held.len() {
            let byte = self.held.as_bytes()[at];
            let mut found: Option<(usize, usize)> = None; // length, index
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.step(byte) && found.is_none_or(|(length, _)| stop.text.len() > length) {
                    found = Some((stop.text.len(), index));
                }
            }
            if let Some((length, index)) = found.filter(|_| may_stop) {
                let mut text = std::mem::take(&mut self.held);
                text.truncate(at + 1 - length);
                self.stopped = Some(index);
                return Piece { text, stopped: self.stopped };
            }
        }
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        Piece { text: self.held.drain(..self.held.len() - hold).collect(), stopped: None }
    }

    /// Ends the text: what was held back and became no stop string.
    pub fn finish(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        std::mem::take(&mut self.held)
    }
}

impl Stop {
    fn new(text: &[u8]) -> Self {
        let mut fallback = vec![0; text.len()];
        let mut length = 0;
        for i in 1..text.len() {
            while length > 0 && text[i] != text[length] {
                length = fallback[length - 1];
            }
            length += usize::from(text[i] == text[length]);
            fallback[i] = length;
        }
        Stop { text: text.into(), fallback: fallback.into(), matched: 0 }
    }

    /// Whether `byte` completes the stop string.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.text[self.matched] == byte);
        let complete = self.matched == self.text.len();
        if complete {
            self.matched = self.fallback[self.matched - 1];
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
    }

    fn all(stops: &mut StopStrings, pieces: &[&str]) -> (String, Option<usize>) {
        let mut text = String::new();
        for piece in pieces {
            let piece = stops.push(piece);
            text += &piece.text;
            if piece.stopped.is_some() {
                return (text, piece.stopped);
            }
        }
        (text + &stops.finish(), None)
    }

    #[test]
    fn a_stop_over_pieces_is_left_out() {
        assert_eq!(all(&mut stops(&["END"]), &["some E", "N", "D more"]), ("some ".into(), Some(0)));
        assert_eq!(all(&mut stops(&["é!"]), &["caf", "é", "!"]), ("caf".into(), Some(0)));
    }

    #[test]
    fn only_a_possible_stop_is_held_back() {
        let mut stops = stops(&["ababc"]);
        assert_eq!(stops.push("xabab").text, "x");
        assert_eq!(stops.push("ab").text, "ab");
        assert_eq!(stops.push("z").text, "ababz");
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn what_became_no_stop_is_flushed() {
        let mut stops = stops(&["STOP"]);
        assert_eq!(stops.push("wait STO").text, "wait ");
        assert_eq!((stops.finish().as_str(), stops.finish().as_str()), ("STO", ""));
    }

    #[test]
    fn the_first_to_complete_wins_then_the_longest() {
        assert_eq!(all(&mut stops(&["abcd", "bc"]), &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(all(&mut stops(&["c", "abc"]), &["xabc"]), ("x".into(), Some(1)));
    }

    #[test]
    fn after_a_stop_all_text_is_dropped() {
        let mut stops = stops(&["."]);
        assert_eq!(stops.push("One. Two."), Piece { text: "One".into(), stopped: Some(0) });
        assert_eq!(stops.push("Three"), Piece { text: String::new(), stopped: Some(0) });
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn an_empty_stop_is_refused() {
        let error = StopStrings::new(&["a".into(), String::new()]).unwrap_err();
        assert_eq!(error.to_string(), "stop string 1: is empty; give at least one character");
    }

    #[test]
    fn clones_share_the_stop_strings_and_not_what_they_matched() {
        let mut first = stops(&["abc"]);
        assert_eq!(first.push("ab").text, "");
        let mut second = first.clone();
        assert!(Arc::ptr_eq(&first.stops[0].text, &second.stops[0].text));
        assert!(Arc::ptr_eq(&first.stops[0].fallback, &second.stops[0].fallback));
        assert_eq!((first.push("c").stopped, second.push("x").text.as_str()), (Some(0), "abx"));
    }

    #[test]
    fn a_long_stop_costs_a_step_a_byte() {
        let mut stops = stops(&[&("a".repeat(100_000) + "b")]);
        let started = std::time::Instant::now();
        let shown: usize = (0..200_000).map(|_| stops.push("a").text.len()).sum();
        assert_eq!(shown, 100_000);
        assert!(started.elapsed().as_secs() < 20);
    }

    /// What the module promises, spelt out: the first end, then the longest stop.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let ending = (0..stops.len()).filter(|&i| text.as_bytes()[..end].ends_with(stops[i].as_bytes()));
            // max_by_key takes the last of equals; the first index counts.
            if let Some(i) = ending.rev().max_by_key(|&i| stops[i].len()) {
                return (text[..end - stops[i].len()].to_string(), Some(i));
            }
        }
        (text.to_string(), None)
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(
            words in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let pieces: Vec<&str> = words.iter().map(String::as_str).collect();
            let got = all(&mut StopStrings::new(&stops).unwrap(), &pieces);
            prop_assert_eq!(got, naive(&stops, &words.concat()));
        }
    }
}
