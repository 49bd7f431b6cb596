//! AVX2, FMA and F16C: products in f32. The bits of an E4M3 number, moved into those of an f16, are the number x 2^-8,
//! subnormal ones included, which one instruction turns into f32.
//!
//! A sum has eight lanes, one product each a step. Chunks of [`CHUNK`] elements are summed one after the other. This
//! order is the same for one row and for many.

use std::arch::x86_64::*;

use bytemuck::{cast, pod_read_unaligned};
use half::bf16;
use quaver_core::e4m3;
use quaver_core::host::slices::Slice;

use super::linear::{CHANNELS, CacheLine, Path};
use super::portable::Portable;
use super::simd;

/// It keeps the error of a long sum small.
const CHUNK: usize = 256;
const LANES: usize = 8;

/// Proof that this machine has the instructions: [`Avx2::detect`] is the only way to one.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    pub fn detect() -> Option<Self> {
        let have =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        have.then_some(Avx2(()))
    }
}

impl Path for Avx2 {
    type Element = f32;
    /// With the channels 12 sums; a weight and an activation beside them make 14 of 16 registers.
    const ROWS: usize = 3;
    const CHUNK: usize = CHUNK;

    fn padded(self, k: usize) -> usize {
        k.next_multiple_of(2 * LANES)
    }

    fn decode_x(self, x: Slice, _: Slice, into: &mut [CacheLine], stride: usize) {
        match x {
            // As f16 they are numbers.
            Slice::E4m3(codes) if codes.iter().any(|&code| e4m3::is_nan(code)) => Portable.decode_w(x, into, stride),
            x => simd::decode_f32(self, x, into, stride),
        }
    }

    fn decode_w(self, w: Slice, into: &mut [CacheLine], stride: usize) {
        simd::decode_f32(self, w, into, stride);
    }

    fn row(self, x: &[f32], w: Slice, k: usize, y: &mut [f32]) {
        simd::row_f32(self, x, w, k, y);
    }

    fn tile(self, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
        simd::tile_f32(self, x, w, sums, on_line);
    }
}

/// Eight elements of a row as f32.
#[target_feature(enable = "avx2,fma,f16c")]
fn load8(row: Slice, i: usize) -> __m256 {
    match row {
        Slice::F32(x) => cast(*x[i..].first_chunk::<LANES>().expect("eight")),
        Slice::Bf16(x) => {
            let x: &[bf16; LANES] = x[i..].first_chunk().expect("eight");
            let words = _mm256_cvtepu16_epi32(pod_read_unaligned(bytemuck::bytes_of(x)));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
        Slice::E4m3(x) => {
            let codes = u64::from_le_bytes(*x[i..].first_chunk::<LANES>().expect("eight"));
            let words = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(codes as i64));
            let sign = _mm_slli_epi16::<8>(_mm_and_si128(words, _mm_set1_epi16(0x80)));
            let magnitude = _mm_slli_epi16::<7>(_mm_and_si128(words, _mm_set1_epi16(0x7f)));
            _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, magnitude)), _mm256_set1_ps(256.0))
        }
    }
}

/// The last elements of a row, zeros behind them.
#[target_feature(enable = "avx2,fma,f16c")]
fn load_rest(row: Slice, i: usize) -> __m256 {
    let mut rest = [0f32; LANES];
    let n = row.len().saturating_sub(i);
    row.range(row.len() - n, n).load(&mut rest[..n]);
    cast(rest)
}

/// Decodes a row to every `stride`th line, padded with zeros.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn decode(row: Slice, into: &mut [CacheLine], stride: usize) {
    let whole = row.len() / LANES * LANES;
    let load = |i| if i < whole { load8(row, i) } else { load_rest(row, i) };
    for (i, into) in (0..row.len()).step_by(2 * LANES).zip(into.iter_mut().step_by(stride)) {
        *into = cast([load(i), load(i + LANES)]);
    }
}

/// One row against channels as they are stored.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn row(x: &[f32], w: Slice, k: usize, y: &mut [f32]) {
    let whole = k / LANES * LANES;
    // Channels of a tile lie a stream apart, as in avx512.rs.
    let last = y.len() - 1;
    let stream = y.len().div_ceil(CHANNELS);
    for i in 0..stream {
        let channel = |c: usize| (c * stream + i).min(last);
        let w: [Slice; CHANNELS] = std::array::from_fn(|c| w.row(channel(c), k));
        let mut total = [0f32; CHANNELS];
        for first in (0..x.len()).step_by(CHUNK) {
            let mut sums = [_mm256_setzero_ps(); CHANNELS];
            for i in (first..x.len().min(first + CHUNK)).step_by(LANES) {
                let x = load8(Slice::F32(x), i);
                for (sum, w) in sums.iter_mut().zip(w) {
                    let w = if i < whole { load8(w, i) } else { load_rest(w, i) };
                    *sum = _mm256_fmadd_ps(w, x, *sum);
                }
            }
            let sums = reduce(sums);
            total = std::array::from_fn(|c| total[c] + sums[c]);
        }
        (0..CHANNELS).for_each(|c| y[channel(c)] = total[c]);
    }
}

/// A tile of up to three rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn tile(x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
    match sums.len() {
        1 => tile_of::<1>(x, w, sums, on_line),
        2 => tile_of::<2>(x, w, sums, on_line),
        3 => tile_of::<3>(x, w, sums, on_line),
        n => unreachable!("{n} rows at a time"),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile_of<const R: usize>(x: &[CacheLine], w: &[CacheLine], out: &mut [[f32; CHANNELS]], mut on_line: impl FnMut()) {
    let (x, w) = (x.as_chunks::<R>().0, w.as_chunks::<CHANNELS>().0);
    let mut sums = [[_mm256_setzero_ps(); CHANNELS]; R];
    for (x, w) in x.iter().zip(w) {
        on_line();
        for half in 0..2 {
            let w: [__m256; CHANNELS] = std::array::from_fn(|c| cast::<_, [__m256; 2]>(w[c])[half]);
            for r in 0..R {
                let x = cast::<_, [__m256; 2]>(x[r])[half];
                for c in 0..CHANNELS {
                    sums[r][c] = _mm256_fmadd_ps(w[c], x, sums[r][c]);
                }
            }
        }
    }
    out.iter_mut().zip(sums).for_each(|(out, sums)| *out = reduce(sums));
}

/// The sums of the lanes of four registers.
#[target_feature(enable = "avx2")]
fn reduce(sums: [__m256; CHANNELS]) -> [f32; CHANNELS] {
    let ab = _mm256_hadd_ps(sums[0], sums[1]);
    let cd = _mm256_hadd_ps(sums[2], sums[3]);
    let abcd = _mm256_hadd_ps(ab, cd);
    cast(_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd)))
}
