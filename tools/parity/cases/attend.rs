//! `Attend`: prefill and decode mixed, over shuffled pages whose unused slots are poisoned.

use quaver_core::op::{DType, Heads, Op};

use super::List;
use super::batch::{self, Batch, Cache};
use super::elementwise::fused;
use crate::parity::bound::{Truth, decode};
use crate::parity::build::{ActKind, Axis, encode};
use crate::parity::limits::Work;
use crate::parity::{Problem, Rng};

/// What one case computes.
#[derive(Clone, Copy)]
struct Shape {
    q: DType,
    cache: Cache,
    out: ActKind,
    /// (first position, rows) of each sequence.
    spans: &'static [(usize, usize)],
    heads: Heads,
    page_tokens: usize,
    /// Standard deviation of q: scores have it too.
    sharpness: f32,
    /// Pages that the second sequence shares with the first.
    shared: usize,
    /// No rows but those in use.
    tight: bool,
}

/// Prefill from the start and behind a prefix, and decode rows with contexts of 1, 15, 16, 17 and 129.
const MIXED: &[(usize, usize)] = &[(0, 19), (0, 1), (14, 1), (128, 1), (13, 21), (15, 1), (16, 1)];

const PLAIN: Shape = Shape {
    q: DType::F32,
    cache: Cache::F32,
    out: ActKind::F32,
    spans: MIXED,
    heads: Heads { q: 8, kv: 2, dim: 64 },
    page_tokens: 16,
    sharpness: 1.0,
    shared: 0,
    tight: false,
};

const STATIC: ActKind = ActKind::Static(0.0037);

pub fn add(list: &mut List) {
    let mut plain = |name: String, shape: Shape| list.add("attend", name, move |rng| problem(rng, shape));
    for (query, q) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
        for cache in Cache::ALL {
            for out in [ActKind::F32, ActKind::Bf16, STATIC, ActKind::PerToken] {
                let name = format!("{query}_over_{}_to_{}_mixed_gqa4", cache.name(), out.name());
                plain(name, Shape { q, cache, out, ..PLAIN });
            }
            plain(
                format!("{query}_over_{}_decode_ctx8192", cache.name()),
                Shape { q, cache, spans: &[(8191, 1), (40, 1)], heads: Heads { q: 4, kv: 1, dim: 64 }, ..PLAIN },
            );
        }
    }
    for (q, kv, dim) in [(3, 3, 64), (8, 1, 64), (8, 2, 128), (4, 1, 24), (32, 8, 64)] {
        plain(format!("mixed_q{q}_kv{kv}_dim{dim}"), Shape { heads: Heads { q, kv, dim }, ..PLAIN });
    }
    for page_tokens in [8, 32, 256] {
        plain(format!("mixed_page{page_tokens}"), Shape { page_tokens, ..PLAIN });
    }
    for context in [1, 15, 16, 17, 129] {
        let spans: &[(usize, usize)] = match context {
            1 => &[(0, 1)],
            15 => &[(14, 1)],
            16 => &[(15, 1)],
            17 => &[(16, 1)],
            _ => &[(128, 1), (128, 1), (128, 1)],
        };
        let name = format!("decode_m{}_ctx{context}_gqa4", spans.len());
        plain(name, Shape { spans, cache: Cache::Bf16, ..PLAIN });
    }
    // The one row of a decode step.
    for cache in Cache::ALL {
        let name = format!("decode_m1_over_{}_ctx129_gqa4", cache.name());
        plain(name, Shape { spans: &[(128, 1)], cache, tight: true, ..PLAIN });
    }
    // Longer than what a device may do in one loop.
    let wide = Shape { spans: &[(15_999, 1)], cache: Cache::Bf16, heads: Heads { q: 2, kv: 1, dim: 256 }, ..PLAIN };
    plain("decode_ctx16000_dim256".into(), wide);
    let long = Shape { spans: &[(40_000, 1)], cache: Cache::Fp8, heads: Heads { q: 2, kv: 1, dim: 64 }, ..PLAIN };
    plain("decode_ctx40001".into(), long);
    plain("prefill_130_rows".into(), Shape { spans: &[(0, 130)], ..PLAIN });
    plain("prefill_70_rows_behind_300".into(), Shape { spans: &[(300, 70)], cache: Cache::Fp8, ..PLAIN });
    // Tiles of many queries, and decode rows beside them; a group that is no power of two, and wide heads.
    for cache in [Cache::Bf16, Cache::Fp8] {
        let (name, spans) = (cache.name(), &[(100, 70), (180, 1)]);
        let shape = Shape { q: DType::Bf16, cache, spans, heads: Heads { q: 4, kv: 1, dim: 64 }, ..PLAIN };
        plain(format!("bf16_over_{name}_prefill_70_rows_behind_100"), shape);
        plain(
            format!("bf16_over_{name}_mixed_q6_kv2_dim128"),
            Shape { spans: MIXED, heads: Heads { q: 6, kv: 2, dim: 128 }, ..shape },
        );
        plain(format!("bf16_over_{name}_mixed_page48"), Shape { spans: MIXED, page_tokens: 48, ..shape });
    }
    plain("two_sequences_share_pages".into(), Shape { spans: &[(64, 9), (70, 3)], shared: 4, ..PLAIN });
    plain("scores_of_all_sizes".into(), Shape { sharpness: 25.0, ..PLAIN });
    plain("no_rows".into(), Shape { spans: &[], ..PLAIN });
    list.drawn("attend", |rng| {
        let (spans, heads, page_tokens) = (batch::spans(rng), batch::heads(rng), rng.pick(&[8, 16, 32]));
        let (q, cache, out) = (rng.pick(&[DType::F32, DType::Bf16]), rng.pick(&Cache::ALL), ActKind::draw(rng));
        let shape = Shape { q, cache, out, heads, page_tokens, ..PLAIN };
        let name = format!("{}_spans_over_{}_q{}_kv{}_dim{}", spans.len(), cache.name(), heads.q, heads.kv, heads.dim);
        (name, move |rng: &mut Rng| over(rng, shape, &spans))
    });
    for kind in [ActKind::Bf16, STATIC, ActKind::PerToken] {
        list.add("attend", format!("fused_equals_unfused_{}", kind.name()), move |rng| {
            let (batch, heads) = (Batch::new(rng, MIXED, 16, true), PLAIN.heads);
            let width = heads.q * heads.dim;
            let mut b = batch.builder();
            let q = b.input_f32("q", Axis::Rows, width, &rng.normals(batch.rows() * width, 1.0));
            let rows = batch.inputs(&mut b);
            let (kv, _) = batch.filled_cache(rng, &mut b, heads, Cache::Fp8);
            fused(&mut b, kind, width, |out| Op::Attend { q, rows, heads, kv, out });
            b.finish()
        });
    }
}

