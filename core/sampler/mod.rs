//! The host sampler: what [`Op::Sample`](crate::op::Op::Sample) computes, and the reference that every backend's is
//! measured against. It reads one row of logits, `[vocab]` f32, and
//!
//! 1. scores: log-softmax of the logits as they are gives the log-probabilities that are reported;
//! 2. stops here where the row has a target;
//! 3. makes -inf of the logits of tokens that the row's [`Mask`] does not allow, where it has one;
//! 4. penalizes, in this order: repetition (positive logits divided, others multiplied) where prompt or output has the
//!    token, frequency times its count in the output, presence where the output has it; the result stays finite;
//! 5. below [`GREEDY_BELOW`] takes the largest;
//! 6. else divides by the temperature and filters: top-k, then top-p of what is left, then min-p relative to the
//!    likeliest. Each keeps a prefix of the tokens in descending order, and at least the first;
//! 7. draws: argmax of (logit - largest logit) / temperature + Gumbel noise, where the noise of a token is made of lane
//!    id % 4 of Philox with counter (id / 4, position, 0, 0) and the seed as its key;
//! 8. counts the token that it chose in the history.
//!
//! Equal values are ordered by ascending id, everywhere. A logit that is not finite has no probability: -inf is never
//! chosen, NaN and +inf are faults, which are counted and never chosen. A row without a finite logit, before or behind its
//! mask, gives [`NO_TOKEN`].

mod mask;
mod order;
mod params;
mod race;
mod row;
#[cfg(test)]
mod tests;

pub use mask::Mask;
pub use params::SamplingParams;
pub use row::{Count, MAX_TOP_N, NO_TOKEN, RowParams, Sampled};

use order::Key;

/// Temperatures below this are greedy, as in vLLM: dividing by them would only overflow.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Scratch of the host sampler, kept from row to row: it grows to the vocabulary at most, and only where masks, penalties
/// or filters are on.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Logits after mask and penalties, `[vocab]`.
    changed: Vec<f32>,
    /// Tokens that the filters have left.
    keys: Vec<Key>,
}

impl Sampler {
    /// A sampler without scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses a token of one row, or scores `params.target`. `logits` and `history` are `[vocab]`; the words of
    /// `history` are [`Count`]s of the sequence, and the token that is chosen is added to them. `mask` has the words of a
    /// [`Mask`], which are read where `params.masked` says so.
    ///
    /// ```
    /// use quaver_core::sampler::{Sampler, SamplingParams};
    /// let params = SamplingParams { temperature: 0.0, ..Default::default() };
    /// let mut history = [0; 3];
    /// let sampled = Sampler::new().sample(&[0.0, 2.0, 1.0], &params.row(0, 0, 42), &[], &mut history);
    /// assert_eq!((sampled.token, sampled.rank, history), (1, 1, [0, 1, 0]));
    /// ```
    ///
    /// # Panics
    /// Where `logits` and `history` differ in length, unless a token is scored: the history is not needed then.
    pub fn sample(&mut self, logits: &[f32], params: &RowParams, mask: &[u32], history: &mut [u32]) -> Sampled {
        let same = logits.len() == history.len();
        assert!(same || params.target != NO_TOKEN, "logits and history cover the same vocabulary");
        let bad_logits = logits.iter().filter(|l| l.is_nan() || **l == f32::INFINITY).count() as u32;
        let mut sampled = Sampled { bad_logits, ..Sampled::NONE };
        let Some(softmax) = LogSoftmax::of(logits) else { return sampled };

        let mut top = [Key::MAX; MAX_TOP_N];
        let top = &mut top[..MAX_TOP_N.min(params.top_n as usize)];
        order::first_keys(logits, top);
        for (i, &key) in top.iter().enumerate().filter(|(_, key)| **key != Key::MAX) {
            sampled.top_ids[i] = order::id(key);
            sampled.top_logprobs[i] = softmax.logprob(order::value(key));
        }

        sampled.token = params.target;
        if params.target == NO_TOKEN {
            sampled.token = self.choose(logits, params, mask, history);
            if let Some(word) = history.get_mut(sampled.token as usize) {
                *word = Count(*word).with_generated().0;
            }
        }
        if let Some(logit) = logits.get(sampled.token as usize).filter(|l| l.is_finite()) {
            sampled.logprob = softmax.logprob(*logit);
            sampled.rank = rank(logits, sampled.token, *logit);
        }
        sampled
    }

