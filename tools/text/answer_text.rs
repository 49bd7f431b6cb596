//! The text of an answer while its tokens come: whole characters, up to a stop string.

use quaver_core::Result;

use super::{Detokenizer, Piece, StopStrings};

/// A detokenizer, and the stop strings that its text is held against.
pub struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopStrings,
}

impl AnswerText {
    /// From its parts, for one answer.
    pub fn new(detokenizer: Detokenizer, stops: StopStrings) -> Self {
        AnswerText { detokenizer, stops }
    }

    /// Takes the next token and gives the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<Piece> {
        Ok(self.stops.push(&self.detokenizer.push(id)?))
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
