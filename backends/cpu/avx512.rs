//! AVX-512 with BF16 and VBMI (Zen 4, Sapphire Rapids and later): E4M3 values are exact in bf16, so that `vdpbf16ps` is
//! a native dot product for them. 64 codes are decoded by two table look-ups in registers: one gives the upper byte of
//! each bf16, one the lower.
//!
//! A sum has 16 lanes; each step of 32 elements adds two products to each. Chunks of [`CHUNK`] elements are summed one
//! after the other. This order is the same for one row and for many.

use std::arch::x86_64::*;

use bytemuck::{cast, cast_slice, pod_read_unaligned};
use half::bf16;
use quaver_core::e4m3;
use quaver_core::host::slices::Slice;

use super::avx2::Avx2;
use super::linear::{CHANNELS, CacheLine, MOST_ROWS, Path};
use super::simd;

/// The rows of a tile of so many elements stay in the first-level cache.
const CHUNK: usize = 2048;

/// Codes that are decoded at a time.
const STEP: usize = 64;

/// Bytes of weights that are asked for ahead of their use, where one row streams them from memory.
const AHEAD: usize = 512;

/// Proof that this machine has the instructions: [`Avx512::detect`] is the only way to one.
/// It carries that of AVX2, which f32 is computed with.
#[derive(Clone, Copy)]
pub struct Avx512(Avx2);

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let have = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bf16");
        Avx2::detect().filter(|_| have).map(Avx512)
    }

    pub fn avx2(self) -> Avx2 {
        self.0
    }
}

impl Path for Avx512 {
    type Element = bf16;
    /// With the channels 24 sums; four weights and an activation beside them make 29 of 32 registers.
    const ROWS: usize = 6;
    const CHUNK: usize = CHUNK;

    fn padded(self, k: usize) -> usize {
        k.next_multiple_of(STEP)
    }

    fn decode_x(self, x: Slice, w: Slice, into: &mut [CacheLine], stride: usize) {
        match (x, w) {
            (Slice::E4m3(codes), Slice::E4m3(_)) => simd::decode(self, codes, into, stride),
            (Slice::E4m3(codes), _) => copy(&values(codes), into, stride),
            (Slice::Bf16(x), Slice::E4m3(_)) => copy(&interleaved(x), into, stride),
            (Slice::Bf16(x), _) => copy(x, into, stride),
            (Slice::F32(_), _) => unreachable!("f32 takes another path"),
        }
    }

    fn decode_w(self, w: Slice, into: &mut [CacheLine], stride: usize) {
        match w {
            Slice::E4m3(codes) => simd::decode(self, codes, into, stride),
            Slice::Bf16(w) => copy(w, into, stride),
            Slice::F32(_) => unreachable!("f32 takes another path"),
        }
    }

    fn row(self, x: &[bf16], w: Slice, k: usize, y: &mut [f32]) {
        simd::row(self, x, w, k, y);
    }

    fn tile(self, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
        simd::tile(self, x, w, sums, on_line);
    }
}

/// To every `stride`th line, padded with zeros.
fn copy(row: &[bf16], into: &mut [CacheLine], stride: usize) {
    let (whole, rest) = row.as_chunks::<32>();
    let mut lines = into.iter_mut().step_by(stride);
    for (line, into) in whole.iter().zip(lines.by_ref()) {
        *into = cast(*line);
    }
    let mut rest = rest.iter().copied();
    for into in lines {
        *into = cast::<[bf16; 32], _>(std::array::from_fn(|_| rest.next().unwrap_or_default()));
    }
}

/// Codes in their own order.
fn values(codes: &[u8]) -> Vec<bf16> {
    codes.iter().map(|&code| bf16::from_f32(e4m3::decode(code))).collect()
}

/// The order in which [`decode64`] leaves 64 codes, padded with zeros: the unpack instructions work on quarters of a
/// register.
fn interleaved(row: &[bf16]) -> Vec<bf16> {
    let place = |i: usize| {
        let (half, quarter, j) = (i % STEP / 32, i % 32 / 8, i % 8);
        i / STEP * STEP + quarter * 16 + half * 8 + j
    };
    (0..row.len().next_multiple_of(STEP)).map(|i| row.get(place(i)).copied().unwrap_or_default()).collect()
}

/// The two bytes of the bf16 of every code without its sign.
static BYTES: [[u8; 128]; 2] = {
    let mut bytes = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        let bits = e4m3::VALUES[code].to_bits() >> 16;
        bytes[0][code] = bits as u8;
        bytes[1][code] = (bits >> 8) as u8;
        code += 1;
    }
    bytes
};

