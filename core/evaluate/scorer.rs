//! A model that gives the logits of windows. Windows are packed into steps, each a sequence of its own; a window longer
//! than a step runs in several, over its keys and values. The head runs over a few rows at a time, so that memory is
//! bounded whatever the vocabulary.

use std::collections::HashMap;

use bytemuck::{cast_slice, cast_slice_mut};

use super::Window;
use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::llama::{KvCache, Llama, Profile, Sizes};
use crate::op::{Backend, DeviceInfo, Plan};
use crate::sampler::RowParams;

/// Rows of a step.
const ROWS: usize = 512;

/// Rows of the head's runs.
const WANTED: usize = 64;

/// Windows of a step, at most.
const SEQUENCES: usize = 32;

const PAGE_TOKENS: usize = 16;

/// The logits in front of one scored token.
pub struct Scored<'a> {
    /// The number of the window.
    pub window: usize,
    /// The token's place in it.
    pub position: usize,
    /// The token.
    pub target: u32,
    /// `[vocab]`.
    pub logits: &'a [f32],
}

/// See the module.
pub struct Scorer {
    backend: Box<dyn Backend>,
    llama: Llama,
    plans: HashMap<(usize, usize), Plan>,
    logits: Vec<f32>,
}

/// A part of a window in a step: tokens `first..end`.
struct Piece {
    window: usize,
    slot: u32,
    first: usize,
    end: usize,
}

impl Scorer {
    /// Loads a checkpoint for windows that run at most `context` tokens: one fewer than they hold, since nothing follows
    /// the last.
    pub fn new(
        checkpoint: &Checkpoint,
        mut backend: Box<dyn Backend>,
        profile: Profile,
        kv_cache: KvCache,
        context: usize,
    ) -> Result<Self> {
        let most = checkpoint.config().max_positions;
        if context > most {
            let why = format!("the model is made for {most} tokens; give shorter windows");
            return Err(Error::text(format!("a window of {context} tokens"), why));
        }
        // One long window, or a step full of short ones.
        let pages = context.div_ceil(PAGE_TOKENS).max(ROWS / PAGE_TOKENS + SEQUENCES);
        let sizes =
            Sizes { rows: ROWS, wanted: WANTED, sequences: SEQUENCES, context, pages, page_tokens: PAGE_TOKENS };
        let llama = Llama::load(checkpoint, &mut *backend, profile, kv_cache, sizes)?;
        Ok(Scorer { backend, llama, plans: HashMap::new(), logits: Vec::new() })
    }

    /// What it runs on.
    pub fn device(&self) -> DeviceInfo {
        self.backend.describe()
    }

