//! `Linear` on the cpu: blocks of output channels go to the threads; each block is decoded once for all rows, or in
//! registers where there is only one. What is done with the elements is a [`Path`]'s affair.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable, cast_slice};
use quaver_core::host::slices::{ActIn, ColsOut, Slice, SliceMut, WeightIn};
use rayon::prelude::*;

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::simd::prefetch_far;
use super::vector::{Math, Work};

/// A way to take dot products: an instruction set, and what elements are decoded to.
pub trait Path: Copy + Send + Sync {
    /// What elements are decoded to.
    type Element: Pod;

    /// Rows of a tile, at most [`MOST_ROWS`].
    const ROWS: usize;

    /// Elements that are summed in registers before their sum is added to that of earlier ones: whole lines.
    const CHUNK: usize;

    /// Elements that a row of `k` takes, zeros behind it included: whole lines.
    fn padded(self, k: usize) -> usize;

    /// A row of activations, for a weight of the kind of `w`, to every `stride`th line, padded with zeros.
    fn decode_x(self, x: Slice, w: Slice, into: &mut [CacheLine], stride: usize);

    /// A chunk of a row of a weight, as `decode_x`.
    fn decode_w(self, w: Slice, into: &mut [CacheLine], stride: usize);

    /// `y[n] = x[padded] . w[n, k]^T`, the weight decoded in registers.
    fn row(self, x: &[Self::Element], w: Slice, k: usize, y: &mut [f32]);

    /// The products of the rows of a panel with the channels of one, a chunk of each: `x[lines, rows]`,
    /// `w[lines, CHANNELS]`. Bit for bit what `row` gives. `on_line` is called at each line.
    fn tile(self, x: &[CacheLine], w: &[CacheLine], sums: &mut [[f32; CHANNELS]], on_line: impl FnMut());
}

/// Channels of a tile.
pub const CHANNELS: usize = 4;

/// Rows of the largest tile.
pub const MOST_ROWS: usize = 6;

/// A line of the cache. Rows that are multiplied together lie in a panel `[lines, rows]`: line by line side by side, so
/// that a tile reads its two panels from one end to the other, and rows never compete for the same places of the cache.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
pub struct CacheLine(pub [u8; 64]);

/// Channels that a thread decodes at a time where there are several rows: a chunk of each is a part of the second-level
/// cache.
const BLOCK_CHANNELS: usize = 64;

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
pub fn linear(isa: Isa, op: Linear, decoded: &mut Vec<CacheLine>) {
    let narrow = |data: &Slice| matches!(data, Slice::E4m3(_) | Slice::Bf16(_));
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(path) if narrow(&op.x.data) && op.w.parts.iter().all(narrow) => run(isa, path, op, decoded),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(path) => run(isa, path.avx2(), op, decoded),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(path) => run(isa, path, op, decoded),
        Isa::Portable(path) => run(isa, path, op, decoded),
    }
}

fn run<P: Path>(isa: Isa, path: P, Linear { x, w, k, out, add }: Linear, decoded: &mut Vec<CacheLine>) {
    let m = x.data.len() / k;
    if m == 0 {
        return;
    }
    let lines = |elements| path.padded(elements) * size_of::<P::Element>() / size_of::<CacheLine>();
    // Tiles of nearly equal rows: a small one at the end would take as long as a large one.
    let tile = m.div_ceil(m.div_ceil(P::ROWS));
    decoded.resize(m * lines(k), CacheLine::zeroed());
    let decode = |(i, panel): (usize, &mut [CacheLine])| {
        let rows = tile.min(m - i * tile);
        for j in 0..rows {
            path.decode_x(x.data.row(i * tile + j, k), w.parts[0], &mut panel[j..], rows);
        }
    };
    match m {
        1 => decode((0, decoded)),
        _ => decoded.par_chunks_mut(tile * lines(k)).enumerate().for_each(decode),
    }
    let x_panels: &[CacheLine] = decoded;
    let most = if m == 1 { STREAM_CHANNELS } else { BLOCK_CHANNELS };
    // Enough blocks that every thread gets several.
    let channels = out.n.div_ceil(4 * rayon::current_num_threads()).min(most).next_multiple_of(CHANNELS);
    let blocks = blocks(w.parts, k, channels);
    let widths: Vec<_> = blocks.iter().map(|block| block.w.len() / k).collect();
    let tasks = blocks.into_par_iter().zip(out.blocks(&widths));
    let compute = |block: Block, out: Vec<SliceMut>, Scratch { panels, products }: &mut Scratch| {
        let Block { first, w: channels, after } = block;
        let count = channels.len() / k;
        let n = count.next_multiple_of(CHANNELS);
        products.clear();
        products.resize(m * n, 0.0);
        if m == 1 {
            path.row(cast_slice(x_panels), channels, k, &mut products[..count]);
        } else {
            for start in (0..k).step_by(P::CHUNK) {
                let chunk = P::CHUNK.min(k - start);
                panels.resize(n * lines(chunk), CacheLine::zeroed());
                for (i, panel) in panels.chunks_exact_mut(CHANNELS * lines(chunk)).enumerate() {
                    for j in 0..CHANNELS {
                        // A panel that is not full is padded with the last channel.
                        let channel = (i * CHANNELS + j).min(count - 1);
                        path.decode_w(channels.range(channel * k + start, chunk), &mut panel[j..], CHANNELS);
                    }
                }
                let next = if start + chunk < k {
                    channels.range(start + chunk, channels.len() - start - chunk)
                } else {
                    after
                };
                let (next, element) = (next.bytes(), channels.bytes().len() / channels.len());
                let (steps, len) = (n / CHANNELS * lines(chunk), P::CHUNK.min(k) * element);
                let mut next_channels = Ahead::new(next, count, len, k * element, m.div_ceil(tile) * steps);
                for (i, products) in products.chunks_mut(tile * n).enumerate() {
                    let rows = products.len() / n;
                    let x = &x_panels[i * tile * lines(k) + lines(start) * rows..];
                    let (x, rest) = x.split_at(lines(chunk) * rows);
                    // Behind this panel's other chunks.
                    let next = rest.get((lines(k) - lines(chunk)) * rows..).unwrap_or_default();
                    let mut next_rows = Ahead::new(cast_slice(next), 1, size_of_val(x), 0, steps);
                    let on_line = || {
                        next_channels.step();
                        next_rows.step();
                    };
                    multiply(path, x, panels, lines(chunk), products, on_line);
                }
            }
        }
        for (row, (products, mut out)) in products.chunks_exact_mut(n).zip(out).enumerate() {
            let products = &mut products[..count];
            let w = w.scale.map(|scales| &scales[first..][..count]);
            isa.run(Scaled { x: x.scale.row(row), w, products, add, out: &mut out });
        }
    };
    tasks.for_each(|(block, out)| SCRATCH.with_borrow_mut(|scratch| compute(block, out, scratch)));
}

