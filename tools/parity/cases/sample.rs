//! `Sample`: from identical logits, identical tokens.

use quaver_core::op::{DType, Op};
use quaver_core::sampler::{Count, Mask, RowParams, Sampled, SamplingParams};

use super::List;
use crate::parity::bound::Bound;
use crate::parity::build::{Axis, Builder};
use crate::parity::{Problem, Rng};

/// A vocabulary that is no multiple of anything.
const VOCAB: usize = 1021;

/// Makes a problem from the vocabulary, the logits and the parameters of each row.
type Make = fn(&mut Rng, usize, Vec<f32>, &dyn Fn(u32, &mut Rng) -> RowParams) -> Problem;

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
            problem(rng, VOCAB, logits, &|row, rng| chosen(row, rng, change))
        });
    }
    for (w, vocab) in [(0, 64), (1, 128_256), (3, 4097), (2, 1)] {
        list.add("sample", format!("top_p_w{w}_vocab{vocab}"), move |rng| {
            let logits = rng.normals(w * vocab, 2.5);
            problem(rng, vocab, logits, &|row, rng| chosen(row, rng, |p, _| p.top_p = 0.9))
        });
    }
    // Few tokens of many are left, and many of them.
    let nuclei: [(&str, Change); 2] = [
        ("cold", |p, _| (p.temperature, p.top_p, p.logprobs) = (0.4, 0.9, Some(20))),
        ("warm", |p, _| (p.temperature, p.top_p) = (1.0, 0.9)),
    ];
    for (name, change) in nuclei {
        list.add("sample", format!("{name}_top_p_w5_vocab40000"), move |rng| {
            let logits = rng.normals(5 * 40_000, 2.5);
            problem(rng, 40_000, logits, &|row, rng| chosen(row, rng, change))
        });
    }
    // As many passes over as many tokens as there can be.
    list.add("sample", "everything_and_20_logprobs_w1_vocab300000", |rng| {
        let logits = rng.normals(300_000, 2.5);
        let all: Change = |p, rng| {
            penalties(p, rng);
            (p.temperature, p.top_k, p.top_p, p.logprobs) = (1.5, 1000, 0.95, Some(20));
        };
        problem(rng, 300_000, logits, &|row, rng| chosen(row, rng, all))
    });
    list.drawn("sample", |rng| {
        let (w, vocab, (name, change)) = (1 + rng.below(9), 1 + rng.below(9000), rng.pick(&variants));
        let (kind, make) = rng.pick(&[("", problem as Make), ("mask_", masked)]);
        (format!("{kind}{name}_w{w}_vocab{vocab}"), move |rng: &mut Rng| {
            let logits = rng.normals(w * vocab, 2.5);
            make(rng, vocab, logits, &|row, rng| chosen(row, rng, change))
        })
    });
    list.add("sample", "greedy_ties_take_the_lower_id", |rng| {
        let mut logits = rng.normals(17 * VOCAB, 1.0);
        for row in logits.chunks_mut(VOCAB) {
            (0..5).for_each(|_| row[rng.below(VOCAB)] = 9.0);
        }
        problem(rng, VOCAB, logits, &|row, rng| chosen(row, rng, |p, _| p.temperature = 0.0))
    });
    // Many logits are equal: the alternatives are ordered by id.
    list.add("sample", "top_20_with_ties", |rng| {
        let logits = (0..9 * VOCAB).map(|_| rng.below(40) as f32 / 4.0).collect();
        problem(rng, VOCAB, logits, &|row, rng| chosen(row, rng, |p, _| p.logprobs = Some(20)))
    });
    list.add("sample", "scoring", |rng| {
        let logits = rng.normals(17 * VOCAB, 3.0);
        problem(rng, VOCAB, logits, &|row, rng| RowParams::score(row, rng.below(VOCAB) as u32, row % 21))
    });
    list.add("sample", "masked_and_faulty_logits", |rng| {
        let mut logits = rng.normals(5 * VOCAB, 2.0);
        let odd = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY];
        for (row, logits) in logits.chunks_mut(VOCAB).enumerate() {
            // The last row has no finite logit at all.
            let count = if row == 4 { VOCAB } else { 300 };
            (0..count).for_each(|i| logits[i * VOCAB / count] = odd[if row == 4 { 0 } else { i % 3 }]);
        }
        problem(rng, VOCAB, logits, &|row, rng| chosen(row, rng, |p, _| p.logprobs = Some(5)))
    });
    for (name, change) in variants {
        list.add("sample", format!("mask_{name}_w17"), move |rng| {
            let logits = rng.normals(17 * VOCAB, 2.5);
            masked(rng, VOCAB, logits, &|row, rng| chosen(row, rng, change))
        });
    }
    for (w, vocab) in [(7, 33), (2, 128_256)] {
        list.add("sample", format!("mask_everything_w{w}_vocab{vocab}"), move |rng| {
            let logits = rng.normals(w * vocab, 2.5);
            masked(rng, vocab, logits, &|row, rng| chosen(row, rng, variants[8].1))
        });
    }
    // What a mask allows is not finite, or nothing.
    list.add("sample", "mask_that_leaves_nothing", |rng| {
        let mut logits = rng.normals(6 * VOCAB, 2.0);
        logits.iter_mut().skip(7).step_by(VOCAB).for_each(|logit| *logit = f32::NEG_INFINITY);
        let params = |row, rng: &mut Rng| chosen(row, rng, |p, rng| p.temperature = rng.pick(&[0.0, 0.9]));
        with_masks(rng, VOCAB, logits, &params, |row, _, _| {
            let mut mask = Mask::all(VOCAB);
            (0..VOCAB as u32).filter(|id| row % 3 == 0 || *id != 7).for_each(|id| mask.forbid(id));
            (row % 3 != 2).then_some(mask)
        })
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

/// Rows without a mask.
fn problem(rng: &mut Rng, vocab: usize, logits: Vec<f32>, params: &dyn Fn(u32, &mut Rng) -> RowParams) -> Problem {
    with_masks(rng, vocab, logits, params, |_, _, _| None)
}

/// By turns rows without a mask, with half of the tokens, with one, and with all but the likeliest.
fn masked(rng: &mut Rng, vocab: usize, logits: Vec<f32>, params: &dyn Fn(u32, &mut Rng) -> RowParams) -> Problem {
    with_masks(rng, vocab, logits, params, |row, logits, rng| {
        let (mut mask, only) = (Mask::all(vocab), rng.below(vocab));
        let likeliest = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        for id in 0..vocab {
            let is_allowed = match row % 4 {
                0 => return None,
                1 => rng.below(2) == 0,
                2 => id == only,
                _ => Some(id) != likeliest,
            };
            if !is_allowed {
                mask.forbid(id as u32);
            }
        }
        Some(mask)
    })
}

/// What the mask of a row is, given its logits.
fn with_masks(
    rng: &mut Rng,
    vocab: usize,
    logits: Vec<f32>,
    params: &dyn Fn(u32, &mut Rng) -> RowParams,
    mask: impl Fn(u32, &[f32], &mut Rng) -> Option<Mask>,
) -> Problem {
    let w = logits.len() / vocab;
    let mut b = Builder::new(w.max(1), w, 0);
    // One sequence more than rows, and the rows' in reverse. Where a row has no mask, its words allow nothing.
    let (mut words, mut masks) = (Vec::new(), Vec::new());
    for (row, logits) in (0..w as u32).zip(logits.chunks(vocab)) {
        let params = params(row, rng);
        let mask = mask(row, logits, rng);
        let params = RowParams { seq: w as u32 - row, masked: mask.is_some().into(), ..params };
        words.extend(bytemuck::cast::<RowParams, [u32; 16]>(params));
        masks.extend(mask.map_or(vec![0; Mask::width(vocab)], |mask| mask.words().to_vec()));
    }
    let logits = b.input_f32("logits", Axis::Wanted, vocab, &logits);
    let params = b.input_u32("params", Axis::Wanted, 16, &words);
    let mask = b.input_u32("mask", Axis::Wanted, Mask::width(vocab), &masks);
    let mut history = vec![0u32; (w + 1) * vocab];
    for row in history.chunks_mut(vocab) {
        let ids = |n: usize, rng: &mut Rng| (0..n).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>();
        Count::fill(row, &ids(40, rng), &ids(60, rng));
    }
    let history = b.input_u32("history", Axis::Fixed(w + 1), vocab, &history);
    let out = b.output("out", DType::U32, Axis::Wanted, size_of::<Sampled>() / 4);
    b.op(Op::Sample { logits, params, mask, history, out });
    b.expect(out, Bound::Sampled);
    b.expect(history, Bound::Bytes);
    b.finish()
}
