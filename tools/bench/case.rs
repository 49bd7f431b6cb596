//! One case through the engine, its prefill and its decoding apart.

use std::fmt;
use std::time::{Duration, Instant};

use quaver_backends::Spec;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::engine::{Engine, EngineOptions, Output};
use quaver_core::meter::{Meter, Reading, Totals};
use quaver_core::op::DeviceInfo;
use quaver_core::philox::philox;
use quaver_core::{Result, sampler::SamplingParams};

/// Sequences that are submitted at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// How many.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Steps that are measured of their decoding.
    pub gen_tokens: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{} p{}", self.batch, self.prompt_tokens)
    }
}

impl Case {
    /// Tokens that a sequence comes to have, at most, where steps have `rows` rows: those that have their prompt behind
    /// them go on until the last prompt is computed, and only then do the measured steps begin.
    pub fn tokens(&self, rows: usize) -> usize {
        let (mut left, mut waiting) = (self.batch * self.prompt_tokens, 0);
        // As the scheduler deals rows: one to each sequence that decodes, the others to prompts, oldest first.
        while left > 0 {
            let decoding = self.batch - left.div_ceil(self.prompt_tokens);
            waiting += decoding.min(1);
            left -= left.min(rows - decoding);
        }
        self.prompt_tokens + waiting + 1 + self.gen_tokens
    }
}

/// What a part of a case took.
#[derive(Clone, Debug)]
pub struct Measured {
    pub tokens: usize,
    pub time: Duration,
    pub totals: Totals,
}

/// What a case took.
#[derive(Clone, Debug)]
pub struct Run {
    /// From the submission of all prompts to the last first token; tokens are the prompts'.
    pub prefill: Measured,
    /// The steps behind it, in each of which every sequence gets a token.
    pub decode: Measured,
    /// From the submission to the first token, of each sequence.
    pub first_tokens: Vec<Duration>,
}

/// An engine with a meter.
pub struct Runner {
    engine: Engine,
    reading: Reading,
    /// Rows of a step.
    rows: usize,
    vocab: usize,
}

impl Runner {
    /// Loads a checkpoint; where `timed`, every op is run and timed by itself.
    pub fn open(checkpoint: &Checkpoint, device: &Spec, options: &EngineOptions, timed: bool) -> Result<Self> {
        let meter = Meter::new(quaver_backends::open(device)?, timed);
        let reading = meter.reading();
        let engine = Engine::new(checkpoint, Box::new(meter), options)?;
        Ok(Runner { engine, reading, rows: options.max_num_batched_tokens, vocab: checkpoint.config().vocab })
    }

    /// What it runs on.
    pub fn device(&self) -> DeviceInfo {
        self.engine.device()
    }

    /// Runs a case; the same prompts in every run.
    pub fn run(&mut self, case: &Case) -> Result<Run> {
        let max_tokens = case.tokens(self.rows) - case.prompt_tokens;
        let params = SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() };
        let prompts: Vec<_> = (0..case.batch).map(|i| self.prompt(i, case.prompt_tokens)).collect();
        self.reading.reset();
        let start = Instant::now();
        let ids = prompts.iter().map(|p| self.engine.submit(p, params.clone())).collect::<Result<Vec<_>>>()?;
        let mut first_tokens = vec![None; case.batch];
        while first_tokens.contains(&None) {
            for (id, output) in self.engine.step()? {
                match output {
                    Output::Failed(error) => return Err(error),
                    Output::Token(_) => {
                        let i = ids.iter().position(|have| *have == id).unwrap_or_default();
                        first_tokens[i].get_or_insert(start.elapsed());
                    }
                    Output::Begun { .. } | Output::Prompt(_) | Output::Finished(_) => {}
                }
            }
        }
        let tokens = case.batch * case.prompt_tokens;
        let prefill = Measured { tokens, time: start.elapsed(), totals: self.reading.totals() };
        let decode = self.decode(case.gen_tokens)?;
        ids.into_iter().for_each(|id| self.engine.cancel(id));
        Ok(Run { prefill, decode, first_tokens: first_tokens.into_iter().flatten().collect() })
    }

    fn decode(&mut self, steps: usize) -> Result<Measured> {
        self.reading.reset();
        let (start, mut tokens) = (Instant::now(), 0);
        for _ in 0..steps {
            for (_, output) in self.engine.step()? {
                match output {
                    Output::Failed(error) => return Err(error),
                    Output::Token(_) => tokens += 1,
                    Output::Begun { .. } | Output::Prompt(_) | Output::Finished(_) => {}
                }
            }
        }
        Ok(Measured { tokens, time: start.elapsed(), totals: self.reading.totals() })
    }

    /// Random ids.
    fn prompt(&self, sequence: usize, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|i| philox([i, sequence as u32, 0, 0], [0; 2])[0] % self.vocab as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_goes_on_while_others_wait_for_their_prompts() {
        let tokens = |batch, prompt_tokens, rows| Case { batch, prompt_tokens, gen_tokens: 10 }.tokens(rows);
        // One step computes the prompt and gives the first token.
        assert_eq!(tokens(1, 100, 512), 100 + 1 + 10);
        assert_eq!(tokens(1, 1100, 512), 1100 + 1 + 10);
        // Steps of 8 rows, then of 7: the first sequence waits for the second's two.
        assert_eq!(tokens(2, 8, 8), 8 + 2 + 1 + 10);
        assert_eq!(tokens(8, 1, 8), 1 + 1 + 10);
        // A step computes 32 prompts, the next a sixteenth fewer, and so on.
        assert_eq!(tokens(512, 16, 512), 16 + 105 + 1 + 10);
    }
}
