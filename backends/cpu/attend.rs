//! `Attend` on the cpu: every (row, key-value head) is a task. A page's keys are decoded once for the query heads that
//! share them.

use quaver_core::host::slices::ActOut;
use quaver_core::host::slices::Slice;
use quaver_core::host::{KvIn, RowsIn};
use quaver_core::op::Heads;
use rayon::prelude::*;

use super::portable::dot;

/// See [`quaver_core::reference::attend`]; `attended` is scratch.
pub fn attend(attended: &mut Vec<f32>, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
    let Heads { q: q_heads, kv: kv_heads, dim } = heads;
    let width = q_heads * dim;
    attended.resize(rows.seq.len() * width, 0.0);
    let task_width = width / kv_heads;
    attended.par_chunks_mut(task_width).enumerate().for_each_init(Task::default, |task, (i, y)| {
        let (row, head) = (i / kv_heads, i % kv_heads);
        task.run(q.range(i * task_width, task_width), rows, row, heads, head, kv, y);
    });
    let rows = attended.par_chunks_exact(width).zip(out.rows(width));
    rows.for_each(|(y, mut out)| out.store(y));
}

/// Scratch of one thread.
#[derive(Default)]
struct Task {
    /// `[group, dim]`.
    q: Vec<f32>,
    /// `[group, context]`: scores, then weights.
    weights: Vec<f32>,
    /// `[page_tokens, dim]`: a page of one head.
    page: Vec<f32>,
    /// `[dim]`: a page's share of the sum.
    partial: Vec<f32>,
}

impl Task {
    /// The query heads of one key-value head, for one row: `y[group, dim]`.
    #[allow(clippy::too_many_arguments)]
    fn run(&mut self, q: Slice, rows: RowsIn, row: usize, heads: Heads, head: usize, kv: KvIn, y: &mut [f32]) {
        let dim = heads.dim;
        let (seq, context) = (rows.seq[row], rows.position[row] as usize + 1);
        let page = |first: usize| {
            let count = kv.page_tokens.min(context - first);
            (rows.kv_row(seq, first, heads, head, kv.page_tokens) * dim, count)
        };
        self.q.resize(y.len(), 0.0);
        self.page.resize(kv.page_tokens * dim, 0.0);
        self.weights.resize(y.len() / dim * context, 0.0);
        q.load(&mut self.q);
        let factor = kv.scales.0 / (dim as f32).sqrt();
        for first in (0..context).step_by(kv.page_tokens) {
            let (start, count) = page(first);
            let keys = &mut self.page[..count * dim];
            kv.k.range(start, count * dim).load(keys);
            for (q, weights) in self.q.chunks_exact(dim).zip(self.weights.chunks_exact_mut(context)) {
                for (weight, key) in weights[first..].iter_mut().zip(keys.chunks_exact(dim)) {
                    *weight = dot(q, key) * factor;
                }
            }
        }
        for weights in self.weights.chunks_exact_mut(context) {
            softmax(weights, kv.scales.1);
        }
        y.fill(0.0);
        self.partial.resize(dim, 0.0);
        for first in (0..context).step_by(kv.page_tokens) {
            let (start, count) = page(first);
            let values = &mut self.page[..count * dim];
            kv.v.range(start, count * dim).load(values);
            for (y, weights) in y.chunks_exact_mut(dim).zip(self.weights.chunks_exact(context)) {
                // Summing a page at a time keeps the error of a long context small.
                self.partial.fill(0.0);
                for (weight, value) in weights[first..].iter().zip(values.chunks_exact(dim)) {
                    self.partial.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
                }
                y.iter_mut().zip(&self.partial).for_each(|(y, sum)| *y += sum);
            }
        }
    }
}

/// Scores to weights, which sum to `total`: the scale of the values rides along.
fn softmax(scores: &mut [f32], total: f32) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f64;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += f64::from(*score);
    }
    let factor = (f64::from(total) / sum) as f32;
    scores.iter_mut().for_each(|weight| *weight *= factor);
}
