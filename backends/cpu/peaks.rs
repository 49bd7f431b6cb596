//! What this machine can do at best, measured: bytes that its threads read from memory, and products that they sum with
//! the instruction that an instruction set multiplies with. Benchmarks are held against both; [`super::peaks`] is the
//! caller.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::ThreadPool;

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::simd;
use super::vector::{Math, Work, mul_add};
use crate::Peaks;

/// Read in each pass: more than nearly all caches hold.
const BUFFER_BYTES: usize = 512 << 20;
/// Bytes that are asked for ahead of their use.
const AHEAD: usize = 4 << 10;
/// Words that are summed side by side: four lines of the cache.
const WORDS: usize = 32;
/// Rounds of [`products`] a pass, some 20 ms on a machine of 2022. Sums of ones stay whole in f32 up to 2^24.
const ROUNDS: usize = 1 << 22;
/// Passes, the best of which counts: what others do on the machine meanwhile only slows one down.
const PASSES: usize = 16;

/// Measures the threads of a pool with an instruction set.
pub fn measure(pool: &ThreadPool, isa: Isa) -> Peaks {
    let threads = pool.current_num_threads();
    let read = {
        let part = (BUFFER_BYTES / 8).div_ceil(threads).next_multiple_of(WORDS);
        // Each thread writes its own part, so that the part's pages are near it.
        let parts: Vec<Vec<u64>> = pool.broadcast(|thread| vec![thread.index() as u64 + 1; part]);
        let best = best(|| {
            pool.broadcast(|thread| black_box(sum(isa, &parts[thread.index()])));
        });
        (threads * part * 8) as f64 / best.as_secs_f64()
    };
    let mut count = 0.0;
    let best = best(|| count = pool.broadcast(|_| products(isa, ROUNDS)).into_iter().sum());
    Peaks { threads, bandwidth: read, flops: 2.0 * count / best.as_secs_f64(), copy: None }
}

/// The time of the fastest pass.
fn best(mut pass: impl FnMut()) -> Duration {
    let time = |_| {
        let start = Instant::now();
        pass();
        start.elapsed()
    };
    (0..PASSES).map(time).min().unwrap_or_default()
}

/// The sum of all words, whole multiples of [`WORDS`].
fn sum(isa: Isa, words: &[u64]) -> u64 {
    let mut sum = 0;
    isa.run(Sum { words, sum: &mut sum });
    sum
}

struct Sum<'a> {
    words: &'a [u64],
    sum: &'a mut u64,
}

impl Work for Sum<'_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        let bytes: &[u8] = bytemuck::cast_slice(self.words);
        let mut sums = [0u64; WORDS];
        for (i, words) in self.words.as_chunks::<WORDS>().0.iter().enumerate() {
            for line in (0..8 * WORDS).step_by(64) {
                prefetch(bytes, i * 8 * WORDS + AHEAD + line);
            }
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(*word);
            }
        }
        *self.sum = sums.into_iter().fold(0, u64::wrapping_add);
    }
}

#[cfg(target_arch = "x86_64")]
use simd::prefetch;

/// Elsewhere the machine's own prefetching is all there is.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &[u8], _: usize) {}

/// Sums `rounds` products of ones in each lane of some registers, with the widest multiplication that an instruction set
/// has for FP8; gives how many that were.
fn products(isa: Isa, rounds: usize) -> f64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(wide) => simd::products_bf16(wide, rounds),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(narrow) => simd::products_f32(narrow, rounds),
        Isa::Portable(_) => products_portable(rounds),
    }
}

/// As the portable variant multiplies and adds: apart, but on aarch64. Of 24 to 128 sums the compiler makes
/// the most of 56: 16 operations a cycle of Zen 4, all that SSE2 has there.
fn products_portable(rounds: usize) -> f64 {
    let (mut sums, [factor, one]) = (black_box([0f32; 56]), black_box([1f32; 2]));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = mul_add(*sum, factor, one);
        }
    }
    sums.into_iter().map(f64::from).sum()
}

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use super::black_box;
    use std::arch::x86_64::*;

    use bytemuck::cast;

    /// In `vdpbf16ps`, two products a lane. Sixteen sums hide its latency; that they start alike is hidden from the
    /// compiler, which would keep one of them.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn products_bf16(rounds: usize) -> f64 {
        // 1.0 in bf16.
        let [x, y]: [__m512bh; 2] = cast(black_box([[0x3f80u16; 32]; 2]));
        let mut sums: [__m512; 16] = cast(black_box([[0f32; 16]; 16]));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
        }
        total(cast::<_, [f32; 256]>(sums))
    }

    /// In `vfmadd`: twelve sums, two operands and two registers to spare.
    #[target_feature(enable = "avx2,fma")]
    pub fn products_f32(rounds: usize) -> f64 {
        let [x, y]: [__m256; 2] = cast(black_box([[1f32; 8]; 2]));
        let mut sums: [__m256; 12] = cast(black_box([[0f32; 8]; 12]));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(x, y, *sum);
            }
        }
        total(cast::<_, [f32; 96]>(sums))
    }

    fn total<const N: usize>(lanes: [f32; N]) -> f64 {
        lanes.into_iter().map(f64::from).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_and_every_product_is_computed() {
        let words: Vec<u64> = (0..1000 * WORDS as u64).collect();
        for isa in Isa::all() {
            assert_eq!(sum(isa, &words), words.iter().sum::<u64>());
            let one = products(isa, 1);
            assert!(one >= 48.0 && products(isa, 1000) == 1000.0 * one, "{}: {one} products a round", isa.name());
        }
    }
}
