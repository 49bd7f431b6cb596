//! `Linear` on the cpu: blocks of output channels go to the threads, which decode them once for all rows.

use quaver_core::host::slices::{ActIn, ColsOut, Slice, SliceMut, WeightIn};
use rayon::prelude::*;

/// Output channels that are decoded together: an activation is read once for all of them.
const CHANNELS: usize = 4;

/// Partial sums of a dot product: two SSE or NEON registers, one AVX register.
const LANES: usize = 8;

/// Kept between calls.
#[derive(Default)]
pub struct Scratch {
    /// `[m, k]`: decoded activations.
    x: Vec<f32>,
    /// `[n, m]`: products, channel by channel.
    y: Vec<f32>,
}

/// See [`quaver_core::reference::linear`]; sums are taken in f32, in [`LANES`] parts.
pub fn linear(scratch: &mut Scratch, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let (m, n) = (x.data.len() / k, w.data.len() / k);
    if m == 0 {
        return;
    }
    let values = match x.data {
        Slice::F32(values) => values,
        codes => {
            scratch.x.resize(m * k, 0.0);
            codes.load(&mut scratch.x);
            &scratch.x
        }
    };
    scratch.y.resize(n * m, 0.0);
    scratch.y.par_chunks_mut(CHANNELS * m).enumerate().for_each_init(
        || vec![0.0; CHANNELS * k],
        |block, (i, y)| {
            let first = i * CHANNELS;
            let channels = y.len() / m;
            w.data.range(first * k, channels * k).load(&mut block[..channels * k]);
            for (row, x_row) in values.chunks_exact(k).enumerate() {
                let products = dots(x_row, block, k);
                for (c, product) in products.into_iter().take(channels).enumerate() {
                    let w_scale = w.scale.map_or(1.0, |scale| scale[first + c]);
                    y[c * m + row] = product * x.scale.row(row) * w_scale;
                }
            }
        },
    );
    let y = &scratch.y;
    out.rows().into_par_iter().enumerate().for_each(|(row, out)| {
        let products = y.iter().skip(row).step_by(m);
        match out {
            SliceMut::F32(out) if add => out.iter_mut().zip(products).for_each(|(out, y)| *out += y),
            SliceMut::F32(out) => out.iter_mut().zip(products).for_each(|(out, y)| *out = *y),
            SliceMut::Bf16(out) => {
                out.iter_mut().zip(products).for_each(|(out, y)| *out = half::bf16::from_f32(*y));
            }
            SliceMut::E4m3(_) => unreachable!("checked by record"),
        }
    });
}

/// The dot products of `x[k]` with each row of `w[CHANNELS, k]`.
fn dots(x: &[f32], w: &[f32], k: usize) -> [f32; CHANNELS] {
    let whole = k - k % LANES;
    let mut sums = [[0f32; LANES]; CHANNELS];
    let rows: [&[f32]; CHANNELS] = std::array::from_fn(|c| &w[c * k..(c + 1) * k]);
    for i in (0..whole).step_by(LANES) {
        let x = &x[i..i + LANES];
        for (sums, row) in sums.iter_mut().zip(rows) {
            let row = &row[i..i + LANES];
            for lane in 0..LANES {
                sums[lane] += x[lane] * row[lane];
            }
        }
    }
    std::array::from_fn(|c| {
        let rest: f32 = x[whole..].iter().zip(&rows[c][whole..]).map(|(x, w)| x * w).sum();
        sum(sums[c]) + rest
    })
}

/// A balanced sum of the lanes.
fn sum(s: [f32; LANES]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// The dot product of two vectors.
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, ws) = (x.chunks_exact(LANES), w.chunks_exact(LANES));
    let rest: f32 = xs.remainder().iter().zip(ws.remainder()).map(|(x, w)| x * w).sum();
    for (x, w) in xs.zip(ws) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * w[lane];
        }
    }
    sum(sums) + rest
}
