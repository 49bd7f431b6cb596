//! `RopeAppend`: rotation at positions up to 131071, and every page but the rows' own untouched.

use quaver_core::op::{Buf, DType, Heads, Op, StaticScale};

use super::List;
use super::batch::{self, Batch, Cache};
use crate::parity::bound::{Bound, Codes, Truth, decode};
use crate::parity::build::{Axis, Builder, encode};
use crate::parity::limits::Work;
use crate::parity::{Problem, Rng};

pub fn add(list: &mut List) {
    let heads = |q, kv, dim| Heads { q, kv, dim };
    // Prefill over page boundaries, decode rows at the first, second and last slot of a page.
    let ragged: &[(usize, usize)] = &[(0, 17), (15, 2), (16, 1), (31, 1), (5, 40), (0, 1)];
    let far: &[(usize, usize)] = &[(8191, 1), (131_071, 1), (8180, 30), (131_060, 11), (0, 3)];
    for (input, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
        for cache in Cache::ALL {
            let name = cache.name();
            list.add("rope_append", format!("{input}_to_{name}_ragged_gqa4_dim64"), move |rng| {
                problem(rng, dtype, cache, ragged, heads(8, 2, 64), 16)
            });
            list.add("rope_append", format!("{input}_to_{name}_to_position_131071"), move |rng| {
                problem(rng, dtype, cache, far, heads(2, 1, 16), 32)
            });
        }
    }
    for (q, kv, dim, page_tokens) in [(3, 3, 24, 16), (8, 1, 128, 8), (4, 2, 2, 64)] {
        list.add("rope_append", format!("q{q}_kv{kv}_dim{dim}_page{page_tokens}"), move |rng| {
            problem(rng, DType::F32, Cache::F32, ragged, heads(q, kv, dim), page_tokens)
        });
    }
    list.drawn("rope_append", |rng| {
        let (dtype, cache) = (rng.pick(&[DType::F32, DType::Bf16]), rng.pick(&Cache::ALL));
        let (spans, heads, page_tokens) = (batch::spans(rng), batch::heads(rng), rng.pick(&[8, 16, 32]));
        let Heads { q, kv, dim } = heads;
        (format!("{}_spans_q{q}_kv{kv}_dim{dim}_page{page_tokens}", spans.len()), move |rng: &mut Rng| {
            problem(rng, dtype, cache, &spans, heads, page_tokens)
        })
    });
    list.add("rope_append", "no_rows", move |rng| problem(rng, DType::F32, Cache::F32, &[], heads(2, 1, 16), 16));
}

/// `[positions, dim]`: cosines, then sines, of Llama's angles, from f64.
pub fn rope_table(positions: usize, dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let mut table = Vec::with_capacity(positions * dim);
    let frequencies: Vec<f64> = (0..half).map(|i| 500_000f64.powf(-2.0 * i as f64 / dim as f64)).collect();
    for position in 0..positions {
        let angles = || frequencies.iter().map(|f| position as f64 * f);
        table.extend(angles().map(|angle| angle.cos() as f32));
        table.extend(angles().map(|angle| angle.sin() as f32));
    }
    table
}

/// Numbers on their way to a buffer.
#[derive(Default)]
struct Side {
    at: Vec<usize>,
    value: Vec<f64>,
    magnitude: Vec<f64>,
}

impl Side {
    /// Elements from `first` on: pairs of value and magnitude.
    fn put(&mut self, first: usize, numbers: Vec<(f64, f64)>) {
        self.at.extend(first..first + numbers.len());
        self.value.extend(numbers.iter().map(|n| n.0));
        self.magnitude.extend(numbers.iter().map(|n| n.1));
    }

    fn expect(self, b: &mut Builder, buf: Buf, width: usize, scale: Option<StaticScale>) {
        let truth = Truth { value: self.value, magnitude: self.magnitude, work: Work::Rope };
        let rows = self.at.len() / width;
        let bound = match scale {
            None => Bound::Close(truth),
            Some(scale) => {
                Bound::Codes(Codes { truth, inv: vec![f64::from(scale.inv); rows], spread: vec![0.0; rows] })
            }
        };
        b.expect_at(buf, self.at, width, bound);
    }
}

fn rotated(head: &[f32], table: &[f32]) -> Vec<(f64, f64)> {
    let half = head.len() / 2;
    let number = |i: usize| {
        let (cos, sin) = (f64::from(table[i % half]), f64::from(table[half + i % half]));
        let (own, other) = (f64::from(head[i]) * cos, f64::from(head[(i + half) % head.len()]) * sin);
        (if i < half { own - other } else { own + other }, own.abs() + other.abs())
    };
    (0..head.len()).map(number).collect()
}

fn problem(
    rng: &mut Rng,
    dtype: DType,
    cache: Cache,
    spans: &[(usize, usize)],
    heads: Heads,
    page_tokens: usize,
) -> Problem {
    let batch = Batch::new(rng, spans, page_tokens, false);
    let Heads { q: q_heads, kv: kv_heads, dim } = heads;
    let width = (q_heads + 2 * kv_heads) * dim;
    let mut b = batch.builder();
    let bytes = encode(dtype, &rng.normals(batch.rows() * width, 1.0));
    let values = decode(dtype, &bytes);
    let qkv = b.input("qkv", dtype, Axis::Rows, width, bytes);
    let table = rope_table(batch.table_cols * page_tokens, dim);
    let rope = b.constant_f32("rope", dim, &table);
    let rows = batch.inputs(&mut b);
    let q = b.output("q", dtype, Axis::Rows, q_heads * dim);
    let [k, v] = ["k", "v"].map(|name| b.output(name, cache.dtype(), Axis::Fixed(batch.cache_rows(heads)), dim));
    let kv = batch.kv(k, v, cache);
    b.op(Op::RopeAppend { qkv, rope, rows, heads, q, kv });

    let (mut q_side, mut k_side, mut v_side) = (Side::default(), Side::default(), Side::default());
    for ((row, (seq, position)), qkv) in batch.each_row().enumerate().zip(values.chunks(width)) {
        let angles = &table[position * dim..][..dim];
        for (head, x) in qkv.chunks(dim).enumerate() {
            let slot = |head: usize| batch.slot(seq, position, kv_heads, head) * dim;
            if head < q_heads {
                q_side.put((row * q_heads + head) * dim, rotated(x, angles));
            } else if head < q_heads + kv_heads {
                k_side.put(slot(head - q_heads), rotated(x, angles));
            } else {
                // Copied: what a cache cannot hold is all that is lost.
                v_side.put(slot(head - q_heads - kv_heads), x.iter().map(|&x| (f64::from(x), 0.0)).collect());
            }
        }
    }
    q_side.expect(&mut b, q, dim, None);
    k_side.expect(&mut b, k, dim, kv.scales.map(|s| s.0));
    v_side.expect(&mut b, v, dim, kv.scales.map(|s| s.1));
    b.finish()
}
