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

/// Channels that a thread streams from memory at a time where there is one row: enough for long streams, few enough that
/// a thread which is held up keeps the others waiting for little.
const STREAM_CHANNELS: usize = 4096;

/// Kept between calls, one a kind of element.
#[derive(Default)]
pub struct Scratch {
    bf16: Vec<bf16>,
    f32: Vec<f32>,
}

/// See [`quaver_core::reference::linear`].
pub fn linear(isa: Isa, scratch: &mut Scratch, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let narrow = |data: &Slice| matches!(data, Slice::E4m3(_) | Slice::Bf16(_));
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(path) if narrow(&x.data) && w.parts.iter().all(narrow) => {
            run(path, &mut scratch.bf16, x, w, k, out, add)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(Avx512(path)) | Isa::Avx2(path) => run(path, &mut scratch.f32, x, w, k, out, add),
        Isa::Portable(path) => run(path, &mut scratch.f32, x, w, k, out, add),
    }
}

fn run<P: Path>(path: P, decoded: &mut Vec<P::Element>, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
    let (m, padded) = (x.data.len() / k, path.padded(k));
    if m == 0 {
        return;
    }
    decoded.resize(m * padded, P::Element::default());
    let decode = |(i, row): (usize, &mut [P::Element])| path.decode_x(x.data.row(i, k), w.parts[0], row);
    match m {
        1 => decode((0, decoded)),
        _ => decoded.par_chunks_mut(padded).enumerate().for_each(decode),
    }
    let x_decoded: &[P::Element] = decoded;
    let scales = Scales { x: x.scale, w: w.scale, add };
    let most = match m {
        1 => STREAM_CHANNELS,
        _ => (BLOCK_BYTES / (padded * size_of::<P::Element>())).max(4),
    };
    // Enough blocks that every thread gets several.
    let channels = out.n.div_ceil(4 * rayon::current_num_threads()).min(most).next_multiple_of(4);
    let blocks = blocks(w.parts, k, channels);
    let widths: Vec<_> = blocks.iter().map(|block| block.w.len() / k).collect();
    let tasks = blocks.into_par_iter().zip(out.blocks(&widths));
    if m == 1 {
        tasks.for_each_init(Vec::new, |y, (block, mut out)| {
            y.resize(out[0].len(), 0.0);
            path.row(x_decoded, block.w, k, y);
            scales.store(0, block.first, y, &mut out[0]);
        });
        return;
    }
    tasks.for_each_init(
        || (Vec::new(), Vec::new()),
        |(weights, y), (block, mut out)| {
            let count = out[0].len();
            weights.resize(count * padded, P::Element::default());
            for (row, into) in block.w.rows(k).zip(weights.chunks_exact_mut(padded)) {
                path.decode_w(row, into);
            }
            for (i, (x, out)) in x_decoded.chunks(ROWS * padded).zip(out.chunks_mut(ROWS)).enumerate() {
                y.resize(out.len() * count, 0.0);
                path.rows(x, weights, padded, y);
                for ((row, y), out) in y.chunks_exact_mut(count).enumerate().zip(out) {
                    scales.store(i * ROWS + row, block.first, y, out);
                }
            }
        },
    );
}

/// Channels of a weight that one task computes.
struct Block<'a> {
    /// The first, counted in the whole weight.
    first: usize,
    /// `[channels, k]`.
    w: Slice<'a>,
}

/// Every part in blocks of at most so many channels.
fn blocks<'a>(parts: &[Slice<'a>], k: usize, channels: usize) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    let mut first = 0;
    for part in parts {
        let n = part.len() / k;
        let starts = (0..n).step_by(channels);
        let block = |start| Block { first: first + start, w: part.range(start * k, channels.min(n - start) * k) };
        blocks.extend(starts.map(block));
        first += n;
    }
    blocks
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
