//! The Gumbel-max race: the token with the largest scaled logit plus Gumbel noise is a draw from their softmax (Gumbel
//! 1954; Maddison, Tarlow, Minka, "A* sampling", 2014). Each token's noise is its own word of Philox, so that the
//! outcome does not depend on the order of the runners, nor on who else runs and loses.

use super::row::{NO_TOKEN, RowParams};
use crate::philox::{gumbel, philox, uniform};

/// Above every Gumbel number: 24 ln 2 is reached at u = 1 - 2^-24.
const HIGHEST: f32 = 16.64;

/// The winner among `runners`, pairs of id and finite value, whose largest value is `max`; those less likely than
/// `min_p` of the likeliest do not start. The lower id wins a tie.
pub(super) fn race(runners: impl Iterator<Item = (u32, f32)>, max: f32, params: &RowParams) -> u32 {
    let floor = params.min_p.ln();
    let (mut winner, mut best) = (NO_TOKEN, f32::NEG_INFINITY);
    let (mut block, mut words) = (NO_TOKEN, [0; 4]);
    for (id, value) in runners {
        let scaled = (value - max) / params.temperature;
        if scaled < floor || scaled + HIGHEST < best {
            continue;
        }
        if block != id / 4 {
            block = id / 4;
            words = philox([block, params.position, 0, 0], [params.seed_lo, params.seed_hi]);
        }
        let word = words[id as usize % 4];
        if scaled + gumbel_limit(word) < best {
            continue;
        }
        let score = scaled + gumbel(uniform(word));
        if score > best || (score == best && id < winner) {
            (winner, best) = (id, score);
        }
    }
    winner
}

/// Not below the Gumbel number of a word, without its logarithms. With v = 1 - u: -ln u >= v, so that
/// -ln(-ln u) <= -ln v <= -ln 2 floor(log2 v); v is an odd count of 2^-24.
fn gumbel_limit(word: u32) -> f32 {
    let count = (!word >> 9 << 1) | 1;
    let log2 = 31 - count.leading_zeros();
    (24 - log2) as f32 * std::f32::consts::LN_2 + 1e-4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_above_every_gumbel_number_and_close_to_the_large_ones() {
        let top = (0..100_000).map(|i| u32::MAX - (i << 9));
        for word in top.chain((0..u32::MAX).step_by(65_521)) {
            let (limit, exact) = (gumbel_limit(word), gumbel(uniform(word)));
            assert!(limit >= exact && limit <= HIGHEST, "word {word:#x}: {exact} against {limit}");
            assert!(exact < 3.0 || limit - exact < 0.75, "word {word:#x}: {exact} against {limit}");
        }
    }
}
