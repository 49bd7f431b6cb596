//! Plain Rust: products in f32, in eight lanes that the compiler keeps in the vector registers that every machine of the
//! architecture has (SSE2, NEON). The order of a sum is the same for one row and for many.

use bytemuck::cast;
use quaver_core::host::slices::Slice;

use super::linear::{CHANNELS, CacheLine, Path};

const LANES: usize = 8;
/// It keeps the error of a long sum small.
const CHUNK: usize = 256;

/// The instruction set that needs no proof.
#[derive(Clone, Copy)]
pub struct Portable;

impl Path for Portable {
    type Element = f32;
    const ROWS: usize = 4;
    const CHUNK: usize = CHUNK;

    fn padded(self, k: usize) -> usize {
        k.next_multiple_of(2 * LANES)
    }

    fn decode_x(self, x: Slice, _: Slice, into: &mut [CacheLine], stride: usize) {
        self.decode_w(x, into, stride);
    }

    fn decode_w(self, w: Slice, into: &mut [CacheLine], stride: usize) {
        for (first, into) in (0..w.len()).step_by(2 * LANES).zip(into.iter_mut().step_by(stride)) {
            let mut values = [0f32; 2 * LANES];
            let count = values.len().min(w.len() - first);
            w.range(first, count).load(&mut values[..count]);
            *into = cast(values);
        }
    }

    fn row(self, x: &[f32], w: Slice, k: usize, y: &mut [f32]) {
        let mut decoded = [0f32; CHUNK];
        for (w, y) in w.rows(k).zip(y) {
            *y = 0.0;
            for (first, x) in (0..k).step_by(CHUNK).zip(x.chunks(CHUNK)) {
                let (weights, padding) = decoded[..x.len()].split_at_mut(x.len().min(k - first));
                w.range(first, weights.len()).load(weights);
                padding.fill(0.0);
                let mut sums = [0f32; LANES];
                let products = x.as_chunks().0.iter().zip(decoded.as_chunks().0);
                products.for_each(|(x, w)| add_products(&mut sums, x, w));
                *y += reduce(sums);
            }
        }
    }

    fn tile(self, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], mut on_line: impl FnMut()) {
        let rows = sums.len();
        for (row, out) in sums.iter_mut().enumerate() {
            let mut sums = [[0f32; LANES]; CHANNELS];
            for (x, w) in x.chunks_exact(rows).zip(w.as_chunks::<CHANNELS>().0) {
                if row == 0 {
                    on_line();
                }
                let x: [[f32; LANES]; 2] = cast(x[row]);
                for (sums, &w) in sums.iter_mut().zip(w) {
                    let w: [[f32; LANES]; 2] = cast(w);
                    x.iter().zip(&w).for_each(|(x, w)| add_products(sums, x, w));
                }
            }
            *out = sums.map(reduce);
        }
    }
}

fn add_products(sums: &mut [f32; LANES], x: &[f32; LANES], w: &[f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] += x[lane] * w[lane];
    }
}

fn reduce(s: [f32; LANES]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}