/// The tables in registers.
#[derive(Clone, Copy)]
struct Tables {
    low: [__m512i; 2],
    high: [__m512i; 2],
    sign: __m512i,
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn tables() -> Tables {
    let table = |bytes: &[u8; 128]| [0, 64].map(|i| pod_read_unaligned(&bytes[i..i + 64]));
    Tables { low: table(&BYTES[0]), high: table(&BYTES[1]), sign: _mm512_set1_epi8(-128) }
}

/// 64 codes as bf16: per quarter of a register the lower eight in the first result, the upper eight in the second.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vbmi")]
fn decode64(codes: __m512i, tables: &Tables) -> [__m512i; 2] {
    // The look-ups read seven bits of a code; its sign is put back from the code itself: a | (b & c).
    let low = _mm512_permutex2var_epi8(tables.low[0], codes, tables.low[1]);
    let high = _mm512_permutex2var_epi8(tables.high[0], codes, tables.high[1]);
    let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, tables.sign);
    [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
}

/// Up to 64 codes, zeros behind them.
#[target_feature(enable = "avx512f,avx512vl")]
fn load_codes(codes: &[u8]) -> __m512i {
    if let Some(codes) = codes.first_chunk::<STEP>() {
        return pod_read_unaligned(codes);
    }
    let mut padded = [0; STEP];
    padded[..codes.len()].copy_from_slice(codes);
    cast(padded)
}

/// Decodes codes in the order of [`decode64`] to every `stride`th line, padded with zeros.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vbmi")]
pub fn decode(codes: &[u8], into: &mut [CacheLine], stride: usize) {
    let tables = tables();
    for (codes, into) in codes.chunks(STEP).zip(into.chunks_mut(2 * stride)) {
        let [first, second] = decode64(load_codes(codes), &tables);
        into[0] = cast(first);
        into[stride] = cast(second);
    }
}

/// One row against channels as they are stored.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vbmi,avx512bf16")]
pub fn row(x: &[bf16], w: Slice, k: usize, y: &mut [f32]) {
    let tables = tables();
    // Channels of a tile lie a stream apart, so that each stream is read from one end to the other: memory gives twice
    // as much to few long streams as to many short ones.
    let last = y.len() - 1;
    let stream = y.len().div_ceil(CHANNELS);
    for i in 0..stream {
        // Where a stream is shorter, its last channel is computed again.
        let channel = |c: usize| (c * stream + i).min(last);
        let sums = match w {
            Slice::E4m3(codes) => {
                let rows: [&[u8]; CHANNELS] = std::array::from_fn(|c| &codes[channel(c) * k..]);
                codes_against_row(x, rows, k, &tables)
            }
            Slice::Bf16(w) => {
                let rows: [&[bf16]; CHANNELS] = std::array::from_fn(|c| &w[channel(c) * k..]);
                bf16_against_row(x, rows, k)
            }
            Slice::F32(_) => unreachable!("f32 takes another path"),
        };
        (0..CHANNELS).for_each(|c| y[channel(c)] = sums[c]);
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vbmi,avx512bf16")]
fn codes_against_row(x: &[bf16], rows: [&[u8]; CHANNELS], k: usize, tables: &Tables) -> [f32; CHANNELS] {
    let mut total = [0f32; CHANNELS];
    for (first, x) in (0..k).step_by(CHUNK).zip(x.chunks(CHUNK)) {
        let mut sums = [_mm512_setzero_ps(); CHANNELS];
        let chunk: [&[u8]; CHANNELS] = rows.map(|row| &row[first..k.min(first + CHUNK)]);
        let (x, _) = x.as_chunks::<STEP>();
        let whole = chunk[0].len() / STEP;
        let blocks: [&[[u8; STEP]]; CHANNELS] = chunk.map(|row| &row.as_chunks::<STEP>().0[..whole]);
        let mut step = |x: &[bf16; STEP], codes: [__m512i; CHANNELS]| {
            let x: [__m512bh; 2] = [pod_read_unaligned(cast_slice(&x[..32])), pod_read_unaligned(cast_slice(&x[32..]))];
            for (sum, codes) in sums.iter_mut().zip(codes) {
                let [low, high] = decode64(codes, tables);
                *sum = _mm512_dpbf16_ps(*sum, cast(low), x[0]);
                *sum = _mm512_dpbf16_ps(*sum, cast(high), x[1]);
            }
        };
        for i in 0..whole {
            rows.iter().for_each(|row| simd::prefetch(row, first + i * STEP + AHEAD));
            step(&x[i], std::array::from_fn(|c| pod_read_unaligned(&blocks[c][i])));
        }
        if let Some(x) = x.get(whole) {
            step(x, std::array::from_fn(|c| load_codes(&chunk[c][whole * STEP..])));
        }
        total = add(total, reduce(sums));
    }
    total
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
fn bf16_against_row(x: &[bf16], rows: [&[bf16]; CHANNELS], k: usize) -> [f32; CHANNELS] {
    let mut total = [0f32; CHANNELS];
    for (first, x) in (0..k).step_by(CHUNK).zip(x.chunks(CHUNK)) {
        let mut sums = [_mm512_setzero_ps(); CHANNELS];
        let chunk: [&[bf16]; CHANNELS] = rows.map(|row| &row[first..k.min(first + CHUNK)]);
        let (x, _) = x.as_chunks::<32>();
        let whole = chunk[0].len() / 32;
        let blocks: [&[[bf16; 32]]; CHANNELS] = chunk.map(|row| &row.as_chunks::<32>().0[..whole]);
        for (i, x) in x[..whole].iter().enumerate() {
            rows.iter().for_each(|row| simd::prefetch(cast_slice(row), 2 * (first + i * 32) + AHEAD));
            let x: __m512bh = pod_read_unaligned(cast_slice(x));
            for (sum, blocks) in sums.iter_mut().zip(blocks) {
                *sum = _mm512_dpbf16_ps(*sum, pod_read_unaligned(cast_slice(&blocks[i])), x);
            }
        }
        for (i, x) in x[whole..].iter().enumerate() {
            let x: __m512bh = pod_read_unaligned(cast_slice(x));
            for (sum, row) in sums.iter_mut().zip(chunk) {
                let rest = row.get((whole + i) * 32..).unwrap_or_default();
                let mut padded = [bf16::ZERO; 32];
                padded[..rest.len()].copy_from_slice(rest);
                *sum = _mm512_dpbf16_ps(*sum, pod_read_unaligned(cast_slice(&padded)), x);
            }
        }
        total = add(total, reduce(sums));
    }
    total
}

/// A tile of up to [`MOST_ROWS`] rows.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub fn tile(x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
    match sums.len() {
        1 => tile_of::<1>(x, w, sums, on_line),
        2 => tile_of::<2>(x, w, sums, on_line),
        3 => tile_of::<3>(x, w, sums, on_line),
        4 => tile_of::<4>(x, w, sums, on_line),
        5 => tile_of::<5>(x, w, sums, on_line),
        MOST_ROWS => tile_of::<MOST_ROWS>(x, w, sums, on_line),
        n => unreachable!("{n} rows at a time"),
    }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
fn tile_of<const R: usize>(x: &[CacheLine], w: &[CacheLine], out: &mut [[f32; CHANNELS]], mut on_line: impl FnMut()) {
    let (x, w) = (x.as_chunks::<R>().0, w.as_chunks::<CHANNELS>().0);
    let mut sums = [[_mm512_setzero_ps(); CHANNELS]; R];
    for (x, w) in x.iter().zip(w) {
        on_line();
        let w: [__m512bh; CHANNELS] = std::array::from_fn(|c| cast(w[c]));
        for r in 0..R {
            let x: __m512bh = cast(x[r]);
            for c in 0..CHANNELS {
                sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w[c], x);
            }
        }
    }
    out.iter_mut().zip(sums).for_each(|(out, sums)| *out = reduce(sums));
}

fn add(a: [f32; CHANNELS], b: [f32; CHANNELS]) -> [f32; CHANNELS] {
    std::array::from_fn(|c| a[c] + b[c])
}

/// The sums of the lanes of four registers.
#[target_feature(enable = "avx512f,avx512vl")]
fn reduce(sums: [__m512; CHANNELS]) -> [f32; CHANNELS] {
    let halves = sums.map(|s| _mm256_add_ps(_mm512_castps512_ps256(s), upper(s)));
    let ab = _mm256_hadd_ps(halves[0], halves[1]);
    let cd = _mm256_hadd_ps(halves[2], halves[3]);
    let abcd = _mm256_hadd_ps(ab, cd);
    cast(_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd)))
}

#[target_feature(enable = "avx512f,avx512vl")]
fn upper(s: __m512) -> __m256 {
    _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(s)))
}

