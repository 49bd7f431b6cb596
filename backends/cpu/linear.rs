//! `Linear` on the cpu: blocks of output channels go to the threads; each block is decoded once for all rows, or in
//! registers where there is only one. What is done with the elements is a [`Path`]'s affair.

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use quaver_core::host::slices::{ActIn, ColsOut, Slice, SliceMut, WeightIn};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::isa::Isa;
use super::vector::{Math, Work};

/// A way to take dot products: an instruction set, and what elements are decoded to.
pub trait Path: Copy + Send + Sync {
    /// What elements are decoded to.
    type Element: Pod + Send + Sync;

    /// Rows of a tile, at most [`MOST_ROWS`].
    const ROWS: usize;

    /// Elements that are summed in registers before their sum is added to that of earlier ones.
    const CHUNK: usize;

    /// Elements that a row of `k` takes, zeros behind it included: whole lines.
    fn padded(self, k: usize) -> usize;

    /// A row of activations, for a weight of the kind of `w`, padded with zeros.
    fn decode_x(self, x: Slice, w: Slice, into: &mut [Self::Element]);

    /// A row of a weight, padded with zeros.
    fn decode_w(self, w: Slice, into: &mut [Self::Element]);

    /// `y[n] = x[padded] . w[n, k]^T`, the weight decoded in registers.
    fn row(self, x: &[Self::Element], w: Slice, k: usize, y: &mut [f32]);

    /// The products of the rows of a panel with the channels of one, a chunk of each: `x[lines, rows]`,
    /// `w[lines, CHANNELS]`. Bit for bit what `row` gives.
    fn tile(self, x: &[Line], w: &[Line], sums: &mut [[f32; CHANNELS]]);
}

/// Channels of a tile.
pub const CHANNELS: usize = 4;

/// Rows of the largest tile.
pub const MOST_ROWS: usize = 6;

/// A line of the cache. Rows that are multiplied together lie in a panel `[lines, rows]`: line by line side by side, so
/// that a tile reads its two panels from one end to the other, and rows never compete for the same places of the cache.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// Decoded weights that a thread keeps at a time: a part of its second-level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// Channels that a thread streams from memory at a time where there is one row: enough for long streams, few enough that
/// a thread which is held up keeps the others waiting for little.
const STREAM_CHANNELS: usize = 4096;

/// The operands of [`quaver_core::reference::linear`].
pub struct Linear<'a> {
    pub x: ActIn<'a>,
    pub w: WeightIn<'a>,
    pub k: usize,
    pub out: ColsOut<'a>,
    pub add: bool,
}

/// Computes it; `decoded` is scratch.
pub fn linear(isa: Isa, op: Linear, decoded: &mut Vec<Line>) {
    let narrow = |data: &Slice| matches!(data, Slice::E4m3(_) | Slice::Bf16(_));
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(path) if narrow(&op.x.data) && op.w.parts.iter().all(narrow) => run(isa, path, op, decoded),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(Avx512(path)) | Isa::Avx2(path) => run(isa, path, op, decoded),
        Isa::Portable(path) => run(isa, path, op, decoded),
    }
}

