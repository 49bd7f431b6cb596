//! The buffers of a host backend. Constants may be shared bytes in several parts (tensors that the checkpoint keeps
//! apart but one op reads together); everything else is owned words.

use bytemuck::allocation::try_zeroed_vec;
use bytemuck::{cast_slice, cast_slice_mut};

use super::slices::{ActIn, ActOut, ScaleIn, ScaleOut, Slice, SliceMut};
use super::{KvIn, Live, RowsIn};
use crate::bytes::Bytes;
use crate::op::{Act, Buf, BufDesc, DType, Extent, Kv, Rows, Scale};

#[derive(Default)]
pub(super) struct Memory {
    buffers: Vec<Buffer>,
}

struct Buffer {
    desc: BufDesc,
    parts: Vec<Part>,
    constant: bool,
}

/// Consecutive rows of a buffer.
enum Part {
    Shared(Bytes),
    Owned(Vec<u32>),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Part::Shared(bytes) => bytes,
            Part::Owned(words) => cast_slice(words),
        }
    }
}

impl Memory {
    /// A zeroed buffer, where there is memory for it. Its pages are the operating system's until they are touched.
    pub fn alloc(&mut self, desc: &BufDesc) -> Option<Buf> {
        let words = try_zeroed_vec(desc.bytes().div_ceil(4)).ok()?;
        Some(self.insert(Buffer { desc: desc.clone(), parts: vec![Part::Owned(words)], constant: false }))
    }

    /// A constant over shared bytes; a part that is not aligned for its dtype is copied.
    pub fn share(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Buf {
        let parts = parts.iter().map(|bytes| {
            if bytes.as_ptr().addr() % desc.dtype.size() == 0 {
                return Part::Shared(bytes.clone());
            }
            let mut words = vec![0u32; bytes.len().div_ceil(4)];
            cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
            Part::Owned(words)
        });
        let parts = parts.collect();
        self.insert(Buffer { desc: desc.clone(), parts, constant: true })
    }

    fn insert(&mut self, buffer: Buffer) -> Buf {
        self.buffers.push(buffer);
        Buf(self.buffers.len() as u32 - 1)
    }

    pub fn find(&self, buf: Buf) -> Option<&BufDesc> {
        self.buffers.get(buf.0 as usize).map(|buffer| &buffer.desc)
    }

    pub fn desc(&self, buf: Buf) -> &BufDesc {
        &self.buffers[buf.0 as usize].desc
    }

    /// True where a buffer is more than one run of bytes, which only the weight of a `Linear` may be.
    pub fn is_split(&self, buf: Buf) -> bool {
        self.buffers[buf.0 as usize].parts.len() != 1
    }

    /// True where the buffer was loaded and must not be written.
    pub fn is_constant(&self, buf: Buf) -> bool {
        self.buffers[buf.0 as usize].constant
    }

    pub fn parts(&self, buf: Buf) -> impl Iterator<Item = &[u8]> {
        self.buffers[buf.0 as usize].parts.iter().map(Part::bytes)
    }

    pub fn bytes(&self, buf: Buf) -> &[u8] {
        let bytes = self.buffers[buf.0 as usize].parts[0].bytes();
        &bytes[..self.desc(buf).bytes()]
    }

    pub fn bytes_mut(&mut self, buf: Buf) -> Option<&mut [u8]> {
        let buffer = self.buffers.get_mut(buf.0 as usize)?;
        match &mut buffer.parts[0] {
            Part::Owned(words) if !buffer.constant => Some(&mut cast_slice_mut(words)[..buffer.desc.bytes()]),
            _ => None,
        }
    }

    /// The words of a buffer that an op is about to write, to be given back with `put`. No op names a buffer twice, so
    /// that its inputs stay readable meanwhile.
    pub fn take(&mut self, buf: Buf) -> Vec<u32> {
        match &mut self.buffers[buf.0 as usize].parts[0] {
            Part::Owned(words) => std::mem::take(words),
            Part::Shared(_) => unreachable!("record refuses to write a constant"),
        }
    }

    pub fn put(&mut self, buf: Buf, words: Vec<u32>) {
        self.buffers[buf.0 as usize].parts[0] = Part::Owned(words);
    }

    pub fn u32s(&self, buf: Buf) -> &[u32] {
        cast_slice(self.bytes(buf))
    }

    pub fn f32s(&self, buf: Buf) -> &[f32] {
        cast_slice(self.bytes(buf))
    }

    pub fn slice(&self, buf: Buf) -> Slice<'_> {
        Slice::new(self.desc(buf).dtype, self.bytes(buf))
    }