/// What a thread computes a block in.
#[derive(Default)]
struct Scratch {
    /// The decoded channels, a chunk of each: `[channels / CHANNELS]` panels.
    panels: Vec<CacheLine>,
    /// `[m, channels]`.
    products: Vec<f32>,
}

thread_local! {
    /// Kept between calls: memory that is taken anew each time costs as much as what is computed in it.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Elsewhere the machine's own prefetching is all there is.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch_far(_: &[u8], _: usize) {}

/// Asks, step by step, for what is read next, so that memory is busy while tiles are computed, and a tile never waits for
/// more requests than the processor keeps.
struct Ahead<'a> {
    bytes: &'a [u8],
    /// Where the next line is, and where its run began.
    at: usize,
    start: usize,
    /// Bytes of a run, and from one run to the next.
    run: usize,
    stride: usize,
    /// Lines that each step asks for, and those that remain.
    a_step: usize,
    left: usize,
}

impl<'a> Ahead<'a> {
    /// For so many runs of `run` bytes, over so many steps.
    fn new(bytes: &'a [u8], runs: usize, run: usize, stride: usize, steps: usize) -> Self {
        let left = runs * run.div_ceil(size_of::<CacheLine>());
        Ahead { bytes, at: 0, start: 0, run, stride, a_step: left.div_ceil(steps), left }
    }

    #[inline]
    fn step(&mut self) {
        for _ in 0..self.a_step.min(self.left) {
            prefetch_far(self.bytes, self.at);
            self.left -= 1;
            self.at += size_of::<CacheLine>();
            if self.at >= self.start + self.run {
                self.start += self.stride;
                self.at = self.start;
            }
        }
    }
}

/// `products[rows, n] += x . w^T` of a panel of rows and the panels of `n` channels, of so many lines a row; `on_line`
/// is called at each line of a tile.
fn multiply<P: Path>(
    path: P,
    x: &[CacheLine],
    w: &[CacheLine],
    lines: usize,
    products: &mut [f32],
    mut on_line: impl FnMut(),
) {
    let (rows, n) = (x.len() / lines, w.len() / lines);
    let mut sums = [[0.0; CHANNELS]; MOST_ROWS];
    for (channel, w) in (0..n).step_by(CHANNELS).zip(w.chunks_exact(CHANNELS * lines)) {
        path.tile(x, w, &mut sums[..rows], &mut on_line);
        for (products, sums) in products.chunks_exact_mut(n).zip(&sums) {
            products[channel..][..CHANNELS].iter_mut().zip(sums).for_each(|(product, sum)| *product += sum);
        }
    }
}

/// Channels of a weight that one task computes.
struct Block<'a> {
    /// The first, counted in the whole weight.
    first: usize,
    /// `[channels, k]`.
    w: Slice<'a>,
    /// What follows.
    after: Slice<'a>,
}

/// Every part in blocks of at most so many channels.
fn blocks<'a>(parts: &[Slice<'a>], k: usize, channels: usize) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    let mut first = 0;
    for part in parts {
        let n = part.len() / k;
        let starts = (0..n).step_by(channels);
        let block = |start| {
            let end = n.min(start + channels);
            let (w, after) = (part.range(start * k, (end - start) * k), part.range(end * k, (n - end) * k));
            Block { first: first + start, w, after }
        };
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
