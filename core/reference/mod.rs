//! THE specification: what each op computes, as plain functions over slices, and [`Reference`], a backend over them.
//! Written to be read and to be right: sums are taken in f64 and rounded once, so that the order of a summation is no
//! part of the specification. Every other backend is measured against this one.

pub mod hugging_face;

use crate::host::slices::{ActIn, ActOut, ColsOut, Slice, SliceMut, WeightIn};
use crate::host::{HostBackend, Kernels, KvIn, KvOut, RowsIn};
use crate::op::{CHOSEN, DeviceInfo, Heads};
use crate::sampler::{Mask, NO_TOKEN, RowParams, Sampled, Sampler};

/// The reference as a backend.
pub type Reference = HostBackend<ReferenceKernels>;

/// The functions of this module, and nothing else.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceKernels;

impl Kernels for ReferenceKernels {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            backend: "reference",
            name: "specification".into(),
            driver: "scalar, f64 sums, one thread".into(),
            memory: None,
            native_fp8: false,
            ..DeviceInfo::default()
        }
    }
}

impl Reference {
    /// A reference backend without buffers.
    pub fn open() -> Self {
        HostBackend::new(ReferenceKernels)
    }
}

/// `out[m, d] = table[ids[m], d]`; an id may name a row of `sampled` instead, whose token is taken.
pub fn embed(ids: &[u32], sampled: &[Sampled], table: Slice, d: usize, out: &mut [f32]) {
    let token = |id: u32| match id & CHOSEN {
        0 => id,
        _ => match sampled[(id & !CHOSEN) as usize].token {
            NO_TOKEN => 0,
            token => token,
        },
    };
    for (&id, row) in ids.iter().zip(out.chunks_exact_mut(d)) {
        table.row(token(id) as usize, d).load(row);
    }
}

/// `out[m, d] = x / sqrt(mean(x^2) + eps) * gamma[d]` (Zhang and Sennrich 2019, as Hugging Face's `LlamaRMSNorm`
/// rounds it: the normalized value first, then the product).
pub fn rms_norm(x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
    let d = gamma.len();
    let mut row = vec![0.0; d];
    for (x, mut out) in x.chunks_exact(d).zip(out.rows(d)) {
        rms_norm_row(x, gamma, eps, &mut row);
        out.store(&row);
    }
}

/// One row of [`rms_norm`].
fn rms_norm_row(x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let inv = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((y, &x), &g) in out.iter_mut().zip(x).zip(gamma) {
        *y = x * inv * g;
    }
}

/// Rounds or quantizes `x[m, k]`.
pub fn quantize(x: &[f32], k: usize, out: ActOut) {
    for (x, mut out) in x.chunks_exact(k).zip(out.rows(k)) {
        out.store(x);
    }
}

/// `out[m, n] (+)= x[m, k] . w[n, k]^T`: the sum of the products of codes, rounded to f32, then x activation scale,
/// then x weight scale.
pub fn linear(x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let values = x.data.to_vec();
    let mut channel = vec![0.0; k];
    let mut rows = out.rows();
    let mut y = [0.0];
    for (j, w_row) in w.rows(k).enumerate() {
        w_row.load(&mut channel);
        let w_scale = w.scale.map_or(1.0, |scale| scale[j]);
        for (i, row) in rows.iter_mut().enumerate() {
            let product = dot(&values[i * k..][..k], &channel) as f32 * x.scale.row(i) * w_scale;
            y[0] = if add { row.get(j) + product } else { product };
            row.range(j, 1).store(&y, 1.0);
        }
    }
}

