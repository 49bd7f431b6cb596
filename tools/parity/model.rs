//! The model end to end: what a device makes of a text, in both profiles, against the same profile on the reference; and
//! how far the fast profile is from the exact one.
//!
//! Two sound programs do not agree here as they do op by op: where they round one FP8 tie differently, what follows
//! differs by a step of a code. So the bounds ([`ModelLimit`]) are those that sound programs keep, and lie far below what
//! weight-only arithmetic, a lost row or a wrong page do; tests plant these.

use std::time::Instant;

use quaver_core::Result;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::{KvCache, Profile};
use quaver_core::op::Backend;
use quaver_core::reference::Reference;

use super::bound::Verdict;
use super::limits::{ModelLimit, model_limit};
use super::run::Outcome;
use super::stage::Stage;
use crate::text::Tokenizer;

/// What the model reads.
const TEXT: &str = "It was a cold morning in March when the old captain came down to the harbour. The wind had been \
    rising since the night before, and the boats lay close together behind the wall. He stood for a long time without \
    speaking, and looked at the grey water; then he turned to the boy who had followed him, and said that they would \
    sail with the tide. The boy did not answer. He had never been farther from the village than the lighthouse, and he \
    thought of his mother, who was still asleep in the little house upon the hill.";

/// Tokens of it; no multiple of a page or a tile.
const TOKENS: usize = 93;

/// Tokens at its end that are also computed one by one.
const DECODED: usize = 24;

/// A model, a text, and what the reference computes of it.
pub struct Model {
    checkpoint: Checkpoint,
    ids: Vec<u32>,
    exact: Forward,
    fast: Forward,
}

/// What the model computes.
struct Forward {
    /// The residual stream behind each layer, `[m, d]`, and the microseconds that the layer took.
    layers: Vec<(Vec<f32>, f64)>,
    /// `[m, vocab]`, from one run of the whole program.
    logits: (Vec<f32>, f64),
    /// `[DECODED, vocab]`, each row from a run of its own; microseconds a run.
    decoded: (Vec<f32>, f64),
}

impl Model {
    /// The first tokens of a fixed text, as a model's tokenizer has them.
    pub fn text(tokenizer_json: &[u8]) -> Result<Vec<u32>> {
        let mut ids = Tokenizer::from_json(tokenizer_json)?.encode(TEXT, true)?;
        ids.truncate(TOKENS);
        Ok(ids)
    }

    /// Runs a model over a text on the reference.
    pub fn new(checkpoint: Checkpoint, ids: Vec<u32>) -> Result<Self> {
        let truth = |profile| forward(&checkpoint, &mut Reference::open(), profile, &ids);
        let (exact, fast) = (truth(Profile::Exact)?, truth(Profile::Fast)?);
        Ok(Model { checkpoint, ids, exact, fast })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The tokens that it reads.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The names of the outcomes of a profile, in order.
    pub fn names(profile: Profile, layers: usize) -> Vec<String> {
        let name = |what: String| format!("model::{}_{what}", profile_name(profile));
        let of_exact: &[&str] =
            if profile == Profile::Fast { &["", "decode_", "from_exact_"] } else { &["", "decode_"] };
        let ends = of_exact.iter().flat_map(|part| ["logits", "kl", "top1"].map(|what| format!("{part}{what}")));
        (0..layers).map(|layer| format!("layer_{layer}")).chain(ends).map(name).collect()
    }

    /// Runs a profile on a device, which must be fresh: without buffers. The outcomes are those of [`Model::names`].
    pub fn run(&self, profile: Profile, seed: u64, device: &mut dyn Backend) -> Result<Vec<Outcome>> {
        let got = forward(&self.checkpoint, device, profile, &self.ids)?;
        let (limit, config) = (model_limit(&device.describe(), profile), self.checkpoint.config());
        let truth = if profile == Profile::Exact { &self.exact } else { &self.fast };
        let mut verdicts = Vec::new();
        for ((want, _), (layer, us)) in truth.layers.iter().zip(&got.layers) {
            verdicts.push((drift(layer, want, config.hidden, limit), *us));
        }
        let mut hold = |(logits, us): &(Vec<f32>, f64), want: &[f32]| {
            let three = logits_verdicts(logits, want, config.vocab, limit);
            verdicts.extend(three.map(|verdict| (verdict, *us)));
        };
        let all = &truth.logits.0;
        hold(&got.logits, all);
        hold(&got.decoded, &all[all.len() - got.decoded.0.len()..]);
        if profile == Profile::Fast {
            hold(&got.logits, &self.exact.logits.0);
        }
        let named = Model::names(profile, config.layers).into_iter().zip(verdicts);
        Ok(named.map(|(name, (verdict, us))| Outcome::new(name, "model", seed, us, vec![verdict])).collect())
    }
}

/// The profile's name on the command line.
const fn profile_name(profile: Profile) -> &'static str {
    match profile {
        Profile::Exact => "exact",
        Profile::Fast => "fast",
    }
}

