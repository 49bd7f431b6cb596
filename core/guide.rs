//! What a grammar is to the engine: it says which tokens may come next, and is told which one came. Grammars over text
//! belong to the root package.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::sampler::Mask;

/// A request's own guide. It is asked and told in turn, from the first token of the answer on.
pub trait Guide: Send {
    /// Takes the tokens that may not come next out of `mask`, which has all. An end-of-text token may come where the answer
    /// may end.
    fn mask(&mut self, mask: &mut Mask) -> Result<()>;

    /// Takes the token that was chosen, unless it ended the answer; breaks where nothing can follow.
    fn advance(&mut self, token: u32) -> Result<ControlFlow<()>>;
}