fn run<P: Path>(isa: Isa, path: P, Linear { x, w, k, out, add }: Linear, decoded: &mut Vec<Line>) {
    let (m, padded) = (x.data.len() / k, path.padded(k));
    if m == 0 {
        return;
    }
    let lines = padded * size_of::<P::Element>() / size_of::<Line>();
    decoded.resize(m * lines, Line::zeroed());
    let decode = |i, row: &mut [Line]| path.decode_x(x.data.row(i, k), w.parts[0], cast_slice_mut(row));
    match m {
        1 => decode(0, decoded),
        _ => decoded.par_chunks_mut(P::ROWS * lines).enumerate().for_each_init(
            || vec![Line::zeroed(); lines],
            |row, (i, panel)| pack(panel, row, |j, row| decode(i * P::ROWS + j, row)),
        ),
    }
    let x_panels: &[Line] = decoded;
    let most = match m {
        1 => STREAM_CHANNELS,
        _ => (BLOCK_BYTES / size_of::<Line>() / lines).max(CHANNELS),
    };
    // Enough blocks that every thread gets several.
    let channels = out.n.div_ceil(4 * rayon::current_num_threads()).min(most).next_multiple_of(CHANNELS);
    let blocks = blocks(w.parts, k, channels);
    let widths: Vec<_> = blocks.iter().map(|block| block.w.len() / k).collect();
    let tasks = blocks.into_par_iter().zip(out.blocks(&widths));
    let store = |row, first, products: &mut [f32], out: &mut SliceMut| {
        let w_scales = w.scale.map(|scales| &scales[first..][..products.len()]);
        isa.run(Scaled { x: x.scale.row(row), w: w_scales, products, add, out });
    };
    if m == 1 {
        tasks.for_each_init(Vec::new, |y, (block, mut out)| {
            y.resize(out[0].len(), 0.0);
            path.row(cast_slice(x_panels), block.w, k, y);
            store(0, block.first, y, &mut out[0]);
        });
        return;
    }
    tasks.for_each_init(
        Default::default,
        |(row, w_panels, y): &mut (Vec<Line>, Vec<Line>, Vec<f32>), (block, mut out)| {
            let n = out[0].len().next_multiple_of(CHANNELS);
            row.resize(lines, Line::zeroed());
            w_panels.resize(n * lines, Line::zeroed());
            // A panel that is not full is padded with its last channel.
            let channel = |i: usize| block.w.row(i.min(out[0].len() - 1), k);
            for (i, panel) in w_panels.chunks_exact_mut(CHANNELS * lines).enumerate() {
                pack(panel, row, |j, row| path.decode_w(channel(i * CHANNELS + j), cast_slice_mut(row)));
            }
            for (i, (x, out)) in x_panels.chunks(P::ROWS * lines).zip(out.chunks_mut(P::ROWS)).enumerate() {
                y.clear();
                y.resize(out.len() * n, 0.0);
                multiply(path, x, w_panels, lines, y);
                for ((j, y), out) in y.chunks_exact_mut(n).enumerate().zip(out) {
                    store(i * P::ROWS + j, block.first, &mut y[..out.len()], out);
                }
            }
        },
    );
}

/// Rows, decoded one by one into `row`, as a panel.
fn pack(panel: &mut [Line], row: &mut [Line], decode: impl Fn(usize, &mut [Line])) {
    let rows = panel.len() / row.len();
    for i in 0..rows {
        decode(i, row);
        panel[i..].iter_mut().step_by(rows).zip(&*row).for_each(|(into, line)| *into = *line);
    }
}

/// `y[rows, n] += x . w^T` of a panel of rows and the panels of `n` channels, of so many lines a row.
fn multiply<P: Path>(path: P, x: &[Line], w: &[Line], lines: usize, y: &mut [f32]) {
    let (rows, n) = (x.len() / lines, w.len() / lines);
    let chunk = P::CHUNK * size_of::<P::Element>() / size_of::<Line>();
    let mut sums = [[0.0; CHANNELS]; MOST_ROWS];
    for first in (0..lines).step_by(chunk) {
        let chunk = first..lines.min(first + chunk);
        let x = &x[chunk.start * rows..chunk.end * rows];
        for (channel, w) in (0..n).step_by(CHANNELS).zip(w.chunks_exact(CHANNELS * lines)) {
            path.tile(x, &w[chunk.start * CHANNELS..chunk.end * CHANNELS], &mut sums[..rows]);
            for (y, sums) in y.chunks_exact_mut(n).zip(&sums) {
                y[channel..][..CHANNELS].iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
            }
        }
    }
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

/// Products of a row on their way out: multiplied by the scales, and stored or added to what is there.
struct Scaled<'a, 'b> {
    x: f32,
    w: Option<&'a [f32]>,
    products: &'a mut [f32],
    add: bool,
    out: &'a mut SliceMut<'b>,
}

impl Work for Scaled<'_, '_> {
    #[inline(always)]
    fn run(self, _: impl Math) {
        let Scaled { x, w, products, add, out } = self;
        match w {
            Some(w) => {
                for (y, w) in products.iter_mut().zip(w) {
                    *y = *y * x * w;
                }
            }
            None => {
                for y in &mut *products {
                    *y *= x;
                }
            }
        }
        match out {
            SliceMut::F32(out) if add => {
                for (out, y) in out.iter_mut().zip(products) {
                    *out += *y;
                }
            }
            out => out.store(products, 1.0),
        }
    }
}
