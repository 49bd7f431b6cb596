//! What a user asks of sampling, and the check that it means something. Stop strings belong to the text layer.

use super::row::{MAX_TOP_N, NO_TOKEN, RowParams};
use crate::error::{Error, Result};

/// How the tokens of one request are chosen, and what is reported of them. Names and defaults are those of the OpenAI
/// API and of Hugging Face's `GenerationConfig`, with every filter and penalty off.
///
/// ```
/// use quaver_core::sampler::SamplingParams;
/// let params = SamplingParams { temperature: 0.7, top_p: 0.9, seed: Some(42), ..Default::default() };
/// assert!(params.validate().is_ok());
/// let error = SamplingParams { top_p: 0.0, ..params }.validate().unwrap_err();
/// assert_eq!(error.to_string(), "top_p is 0; it must be above 0 and at most 1 (1 turns it off)");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0, and anything below [`GREEDY_BELOW`](super::GREEDY_BELOW), takes the largest.
    pub temperature: f32,
    /// Keep the fewest tokens, the likeliest first, whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep so many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this likely, relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies negative ones, of tokens that the prompt or the output has; 1 is off.
    /// (Keskar et al., CTRL, 2019, in the two-sided form of Hugging Face and vLLM.)
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the output has.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time that the output has it.
    pub frequency_penalty: f32,
    /// The same seed and prompt give the same text; `None` lets the engine choose a seed.
    pub seed: Option<u64>,
    /// Added to the logits of tokens, each once at most; before penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that are generated at most; 0 only reads the prompt.
    pub max_tokens: usize,
    /// Tokens before which no end-of-text token and no stop token is chosen.
    pub min_tokens: usize,
    /// Tokens that end the output, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on after the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// Report each generated token's log-probability, and so many of the likeliest alternatives.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
            max_tokens: 256,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// True where the history of a sequence changes its logits.
    pub fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every value; the ranges are OpenAI's and vLLM's where they have one.
    ///
    /// # Errors
    /// [`Error::Sampling`] with the first parameter that means nothing.
    pub fn validate(&self) -> Result<()> {
        // NaN lies in no range.
        let real = |name, value: f32, is_allowed: bool, allowed| {
            if is_allowed { Ok(()) } else { Err(Error::Sampling { name, value: value.to_string(), allowed }) }
        };
        let count = |name, value: Option<usize>| match value {
            Some(n) if n > MAX_TOP_N => {
                Err(Error::Sampling { name, value: n.to_string(), allowed: "at most 20 alternatives" })
            }
            _ => Ok(()),
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repetition_penalty);
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        real("temperature", t, (0.0..=100.0).contains(&t), "between 0 (greedy) and 100")?;
        real("top_p", p, p > 0.0 && p <= 1.0, "above 0 and at most 1 (1 turns it off)")?;
        real("min_p", m, (0.0..=1.0).contains(&m), "between 0 (off) and 1")?;
        real("repetition_penalty", r, r > 0.0 && r <= 100.0, "above 0 and at most 100 (1 turns it off)")?;
        real("presence_penalty", presence, (-2.0..=2.0).contains(&presence), "between -2 and 2 (0 turns it off)")?;
        real("frequency_penalty", frequency, (-2.0..=2.0).contains(&frequency), "between -2 and 2 (0 turns it off)")?;
        for &(_, bias) in &self.logit_bias {
            real("logit_bias", bias, (-100.0..=100.0).contains(&bias), "between -100 and 100")?;
        }
        if self.min_tokens > self.max_tokens {
            let value = self.min_tokens.to_string();
            return Err(Error::Sampling { name: "min_tokens", value, allowed: "at most max_tokens" });
        }
        count("logprobs", self.logprobs)?;
        count("prompt_logprobs", self.prompt_logprobs)
    }

    /// The row of [`Op::Sample`](crate::op::Op::Sample) that chooses the token at `position` of the sequence whose
    /// history is row `seq`. `seed` is this request's own where it has one, else the engine's choice, the same for all
    /// of its tokens.
    pub fn row(&self, seq: u32, position: u32, seed: u64) -> RowParams {
        RowParams {
            seq,
            target: NO_TOKEN,
            temperature: self.temperature,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition: self.repetition_penalty,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            top_k: self.top_k,
            top_n: self.logprobs.unwrap_or(0) as u32,
            seed_lo: seed as u32,
            seed_hi: (seed >> 32) as u32,
            position,
            masked: 0,
            reserved: [0; 2],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(change: impl FnOnce(&mut SamplingParams)) -> String {
        let mut params = SamplingParams::default();
        change(&mut params);
        params.validate().expect_err("should be refused").to_string()
    }

    #[test]
    fn defaults_and_limits_are_allowed() {
        assert!(SamplingParams::default().validate().is_ok());
        let low = SamplingParams {
            temperature: 0.0,
            top_p: f32::MIN_POSITIVE,
            min_p: 0.0,
            repetition_penalty: f32::MIN_POSITIVE,
            presence_penalty: -2.0,
            frequency_penalty: -2.0,
            max_tokens: 0,
            logprobs: Some(0),
            ..Default::default()
        };
        let high = SamplingParams {
            temperature: 100.0,
            top_k: u32::MAX,
            min_p: 1.0,
            repetition_penalty: 100.0,
            presence_penalty: 2.0,
            frequency_penalty: 2.0,
            max_tokens: usize::MAX,
            logprobs: Some(20),
            prompt_logprobs: Some(20),
            ..Default::default()
        };
        assert!(low.validate().is_ok() && high.validate().is_ok());
    }

    #[test]
    fn every_parameter_has_its_own_message() {
        for (got, wanted) in [
            (message(|p| p.temperature = -0.5), "temperature is -0.5; it must be between 0 (greedy) and 100"),
            (message(|p| p.top_p = 1.5), "top_p is 1.5; it must be above 0 and at most 1 (1 turns it off)"),
            (message(|p| p.min_p = -1.0), "min_p is -1; it must be between 0 (off) and 1"),
            (
                message(|p| p.repetition_penalty = 0.0),
                "repetition_penalty is 0; it must be above 0 and at most 100 (1 turns it off)",
            ),
            (
                message(|p| p.presence_penalty = 2.5),
                "presence_penalty is 2.5; it must be between -2 and 2 (0 turns it off)",
            ),
            (
                message(|p| p.frequency_penalty = -3.0),
                "frequency_penalty is -3; it must be between -2 and 2 (0 turns it off)",
            ),
            (message(|p| p.logit_bias = vec![(1, 101.0)]), "logit_bias is 101; it must be between -100 and 100"),
            (message(|p| (p.min_tokens, p.max_tokens) = (3, 2)), "min_tokens is 3; it must be at most max_tokens"),
            (message(|p| p.logprobs = Some(21)), "logprobs is 21; it must be at most 20 alternatives"),
            (message(|p| p.prompt_logprobs = Some(99)), "prompt_logprobs is 99; it must be at most 20 alternatives"),
        ] {
            assert_eq!(got, wanted);
        }
    }

    #[test]
    fn nan_and_infinity_are_refused_everywhere() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for change in [
                (|p, x| p.temperature = x) as fn(&mut SamplingParams, f32),
                |p, x| p.top_p = x,
                |p, x| p.min_p = x,
                |p, x| p.repetition_penalty = x,
                |p, x| p.presence_penalty = x,
                |p, x| p.frequency_penalty = x,
            ] {
                message(|p| change(p, bad));
            }
        }
    }
}
