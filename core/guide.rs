//! What a grammar is to the engine: it says which tokens may come next, and is told which one came. Grammars over text
//! belong to the root package.

use std::ops::ControlFlow;

use crate::error::Result;

/// A request's own guide. It is asked and told in turn, from the first token of the answer on.
pub trait Guide: Send {
    /// Sets the logits of tokens that may not come next, `[vocab]`, to -inf. An end-of-text token may come where the
    /// answer may end.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Takes the token that was chosen, unless it ended the answer; breaks where nothing can follow.
    fn advance(&mut self, token: u32) -> Result<ControlFlow<()>>;
}
