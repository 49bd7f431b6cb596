//! Plain Rust: products in f32, in eight lanes that the compiler keeps in the vector registers that every machine of the
//! architecture has (SSE2, NEON). The order of a sum is the same for one row and for many.

use quaver_core::host::slices::Slice;

use super::linear::Path;

const LANES: usize = 8;
/// Elements that are summed lane by lane before their sum is added to that of earlier ones: it keeps the error of a long
/// sum small.
const CHUNK: usize = 256;
/// Channels of a tile.
const CHANNELS: usize = 4;

/// The instruction set that needs no proof.
#[derive(Clone, Copy)]
pub struct Portable;

impl Path for Portable {
    type Element = f32;

    fn padded(self, k: usize) -> usize {
        k.next_multiple_of(LANES)
    }

    fn decode_x(self, x: Slice, _: Slice, into: &mut [f32]) {
        self.decode_w(x, into);
    }

    fn decode_w(self, w: Slice, into: &mut [f32]) {
        let (values, zeros) = into.split_at_mut(w.len());
        w.load(values);
        zeros.fill(0.0);
    }

    fn row(self, x: &[f32], w: Slice, k: usize, y: &mut [f32]) {
        let mut decoded = vec![0.0; CHANNELS * x.len()];
        for (block, y) in y.chunks_mut(CHANNELS).enumerate() {
            let decoded = &mut decoded[..y.len() * x.len()];
            for (c, row) in decoded.chunks_exact_mut(x.len()).enumerate() {
                self.decode_w(w.row(block * CHANNELS + c, k), row);
            }
            self.rows(x, decoded, x.len(), y);
        }
    }

    fn rows(self, x: &[f32], w: &[f32], padded: usize, y: &mut [f32]) {
        let n = w.len() / padded;
        for (w, channel) in w.chunks(CHANNELS * padded).zip((0..n).step_by(CHANNELS)) {
            for (x, y) in x.chunks_exact(padded).zip(y.chunks_exact_mut(n)) {
                let y = &mut y[channel..n.min(channel + CHANNELS)];
                match w.len() / padded {
                    CHANNELS => y.copy_from_slice(&dots::<CHANNELS>(x, w)),
                    _ => y.iter_mut().zip(w.chunks_exact(padded)).for_each(|(y, w)| [*y] = dots::<1>(x, w)),
                }
            }
        }
    }
}

/// The dot products of a row with each of `C` channels.
fn dots<const C: usize>(x: &[f32], w: &[f32]) -> [f32; C] {
    let mut total = [0f32; C];
    for first in (0..x.len()).step_by(CHUNK) {
        let range = first..x.len().min(first + CHUNK);
        let steps = range.len() / LANES;
        let x = &x[range.clone()].as_chunks::<LANES>().0[..steps];
        let row = |c: usize| &w[c * (w.len() / C)..][range.clone()].as_chunks::<LANES>().0[..steps];
        let w: [&[[f32; LANES]]; C] = std::array::from_fn(row);
        let mut sums = [[0f32; LANES]; C];
        for i in 0..steps {
            for c in 0..C {
                for lane in 0..LANES {
                    sums[c][lane] += x[i][lane] * w[c][i][lane];
                }
            }
        }
        for (total, s) in total.iter_mut().zip(sums) {
            *total += ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        }
    }
    total
}
