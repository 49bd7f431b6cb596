//! The words of [`Op::Sample`](crate::op::Op::Sample)'s buffers: its parameters, its results and the history between
//! them. Their layout is the same on every backend.

use bytemuck::{Pod, Zeroable};

/// Where a token id is expected: there is none. As [`RowParams::target`], choose a token; as [`Sampled::token`], no
/// logit of the row was finite; in [`Sampled::top_ids`], the entry is unused.
pub const NO_TOKEN: u32 = u32::MAX;

/// The most alternatives that a row can report; OpenAI's `top_logprobs` has the same limit.
pub const MAX_TOP_N: usize = 20;

/// One row of `params`, 16 words.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct RowParams {
    /// The sequence, as a row of the history.
    pub seq: u32,
    /// Score this token instead of choosing one; [`NO_TOKEN`] chooses.
    pub target: u32,
    /// Below [`GREEDY_BELOW`](super::GREEDY_BELOW): greedy.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition: f32,
    /// 0 is off.
    pub presence: f32,
    /// 0 is off.
    pub frequency: f32,
    /// 0 is off.
    pub top_k: u32,
    /// How many alternatives to report, at most [`MAX_TOP_N`].
    pub top_n: u32,
    /// The lower half of the seed: Philox key word 0.
    pub seed_lo: u32,
    /// The upper half: Philox key word 1.
    pub seed_hi: u32,
    /// The position that the chosen token will have in its sequence: Philox counter word 1.
    pub position: u32,
    /// 0 where every token may be chosen, 1 where the row's [`Mask`](super::Mask) says which.
    pub masked: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

impl RowParams {
    /// A row that scores `target`, a token of the prompt, and reports `top_n` alternatives.
    pub fn score(seq: u32, target: u32, top_n: u32) -> Self {
        RowParams { target, top_n, ..super::SamplingParams::default().row(seq, 0, 0) }
    }

    /// True where the history changes the logits.
    pub fn penalizes(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }
}

/// One row of the results, 44 words. Log-probabilities are those of the model: before penalties, temperature and
/// filters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Sampled {
    /// The token that was chosen or scored; [`NO_TOKEN`] where no logit of the row was finite, or
    /// none of those that its mask allows.
    pub token: u32,
    /// Its natural log-probability; -inf where its logit is not finite or lies outside the vocabulary.
    pub logprob: f32,
    /// Its place among all logits in descending order, the lower id first on ties; 1 is the likeliest, 0 stands where
    /// `logprob` is -inf for want of a finite logit.
    pub rank: u32,
    /// How many logits were NaN or +inf. They are never chosen, but they are a fault of the model or of the device.
    pub bad_logits: u32,
    /// The `top_n` likeliest tokens, likeliest first, the lower id first on ties; the rest is [`NO_TOKEN`].
    pub top_ids: [u32; MAX_TOP_N],
    /// Their natural log-probabilities; the rest is -inf.
    pub top_logprobs: [f32; MAX_TOP_N],
}

impl Sampled {
    /// The result of a row without a finite logit.
    pub const NONE: Sampled = Sampled {
        token: NO_TOKEN,
        logprob: f32::NEG_INFINITY,
        rank: 0,
        bad_logits: 0,
        top_ids: [NO_TOKEN; MAX_TOP_N],
        top_logprobs: [f32::NEG_INFINITY; MAX_TOP_N],
    };

    /// The alternatives that were reported: (token id, natural log-probability), likeliest first.
    pub fn top(&self) -> impl Iterator<Item = (u32, f32)> {
        self.top_ids.into_iter().zip(self.top_logprobs).take_while(|&(id, _)| id != NO_TOKEN)
    }
}

const _: () = assert!(size_of::<RowParams>() == 16 * 4 && size_of::<Sampled>() == 44 * 4);

/// One word of the history: what a sequence has of one entry of the vocabulary. Bit 31 says that the prompt has it, the
/// others count how often it was generated.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Count(pub u32);

impl Count {
    /// The bit of a token that the prompt has.
    pub const PROMPT: u32 = 1 << 31;

    /// Does the prompt have the token?
    pub const fn in_prompt(self) -> bool {
        self.0 & Self::PROMPT != 0
    }

    /// How often the token was generated.
    pub const fn generated(self) -> u32 {
        self.0 & !Self::PROMPT
    }

    /// The same with the token in the prompt.
    pub const fn with_prompt(self) -> Self {
        Count(self.0 | Self::PROMPT)
    }

    /// The same with the token generated once more; the count stops at 2^31 - 1.
    pub const fn with_generated(self) -> Self {
        if self.generated() == !Self::PROMPT { self } else { Count(self.0 + 1) }
    }

    /// Makes `history`, `[vocab]`, that of a sequence with this prompt and output.
    ///
    /// # Panics
    /// Where an id lies outside the vocabulary: requests are checked before they come here.
    pub fn fill(history: &mut [u32], prompt: &[u32], output: &[u32]) {
        history.fill(0);
        for &id in prompt {
            let word = &mut history[id as usize];
            *word = Count(*word).with_prompt().0;
        }
        for &id in output {
            let word = &mut history[id as usize];
            *word = Count(*word).with_generated().0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_words_hold_prompt_and_count() {
        let mut history = [7; 4];
        Count::fill(&mut history, &[1, 1, 2], &[2, 3, 3]);
        let words = history.map(|word| (Count(word).in_prompt(), Count(word).generated()));
        assert_eq!(words, [(false, 0), (true, 0), (true, 1), (false, 2)]);
    }

    #[test]
    fn a_count_stops_before_it_reaches_the_prompt_bit() {
        let full = Count(!Count::PROMPT);
        assert_eq!(full.with_generated(), full);
        assert_eq!(full.with_prompt().with_generated(), Count(u32::MAX));
    }
}