    /// Steps 3 to 7; at least one logit is finite.
    fn choose(&mut self, logits: &[f32], params: &RowParams, mask: &[u32], history: &[u32]) -> u32 {
        let is_masked = params.masked != 0;
        let values = if is_masked || params.penalizes() {
            let change = |((&logit, &word), id)| match is_masked && !Mask::allows(mask, id) {
                true => f32::NEG_INFINITY,
                false => penalize(logit, Count(word), params),
            };
            self.changed.clear();
            self.changed.extend(logits.iter().zip(history).zip(0..).map(change));
            &self.changed
        } else {
            logits
        };
        let max = largest(values);
        if max == f32::NEG_INFINITY {
            return NO_TOKEN;
        }
        if params.temperature < GREEDY_BELOW {
            return order::finite(values).find(|&(_, value)| value == max).map_or(NO_TOKEN, |(id, _)| id);
        }
        let top_k = if params.top_k == 0 { values.len() } else { params.top_k as usize };
        if top_k >= values.len() && params.top_p >= 1.0 {
            return race::race(order::finite(values), max, params);
        }
        self.keys.clear();
        self.keys.extend(order::finite(values).map(|(id, value)| order::key(value, id)));
        order::keep_top_k(&mut self.keys, top_k);
        if params.top_p < 1.0 {
            order::keep_top_p(&mut self.keys, params.top_p, |value| ((value - max) / params.temperature).exp());
        }
        race::race(self.keys.iter().map(|&key| (order::id(key), order::value(key))), max, params)
    }
}

/// A logit after its penalties; one that is not finite stays as it is, a finite one stays finite.
fn penalize(logit: f32, count: Count, params: &RowParams) -> f32 {
    if count.0 == 0 || !logit.is_finite() {
        return logit;
    }
    let mut value = if logit > 0.0 { logit / params.repetition } else { logit * params.repetition };
    if count.generated() > 0 {
        value -= params.frequency * count.generated() as f32;
        value -= params.presence;
    }
    value.clamp(f32::MIN, f32::MAX)
}

/// The largest finite value; -inf where there is none.
fn largest(values: &[f32]) -> f32 {
    let larger = |max: f32, value: f32| if value > max && value < f32::INFINITY { value } else { max };
    // Eight maxima side by side: one alone waits for each of its comparisons.
    let (eights, rest) = values.as_chunks::<8>();
    let mut lanes = [f32::NEG_INFINITY; 8];
    for eight in eights {
        lanes = std::array::from_fn(|lane| larger(lanes[lane], eight[lane]));
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// The place of a finite logit in the order of its row, from 1.
fn rank(logits: &[f32], token: u32, logit: f32) -> u32 {
    let above = logits.iter().filter(|l| **l > logit && **l < f32::INFINITY).count();
    let tied = logits[..token as usize].iter().filter(|l| **l == logit).count();
    (1 + above + tied) as u32
}

/// What turns the logits of a row into log-probabilities.
struct LogSoftmax {
    max: f32,
    /// ln of the sum of exp(logit - max).
    ln_sum: f64,
}

impl LogSoftmax {
    /// `None` where no logit is finite. Differences and exponentials are f32, their sum is f64.
    fn of(logits: &[f32]) -> Option<Self> {
        let max = largest(logits);
        let sum: f64 = order::finite(logits).map(|(_, logit)| f64::from((logit - max).exp())).sum();
        (sum > 0.0).then(|| LogSoftmax { max, ln_sum: sum.ln() })
    }

    /// The natural log-probability of a finite logit.
    fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.ln_sum) as f32
    }
}
