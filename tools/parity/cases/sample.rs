//! `Sample`: from identical logits, identical tokens.

use quaver_core::op::{DType, Op};
use quaver_core::sampler::{Count, RowParams, Sampled, SamplingParams};

use super::List;
use crate::parity::bound::Bound;
use crate::parity::build::{Axis, Builder};
use crate::parity::{Problem, Rng};

/// A vocabulary that is no multiple of anything.
const VOCAB: usize = 1021;

/// Sets the parameters of a row.
type Change = fn(&mut SamplingParams, &mut Rng);

pub fn add(list: &mut List) {
    let variants: [(&str, Change); 9] = [
        ("greedy", |p, _| p.temperature = 0.0),
        ("plain", |_, _| ()),
        ("temperature", |p, rng| p.temperature = rng.between(0.2, 1.8)),
        ("top_k", |p, rng| p.top_k = 1 + rng.below(60) as u32),
        ("top_p", |p, rng| p.top_p = rng.between(0.3, 0.99)),
        ("min_p", |p, rng| p.min_p = rng.between(0.01, 0.3)),
        ("penalties", penalties),
        ("greedy_penalties", |p, rng| {
            penalties(p, rng);
            p.temperature = 0.0;
        }),
        ("everything", |p, rng| {
            penalties(p, rng);
            (p.temperature, p.top_k, p.top_p, p.min_p) = (0.8, 40, 0.9, 0.02);
        }),
    ];
    for (name, change) in variants {
        list.add("sample", format!("{name}_w17"), move |rng| {
            let logits = rng.normals(17 * VOCAB, 2.5);
            problem(rng, VOCAB, logits, |row, rng| chosen(row, rng, change))
        });
    }
    for (w, vocab) in [(0, 64), (1, 128_256), (3, 4097), (2, 1)] {
        list.add("sample", format!("top_p_w{w}_vocab{vocab}"), move |rng| {
            let logits = rng.normals(w * vocab, 2.5);
            problem(rng, vocab, logits, |row, rng| chosen(row, rng, |p, _| p.top_p = 0.9))
        });
    }
    // As many passes over as many tokens as there can be.
    list.add("sample", "everything_and_20_logprobs_w1_vocab300000", |rng| {
        let logits = rng.normals(300_000, 2.5);
        let all: Change = |p, rng| {
            penalties(p, rng);
            (p.temperature, p.top_k, p.top_p, p.logprobs) = (1.5, 1000, 0.95, Some(20));
        };
        problem(rng, 300_000, logits, |row, rng| chosen(row, rng, all))
    });
    list.drawn("sample", |rng| {
        let (w, vocab, (name, change)) = (1 + rng.below(9), 1 + rng.below(9000), rng.pick(&variants));
        (format!("{name}_w{w}_vocab{vocab}"), move |rng: &mut Rng| {
            let logits = rng.normals(w * vocab, 2.5);
            problem(rng, vocab, logits, |row, rng| chosen(row, rng, change))
        })
    });
    list.add("sample", "greedy_ties_take_the_lower_id", |rng| {
        let mut logits = rng.normals(17 * VOCAB, 1.0);
        for row in logits.chunks_mut(VOCAB) {
            (0..5).for_each(|_| row[rng.below(VOCAB)] = 9.0);
        }
        problem(rng, VOCAB, logits, |row, rng| chosen(row, rng, |p, _| p.temperature = 0.0))
    });
    // Many logits are equal: the alternatives are ordered by id.
    list.add("sample", "top_20_with_ties", |rng| {
        let logits = (0..9 * VOCAB).map(|_| rng.below(40) as f32 / 4.0).collect();
        problem(rng, VOCAB, logits, |row, rng| chosen(row, rng, |p, _| p.logprobs = Some(20)))
    });
    list.add("sample", "scoring", |rng| {
        let logits = rng.normals(17 * VOCAB, 3.0);
        problem(rng, VOCAB, logits, |row, rng| RowParams::score(row, rng.below(VOCAB) as u32, row % 21))
    });
    list.add("sample", "masked_and_faulty_logits", |rng| {
        let mut logits = rng.normals(5 * VOCAB, 2.0);
        let odd = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY];
        for (row, logits) in logits.chunks_mut(VOCAB).enumerate() {
            // The last row has no finite logit at all.
            let count = if row == 4 { VOCAB } else { 300 };
            (0..count).for_each(|i| logits[i * VOCAB / count] = odd[if row == 4 { 0 } else { i % 3 }]);
        }
        problem(rng, VOCAB, logits, |row, rng| chosen(row, rng, |p, _| p.logprobs = Some(5)))
    });
}

fn penalties(p: &mut SamplingParams, rng: &mut Rng) {
    p.repetition_penalty = rng.between(1.0, 1.5);
    p.presence_penalty = rng.between(-1.0, 1.5);
    p.frequency_penalty = rng.between(-0.5, 0.7);
}

/// A row that chooses a token at a random position.
fn chosen(row: u32, rng: &mut Rng, change: Change) -> RowParams {
    let mut params = SamplingParams { logprobs: Some(row as usize % 4), ..SamplingParams::default() };
    change(&mut params, rng);
    params.row(row, rng.below(131_072) as u32, rng.bits())
}

fn problem(rng: &mut Rng, vocab: usize, logits: Vec<f32>, params: impl Fn(u32, &mut Rng) -> RowParams) -> Problem {
    let w = logits.len() / vocab;
    let mut b = Builder::new(w.max(1), w, 0);
    let logits = b.input_f32("logits", Axis::Wanted, vocab, &logits);
    // One sequence more than rows, and the rows' in reverse.
    let mut words = Vec::new();
    for row in 0..w as u32 {
        let params = RowParams { seq: w as u32 - row, ..params(row, rng) };
        words.extend(bytemuck::cast::<RowParams, [u32; 16]>(params));
    }
    let params = b.input_u32("params", Axis::Wanted, 16, &words);
    let mut history = vec![0u32; (w + 1) * vocab];
    for row in history.chunks_mut(vocab) {
        let ids = |n: usize, rng: &mut Rng| (0..n).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>();
        Count::fill(row, &ids(40, rng), &ids(60, rng));
    }
    let history = b.input_u32("history", Axis::Fixed(w + 1), vocab, &history);
    let out = b.output("out", DType::U32, Axis::Wanted, size_of::<Sampled>() / 4);
    b.op(Op::Sample { logits, params, history, out });
    b.expect(out, Bound::Sampled);
    b.expect(history, Bound::Bytes);
    b.finish()
}
