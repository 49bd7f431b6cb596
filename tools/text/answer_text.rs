//! The text of an answer while its tokens come: whole characters, up to a stop string.

use quaver_core::Result;

use super::{Detokenizer, Piece, StopStrings};

/// A detokenizer, and the stop strings that its text is held against.
pub struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Tokens that no stop string can end the text in.
    unstopped: usize,
}

impl AnswerText {
    /// From its parts, for one answer, of which at least `min_tokens` come.
    pub fn new(detokenizer: Detokenizer, stops: StopStrings, min_tokens: usize) -> Self {
        AnswerText { detokenizer, stops, unstopped: min_tokens }
    }

    /// Takes the next token and gives the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<Piece> {
        let text = self.detokenizer.push(id)?;
        if self.unstopped > 0 {
            self.unstopped -= 1;
            return Ok(self.stops.pass(&text));
        }
        Ok(self.stops.push(&text))
    }

    /// Ends the answer and gives what was held back.
    pub fn finish(&mut self) -> Piece {
        let rest = self.detokenizer.finish();
        let mut piece = self.stops.push(&rest);
        if piece.stopped.is_none() {
            piece.text += &self.stops.finish();
        }
        piece
    }
}
