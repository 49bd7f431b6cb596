//! Rotary position embedding: frequencies, their scaling for long contexts, and the table of cosines and sines. All of
//! it is f64 until the table is rounded once: at position 131071 a frequency in f32 would be wrong by 0.008 radians.

use std::f64::consts::PI;

use crate::checkpoint::json::Object;
use crate::error::{Error, Result};

/// Base and scaling of the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies: pair `i` turns by `theta^(-2 i / dim)` radians a position.
    pub theta: f64,
    /// How frequencies are changed for contexts longer than those of training.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// They are not.
    None,
    /// All are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns in `original_max_position` positions a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns in `original_max_position` positions a frequency is high.
        high_freq_factor: f64,
        /// Positions of the context of training.
        original_max_position: usize,
    },
}

impl Rope {
    /// Reads both spellings: `rope_parameters` with the theta inside (Hugging Face transformers 5), and `rope_theta`
    /// beside `rope_scaling` (transformers 4, where `rope_type` may be called `type`).
    pub(crate) fn from_json(config: Object) -> Result<Self> {
        let key = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let parameters = config.object(key)?;
        // Not infinite, and large enough that frequencies fall.
        const THETA: std::ops::RangeInclusive<f64> = 1.0..=1e15;
        let theta = match parameters {
            Some(parameters) => parameters.real("rope_theta", THETA)?,
            None => None,
        };
        // The default of transformers' LlamaConfig.
        let theta = theta.or(config.real("rope_theta", THETA)?).unwrap_or(10_000.0);
        for object in [Some(config), parameters].into_iter().flatten() {
            if let Some(share) = object.real("partial_rotary_factor", 0.0..=1.0)?.filter(|share| *share != 1.0) {
                let what = format!("partial_rotary_factor {share}");
                return Err(Error::unsupported_model(what, "rotation of whole heads is"));
            }
        }
        let scaling = parameters.map_or(Ok(RopeScaling::None), |parameters| RopeScaling::from_json(key, parameters))?;
        Ok(Rope { theta, scaling })
    }

    /// Radians a position of each of the `dim / 2` pairs of a head, scaled.
    pub fn inv_freq(&self, dim: usize) -> Vec<f64> {
        (0..dim / 2).map(|i| self.scaling.apply(self.theta.powf(-((2 * i) as f64) / dim as f64))).collect()
    }

    /// `[positions, dim]`: for each position the cosines of its `dim / 2` angles, then their sines.
    pub fn table(&self, dim: usize, positions: usize) -> Vec<f32> {
        // A position is a multiple of NEAR and a rest: the angles' cosines and sines are those of the sums, and few of
        // them are computed the long way. In f64 that costs 2^-52 of accuracy, which the rounding to f32 hides.
        const NEAR: usize = 256;
        let (inv_freq, half) = (self.inv_freq(dim), dim / 2);
        let turns = |position: usize| inv_freq.iter().map(move |freq| (position as f64 * freq).sin_cos());
        let near: Vec<(f64, f64)> = (0..NEAR.min(positions)).flat_map(turns).collect();
        let mut table = vec![0.0; positions * dim];
        for (block, rows) in table.chunks_mut(NEAR * dim).enumerate() {
            let far: Vec<_> = turns(block * NEAR).collect();
            for (row, near) in rows.chunks_exact_mut(dim).zip(near.chunks_exact(half)) {
                let (cosines, sines) = row.split_at_mut(half);
                for i in 0..half {
                    let ((far_sin, far_cos), (near_sin, near_cos)) = (far[i], near[i]);
                    cosines[i] = (far_cos * near_cos - far_sin * near_sin) as f32;
                    sines[i] = (far_sin * near_cos + far_cos * near_sin) as f32;
                }
            }
        }
        table
    }

    /// The table as transformers computes it, frequencies and angles in f32: what a model sees that is calibrated there.
    /// It is as wrong as f32 makes it.
    pub fn table_of_transformers(&self, dim: usize, positions: usize) -> Vec<f32> {
        let freqs = (0..dim / 2).map(|i| self.theta.powf((2 * i) as f64 / dim as f64) as f32).map(|power| 1.0 / power);
        let inv_freq: Vec<f32> = freqs.map(|freq| self.scaling.apply_in_f32(freq)).collect();
        let row = |position| {
            let angles = inv_freq.iter().map(move |freq| f64::from(freq * position as f32));
            angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|x| x as f32)
        };
        (0..positions).flat_map(row).collect()
    }
}

impl RopeScaling {
    fn from_json(key: &str, parameters: Object) -> Result<Self> {
        // Models that rotate layer kinds differently nest one object a kind; reading such a one as flat would find
        // nothing and scale nothing.
        if parameters.is_nested() {
            let what = format!("`{key}` with an object a layer kind");
            return Err(Error::unsupported_model(what, "one rope for all layers is"));
        }
        let kind = parameters.text("rope_type")?.or(parameters.text("type")?).unwrap_or("default");
        let number = |name: &str, min| parameters.required(name, parameters.real(name, min..=1e9)?);
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor", 1.0)? }),
            "llama3" => {
                let (low, high) = (number("low_freq_factor", 1e-9)?, number("high_freq_factor", 1e-9)?);
                if low >= high {
                    let why = format!("must be less than `high_freq_factor` {high}, found {low}");
                    return Err(parameters.error("low_freq_factor", why));
                }
                let name = "original_max_position_embeddings";
                Ok(RopeScaling::Llama3 {
                    factor: number("factor", 1.0)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: parameters.required(name, parameters.whole(name, 1..=1 << 24)?)?,
                })
            }
            other => {
                let what = format!("rope type {}", crate::checkpoint::json::clipped(other));
                Err(Error::unsupported_model(what, "default, linear and llama3 are"))
            }
        }
    }

    /// The llama3 case follows `_compute_llama3_parameters` of Hugging Face transformers (modeling_rope_utils.py).
    fn apply(&self, freq: f64) -> f64 {
        match *self {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let turns = original_max_position as f64 * freq / (2.0 * PI);
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                kept * freq + (1.0 - kept) * freq / factor
            }
        }
    }
}

