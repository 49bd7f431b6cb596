//! How far each backend may be from the f64 result, in one table.
//!
//! An element's error is at most `element` x its magnitude, which the case computes in f64: what the error of a sum is
//! proportional to, for instance the sum of |x||w|. That limit is proven from the order of the summation and holds for
//! any input. It grows with the length of the sum, so that a small fault may hide below it; errors that are as random
//! as roundings are do not reach it by far. Hence the second limit: the root mean square of a row's errors is at most
//! `rms` x that of its magnitudes. It is two to four times what was measured.

use quaver_core::llama::Profile;
use quaver_core::op::{DType, DeviceInfo};

/// The rounding error of an f32 operation, relative to its result.
pub const U: f64 = 1.0 / (1 << 24) as f64;

/// Errors below this count for nothing: devices may flush subnormal numbers, and exp(89) is no f32 any more.
pub const TINY: f64 = 1e-30;

/// What was computed, as far as its rounding errors depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Nothing that rounds, besides storing the result.
    Exact,
    /// A sum of `k` products, scaled, and added to a residual. Magnitude: sum of |x||w|, + |residual|.
    Linear {
        /// Rows of the step.
        rows: usize,
        /// Products.
        k: usize,
        /// Of activations and weights.
        dtypes: [DType; 2],
    },
    /// A normalized row. Magnitude: |value|.
    RmsNorm,
    /// Two products and their sum. Magnitude: |a cos| + |b sin|.
    Rope,
    /// Magnitude: sum over t of (1 + s) w |v|, + |value| x sum of (1 + s) w, where w is the softmax weight and
    /// s = sum |q||k| / sqrt(dim), which is what the error of a score is proportional to.
    Attend {
        /// Elements a head.
        dim: usize,
        /// The longest context.
        context: usize,
        /// Tokens a page.
        page_tokens: usize,
    },
    /// Magnitude: |value| (1 + |gate| (1 - sigmoid(gate))), as exp multiplies the error of its argument.
    SwiGlu,
}

/// Limits of the error, relative to the magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// Of each element.
    pub element: f64,
    /// Of the root mean square of a row, and of all rows.
    pub rms: f64,
    /// What is added to that, relative to the root mean square of the values: where rounding towards zero makes sums smaller.
    pub bias: f64,
}

/// How often a sum of tensor cores is taken up again at most until it is promoted: by 128 products in instructions of 8, by 256
/// of E4M3 in instructions of 16 where rows are few.
const SUMS: usize = 16;

/// What a sum of tensor cores with so many bits behind the leading one may lose, relative to it.
///
/// An addend of an instruction, be it a product or the sum so far, loses less than 2^-bits of the largest, which is at most
/// the sum of |x||w|; the new sum loses 2^-bits of itself. Hence the limit of an element, over a sum that is promoted in time.
/// Products of either sign lose as much one way as the other, while sums of one sign lose half of that each time, up to 48
/// times until they are promoted. Both follow from the model of `emulator.cpp`. An H100's sums of 8192 E4M3 products of one
/// sign were 2^-10.5 too small (2026-11-26), a sixth of `bias`.
fn tensor_core_limit((bits, products): (u32, usize)) -> Limit {
    let bit = 0.5f64.powi(bits as i32);
    Limit { element: (products + 2 * SUMS) as f64 * bit, rms: bit, bias: 32.0 * bit }
}

/// The bits that a device's tensor cores keep of a Linear, and how many products they sum before they are promoted; None where
/// it runs without them.
fn tensor_sums(device: &DeviceInfo, rows: usize, dtypes: [DType; 2]) -> Option<(u32, usize)> {
    let cores = device.tensor_cores?;
    match dtypes {
        [DType::E4m3, DType::E4m3] if rows >= cores.e4m3_rows => Some((cores.e4m3_bits, 128)),
        [DType::E4m3, DType::E4m3] => Some((cores.bf16_bits, 256)),
        [DType::Bf16, DType::Bf16] => Some((cores.bf16_bits, 128)),
        _ => None,
    }
}