/// The sum of products, in f64.
pub fn dot(x: &[f32], w: &[f32]) -> f64 {
    // Eight sums instead of one let the compiler use vector registers.
    let mut sums = [0f64; 8];
    let (x8, w8) = (x.chunks_exact(8), w.chunks_exact(8));
    let rest: f64 = x8.remainder().iter().zip(w8.remainder()).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
    for (x, w) in x8.zip(w8) {
        for ((sum, &x), &w) in sums.iter_mut().zip(x).zip(w) {
            *sum += f64::from(x) * f64::from(w);
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Rotates q and k of `qkv[m, (q + 2 kv) dim]` by their rows' positions (Su et al. 2021, halves against each other as
/// Hugging Face's `rotate_half`), writes q, and appends k and v to their pages. Inlined, so that the cpu backend can have
/// it compiled for more instructions.
#[inline(always)]
pub fn rope_append(qkv: Slice, rope: &[f32], rows: RowsIn, heads: Heads, mut q: SliceMut, mut kv: KvOut) {
    let Heads { q: q_heads, kv: kv_heads, dim } = heads;
    let width = (q_heads + 2 * kv_heads) * dim;
    let (k_inv, v_inv) = kv.scales.map_or((1.0, 1.0), |(k, v)| (k.inv, v.inv));
    let mut row = vec![0.0; width];
    for (i, (&seq, &position)) in rows.seq.iter().zip(rows.position).enumerate() {
        let position = position as usize;
        qkv.row(i, width).load(&mut row);
        let (rotated, v) = row.split_at_mut((q_heads + kv_heads) * dim);
        for head in rotated.chunks_exact_mut(dim) {
            rotate(head, &rope[position * dim..][..dim]);
        }
        let (q_row, k) = rotated.split_at(q_heads * dim);
        q.range(i * q_heads * dim, q_heads * dim).store(q_row, 1.0);
        for (head, (k, v)) in k.chunks_exact(dim).zip(v.chunks_exact(dim)).enumerate() {
            let slot = rows.kv_row(seq, position, heads, head, kv.page_tokens);
            kv.k.range(slot * dim, dim).store(k, k_inv);
            kv.v.range(slot * dim, dim).store(v, v_inv);
        }
    }
}

/// Rotates one head: `table` has dim/2 cosines, then dim/2 sines.
#[inline(always)]
fn rotate(head: &mut [f32], table: &[f32]) {
    let half = head.len() / 2;
    let (cos, sin) = table.split_at(half);
    let (first, second) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (first[i], second[i]);
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

/// `out[m, q dim] = softmax(q k^T / sqrt(dim)) v` of each row over the positions of its sequence up to its own.
pub fn attend(q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
    let Heads { q: q_heads, kv: kv_heads, dim } = heads;
    let group = q_heads / kv_heads;
    let mut q_row = vec![0.0; q_heads * dim];
    let mut y = vec![0.0; q_heads * dim];
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for (i, mut out) in out.rows(q_heads * dim).into_iter().enumerate() {
        let (seq, context) = (rows.seq[i], rows.position[i] as usize + 1);
        q.row(i, q_heads * dim).load(&mut q_row);
        k.resize(context * dim, 0.0);
        v.resize(context * dim, 0.0);
        for head in 0..kv_heads {
            for t in 0..context {
                let slot = rows.kv_row(seq, t, heads, head, kv.page_tokens);
                kv.k.row(slot, dim).load(&mut k[t * dim..][..dim]);
                kv.v.row(slot, dim).load(&mut v[t * dim..][..dim]);
            }
            for h in head * group..(head + 1) * group {
                attend_head(&q_row[h * dim..][..dim], &k, &v, kv.scales, &mut y[h * dim..][..dim]);
            }
        }
        out.store(&y);
    }
}

/// One query head over `k[t, dim]` and `v[t, dim]`.
fn attend_head(q: &[f32], k: &[f32], v: &[f32], scales: (f32, f32), out: &mut [f32]) {
    let dim = q.len();
    let factor = f64::from(scales.0) / (dim as f64).sqrt();
    let mut weights: Vec<f64> = k.chunks_exact(dim).map(|k| dot(q, k) * factor).collect();
    let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    weights.iter_mut().for_each(|w| *w = (*w - max).exp());
    let norm = f64::from(scales.1) / weights.iter().sum::<f64>();
    let mut sums = vec![0f64; dim];
    for (w, v) in weights.iter().zip(v.chunks_exact(dim)) {
        for (sum, &v) in sums.iter_mut().zip(v) {
            *sum += w * f64::from(v);
        }
    }
    for (y, sum) in out.iter_mut().zip(sums) {
        *y = (sum * norm) as f32;
    }
}

/// `out[m, f] = silu(gate) * up` of `gate_up[m, 2 f]` (Shazeer 2020).
pub fn swiglu(gate_up: Slice, f: usize, out: ActOut) {
    let (mut row, mut y) = (vec![0.0; 2 * f], vec![0.0; f]);
    for (i, mut out) in out.rows(f).into_iter().enumerate() {
        gate_up.row(i, 2 * f).load(&mut row);
        swiglu_row(&row, &mut y);
        out.store(&y);
    }
}

/// One row of [`swiglu`].
fn swiglu_row(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((y, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        let gate = f64::from(gate);
        *y = (gate / (1.0 + (-gate).exp()) * f64::from(up)) as f32;
    }
}

/// Chooses or scores a token a row of `logits[w, vocab]`; `history` is `[sequences, vocab]`.
pub fn sample(logits: &[f32], params: &[RowParams], mask: &[u32], history: &mut [u32], out: &mut [Sampled]) {
    let mut sampler = Sampler::default();
    let vocab = logits.len() / params.len().max(1);
    let masks = mask.chunks_exact(Mask::width(vocab.max(1)));
    for (((logits, params), mask), out) in logits.chunks_exact(vocab.max(1)).zip(params).zip(masks).zip(out) {
        *out = sampler.sample(logits, params, mask, &mut history[params.seq as usize * vocab..][..vocab]);
    }
}

/// Copies pages of `page` bytes from the first to the second of each of `pairs[n, 2]`.
pub fn copy_pages(cache: &mut [u8], page: usize, pairs: &[u32]) {
    for pair in pairs.chunks_exact(2).filter(|pair| pair[0] != pair[1]) {
        let [from, to] = [pair[0], pair[1]].map(|p| p as usize * page);
        cache.copy_within(from..from + page, to);
    }
}

/// `out = max(out, max |x|)`.
pub fn abs_max(x: &[f32], out: &mut [f32]) {
    out[0] = x.iter().fold(out[0], |max, x| max.max(x.abs()));
}
