//! `Attend` on the cpu. A task is one key-value head and a block of rows that follow each other in one sequence: a page's
//! keys and values are decoded once for all of their query heads. Keys are turned on their side, so that one instruction
//! takes the scores of 16 tokens a step further.
//!
//! What a query computes does not depend on the block it is in: its scores are sums over `dim` in order, its values are
//! summed page by page, and both in f64 beyond a few terms.

use quaver_core::host::slices::{ActOut, Slice};
use quaver_core::host::{KvIn, RowsIn};
use quaver_core::op::Heads;
use rayon::prelude::*;

use super::isa::Isa;
use super::vector::{LANES, Math, Store, Work, softmax};

/// Rows of a block.
const BLOCK: usize = 8;

/// See [`quaver_core::reference::attend`]; `attended` is scratch, `[rows, kv_heads, group, dim]`.
pub fn attend(isa: Isa, attended: &mut Vec<f32>, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
    let width = heads.q * heads.dim;
    attended.resize(rows.seq.len() * width, 0.0);
    // Every (row, key-value head) of the output apart, dealt out to the tasks.
    let mut parts = attended.chunks_exact_mut(width / heads.kv);
    let mut tasks: Vec<Task> = Vec::new();
    let mut next = 0;
    for &[first, count, seq, position] in rows.spans {
        debug_assert_eq!(first, next, "spans cover the rows in their order");
        next += count;
        for first_row in (0..count).step_by(BLOCK) {
            let block = BLOCK.min((count - first_row) as usize);
            let (row, position) = ((first + first_row) as usize, (position + first_row) as usize);
            let mut outs: Vec<Vec<&mut [f32]>> = (0..heads.kv).map(|_| Vec::with_capacity(block)).collect();
            for _ in 0..block {
                outs.iter_mut().for_each(|outs| outs.extend(parts.next()));
            }
            let task = outs.into_iter().enumerate().map(|(head, outs)| Task { seq, row, position, head, outs });
            tasks.extend(task);
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        isa.run(Running { task, scratch, q, rows, heads, kv });
    });
    let rows = attended.par_chunks_exact(width).zip(out.rows(width));
    rows.for_each(|(y, mut out)| isa.run(Store(&mut out, y)));
}

/// Rows of one sequence and one key-value head.
struct Task<'a> {
    seq: u32,
    /// The first row, and its position.
    row: usize,
    position: usize,
    head: usize,
    /// `[rows][group, dim]`.
    outs: Vec<&'a mut [f32]>,
}

/// Scratch of one thread.
#[derive(Default)]
struct Scratch {
    /// `[rows, group, dim]`.
    q: Vec<f32>,
    /// `[rows, group, context]`: scores, then weights.
    weights: Vec<f32>,
    /// `[page_tokens, dim]`: a page of one head.
    page: Vec<f32>,
    /// `[page_tokens / 16, dim, 16]`: the same on its side.
    turned: Vec<[f32; LANES]>,
    /// `[rows, group, dim]`: the values.
    sums: Vec<f64>,
}

/// Queries that are computed side by side, each value of a page being read once for them.
const QUERIES: usize = 4;

/// The products of `queries[Q, dim]` with 16 keys on their side: 16 elements at a time in f32, and these sums in f64.
#[inline(always)]
fn dots<M: Math, const Q: usize>(math: M, queries: &[f32], keys: &[[f32; LANES]]) -> [[f64; LANES]; Q] {
    let queries: [&[f32]; Q] = std::array::from_fn(|q| &queries[q * keys.len()..][..keys.len()]);
    let mut sums = [[0f64; LANES]; Q];
    for first in (0..keys.len()).step_by(16) {
        let mut parts = [math.splat(0.0); Q];
        for i in first..keys.len().min(first + 16) {
            let keys = math.load(&keys[i]);
            for q in 0..Q {
                parts[q] = math.mul_add(math.splat(queries[q][i]), keys, parts[q]);
            }
        }
        for q in 0..Q {
            add(&mut sums[q], math.store(parts[q]));
        }
    }
    sums
}

