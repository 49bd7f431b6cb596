//! Arithmetic in plain Rust, written so that the compiler turns it into the vector instructions of the set that
//! [`super::isa::Isa::run`] runs it with: everything is inlined there, which is why loops are `for` loops: what
//! `for_each` calls may be compiled by itself, without these instructions.

use quaver_core::host::slices::{RowOut, Slice, SliceMut};
use quaver_core::host::{KvOut, RowsIn};
use quaver_core::op::Heads;
use quaver_core::reference::rope_append;

use super::portable::Portable;

/// Something to compute with an instruction set. A trait, because a closure cannot be told to be inlined always.
pub trait Work {
    /// Computes it; implementations are `#[inline(always)]`.
    fn run(self, math: impl Math);
}

/// Sixteen f32 in registers, for loops that the compiler does not keep there by itself.
pub trait Math: Copy {
    /// The registers.
    type Lanes: Copy;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::Lanes;

    /// From memory.
    fn load(self, x: &[f32; LANES]) -> Self::Lanes;

    /// To memory.
    fn store(self, x: Self::Lanes) -> [f32; LANES];

    /// `a * b + c`, fused where there is an instruction for it.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;

    /// Rows to columns.
    #[inline(always)]
    fn transpose(self, rows: &[[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]))
    }
}

/// `a * b + c`, fused where every machine of the architecture can.
#[inline(always)]
pub fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

impl Math for Portable {
    type Lanes = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }

    #[inline(always)]
    fn store(self, x: [f32; LANES]) -> [f32; LANES] {
        x
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| mul_add(a[i], b[i], c[i]))
    }
}

/// Rounds or quantizes a row.
pub struct Store<'a, 'b>(pub &'a mut RowOut<'b>, pub &'a [f32]);

impl Work for Store<'_, '_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        self.0.store(self.1);
    }
}

/// A row of [`quaver_core::reference::rms_norm`]; `row` is scratch.
pub struct RmsNorm<'a, 'b> {
    pub x: &'a [f32],
    pub gamma: &'a [f32],
    pub eps: f32,
    pub row: &'a mut [f32],
    pub out: &'a mut RowOut<'b>,
}

impl Work for RmsNorm<'_, '_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        rms_norm(self.x, self.gamma, self.eps, self.row);
        self.out.store(self.row);
    }
}

/// [`quaver_core::reference::rope_append`].
pub struct RopeAppend<'a> {
    pub qkv: Slice<'a>,
    pub rope: &'a [f32],
    pub rows: RowsIn<'a>,
    pub heads: Heads,
    pub q: SliceMut<'a>,
    pub kv: KvOut<'a>,
}

impl Work for RopeAppend<'_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        rope_append(self.qkv, self.rope, self.rows, self.heads, self.q, self.kv);
    }
}

/// A row of [`quaver_core::reference::swiglu`]; `row` (2 f) and `y` (f) are scratch.
pub struct SwiGlu<'a, 'b> {
    pub gate_up: Slice<'a>,
    pub row: &'a mut [f32],
    pub y: &'a mut [f32],
    pub out: &'a mut RowOut<'b>,
}

impl Work for SwiGlu<'_, '_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        self.gate_up.load(self.row);
        swiglu(self.row, self.y);
        self.out.store(self.y);
    }
}

/// Numbers that are computed side by side.
pub const LANES: usize = 16;

/// e^x within two units of the last place, by Cody and Waite's reduction and the polynomial of Cephes' `expf`.
/// Results stay finite and normal: x is clamped to [-87, 88].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 x 2^23: adding and subtracting it rounds to a whole number
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, the first of few bits, so that its product with n is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = p * r + c;
    }
    let p = (p * r * r + r) + 1.0;
    // n is in the lowest bits of `shifted` too.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Scores to weights that sum to `total`.
#[inline(always)]
pub fn softmax(scores: &mut [f32], total: f32) {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for scores in &*whole {
        for lane in 0..LANES {
            most[lane] = larger(scores[lane], most[lane]);
        }
    }
    let max = most.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger);
    let mut sums = [0f64; LANES];
    for scores in whole {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp(*score - max);
            *sum += f64::from(*score);
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp(*score - max);
        *sum += f64::from(*score);
    }
    let factor = (f64::from(total) / sums.iter().sum::<f64>()) as f32;
    for weight in scores {
        *weight *= factor;
    }
}

#[inline(always)]
fn swiglu(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((y, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *y = gate / (1.0 + exp(-gate)) * up;
    }
}

#[inline(always)]
fn rms_norm(x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
    let mut sums = [0f64; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (sum, &x) in sums.iter_mut().zip(x) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    let mean = sums.iter().sum::<f64>() / x.len() as f64;
    let inv = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((y, &x), &g) in out.iter_mut().zip(x).zip(gamma) {
        *y = x * inv * g;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (super::exp(x), f64::from(x).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {got}, {want}: off by {error:e}");
        }
        assert!(super::exp(f32::NEG_INFINITY) < 1e-37 && super::exp(f32::INFINITY) > 1e38);
    }
}
