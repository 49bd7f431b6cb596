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
    for &[first, count, seq, position] in rows.spans {
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
    /// `[dim]`: a page's share of the values.
    partial: Vec<f32>,
    /// `[rows, group, dim]`: the values.
    sums: Vec<f64>,
}

/// The products of a query with 16 keys on their side: eight elements at a time in f32, and these sums in f64.
#[inline(always)]
fn dots<M: Math>(query: &[f32], keys: &[[f32; LANES]]) -> [f64; LANES] {
    let mut sums = [0f64; LANES];
    for (query, keys) in query.chunks(8).zip(keys.chunks(8)) {
        let mut part = [0f32; LANES];
        for (&q, keys) in query.iter().zip(keys) {
            for lane in 0..LANES {
                part[lane] = M::mul_add(q, keys[lane], part[lane]);
            }
        }
        for lane in 0..LANES {
            sums[lane] += f64::from(part[lane]);
        }
    }
    sums
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

impl Work for Running<'_> {
    #[inline(always)]
    fn run<M: Math>(self) {
        let Running { task, scratch, q, rows, heads, kv } = self;
        let (dim, group) = (heads.dim, heads.q / heads.kv);
        let Scratch { q: queries, weights, page, turned, partial, sums } = scratch;
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
        let load = |cache: Slice, first: usize, page: &mut [f32]| {
            let start = rows.kv_row(task.seq, first, heads, task.head, kv.page_tokens) * dim;
            let count = kv.page_tokens.min(longest - first);
            cache.range(start, count * dim).load(&mut page[..count * dim]);
            count
        };
        for first in pages() {
            let count = load(kv.k, first, page);
            turn(&page[..count * dim], dim, turned);
            for (query, weights) in queries.chunks_exact(dim).zip(weights.chunks_exact_mut(stride)) {
                for (keys, token) in turned.chunks_exact(dim).zip((0..count).step_by(LANES)) {
                    let scores = dots::<M>(query, keys).map(|dot| (dot * factor) as f32);
                    let n = LANES.min(count - token);
                    weights[first + token..][..n].copy_from_slice(&scores[..n]);
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
        partial.resize(dim, 0.0);
        for first in pages() {
            let count = load(kv.v, first, page);
            let rows = sums.chunks_exact_mut(group * dim).zip(weights.chunks_exact(group * stride));
            for (i, (sums, weights)) in rows.enumerate() {
                let count = count.min((task.position + i + 1).saturating_sub(first));
                for (sums, weights) in sums.chunks_exact_mut(dim).zip(weights.chunks_exact(stride)) {
                    // Within a page in f32, page to page in f64: the error does not grow with the context.
                    partial.fill(0.0);
                    for (&weight, value) in weights[first..first + count].iter().zip(page.chunks_exact(dim)) {
                        for (sum, &v) in partial.iter_mut().zip(value) {
                            *sum = M::mul_add(weight, v, *sum);
                        }
                    }
                    for (sum, &part) in sums.iter_mut().zip(&*partial) {
                        *sum += f64::from(part);
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
fn turn(keys: &[f32], dim: usize, turned: &mut [[f32; LANES]]) {
    for (keys, turned) in keys.chunks(LANES * dim).zip(turned.chunks_exact_mut(dim)) {
        for (lane, key) in keys.chunks_exact(dim).enumerate() {
            for (turned, &k) in turned.iter_mut().zip(key) {
                turned[lane] = k;
            }
        }
    }
}
