//! The reference with the roundings of Hugging Face's `LlamaForCausalLM` in bf16 with eager attention: every module's
//! result is rounded to bf16, and within a module what transformers computes in bf16 is. Calibration with it sees the
//! values that llm-compressor's does, to the bit where oneDNN multiplies with AVX-512-BF16: sums of products are taken in
//! f32 in the order of its kernels (`Sum`). Activations are bf16 values in f32 buffers: the profile is `exact`.

use half::bf16;

use crate::host::slices::{ActIn, ActOut, ColsOut, Slice, SliceMut, WeightIn};
use crate::host::{HostBackend, Kernels, KvIn, KvOut, RowsIn};
use crate::op::{DeviceInfo, Heads};

/// These roundings as a backend.
pub type HuggingFace = HostBackend<HuggingFaceKernels>;

/// The functions of this module; what rounds nothing is the reference's.
#[derive(Clone, Copy, Debug)]
pub struct HuggingFaceKernels;

impl HuggingFace {
    /// A backend without buffers.
    pub fn open() -> Self {
        HostBackend::new(HuggingFaceKernels)
    }
}

impl Kernels for HuggingFaceKernels {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            backend: "reference",
            name: "specification".into(),
            driver: "scalar, one thread, rounded to bf16 where Hugging Face does".into(),
            memory: None,
            native_fp8: false,
            ..DeviceInfo::default()
        }
    }

    /// The normalized value is rounded, then its product with gamma.
    fn rms_norm(&mut self, x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
        let d = gamma.len();
        let mut row = vec![0.0; d];
        for (x, mut out) in x.chunks_exact(d).zip(out.rows(d)) {
            let inv = 1.0 / (sum_of_squares(x) / d as f32 + eps).sqrt();
            for ((y, x), gamma) in row.iter_mut().zip(x).zip(gamma) {
                *y = round(round(x * inv) * gamma);
            }
            out.store(&row);
        }
    }

    /// The sum is rounded, then the residual with it.
    fn linear(&mut self, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
        let values = x.data.to_vec();
        let mut channel = vec![0.0; k];
        let mut rows = out.rows();
        // Rows side by side, element by element, so that the compiler adds to many sums at once.
        let panels: Vec<Vec<[f32; LANES]>> = values
            .chunks(LANES * k)
            .map(|rows| {
                let value = |i, lane| rows.get(lane * k + i).copied().unwrap_or(0.0);
                (0..k).map(|i| std::array::from_fn(|lane| value(i, lane))).collect()
            })
            .collect();
        for (j, w_row) in w.rows(k).enumerate() {
            w_row.load(&mut channel);
            let w_scale = w.scale.map_or(1.0, |scale| scale[j]);
            for (p, panel) in panels.iter().enumerate() {
                let mut sum = Sum::<LANES>::new();
                panel.iter().zip(&channel).for_each(|(x, w)| sum.push(x.map(|x| x * w)));
                for (i, (row, sum)) in rows[p * LANES..].iter_mut().zip(sum.end()).enumerate() {
                    let y = round(sum * x.scale.row(p * LANES + i) * w_scale);
                    let y = if add { round(row.get(j) + y) } else { y };
                    row.range(j, 1).store(&[y], 1.0);
                }
            }
        }
    }

    /// Cosines and sines are rounded, both products, and their sum.
    fn rope_append(&mut self, qkv: Slice, rope: &[f32], rows: RowsIn, heads: Heads, q: SliceMut, kv: KvOut) {
        let turned = heads.q + heads.kv;
        let width = (turned + heads.kv) * heads.dim;
        let half = heads.dim / 2;
        let mut rotated = qkv.to_vec();
        for (row, &position) in rotated.chunks_exact_mut(width).zip(rows.position) {
            let (cos, sin) = rope[position as usize * heads.dim..][..heads.dim].split_at(half);
            for head in row[..turned * heads.dim].chunks_exact_mut(heads.dim) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b, cos, sin) = (first[i], second[i], round(cos[i]), round(sin[i]));
                    first[i] = round(round(a * cos) - round(b * sin));
                    second[i] = round(round(b * cos) + round(a * sin));
                }
            }
        }
        // What is left to do turns nothing.
        let still = still(heads.dim, rope.len());
        super::rope_append(Slice::F32(&rotated), &still, rows, heads, q, kv);
    }

    /// Scores are rounded, their products with the factor, the weights, and the sum of values.
    fn attend(&mut self, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
        let Heads { q: q_heads, kv: kv_heads, dim } = heads;
        let factor = (dim as f32).powf(-0.5);
        let mut q_row = vec![0.0; q_heads * dim];
        let mut y = vec![0.0; q_heads * dim];
        let mut value = vec![0.0; dim];
        for (i, mut out) in out.rows(q_heads * dim).into_iter().enumerate() {
            let (seq, context) = (rows.seq[i], rows.position[i] as usize + 1);
            q.row(i, q_heads * dim).load(&mut q_row);
            for (h, (q, y)) in q_row.chunks_exact(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
                let slot = |t| rows.kv_row(seq, t, heads, h / (q_heads / kv_heads), kv.page_tokens);
                let mut weights = Vec::with_capacity(context);
                for t in 0..context {
                    kv.k.row(slot(t), dim).load(&mut value);
                    let mut score = Sum::<1>::new();
                    q.iter().zip(&value).for_each(|(q, k)| score.push([q * k]));
                    let [score] = score.end();
                    weights.push(round(round(score * kv.scales.0) * factor));
                }
                softmax(&mut weights);
                for (first, y) in y.chunks_mut(LANES).enumerate() {
                    let mut sum = Sum::<LANES>::new();
                    for (t, weight) in weights.iter().enumerate() {
                        kv.v.row(slot(t), dim).range(first * LANES, y.len()).load(&mut value[..y.len()]);
                        sum.push(std::array::from_fn(|lane| weight * value[lane.min(y.len() - 1)]));
                    }
                    y.iter_mut().zip(sum.end()).for_each(|(y, sum)| *y = round(sum * kv.scales.1));
                }
            }
            out.store(&y);
        }
    }

    /// The activation is rounded, then its product.
    fn swiglu(&mut self, gate_up: Slice, f: usize, out: ActOut) {
        let (mut row, mut y) = (vec![0.0; 2 * f], vec![0.0; f]);
        for (i, mut out) in out.rows(f).into_iter().enumerate() {
            gate_up.row(i, 2 * f).load(&mut row);
            for (y, (gate, up)) in y.iter_mut().zip(row[..f].iter().zip(&row[f..])) {
                *y = round(round(gate / (1.0 + (-gate).exp())) * up);
            }
            out.store(&y);
        }
    }
}

