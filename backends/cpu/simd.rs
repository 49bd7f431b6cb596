//! The one file of the cpu backend with unsafe code: calls of functions that need instructions which not every machine
//! has. Each takes the proof that this one has them.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use bytemuck::cast;
use half::bf16;
use quaver_core::host::slices::Slice;

use super::avx2::{self, Avx2};
use super::avx512::{self, Avx512};
use super::linear::{CHANNELS, CacheLine};
use super::peaks::x86;
use super::vector::{LANES, Math, Work};

/// Asks for the cache line of a byte, where there is such a byte, for the second-level cache.
#[inline(always)]
pub fn prefetch_far(bytes: &[u8], at: usize) {
    if let Some(byte) = bytes.get(at) {
        // SAFETY: a prefetch reads nothing; the address is that of a byte that is there.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(byte).cast()) }
    }
}

/// As [`prefetch_far`], for the first-level cache.
#[inline(always)]
pub fn prefetch(bytes: &[u8], at: usize) {
    if let Some(byte) = bytes.get(at) {
        // SAFETY: a prefetch reads nothing; the address is that of a byte that is there.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast()) }
    }
}

/// [`avx512::decode`].
pub fn decode(_: Avx512, codes: &[u8], into: &mut [CacheLine], stride: usize) {
    // SAFETY: an `Avx512` exists only where its features were detected.
    unsafe { avx512::decode(codes, into, stride) }
}

/// [`avx512::row`].
pub fn row(_: Avx512, x: &[bf16], w: Slice, k: usize, y: &mut [f32]) {
    // SAFETY: an `Avx512` exists only where its features were detected.
    unsafe { avx512::row(x, w, k, y) }
}

/// [`avx512::tile`].
pub fn tile(_: Avx512, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
    // SAFETY: an `Avx512` exists only where its features were detected.
    unsafe { avx512::tile(x, w, sums, on_line) }
}

/// [`avx2::decode`].
pub fn decode_f32(_: Avx2, row: Slice, into: &mut [CacheLine], stride: usize) {
    // SAFETY: an `Avx2` exists only where its features were detected.
    unsafe { avx2::decode(row, into, stride) }
}

/// [`avx2::row`].
pub fn row_f32(_: Avx2, x: &[f32], w: Slice, k: usize, y: &mut [f32]) {
    // SAFETY: an `Avx2` exists only where its features were detected.
    unsafe { avx2::row(x, w, k, y) }
}

/// [`avx2::tile`].
pub fn tile_f32(_: Avx2, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut()) {
    // SAFETY: an `Avx2` exists only where its features were detected.
    unsafe { avx2::tile(x, w, sums, on_line) }
}

/// [`x86::products_bf16`].
pub fn products_bf16(_: Avx512, rounds: usize) -> f64 {
    // SAFETY: an `Avx512` exists only where its features were detected.
    unsafe { x86::products_bf16(rounds) }
}

/// [`x86::products_f32`].
pub fn products_f32(_: Avx2, rounds: usize) -> f64 {
    // SAFETY: an `Avx2` exists only where its features were detected.
    unsafe { x86::products_f32(rounds) }
}

impl Math for Avx512 {
    type Lanes = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: an `Avx512` exists only where its features were detected.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        cast(*x)
    }

    #[inline(always)]
    fn store(self, x: __m512) -> [f32; LANES] {
        cast(x)
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: an `Avx512` exists only where its features were detected.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn transpose(self, rows: &[[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        // SAFETY: an `Avx512` exists only where its features were detected.
        cast(unsafe { avx512::transpose(cast(*rows)) })
    }
}

impl Math for Avx2 {
    type Lanes = [__m256; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
        cast(*x)
    }

    #[inline(always)]
    fn store(self, x: [__m256; 2]) -> [f32; LANES] {
        cast(x)
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: an `Avx2` exists only where its features were detected.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}

/// Computes something with the vector instructions of AVX-512.
pub fn run_avx512(isa: Avx512, work: impl Work) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    fn run(isa: Avx512, work: impl Work) {
        work.run(isa);
    }
    // SAFETY: an `Avx512` exists only where these features were detected.
    unsafe { run(isa, work) }
}

/// Computes something with the vector instructions of AVX2.
pub fn run_avx2(isa: Avx2, work: impl Work) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run(isa: Avx2, work: impl Work) {
        work.run(isa);
    }
    // SAFETY: an `Avx2` exists only where these features were detected.
    unsafe { run(isa, work) }
}
