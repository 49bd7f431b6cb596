//! How a buffer lies in device memory. Rows of matrices are padded with zeros to whole blocks of 16
//! elements, so that kernels read whole vectors; a buffer beyond what can be bound at once is several, of whole rows each.

use std::ops::Range;

use quaver_core::op::{Buf, BufDesc, DType};

/// Elements that rows are padded to (`dtype.wgsl`).
const BLOCK: usize = 16;

/// The layout of one buffer.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What it holds.
    pub desc: BufDesc,
    /// Bytes of a row as the host sees it.
    pub row: usize,
    /// Bytes from one row to the next on the device.
    pub stride: usize,
    /// The rows of each part; never empty.
    pub parts: Vec<Range<usize>>,
}

impl Layout {
    /// The layout of a buffer whose parts have at most `limit` bytes each.
    pub fn new(desc: &BufDesc, limit: u64) -> Self {
        let row = desc.cols * desc.dtype.size();
        // Words that an op indexes one by one, and columns of numbers, are packed.
        let is_packed = desc.dtype == DType::U32 || (desc.dtype == DType::F32 && desc.cols == 1);
        let stride = if is_packed { row } else { desc.cols.next_multiple_of(BLOCK) * desc.dtype.size() };
        let rows = desc.rows.capacity();
        let most = ((limit as usize) / stride.max(1)).max(1);
        let first = (0..rows.max(1)).step_by(most);
        let parts = first.map(|first| first..(first + most).min(rows)).collect();
        Layout { desc: desc.clone(), row, stride, parts }
    }

    /// Bytes of a part.
    pub fn part_bytes(&self, part: usize) -> u64 {
        (self.parts[part].len() * self.stride) as u64
    }

    /// Words from one row to the next.
    pub fn row_words(&self) -> u32 {
        (self.stride / 4) as u32
    }

    /// True where the host's bytes are the device's.
    pub fn is_plain(&self) -> bool {
        self.row == self.stride
    }

    /// Rows as the host has them, laid out for the device.
    pub fn pad(&self, rows: &[u8]) -> Vec<u8> {
        let mut padded = vec![0; rows.len() / self.row * self.stride];
        for (to, from) in padded.chunks_exact_mut(self.stride).zip(rows.chunks_exact(self.row)) {
            to[..self.row].copy_from_slice(from);
        }
        padded
    }
}

/// The layouts of a backend's buffers, by their numbers.
#[derive(Debug, Default)]
pub struct Layouts(Vec<Layout>);

impl Layouts {
    /// Adds one.
    pub fn push(&mut self, layout: Layout) -> Buf {
        self.0.push(layout);
        Buf(self.0.len() as u32 - 1)
    }

    /// A buffer's, where there is one.
    pub fn find(&self, buf: Buf) -> Option<&Layout> {
        self.0.get(buf.0 as usize)
    }

    /// The layout of a buffer that `Program::check` has seen.
    pub fn get(&self, buf: Buf) -> &Layout {
        &self.0[buf.0 as usize]
    }

    /// Its description.
    pub fn desc(&self, buf: Buf) -> &BufDesc {
        &self.get(buf).desc
    }
}