/// Sums that are taken side by side.
const LANES: usize = 16;

/// Sums of products of bf16 numbers, which are exact in f32, as oneDNN takes them with `vdpbf16ps`: of each two products
/// the second is added first (Intel SDM, `VDPBF16PS`), and after each 512 a new sum begins, which is added to the last.
struct Sum<const N: usize> {
    total: Option<[f32; N]>,
    part: [f32; N],
    held: Option<[f32; N]>,
    count: usize,
}

impl<const N: usize> Sum<N> {
    const BLOCK: usize = 512;

    fn new() -> Self {
        Sum { total: None, part: [0.0; N], held: None, count: 0 }
    }

    #[inline(always)]
    fn push(&mut self, products: [f32; N]) {
        match self.held.take() {
            None => self.held = Some(products),
            Some(held) => self.part = plus(plus(self.part, products), held),
        }
        self.count += 1;
        if self.count.is_multiple_of(Self::BLOCK) {
            self.close();
        }
    }

    fn close(&mut self) {
        let part = std::mem::replace(&mut self.part, [0.0; N]);
        self.total = Some(self.total.map_or(part, |total| plus(total, part)));
    }

    fn end(mut self) -> [f32; N] {
        if let Some(held) = self.held.take() {
            self.part = plus(self.part, held);
        }
        if !self.count.is_multiple_of(Self::BLOCK) || self.total.is_none() {
            self.close();
        }
        self.total.unwrap_or([0.0; N])
    }
}

#[inline(always)]
fn plus<const N: usize>(a: [f32; N], b: [f32; N]) -> [f32; N] {
    std::array::from_fn(|i| a[i] + b[i])
}

/// A sum of squares in f32, in the order of PyTorch's `sum` over a row: four registers of eight lanes side by side, put by
/// after each 16 rounds, and those again, on four levels (aten/src/ATen/native/cpu/SumKernel.cpp, `cascade_sum`).
fn sum_of_squares(x: &[f32]) -> f32 {
    const ROUND: usize = 4 * 8;
    let mut levels = [[0f32; ROUND]; 4];
    let rounds = x.as_chunks::<ROUND>();
    for (done, x) in (1usize..).zip(rounds.0) {
        levels[0] = plus(levels[0], x.map(|x| x * x));
        for level in 1..levels.len() {
            if !done.is_multiple_of(1 << (4 * level)) {
                break;
            }
            levels[level] = plus(levels[level], levels[level - 1]);
            levels[level - 1] = [0.0; ROUND];
        }
    }
    let registers = levels.into_iter().reduce(plus).unwrap_or([0.0; ROUND]);
    let mut registers = registers.as_chunks::<8>().0.to_vec();
    let vectors = rounds.1.as_chunks::<8>();
    vectors.0.iter().for_each(|x| registers[0] = plus(registers[0], x.map(|x| x * x)));
    let lanes = registers.into_iter().reduce(plus).unwrap_or([0.0; 8]);
    vectors.1.iter().map(|x| x * x).chain(lanes).fold(0.0, |sum, x| sum + x)
}

fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// In f32, rounded at the end.
fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum = x.iter().map(|x| f64::from(*x)).sum::<f64>() as f32;
    x.iter_mut().for_each(|x| *x = round(*x / sum));
}

/// A rotary table of so many elements that rotates nothing.
fn still(dim: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|i| if i % dim < dim / 2 { 1.0 } else { 0.0 }).collect()
}