    /// Entries of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.llama.config.vocab
    }

    /// Calls `take` for every scored token, in order.
    pub fn score(&mut self, windows: &[Window], mut take: impl FnMut(Scored) -> Result<()>) -> Result<()> {
        for step in steps(windows) {
            let (batch, scored) = self.batch(windows, &step)?;
            for (i, scored) in scored.chunks(WANTED).enumerate() {
                self.run(&batch, i * WANTED, scored.len())?;
                let vocab = self.vocab();
                for ((window, position), logits) in scored.iter().zip(self.logits.chunks_exact(vocab)) {
                    take(Scored::new(windows, *window, *position, logits))?;
                }
            }
            if scored.is_empty() {
                self.run(&batch, 0, 0)?;
            }
        }
        Ok(())
    }

    /// The same for two models of one vocabulary: `take` is given the logits of both.
    pub fn score_both(
        first: &mut Scorer,
        second: &mut Scorer,
        windows: &[Window],
        mut take: impl FnMut(Scored, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab = first.vocab();
        if vocab != second.vocab() {
            let why = format!("one has {vocab} entries, the other {}; compare models of one family", second.vocab());
            return Err(Error::text("the vocabularies differ", why));
        }
        for step in steps(windows) {
            let (batch, scored) = first.batch(windows, &step)?;
            let (other, _) = second.batch(windows, &step)?;
            for start in (0..scored.len().max(1)).step_by(WANTED) {
                let part = &scored[start..scored.len().min(start + WANTED)];
                first.run(&batch, start, part.len())?;
                second.run(&other, start, part.len())?;
                let rows = first.logits.chunks_exact(vocab).zip(second.logits.chunks_exact(vocab));
                for ((window, position), (logits, others)) in part.iter().zip(rows) {
                    take(Scored::new(windows, *window, *position, logits), others)?;
                }
            }
        }
        Ok(())
    }

    /// A step's rows, written to the page table too, and (window, place) of each token that it scores.
    fn batch(&mut self, windows: &[Window], step: &[Piece]) -> Result<(Batch, Vec<(usize, usize)>)> {
        let sizes = self.llama.sizes;
        let (mut batch, mut scored, mut page) = (Batch::default(), Vec::new(), 0);
        for Piece { window, slot, first, end } in step {
            let Window { ids, from } = &windows[*window];
            let rows = rows(&windows[*window]);
            if rows > sizes.context {
                let why = format!("{} fit, of which the last is only scored; give shorter ones", sizes.context + 1);
                return Err(Error::text(format!("a window of {} tokens", ids.len()), why));
            }
            let pages: Vec<u32> = (page..page + rows.div_ceil(PAGE_TOKENS) as u32).collect();
            page += pages.len() as u32;
            let row = *slot as usize * sizes.pages_a_sequence() * 4;
            self.backend.write(self.llama.inputs.rows.page_table, row, cast_slice(&pages))?;
            let row = batch.push(*slot, *first, &ids[*first..*end]);
            // The row before a token gives its logits.
            let (next, end) = ((*from).max(first + 1), end + 1);
            for (position, target) in (next..end).zip(&ids[next.min(end)..end]) {
                batch.want(row + position - 1 - first, RowParams::score(*slot, *target, 0));
                scored.push((*window, position));
            }
        }
        Ok((batch, scored))
    }

    /// Runs a batch, or only the head over what it left where `first` is not 0, and reads the logits of `count` of its
    /// wanted rows.
    fn run(&mut self, batch: &Batch, first: usize, count: usize) -> Result<()> {
        if first == 0 {
            batch.write(&self.llama, &mut *self.backend)?;
        }
        batch.write_wanted(&self.llama, &mut *self.backend, first, count)?;
        let plan = self.plan(if first == 0 { batch.rows() } else { 0 }, count)?;
        self.backend.run(plan)?;
        self.logits.resize(count * self.llama.config.vocab, 0.0);
        self.backend.read(self.llama.outputs.logits, 0, cast_slice_mut(&mut self.logits))?;
        match self.logits.iter().all(|x| x.is_finite()) {
            true => Ok(()),
            false => {
                let why = "the logits are not finite: the checkpoint is damaged, or the device is";
                Err(Error::device(self.backend.describe().backend, why))
            }
        }
    }

    /// A plan for at least so many rows (0: the head alone) and wanted ones, rounded up to powers of two.
    fn plan(&mut self, rows: usize, wanted: usize) -> Result<Plan> {
        let bucket = |n: usize, most: usize| if n == 0 { 0 } else { n.next_power_of_two().min(most) };
        let (rows, wanted) = (bucket(rows, ROWS), bucket(wanted, WANTED));
        if let Some(plan) = self.plans.get(&(rows, wanted)) {
            return Ok(*plan);
        }
        let program = match rows {
            0 => self.llama.head_program(wanted),
            _ => self.llama.program(rows, wanted),
        };
        let plan = self.backend.record(&program)?;
        self.plans.insert((rows, wanted), plan);
        Ok(plan)
    }
}

impl<'a> Scored<'a> {
    fn new(windows: &[Window], window: usize, position: usize, logits: &'a [f32]) -> Self {
        Scored { window, position, target: windows[window].ids[position], logits }
    }
}

/// Tokens of a window that are run: what would follow the last is not asked for.
fn rows(window: &Window) -> usize {
    window.ids.len().saturating_sub(1)
}

/// Windows in steps, in their order: as many whole ones as fit, or a part of a longer one.
fn steps(windows: &[Window]) -> Vec<Vec<Piece>> {
    let mut steps: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (window, rows) in windows.iter().map(rows).enumerate() {
        if rows > ROWS {
            let piece = |first| Piece { window, slot: 0, first, end: rows.min(first + ROWS) };
            steps.extend((0..rows).step_by(ROWS).map(|first| vec![piece(first)]));
            room = 0;
            continue;
        }
        let piece = |slot| Piece { window, slot, first: 0, end: rows };
        match steps.last_mut() {
            Some(step) if rows <= room && step.len() < SEQUENCES => step.push(piece(step.len() as u32)),
            _ => {
                steps.push(vec![piece(0)]);
                room = ROWS;
            }
        }
        room -= rows;
    }
    steps
}