fn problem(rng: &mut Rng, shape: Shape) -> Problem {
    over(rng, shape, shape.spans)
}

/// A case over other spans than the shape's.
fn over(rng: &mut Rng, shape: Shape, spans: &[(usize, usize)]) -> Problem {
    let Shape { heads, page_tokens, .. } = shape;
    let mut batch = Batch::new(rng, spans, page_tokens, true);
    if shape.shared > 0 {
        batch.share(0, 1, shape.shared);
    }
    let width = heads.q * heads.dim;
    let mut b = if shape.tight { batch.tight_builder() } else { batch.builder() };
    let bytes = encode(shape.q, &rng.normals(batch.rows() * width, shape.sharpness));
    let queries = decode(shape.q, &bytes);
    let q = b.input("q", shape.q, Axis::Rows, width, bytes);
    let rows = batch.inputs(&mut b);
    let (kv, [k, v]) = batch.filled_cache(rng, &mut b, heads, shape.cache);
    let out = b.act_out(shape.out, Axis::Rows, width);
    b.op(Op::Attend { q, rows, heads, kv, out });

    let scales = kv.scales.map_or((1.0, 1.0), |(k, v)| (f64::from(k.scale), f64::from(v.scale)));
    let (mut value, mut magnitude) = (Vec::new(), Vec::new());
    for ((seq, position), q) in batch.each_row().zip(queries.chunks(width)) {
        for (head, q) in q.chunks(heads.dim).enumerate() {
            let slots: Vec<usize> =
                (0..=position).map(|t| batch.slot(seq, t, heads.kv, head / (heads.q / heads.kv))).collect();
            let (y, size) = attend_head(q, &slots, [&k, &v], scales);
            value.extend(y);
            magnitude.extend(size);
        }
    }
    let context = spans.iter().map(|span| span.0 + span.1).max().unwrap_or(0);
    let work = Work::Attend { dim: heads.dim, context, page_tokens };
    b.expect_act(out, width, Truth { value, magnitude, work });
    b.finish()
}

/// One head of one row over the given rows of the cache, in f64: values and magnitudes, as [`Work::Attend`] says.
fn attend_head(q: &[f32], slots: &[usize], [k, v]: [&[f32]; 2], scales: (f64, f64)) -> (Vec<f64>, Vec<f64>) {
    let dim = q.len();
    let factor = scales.0 / (dim as f64).sqrt();
    let row = |side: &[f32], slot: usize| -> Vec<f32> { side[slot * dim..][..dim].to_vec() };
    let score = |&slot: &usize| {
        let products = q.iter().zip(row(k, slot)).map(|(&q, k)| f64::from(q) * f64::from(k) * factor);
        products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
    };
    let scores: Vec<(f64, f64)> = slots.iter().map(score).collect();
    let max = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(s.0));
    let norm: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
    let (mut value, mut magnitude, mut spread) = (vec![0.0; dim], vec![0.0; dim], 0.0);
    for (&slot, &(score, size)) in slots.iter().zip(&scores) {
        let weight = (score - max).exp() / norm;
        spread += weight * (1.0 + size);
        for (i, v) in row(v, slot).into_iter().enumerate() {
            let product = weight * f64::from(v) * scales.1;
            value[i] += product;
            magnitude[i] += product.abs() * (1.0 + size);
        }
    }
    magnitude.iter_mut().zip(&value).for_each(|(size, value)| *size += value.abs() * spread);
    (value, magnitude)
}
