//! One step's work in host memory, and how it reaches a model's input buffers. What an engine writes in every step.

use bytemuck::cast_slice;

use crate::error::{Error, Result};
use crate::llama::Llama;
use crate::op::{Backend, CHOSEN};
use crate::sampler::{Mask, RowParams};

/// Rows of ragged sequences, and those of them whose logits are wanted.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    ids: Vec<u32>,
    seq: Vec<u32>,
    position: Vec<u32>,
    spans: Vec<[u32; 4]>,
    wanted: Vec<u32>,
    params: Vec<RowParams>,
    /// Masks of wanted rows that have one, in the order of the rows.
    masks: Vec<(usize, Mask)>,
}

impl Batch {
    /// Appends the tokens `ids` of sequence `seq`, which stand at `position` and behind; gives the row of the first. As
    /// [`Op::Embed`](crate::op::Op::Embed) takes them: a token that the last step chose may stand as the row where it did.
    pub fn push(&mut self, seq: u32, position: usize, ids: &[u32]) -> usize {
        let first = self.ids.len();
        self.spans.push([first as u32, ids.len() as u32, seq, position as u32]);
        self.ids.extend(ids);
        self.seq.extend(ids.iter().map(|_| seq));
        self.position.extend((position..position + ids.len()).map(|p| p as u32));
        first
    }

    /// Asks for the logits of a row, and says how to choose a token from them.
    pub fn want(&mut self, row: usize, params: RowParams) {
        self.wanted.push(row as u32);
        self.params.push(params);
    }

    /// The same with a mask of the tokens that may be chosen.
    pub fn want_masked(&mut self, row: usize, params: RowParams, mask: Mask) {
        self.masks.push((self.wanted(), mask));
        self.want(row, RowParams { masked: 1, ..params });
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows whose logits are wanted.
    pub fn wanted(&self) -> usize {
        self.wanted.len()
    }

    /// Writes everything but the wanted rows. Fails where the batch is larger than the model's buffers.
    pub fn write(&self, llama: &Llama, backend: &mut dyn Backend) -> Result<()> {
        let (rows, sizes) = (llama.inputs.rows, &llama.sizes);
        at_most("rows", self.rows(), sizes.rows)?;
        at_most("runs of rows", self.spans.len(), sizes.sequences)?;
        let seqs = self.seq.iter().copied().chain(self.params.iter().map(|params| params.seq));
        at_most("sequences", seqs.max().map_or(0, |seq| seq as usize + 1), sizes.sequences)?;
        at_most(
            "rows up to the last wanted one",
            self.wanted.iter().max().map_or(0, |row| *row as usize + 1),
            self.rows(),
        )?;
        if let Some(&id) = self.ids.iter().find(|&&id| id & CHOSEN == 0 && id as usize >= llama.config.vocab) {
            return Err(Error::TokenOutOfRange { id, vocab: llama.config.vocab });
        }
        let chosen = self.ids.iter().filter(|&&id| id & CHOSEN != 0).map(|id| (id & !CHOSEN) as usize + 1);
        at_most("rows of the last step", chosen.max().unwrap_or(0), sizes.wanted)?;
        let context = sizes.pages_a_sequence() * sizes.page_tokens;
        if let Some(&position) = self.position.iter().find(|&&p| p as usize >= context) {
            return Err(Error::PromptTooLong { got: position as usize + 1, max: context });
        }
        backend.write(llama.inputs.ids, 0, cast_slice(&self.ids))?;
        backend.write(rows.seq, 0, cast_slice(&self.seq))?;
        backend.write(rows.position, 0, cast_slice(&self.position))?;
        backend.write(rows.spans, 0, cast_slice(&self.spans))
    }

    /// Writes `count` of the wanted rows from `first` on, and how much of all buffers is in use.
    pub fn write_wanted(&self, llama: &Llama, backend: &mut dyn Backend, first: usize, count: usize) -> Result<()> {
        at_most("wanted rows", count, llama.sizes.wanted)?;
        at_most("wanted rows", first.saturating_add(count), self.wanted())?;
        backend.write(llama.inputs.wanted, 0, cast_slice(&self.wanted[first..first + count]))?;
        backend.write(llama.inputs.params, 0, cast_slice(&self.params[first..first + count]))?;
        let width = Mask::width(llama.config.vocab) * 4;
        for (row, mask) in self.masks.iter().filter(|(row, _)| (first..first + count).contains(row)) {
            backend.write(llama.inputs.mask, (row - first) * width, cast_slice(mask.words()))?;
        }
        let live = [self.rows(), count, self.spans.len()].map(|n| n as u32);
        backend.write(llama.inputs.live, 0, cast_slice(&live))
    }
}

/// A batch that does not fit is its builder's mistake, as is a program that does not.
fn at_most(what: &str, got: usize, most: usize) -> Result<()> {
    if got <= most {
        return Ok(());
    }
    Err(Error::Program { line: 0, op: "batch".into(), why: format!("{got} {what} do not fit {most}") })
}
