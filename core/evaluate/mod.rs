//! Judges models by the logits that they give: the negative log-likelihood of texts ([`Window`], [`Tally`]), how far one
//! model's distributions are from another's ([`compare`]), and how likely answers are ([`log_likelihoods`]). Everything is
//! computed on the host from f32 logits, in f64. Token ids in, figures out; texts are the caller's affair.

mod scorer;

pub use self::scorer::{Scored, Scorer};

use crate::error::Result;

/// A stretch of a text that is seen at once: `ids[from..]` are scored, those before them are context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Context and scored tokens.
    pub ids: Vec<u32>,
    /// The first token that is scored; at least 1.
    pub from: usize,
}

/// The windows of a text: each holds `context` tokens behind one that is only seen, and begins `stride` tokens behind the
/// one before. The one that is only seen is the begin-of-text token, or, where the text has none, the token before: the
/// first token of such a text is not scored, every other one is by the first window that holds it. (`prefix` is the
/// begin-of-text token, `text` what follows it.)
pub fn windows(prefix: &[u32], text: &[u32], context: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut scored = 0;
    for start in (0..text.len()).step_by(stride.max(1)) {
        let end = text.len().min(start + context);
        let seen = if prefix.is_empty() { &text[start.saturating_sub(1)..start] } else { prefix };
        let ids = [seen, &text[start..end]].concat();
        let from = (seen.len() + scored - start).max(1);
        if from < ids.len() {
            windows.push(Window { ids, from });
        }
        scored = end;
        if end == text.len() {
            break;
        }
    }
    windows
}

/// Negative log-likelihood, summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Tokens that were scored.
    pub tokens: u64,
    /// The sum of their negative log-likelihoods, in nats.
    pub nll: f64,
}

impl Tally {
    /// With one more token.
    pub fn add(&mut self, nll: f64) {
        self.tokens += 1;
        self.nll += nll;
    }

    /// Nats a token.
    pub fn mean(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// The exponential of that.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
}

/// Scores windows, a few at a time; `on_window` is given the number of each and its tally, in order.
pub fn perplexity(
    scorer: &mut Scorer,
    windows: &[Window],
    mut on_window: impl FnMut(usize, Tally) -> Result<()>,
) -> Result<()> {
    let mut tallies = vec![Tally::default(); windows.len()];
    let mut done = 0;
    scorer.score(windows, |Scored { window, target, logits, .. }| {
        while done < window {
            on_window(done, tallies[done])?;
            done += 1;
        }
        tallies[window].add(-log_softmax(logits, target));
        Ok(())
    })?;
    (done..windows.len()).try_for_each(|i| on_window(i, tallies[i]))
}

/// What two models make of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// The token's negative log-likelihood by the base, in nats.
    pub base_nll: f64,
    /// By the other.
    pub quant_nll: f64,
    /// The Kullback-Leibler divergence of the other's distribution from the base's, in nats.
    pub kl: f64,
    /// True where both hold the same token for the likeliest.
    pub agree: bool,
}

/// Runs two models side by side over windows. `on_window` is given the number of each and its tokens, in order.
///
/// Fails where their vocabularies differ.
pub fn compare(
    base: &mut Scorer,
    quant: &mut Scorer,
    windows: &[Window],
    mut on_window: impl FnMut(usize, &[Pair]) -> Result<()>,
) -> Result<()> {
    let mut pairs = Vec::new();
    let mut done = 0;
    Scorer::score_both(base, quant, windows, |Scored { window, target, logits, .. }, other| {
        while done < window {
            on_window(done, &pairs)?;
            pairs.clear();
            done += 1;
        }
        pairs.push(pair(logits, other, target));
        Ok(())
    })?;
    for window in done..windows.len() {
        on_window(window, &pairs)?;
        pairs.clear();
    }
    Ok(())
}

fn pair(base: &[f32], quant: &[f32], target: u32) -> Pair {
    let (p_norm, q_norm) = (log_sum_exp(base), log_sum_exp(quant));
    let terms = base.iter().zip(quant).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - p_norm, f64::from(*q) - q_norm);
        p.exp() * (p - q)
    });
    Pair {
        base_nll: p_norm - f64::from(base[target as usize]),
        quant_nll: q_norm - f64::from(quant[target as usize]),
        kl: terms.sum::<f64>().max(0.0),
        agree: best(base) == best(quant),
    }
}

/// The log-likelihoods of what each window scores: sums of the log-probabilities of its tokens.
pub fn log_likelihoods(scorer: &mut Scorer, windows: &[Window], mut on_token: impl FnMut(usize)) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; windows.len()];
    scorer.score(windows, |Scored { window, target, logits, .. }| {
        sums[window] += log_softmax(logits, target);
        on_token(window);
        Ok(())
    })?;
    Ok(sums)
}

/// The log-probability of one entry, in nats.
fn log_softmax(logits: &[f32], entry: u32) -> f64 {
    f64::from(logits[entry as usize]) - log_sum_exp(logits)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln()
}

/// The first of the largest.
fn best(logits: &[f32]) -> usize {
    let better = |best: usize, (i, x): (usize, &f32)| if *x > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_score_every_token_once() {
        let text: Vec<u32> = (0..10).collect();
        for (context, stride) in [(4, 4), (4, 2), (4, 1), (100, 100), (3, 3), (4, 3)] {
            for prefix in [&[99][..], &[]] {
                let scored: Vec<u32> =
                    windows(prefix, &text, context, stride).iter().flat_map(|w| w.ids[w.from..].to_vec()).collect();
                assert_eq!(scored, text[1 - prefix.len()..], "context {context}, stride {stride}, {prefix:?}");
            }
        }
        let strided = windows(&[99], &text[..6], 4, 2);
        assert_eq!(strided[1], Window { ids: vec![99, 2, 3, 4, 5], from: 3 });
        let bare = windows(&[], &text[..6], 4, 4);
        assert_eq!(bare[1], Window { ids: vec![3, 4, 5], from: 1 });
        assert_eq!(windows(&[99], &[], 4, 4), []);
        assert_eq!(windows(&[], &[1], 4, 4), []);
    }

    #[test]
    fn divergence_is_that_of_the_distributions() {
        let logits = |p: [f64; 3]| p.map(|p| p.ln() as f32 + 2.0);
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]);
        let pair = pair(&logits(p), &logits(q), 1);
        let want: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((pair.kl - want).abs() < 1e-6 && !pair.agree, "{pair:?}");
        assert!((pair.base_nll - 4f64.ln()).abs() < 1e-6 && (pair.quant_nll - 4f64.ln()).abs() < 1e-6);
        assert_eq!(super::pair(&logits(p), &logits(p), 0).kl, 0.0);
    }
}