/// Rows to columns: pairs, then fours within each quarter of a register, then the quarters themselves.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
pub fn transpose(rows: [__m512; 16]) -> [__m512; 16] {
    let pairs: [__m512; 16] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_ps(rows[i], rows[i + 1]),
        _ => _mm512_unpackhi_ps(rows[i - 1], rows[i]),
    });
    // fours[4 i + j]: of each quarter q, column 4 q + j of rows 4 i to 4 i + 3.
    let fours: [__m512; 16] = std::array::from_fn(|i| {
        let (first, j) = (i / 4 * 4, i % 4);
        let [a, b] = [pairs[first + j / 2], pairs[first + j / 2 + 2]].map(|pair| _mm512_castps_pd(pair));
        _mm512_castpd_ps(if j % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
    });
    std::array::from_fn(|i| {
        let (quarter, j) = (i / 4, i % 4);
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (ab, cd) = match quarter / 2 {
            0 => (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d)),
            _ => (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d)),
        };
        match quarter % 2 {
            0 => _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _ => _mm512_shuffle_f32x4::<0xdd>(ab, cd),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::vector::Math;
    use super::*;

    #[test]
    fn transposed_rows_are_columns() {
        let Some(isa) = Avx512::detect() else { return };
        let rows = std::array::from_fn(|i| std::array::from_fn(|j| (i * 16 + j) as f32));
        let columns = isa.transpose(&rows);
        (0..256).for_each(|i| assert_eq!(columns[i % 16][i / 16], rows[i / 16][i % 16]));
    }
}
