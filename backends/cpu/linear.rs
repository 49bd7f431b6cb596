//! `Linear` on the cpu: blocks of output channels go to the threads; each block is decoded once for all rows, or in
//! registers where there is only one. What is done with the elements is a [`Path`]'s affair.

use half::bf16;
use quaver_core::host::slices::{ActIn, ColsOut, ScaleIn, Slice, SliceMut, WeightIn};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::isa::Isa;

/// A way to take dot products: an instruction set, and what elements are decoded to.
pub trait Path: Copy + Send + Sync {
    /// What elements are decoded to.
    type Element: Copy + Default + Send + Sync + 'static;

    /// Elements that a row of `k` takes, zeros behind it included.
    fn padded(self, k: usize) -> usize;

    /// A row of activations, for a weight of the kind of `w`, padded with zeros.
    fn decode_x(self, x: Slice, w: Slice, into: &mut [Self::Element]);

    /// A row of a weight, padded with zeros.
    fn decode_w(self, w: Slice, into: &mut [Self::Element]);

    /// `y[n] = x[padded] . w[n, k]^T`, the weight decoded in registers.
    fn row(self, x: &[Self::Element], w: Slice, k: usize, y: &mut [f32]);

    /// `y[rows, n] = x[rows, padded] . w[n, padded]^T` for at most [`ROWS`] rows. Bit for bit what `row` gives.
    fn rows(self, x: &[Self::Element], w: &[Self::Element], padded: usize, y: &mut [f32]);
}

/// Rows that [`Path::rows`] takes at a time.
pub const ROWS: usize = 4;

/// Decoded weights that a thread keeps at a time: a part of its second-level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// Kept between calls, one a kind of element.
#[derive(Default)]
pub struct Scratch {
    bf16: Vec<bf16>,
    f32: Vec<f32>,
}

/// See [`quaver_core::reference::linear`].
pub fn linear(isa: Isa, scratch: &mut Scratch, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let narrow = |data: Slice| matches!(data, Slice::E4m3(_) | Slice::Bf16(_));
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(path) if narrow(x.data) && narrow(w.data) => run(path, &mut scratch.bf16, x, w, k, out, add),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(Avx512(path)) | Isa::Avx2(path) => run(path, &mut scratch.f32, x, w, k, out, add),
        Isa::Portable(path) => run(path, &mut scratch.f32, x, w, k, out, add),
    }
}

fn run<P: Path>(path: P, decoded: &mut Vec<P::Element>, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let (m, n, padded) = (x.data.len() / k, w.data.len() / k, path.padded(k));
    if m == 0 || n == 0 {
        return;
    }
    decoded.resize(m * padded, P::Element::default());
    let decode = |(i, row): (usize, &mut [P::Element])| path.decode_x(x.data.row(i, k), w.data, row);
    match m {
        1 => decode((0, decoded)),
        _ => decoded.par_chunks_mut(padded).enumerate().for_each(decode),
    }
    let x_decoded: &[P::Element] = decoded;
    let scales = Scales { x: x.scale, w: w.scale, add };
    let most = (BLOCK_BYTES / (padded * size_of::<P::Element>())).max(4);
    // Enough blocks that every thread gets several.
    let block = n.div_ceil(4 * rayon::current_num_threads()).min(most).next_multiple_of(4);
    let blocks = out.blocks(block).into_par_iter().enumerate();
    if m == 1 {
        blocks.for_each_init(Vec::new, |y, (i, mut out)| {
            let (first, count) = (i * block, out[0].len());
            y.resize(count, 0.0);
            path.row(x_decoded, w.data.range(first * k, count * k), k, y);
            scales.store(0, first, y, &mut out[0]);
        });
        return;
    }
    blocks.for_each_init(
        || (Vec::new(), Vec::new()),
        |(weights, y), (i, mut out)| {
            let (first, count) = (i * block, out[0].len());
            weights.resize(count * padded, P::Element::default());
            for (i, row) in weights.chunks_exact_mut(padded).enumerate() {
                path.decode_w(w.data.row(first + i, k), row);
            }
            for (i, (x, out)) in x_decoded.chunks(ROWS * padded).zip(out.chunks_mut(ROWS)).enumerate() {
                y.resize(out.len() * count, 0.0);
                path.rows(x, weights, padded, y);
                for ((row, y), out) in y.chunks_exact_mut(count).enumerate().zip(out) {
                    scales.store(i * ROWS + row, first, y, out);
                }
            }
        },
    );
}

/// What results are multiplied by on their way out, and whether they are added to what is there.
struct Scales<'a> {
    x: ScaleIn<'a>,
    w: Option<&'a [f32]>,
    add: bool,
}

impl Scales<'_> {
    /// Stores a row's products for the channels from `first` on.
    fn store(&self, row: usize, first: usize, products: &mut [f32], out: &mut SliceMut) {
        let scale = self.x.row(row);
        match self.w {
            Some(w) => products.iter_mut().zip(&w[first..]).for_each(|(y, w)| *y = *y * scale * w),
            None => products.iter_mut().for_each(|y| *y *= scale),
        }
        match out {
            SliceMut::F32(out) if self.add => out.iter_mut().zip(products).for_each(|(out, y)| *out += *y),
            out => out.store(products, 1.0),
        }
    }
}