/// `sums[Q, dim] += weights[Q, tokens] . values[tokens, dim]`: within a page in f32, page to page in f64, so that the
/// error does not grow with the context.
#[inline(always)]
fn weigh<M: Math, const Q: usize>(math: M, weights: [&[f32]; Q], values: &[f32], dim: usize, sums: &mut [f64]) {
    let tokens = values.len() / dim;
    let weights = weights.map(|weights| &weights[..tokens]);
    for first in (0..dim).step_by(LANES) {
        let width = LANES.min(dim - first);
        let mut parts = [math.splat(0.0); Q];
        for token in 0..tokens {
            let row = &values[token * dim + first..][..width];
            let value = match row.first_chunk() {
                Some(whole) => math.load(whole),
                None => math.load(&std::array::from_fn(|i| row.get(i).copied().unwrap_or_default())),
            };
            for q in 0..Q {
                parts[q] = math.mul_add(math.splat(weights[q][token]), value, parts[q]);
            }
        }
        for q in 0..Q {
            let sums = &mut sums[q * dim + first..][..width];
            match sums.first_chunk_mut() {
                Some(whole) => add(whole, math.store(parts[q])),
                None => {
                    for (sum, part) in sums.iter_mut().zip(math.store(parts[q])) {
                        *sum += f64::from(part);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add(sums: &mut [f64; LANES], parts: [f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] += f64::from(parts[lane]);
    }
}

/// A task with what it needs.
struct Running<'a> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    q: Slice<'a>,
    rows: RowsIn<'a>,
    heads: Heads,
    kv: KvIn<'a>,
}

impl<'a> Work for Running<'a> {
    #[inline(always)]
    fn run(self, math: impl Math) {
        let Running { task, scratch, q, rows, heads, kv } = self;
        let (dim, group) = (heads.dim, heads.q / heads.kv);
        let Scratch { q: queries, weights, page, turned, sums } = scratch;
        let longest = task.position + task.outs.len();
        let stride = longest.next_multiple_of(LANES);
        queries.resize(task.outs.len() * group * dim, 0.0);
        for (i, into) in queries.chunks_exact_mut(group * dim).enumerate() {
            q.range((task.row + i) * heads.q * dim + task.head * group * dim, group * dim).load(into);
        }
        weights.resize(task.outs.len() * group * stride, 0.0);
        page.resize(kv.page_tokens * dim, 0.0);
        turned.resize(kv.page_tokens.div_ceil(LANES) * dim, [0.0; LANES]);
        let factor = f64::from(kv.scales.0) / (dim as f64).sqrt();
        let pages = || (0..longest).step_by(kv.page_tokens);
        let cached = |cache: Slice<'a>, first: usize| {
            let start = rows.kv_row(task.seq, first, heads, task.head, kv.page_tokens) * dim;
            cache.range(start, kv.page_tokens.min(longest - first) * dim)
        };
        for first in pages() {
            let keys = cached(kv.k, first);
            let count = keys.len() / dim;
            keys.load(&mut page[..count * dim]);
            turn(math, &page[..count * dim], dim, turned);
            for (queries, weights) in queries.chunks(QUERIES * dim).zip(weights.chunks_mut(QUERIES * stride)) {
                for (keys, token) in turned.chunks_exact(dim).zip((0..count).step_by(LANES)) {
                    let n = LANES.min(count - token);
                    let mut store = |query: usize, dots: [f64; LANES]| {
                        let weights = &mut weights[query * stride + first + token..][..n];
                        for (weight, dot) in weights.iter_mut().zip(dots) {
                            *weight = (dot * factor) as f32;
                        }
                    };
                    if queries.len() == QUERIES * dim {
                        let dots = dots::<_, QUERIES>(math, queries, keys);
                        for (query, dots) in dots.into_iter().enumerate() {
                            store(query, dots);
                        }
                    } else {
                        for (query, row) in queries.chunks_exact(dim).enumerate() {
                            let [dots] = dots::<_, 1>(math, row, keys);
                            store(query, dots);
                        }
                    }
                }
            }
        }
        for (i, weights) in weights.chunks_exact_mut(group * stride).enumerate() {
            let context = task.position + i + 1;
            for weights in weights.chunks_exact_mut(stride) {
                softmax(&mut weights[..context], kv.scales.1);
            }
        }
        let mut outs = task.outs;
        sums.clear();
        sums.resize(outs.len() * group * dim, 0.0);
        for first in pages() {
            let values = cached(kv.v, first);
            let count = values.len() / dim;
            values.load(&mut page[..count * dim]);
            let rows = sums.chunks_exact_mut(group * dim).zip(weights.chunks_exact(group * stride));
            for (i, (sums, weights)) in rows.enumerate() {
                let count = count.min((task.position + i + 1).saturating_sub(first));
                let (values, here) = (&page[..count * dim], first..first + count);
                for (sums, weights) in sums.chunks_mut(QUERIES * dim).zip(weights.chunks(QUERIES * stride)) {
                    if sums.len() == QUERIES * dim {
                        let weights = std::array::from_fn(|q| &weights[q * stride..][here.clone()]);
                        weigh::<_, QUERIES>(math, weights, values, dim, sums);
                    } else {
                        for (sums, weights) in sums.chunks_exact_mut(dim).zip(weights.chunks_exact(stride)) {
                            weigh::<_, 1>(math, [&weights[here.clone()]], values, dim, sums);
                        }
                    }
                }
            }
        }
        for (out, sums) in outs.iter_mut().zip(sums.chunks_exact(group * dim)) {
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = sum as f32;
            }
        }
    }
}

/// `keys[tokens, dim]` to `[tokens / 16, dim, 16]`; lanes without a token keep what they hold, and are not used.
#[inline(always)]
fn turn(math: impl Math, keys: &[f32], dim: usize, turned: &mut [[f32; LANES]]) {
    for (keys, turned) in keys.chunks(LANES * dim).zip(turned.chunks_exact_mut(dim)) {
        let whole = if keys.len() == LANES * dim { dim / LANES * LANES } else { 0 };
        for first in (0..whole).step_by(LANES) {
            let row = |token: usize| *keys[token * dim + first..].first_chunk().expect("whole");
            turned[first..first + LANES].copy_from_slice(&math.transpose(&std::array::from_fn(row)));
        }
        for (lane, key) in keys.chunks_exact(dim).enumerate() {
            for (turned, &k) in turned[whole..].iter_mut().zip(&key[whole..]) {
                turned[lane] = k;
            }
        }
    }
}