impl RopeScaling {
    /// The same in f32, operation by operation as transformers has it: a number over a tensor is the reciprocal times the
    /// number there.
    fn apply_in_f32(&self, freq: f32) -> f32 {
        match *self {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor as f32,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let context = original_max_position as f64;
                let wavelength = 1.0 / freq * (2.0 * PI) as f32;
                if wavelength < (context / high_freq_factor) as f32 {
                    return freq;
                }
                if wavelength > (context / low_freq_factor) as f32 {
                    return freq / factor as f32;
                }
                let turns = 1.0 / wavelength * context as f32;
                let kept = (turns - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
                (1.0 - kept) * freq / factor as f32 + kept * freq
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_3_2: RopeScaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };

    #[test]
    fn llama3_frequencies_equal_those_of_transformers() {
        // `inv_freq` of transformers 5.17 (f32) for this configuration.
        #[rustfmt::skip]
        const GOLDEN: [f64; 32] = [
            1.0, 0.663601279258728, 0.44036662578582764, 0.2922278344631195, 0.193922758102417, 0.12868738174438477,
            0.08539710193872452, 0.05666961893439293, 0.026244644075632095, 0.00910873617976904, 0.0023863334208726883,
            0.0003434227837715298, 0.00022789578360971063, 0.00015123191406019032, 0.00010035769082605839,
            6.659748760284856e-05, 4.4194170186528936e-05, 2.932730785687454e-05, 1.9461638657958247e-05,
            1.291476746700937e-05, 8.570255886297673e-06, 5.687232260243036e-06, 3.7740544485131977e-06,
            2.504467147446121e-06, 1.6619674170215148e-06, 1.1028836297555245e-06, 7.318749339901842e-07,
            4.856731266045244e-07, 3.2229328894572973e-07, 2.1387423032592778e-07, 1.4192720243499934e-07,
            9.418306490260875e-08,
        ];
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 512,
        };
        let rope = Rope { theta: 500_000.0, scaling };
        let got = rope.inv_freq(64);
        assert_eq!(got.len(), GOLDEN.len());
        for (i, (got, want)) in got.iter().zip(GOLDEN).enumerate() {
            assert!((got / want - 1.0).abs() < 1e-6, "pair {i}: {got} against {want}");
        }
        // The second row of the table has the sines of the frequencies themselves.
        let want = GOLDEN.map(|freq| f64::from(freq as f32).sin() as f32);
        assert_eq!(rope.table_of_transformers(64, 2)[96..], want);
    }

    #[test]
    fn position_131071_equals_an_evaluation_with_50_digits() {
        // (pair, cos, sin) of 131071 * inv_freq for theta 500000 and dim 64, in 50 digits, rounded here to f64.
        let plain = [
            (0, -0.817_983_499_387_949_1, -0.575_241_683_754_789_4),
            (1, 0.736_023_631_154_672_5, 0.676_955_843_746_023_5),
            (7, 0.524_286_459_430_865_9, 0.851_541_959_305_263_4),
            (15, -0.962_756_485_893_578, 0.270_370_022_136_050_8),
            (21, 0.287_727_995_215_292_45, -0.957_712_170_106_127_8),
            (31, 0.922_985_249_888_045_6, 0.384_835_326_456_787_3),
        ];
        let scaled = [
            (0, -0.817_983_499_387_949_1, -0.575_241_683_754_789_4),
            (15, 0.881_108_238_758_241_4, -0.472_914_655_717_445_2),
            (16, 0.969_838_519_228_385, -0.243_748_326_396_087_05),
            (17, 0.987_484_195_073_690_4, 0.157_717_990_348_804_93),
            (21, 0.734_795_489_074_985_1, 0.678_288_721_136_050_9),
            (31, 0.999_923_805_543_628, 0.012_344_355_274_725_828),
        ];
        for (scaling, want) in [(RopeScaling::None, plain), (LLAMA_3_2, scaled)] {
            let table = Rope { theta: 500_000.0, scaling }.table(64, 131_072);
            assert_eq!(table.len(), 131_072 * 64);
            let last = &table[131_071 * 64..];
            for (i, cos, sin) in want {
                // Half a unit in the last place below 1, and what f64 loses in reducing the angle.
                let bound = 2f64.powi(-25) + 1e-10;
                assert!((f64::from(last[i]) - cos).abs() <= bound, "{scaling:?} cos of pair {i}: {}", last[i]);
                assert!(
                    (f64::from(last[32 + i]) - sin).abs() <= bound,
                    "{scaling:?} sin of pair {i}: {}",
                    last[32 + i]
                );
            }
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = Rope { theta: 10_000.0, scaling: RopeScaling::None }.inv_freq(8);
        let scaled = Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 4.0 } }.inv_freq(8);
        assert_eq!(scaled, plain.iter().map(|freq| freq / 4.0).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_row_of_a_table_rotates_nothing() {
        let table = Rope { theta: 10_000.0, scaling: RopeScaling::None }.table(4, 2);
        assert_eq!(table[..4], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(table[4..], [1f64.cos() as f32, 0.01f64.cos() as f32, 1f64.sin() as f32, 0.01f64.sin() as f32]);
    }
}
