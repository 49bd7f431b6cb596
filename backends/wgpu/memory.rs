//! The buffers of a device: allocation, upload, and the host's bytes in and out of the device's layout.

use std::collections::HashMap;
use std::ops::Range;

use ::wgpu::{Buffer, BufferSize, BufferUsages};
use bytemuck::cast_slice_mut;
use quaver_core::Result;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Buf, BufDesc};

use super::gpu::{Gpu, Readback};
use super::layout::{Layout, Layouts};

/// Bytes that an upload stages at a time.
const STAGE: usize = 8 << 20;

/// Bytes that are staged before the device is waited for, so that loading a model needs no second copy of it.
const IN_FLIGHT: usize = 64 << 20;

/// See the module.
pub struct Memory {
    pub layouts: Layouts,
    /// Bytes of a part of a buffer, at most.
    most_bound: u64,
    buffers: Vec<Resident>,
    /// Bytes staged since the device was last waited for.
    staged: usize,
    /// What was last written to buffers of three words: a program's `live` is one of them.
    threes: HashMap<Buf, [u32; 3]>,
}

struct Resident {
    /// One for each part of the layout.
    parts: Vec<Buffer>,
    is_constant: bool,
}

impl Memory {
    /// No buffers, none to have a part of more than so many bytes, or than the device binds.
    pub fn new(gpu: &Gpu, most_bound: u64) -> Self {
        let limits = gpu.device.limits();
        Memory {
            layouts: Layouts::default(),
            most_bound: most_bound.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size),
            buffers: Vec::new(),
            staged: 0,
            threes: HashMap::new(),
        }
    }

    /// The device's buffer of a part.
    pub fn part(&self, buf: Buf, part: usize) -> &Buffer {
        &self.buffers[buf.0 as usize].parts[part]
    }

    /// True where the buffer was loaded and must not be written.
    pub fn is_constant(&self, buf: Buf) -> bool {
        self.buffers[buf.0 as usize].is_constant
    }

    /// The three words of a program's `live` buffer.
    pub fn live(&self, buf: Buf) -> [u32; 3] {
        self.threes.get(&buf).copied().unwrap_or_default()
    }

    /// A zeroed buffer.
    pub fn alloc(&mut self, gpu: &Gpu, desc: &BufDesc, is_constant: bool) -> Result<Buf> {
        let layout = Layout::new(desc, self.most_bound);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let parts = (0..layout.parts.len()).map(|part| gpu.buffer(&desc.name, layout.part_bytes(part), usage));
        self.buffers.push(Resident { parts: parts.collect::<Result<_>>()?, is_constant });
        Ok(self.layouts.push(layout))
    }

    /// A constant from parts of consecutive rows.
    pub fn load(&mut self, gpu: &Gpu, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        let (got, row) = (parts.iter().map(|part| part.len()).sum::<usize>(), desc.cols * desc.dtype.size());
        if got != desc.bytes() || parts.is_empty() || parts.iter().any(|part| part.len() % row != 0) {
            let (name, need) = (&desc.name, desc.bytes());
            return Err(gpu.error(format!("{name} takes {need} bytes in whole rows, {got} were given")));
        }
        let buf = self.alloc(gpu, desc, true)?;
        let mut first = 0;
        for part in parts {
            for chunk in part.chunks((STAGE / row).max(1) * row) {
                self.upload(gpu, buf, first, chunk)?;
                first += chunk.len() / row;
            }
        }
        Ok(buf)
    }

    /// Writes whole rows from `first` on.
    fn upload(&mut self, gpu: &Gpu, buf: Buf, first: usize, mut rows: &[u8]) -> Result<()> {
        let Memory { layouts, buffers, staged, .. } = self;
        let layout = layouts.get(buf);
        let mut first = first;
        for (range, buffer) in layout.parts.iter().zip(&buffers[buf.0 as usize].parts) {
            let count = range.end.saturating_sub(first).min(rows.len() / layout.row);
            if first < range.start || count == 0 {
                continue;
            }
            let (own, rest) = rows.split_at(count * layout.row);
            let offset = ((first - range.start) * layout.stride) as u64;
            let size = BufferSize::new((count * layout.stride) as u64).expect("at least one row of one element");
            let view = gpu.queue.write_buffer_with(buffer, offset, size);
            gpu.check()?;
            let mut view = view.ok_or_else(|| gpu.error("there is no memory to stage an upload in"))?;
            match layout.is_plain() {
                true => view.copy_from_slice(own),
                false => view.copy_from_slice(&layout.pad(own)),
            }
            (first, rows) = (first + count, rest);
            *staged += count * layout.stride;
        }
        if *staged > IN_FLIGHT {
            gpu.queue.submit([]);
            gpu.wait()?;
            *staged = 0;
        }
        Ok(())
    }

    /// Overwrites bytes of a buffer.
    pub fn write(&mut self, gpu: &mut Gpu, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        gpu.is_there()?;
        let range = offset..offset + bytes.len();
        let is_known = self.layouts.find(dst).is_some_and(|layout| range.end <= layout.desc.bytes());
        if !is_known || self.is_constant(dst) {
            return Err(gpu.error(format!("bytes {range:?} of buffer {} cannot be written", dst.0)));
        }
        let row = self.layouts.get(dst).row;
        if bytes.is_empty() {
            return Ok(());
        }
        if self.layouts.desc(dst).bytes() == 12 {
            let words = self.threes.entry(dst).or_default();
            cast_slice_mut(words)[offset..][..bytes.len()].copy_from_slice(bytes);
        }
        if [row, offset, bytes.len()].iter().all(|n| n.is_multiple_of(4)) && self.layouts.get(dst).is_plain() {
            return self.write_plain(gpu, dst, offset, bytes);
        }
        // What shares rows with others is read first.
        let rows = offset / row..range.end.div_ceil(row);
        let mut whole = vec![0; rows.len() * row];
        if !(offset.is_multiple_of(row) && range.end.is_multiple_of(row)) {
            let start = rows.start * row;
            let copy = self.fetch(gpu, dst, start..start + whole.len())?;
            Self::take(gpu, copy, &mut whole)?;
        }
        whole[offset - rows.start * row..][..bytes.len()].copy_from_slice(bytes);
        self.upload(gpu, dst, rows.start, &whole)
    }

    /// Overwrites words of a buffer that lies as the host sees it.
    fn write_plain(&self, gpu: &Gpu, dst: Buf, offset: usize, mut bytes: &[u8]) -> Result<()> {
        let layout = self.layouts.get(dst);
        let mut offset = offset;
        for (part, range) in layout.parts.iter().enumerate() {
            let (start, end) = (range.start * layout.stride, range.end * layout.stride);
            let count = end.saturating_sub(offset).min(bytes.len());
            if offset < start || count == 0 {
                continue;
            }
            let (own, rest) = bytes.split_at(count);
            gpu.queue.write_buffer(self.part(dst, part), (offset - start) as u64, own);
            (offset, bytes) = (offset + count, rest);
        }
        gpu.check()
    }

    /// Queues a copy of bytes of a buffer.
    pub fn fetch(&self, gpu: &mut Gpu, src: Buf, range: Range<usize>) -> Result<Copy> {
        let Some(layout) = self.layouts.find(src).filter(|layout| range.end <= layout.desc.bytes()) else {
            return Err(gpu.error(format!("bytes {range:?} of buffer {} cannot be read", src.0)));
        };
        let rows = range.start / layout.row..range.end.div_ceil(layout.row);
        let (mut pieces, mut runs) = (Vec::new(), Vec::new());
        for (part, own) in layout.parts.iter().enumerate() {
            let rows = rows.start.max(own.start)..rows.end.min(own.end);
            if rows.is_empty() || range.is_empty() {
                continue;
            }
            let device = (rows.start - own.start) * layout.stride..(rows.end - own.start) * layout.stride;
            let first = rows.start * layout.row;
            // A plain buffer is read from the first word on that is asked for, any other in whole rows.
            let (skip, end, run) = match layout.is_plain() {
                true => {
                    let skip = range.start.saturating_sub(first) / 4 * 4;
                    let end = device.end.min((range.end - own.start * layout.row).next_multiple_of(4));
                    (skip, end, end - device.start - skip)
                }
                false => (0, device.end, layout.row),
            };
            let start = device.start + skip;
            let bytes = (end - start).next_multiple_of(4);
            pieces.push((self.part(src, part), start as u64..(start + bytes) as u64));
            runs.push(Run {
                first: first + skip,
                bytes,
                run,
                stride: if layout.is_plain() { bytes } else { layout.stride },
            });
        }
        Ok(Copy { readback: gpu.fetch(&pieces)?, range, runs })
    }

    /// Waits for a copy.
    pub fn take(gpu: &mut Gpu, copy: Copy, into: &mut [u8]) -> Result<()> {
        let Copy { readback, range, runs } = copy;
        gpu.take(readback, |mut bytes| {
            for Run { first, bytes: len, run, stride } in runs {
                let (own, rest) = bytes.split_at(len);
                for (i, own) in own.chunks(stride).enumerate() {
                    place(&range, into, first + i * run, &own[..run.min(own.len())]);
                }
                bytes = rest;
            }
        })
    }
}

/// A copy of a range of a buffer that is under way.
pub struct Copy {
    readback: Readback,
    range: Range<usize>,
    runs: Vec<Run>,
}

impl Copy {
    /// Bytes that were asked for.
    pub fn len(&self) -> usize {
        self.range.len()
    }
}

/// Rows that lie one behind the other in a copy, `bytes` in all: `run` bytes every `stride`, which in the buffer, as the
/// host sees it, follow each other from byte `first` on.
struct Run {
    first: usize,
    bytes: usize,
    run: usize,
    stride: usize,
}

/// Copies what lies in `range` of `bytes`, which begin at `first`, to its place in `into`.
fn place(range: &Range<usize>, into: &mut [u8], first: usize, bytes: &[u8]) {
    let (start, end) = (first.max(range.start), (first + bytes.len()).min(range.end));
    if start < end {
        into[start - range.start..end - range.start].copy_from_slice(&bytes[start - first..end - first]);
    }
}
