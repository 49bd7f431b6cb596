//! Philox4x32-10: random numbers as a pure function of a counter and a key, so that every backend draws the same ones
//! in any order and keeps no state. (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.)
//! The sampler is its caller; shaders and kernels repeat it word by word.

/// Multipliers of the two halves of a round (Salmon et al., table 2).
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];

/// What each round adds to the key: the golden ratio and sqrt(3) - 1, as fractions of 2^32 (Salmon et al., section 4.3).
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Four random words, each uniform over all of u32.
#[inline]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let left = u64::from(MULTIPLIERS[0]) * u64::from(a);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(c);
        (a, b, c, d) = ((right >> 32) as u32 ^ b ^ k0, right as u32, (left >> 32) as u32 ^ d ^ k1, left as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [a, b, c, d]
}

/// A uniform number in the open interval (0, 1): (2k + 1) / 2^24 where k is the upper 23 bits of `word`. Every such
/// number is an f32, so that no step rounds and every backend gets the same bits.
#[inline]
pub fn uniform(word: u32) -> f32 {
    ((word >> 9 << 1) | 1) as f32 * (1.0 / 16_777_216.0)
}

/// The standard Gumbel number of a uniform one: -ln(-ln u), between -2.812 and 16.636 for [`uniform`]'s numbers.
///
/// Large values, those that win, come from u close to 1, where a device's logarithm may be poor (WGSL allows an
/// absolute error of 2^-21 between 0.5 and 2). With v = 1 - u, which is exact, such a device sums
/// -ln u = v (1 + v/2 + v²/3 + v³/4 + v⁴/5 + v⁵/6) for v < 1/16; the inner logarithm is good enough elsewhere.
#[inline]
pub fn gumbel(u: f32) -> f32 {
    -(-f64::from(u).ln()).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three `philox4x32 10` lines of Random123's `kat_vectors`.
    #[test]
    fn known_answers_of_random123() {
        let ones = u32::MAX;
        for (counter, key, answer) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), answer, "counter {counter:x?}, key {key:x?}");
        }
    }

    #[test]
    fn uniform_is_exact_and_never_0_or_1() {
        assert_eq!(uniform(0), 2f32.powi(-24));
        assert_eq!(uniform(u32::MAX), 1.0 - 2f32.powi(-24));
        for k in (0..1 << 23).step_by(997) {
            assert_eq!(f64::from(uniform(k << 9)), (2.0 * f64::from(k) + 1.0) / 16_777_216.0);
            assert_eq!(uniform(k << 9), uniform(k << 9 | 0x1ff), "the low 9 bits do not count");
        }
    }

    /// What shaders compute, with the absolute error that WGSL allows its `log` between 0.5 and 2.
    #[test]
    fn gumbel_survives_a_poor_logarithm_by_its_series() {
        let poor_ln = |x: f32| x.ln() + if (0.5..=2.0).contains(&x) { 2f32.powi(-21) } else { 0.0 };
        let by_series = |u: f32| {
            let v = 1.0 - u;
            let series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * (0.25 + v * (0.2 + v / 6.0)))));
            -poor_ln(if v < 0.0625 { series } else { -poor_ln(u) })
        };
        let top = (0..4096).map(|i| u32::MAX - (i << 9));
        for u in top.chain((0..u32::MAX).step_by(65_521)).map(uniform) {
            let error = (by_series(u) - gumbel(u)).abs();
            assert!(error < 1e-5, "u = {u}: {} against {}", by_series(u), gumbel(u));
        }
    }

    #[test]
    fn gumbel_has_the_mean_and_variance_of_its_distribution() {
        let draws =
            (0..100_000).flat_map(|i| philox([i, 0, 0, 0], [1, 2])).map(|word| f64::from(gumbel(uniform(word))));
        let (sum, squares) = draws.fold((0.0, 0.0), |(s, q), g| (s + g, q + g * g));
        let mean = sum / 400_000.0;
        let variance = squares / 400_000.0 - mean * mean;
        assert!((mean - 0.577_216).abs() < 0.01, "mean {mean}, Euler's constant expected");
        assert!((variance - 1.644_934).abs() < 0.03, "variance {variance}, pi^2/6 expected");
    }
}