/// The limit of a device, by its backend's name. A backend without a line of its own is held to the cpu's.
pub fn limit(device: &DeviceInfo, work: Work) -> Limit {
    let of = |element: f64, rms: f64| Limit { element: element * U, rms: rms * U, bias: 0.0 };
    match (device.backend, work) {
        (_, Work::Exact) => of(0.0, 0.0),
        // The sum is rounded once, then the two scales and the residual.
        ("reference", Work::Linear { .. }) => of(4.0, 2.0),
        // Eight lanes of k/8 terms at the longest, three levels to sum them, up to seven terms left over; then as above. Tensor
        // cores leave fewer sums to add in f32, but lose on the way to them.
        (_, Work::Linear { rows, k, dtypes }) => {
            let (f32, lost) =
                (of((k / 8) as f64 + 16.0, 2.0), tensor_sums(device, rows, dtypes).map(tensor_core_limit));
            lost.map_or(f32, |lost| Limit {
                element: f32.element + lost.element,
                rms: f32.rms + lost.rms,
                bias: lost.bias,
            })
        }
        // 1/sqrt, and two products. One element may be the largest of all by far, and its error be that of its row.
        // The sum of squares in f32, and the device's 1/sqrt, mended by a step of Newton's.
        ("wgpu", Work::RmsNorm) => of(6.0, 6.0),
        (_, Work::RmsNorm) => of(3.0, 3.0),
        (_, Work::Rope) => of(2.0, 1.0),
        // f64 throughout, rounded once.
        ("reference", Work::Attend { .. }) => of(1.0, 0.5),
        // A score is a sum of eight lanes of dim/8; the values are summed within a page, then page by page.
        (_, Work::Attend { dim, context, page_tokens }) => {
            let terms = dim / 8 + 8 + page_tokens + context.div_ceil(page_tokens) + 8;
            of(terms as f64, 0.6)
        }
        // exp within one unit (two U) of the last place, one sum, one quotient, one product.
        (_, Work::SwiGlu) => of(5.0, 4.0),
    }
}

/// How far the model on a device may be from the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelLimit {
    /// rms(error) / rms(value) of the residual stream behind a layer, over all rows.
    pub layer: f64,
    /// The same of each row.
    pub layer_row: f64,
    /// rms error of the logits.
    pub logits: f64,
    /// Mean KL divergence, in nats a token.
    pub kl: f64,
    /// The lead of the best logit from which on it must be the best here too.
    pub margin: f32,
}

/// The limits of every backend against the reference in the same profile, and of the fast profile against the exact one.
///
/// Of the demo model, over cpu and wgpu: in the exact profile sound devices drift by 3.4e-3, behind the last of six layers,
/// and weight-only arithmetic by 2.2e-2 behind the first. In the fast one ties of bf16 flip too, in q, k, v, gate and up,
/// and devices drift by about 1e-2 behind the fourth: it cannot tell weight-only arithmetic, which the exact one is for.
///
/// What FP8 tensor cores lose of a sum turns codes behind it, as ties of bf16 do, so that both profiles are held to the limits
/// of the fast one there: an H100 drifts by 2.4e-2 behind the last layer in the exact profile. Its kernels of Ampere, which
/// multiply codes as bf16, keep to the limits of the exact one.
pub fn model_limit(device: &DeviceInfo, profile: Profile) -> ModelLimit {
    let keeps_f32 = device.tensor_cores.is_none_or(|cores| cores.e4m3_bits >= 24);
    match profile {
        Profile::Exact if keeps_f32 => ModelLimit { layer: 1e-2, layer_row: 5e-2, logits: 0.05, kl: 5e-4, margin: 0.2 },
        _ => ModelLimit { layer: 4e-2, layer_row: 0.2, logits: 0.25, kl: 5e-3, margin: 0.2 },
    }
}