fn forward(checkpoint: &Checkpoint, device: &mut dyn Backend, profile: Profile, ids: &[u32]) -> Result<Forward> {
    let mut stage = Stage::new(checkpoint, device, profile, KvCache::Auto, ids.len())?;
    let (m, outputs) = (ids.len(), stage.llama.outputs);
    stage.write(0, ids)?;
    let whole = stage.llama.program(m, m);
    let embed = stage.record(&whole.lines[..1], m)?;
    stage.run(embed)?;
    let mut layers = Vec::new();
    for layer in 0..stage.llama.config.layers {
        let plan = stage.record(&stage.llama.layer_program(layer, m).lines, m)?;
        let begin = Instant::now();
        stage.run(plan)?;
        layers.push((stage.read_f32(outputs.residual, m)?, micros(begin)));
    }
    let plan = stage.record(&whole.lines, m)?;
    let begin = Instant::now();
    stage.run(plan)?;
    let logits = (stage.read_f32(outputs.logits, m)?, micros(begin));

    let plan = stage.record(&stage.llama.program(1, 1).lines, 1)?;
    let (begin, first) = (Instant::now(), m - DECODED.min(m));
    let mut decoded = Vec::new();
    for (position, id) in ids.iter().enumerate().skip(first) {
        stage.write(position, &[*id])?;
        stage.run(plan)?;
        decoded.extend(stage.read_f32(outputs.logits, 1)?);
    }
    let decoded = (decoded, micros(begin) / (m - first) as f64);
    Ok(Forward { layers, logits, decoded })
}

fn micros(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e6
}

/// How far a residual stream has drifted, rms(error) / rms(value), over all rows and in the worst.
fn drift(got: &[f32], want: &[f32], width: usize, limit: ModelLimit) -> Verdict {
    let mut verdict = Verdict::default();
    let all = relative_rms(got, want);
    verdict.note(all, limit.layer, || "drift of all rows".into());
    let mut worst = 0f64;
    for (row, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
        let error = relative_rms(got, want);
        worst = worst.max(error);
        verdict.note(error, limit.layer_row, || format!("drift of row {row}"));
    }
    if verdict.passed() {
        verdict.detail = format!("drift of all rows {all:.1e}, of the worst {worst:.1e}");
    }
    verdict
}

/// rms, KL divergence and most probable tokens of some rows of logits.
fn logits_verdicts(got: &[f32], want: &[f32], vocab: usize, limit: ModelLimit) -> [Verdict; 3] {
    let [mut rms, mut kl, mut top1] = [Verdict::default(), Verdict::default(), Verdict::default()];
    let rows = || got.chunks(vocab).zip(want.chunks(vocab)).enumerate();
    let count = rows().count();
    let squares = rows().map(|(_, (got, want))| square_error(got, want)).sum::<f64>();
    let error = (squares / got.len() as f64).sqrt();
    rms.note(error, limit.logits, || format!("rms error {error:.1e} of {count} rows of logits"));
    let nats = rows().map(|(_, (got, want))| divergence(want, got)).sum::<f64>() / count as f64;
    kl.note(nats, limit.kl, || format!("{nats:.1e} nats a token, over {count} tokens"));

    let (mut clear, mut wrong) = (0, Vec::new());
    for (row, (got, want)) in rows() {
        let ([best, second], [mine, _]) = (best_two(want), best_two(got));
        if want[best] - want[second] < limit.margin {
            continue;
        }
        clear += 1;
        if mine != best {
            wrong.push(format!("row {row}: {mine}, not {best}, which leads by {}", want[best] - want[second]));
        }
    }
    top1.note(wrong.len() as f64, 0.0, || wrong.join("; "));
    // Else the case would say nothing.
    let few = (count / 2).saturating_sub(clear);
    top1.note(few as f64, 0.0, || format!("only {clear} of {count} steps lead clearly enough for a verdict"));
    if top1.passed() {
        top1.detail = format!("{clear} of {count} steps lead by {} or more, and have the same token", limit.margin);
    }
    [rms, kl, top1]
}

/// The largest two, the first of equal ones.
fn best_two(logits: &[f32]) -> [usize; 2] {
    let (mut best, mut second) = (0, usize::MAX);
    for i in 1..logits.len() {
        if logits[i] > logits[best] {
            (best, second) = (i, best);
        } else if second == usize::MAX || logits[i] > logits[second] {
            second = i;
        }
    }
    [best, second.min(logits.len() - 1)]
}

/// rms(a - b) / rms(b).
pub(super) fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    let error = square_error(a, b);
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

fn square_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// The KL divergence of softmax(q) from softmax(p), in nats.
pub fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + x.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
    };
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - p_sum, f64::from(q) - q_sum);
        p.exp() * (p - q)
    });
    terms.sum()
}