    /// The first rows of a matrix.
    pub fn rows(&self, buf: Buf, rows: usize) -> Slice<'_> {
        self.slice(buf).range(0, rows * self.desc(buf).cols)
    }

    /// As many rows of an operand as are in use.
    pub fn live_rows(&self, buf: Buf, live: Live) -> usize {
        match self.desc(buf).rows {
            Extent::Rows(_) => live.rows,
            Extent::Wanted(_) => live.wanted,
            Extent::Fixed(rows) => rows,
        }
    }

    pub fn act(&self, act: Act, rows: usize) -> ActIn<'_> {
        let (buf, scale) = match act {
            Act::Real(buf) => (buf, ScaleIn::None),
            Act::Fp8 { codes, scale: Scale::Static(s) } => (codes, ScaleIn::Static(s.scale)),
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => (codes, ScaleIn::PerToken(&self.f32s(scale)[..rows])),
        };
        ActIn { data: self.rows(buf, rows), scale }
    }

    pub fn rows_in(&self, rows: Rows, live: Live) -> RowsIn<'_> {
        let spans: &[[u32; 4]] = cast_slice(self.u32s(rows.spans));
        RowsIn {
            seq: &self.u32s(rows.seq)[..live.rows],
            position: &self.u32s(rows.position)[..live.rows],
            page_table: self.u32s(rows.page_table),
            pages: self.desc(rows.page_table).cols,
            spans: &spans[..live.spans],
        }
    }

    pub fn kv_in(&self, kv: Kv) -> KvIn<'_> {
        KvIn {
            k: self.slice(kv.k),
            v: self.slice(kv.v),
            page_tokens: kv.page_tokens,
            scales: kv.scales.map_or((1.0, 1.0), |(k, v)| (k.scale, v.scale)),
        }
    }

    /// Runs `f` with the first `rows` rows of a matrix, to write.
    pub fn write_rows(&mut self, buf: Buf, rows: usize, f: impl FnOnce(&Memory, SliceMut)) {
        let (dtype, len) = (self.desc(buf).dtype, rows * self.desc(buf).cols);
        let mut words = self.take(buf);
        f(self, SliceMut::new(dtype, cast_slice_mut(&mut words)).first(len));
        self.put(buf, words);
    }

    /// Runs `f` with the first `rows` rows of activations, to write.
    pub fn write_act(&mut self, act: Act, rows: usize, f: impl FnOnce(&Memory, ActOut)) {
        match act {
            Act::Real(buf) => {
                self.write_rows(buf, rows, |memory, data| f(memory, ActOut { data, scale: ScaleOut::None }))
            }
            Act::Fp8 { codes, scale: Scale::Static(s) } => {
                self.write_rows(codes, rows, |memory, data| f(memory, ActOut { data, scale: ScaleOut::Static(s.inv) }));
            }
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => {
                let mut scales = self.take(scale);
                let out = ScaleOut::PerToken(&mut cast_slice_mut(&mut scales)[..rows]);
                self.write_rows(codes, rows, |memory, data| f(memory, ActOut { data, scale: out }));
                self.put(scale, scales);
            }
        }
    }

    /// As `write_rows`, for words that are no numbers.
    pub fn write_words(&mut self, buf: Buf, f: impl FnOnce(&Memory, &mut [u32])) {
        debug_assert_eq!(self.desc(buf).dtype, DType::U32);
        let mut words = self.take(buf);
        f(self, &mut words);
        self.put(buf, words);
    }
}
