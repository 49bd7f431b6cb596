//! What an op takes at least: bytes that must come from memory, and arithmetic. Bytes over the bandwidth and operations
//! over the rate are the floor that its time is held against.

use crate::op::{Buf, BufDesc, Extent, Op, Weight};

/// Bytes and operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Weights, tables and cache that are read or written, each once. What one op leaves to the next is not counted:
    /// it is small, and stays in the caches of the device.
    pub bytes: u64,
    /// Multiplications and additions of the matrix products; everything else is small beside them.
    pub flops: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, more: Cost) {
        self.bytes += more.bytes;
        self.flops += more.flops;
    }
}

/// The size of one step: what is in use of a program's rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Rows.
    pub rows: u64,
    /// Rows whose logits are wanted.
    pub wanted: u64,
    /// (first row, rows, seq, first position) of each run of rows of one sequence.
    pub spans: Vec<[u32; 4]>,
}

impl Work {
    /// Positions that the spans' sequences have, those of this step included: what attention reads once.
    fn cached(&self) -> u64 {
        self.spans.iter().map(|&[_, rows, _, position]| u64::from(rows) + u64::from(position)).sum()
    }

    /// Positions that all rows attend to.
    fn attended(&self) -> u64 {
        let row = |&[_, rows, _, position]: &[u32; 4]| {
            let (rows, position) = (u64::from(rows), u64::from(position));
            rows * position + rows * (rows + 1) / 2
        };
        self.spans.iter().map(row).sum()
    }
}

/// What an op takes for a step; `desc` gives its buffers.
pub fn cost<'a>(op: &Op, work: &Work, desc: impl Fn(Buf) -> &'a BufDesc) -> Cost {
    let row_bytes = |buf| (desc(buf).cols * desc(buf).dtype.size()) as u64;
    let whole = |buf| desc(buf).bytes() as u64;
    let live = |buf| match desc(buf).rows {
        Extent::Rows(_) => work.rows,
        Extent::Wanted(_) => work.wanted,
        Extent::Fixed(rows) => rows as u64,
    };
    match *op {
        Op::Embed { table, .. } => Cost { bytes: work.rows * row_bytes(table), flops: 0 },
        Op::RmsNorm { gamma, .. } => Cost { bytes: whole(gamma), flops: 0 },
        Op::Linear { w, out, .. } => {
            let (data, scale) = match w {
                Weight::Real(data) => (data, 0),
                Weight::Fp8 { codes, scale } => (codes, whole(scale)),
            };
            let elements = (desc(data).rows.capacity() * desc(data).cols) as u64;
            Cost { bytes: whole(data) + scale, flops: 2 * live(out.buf) * elements }
        }
        Op::RopeAppend { rope, heads, kv, .. } => {
            let cache = heads.kv as u64 * (row_bytes(kv.k) + row_bytes(kv.v));
            Cost { bytes: work.rows * (row_bytes(rope) + cache), flops: 0 }
        }
        Op::Attend { heads, kv, .. } => Cost {
            bytes: work.cached() * heads.kv as u64 * (row_bytes(kv.k) + row_bytes(kv.v)),
            flops: 4 * work.attended() * (heads.q * heads.dim) as u64,
        },
        Op::CopyPages { kv, page_rows, pairs } => {
            let page = page_rows as u64 * (row_bytes(kv.k) + row_bytes(kv.v));
            Cost { bytes: 2 * page * live(pairs), flops: 0 }
        }
        Op::Quantize { .. } | Op::SwiGlu { .. } | Op::Gather { .. } | Op::Sample { .. } | Op::AbsMax { .. } => {
            Cost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Act, Cols, DType, Heads, Kv, Rows};

    #[test]
    fn a_linear_reads_its_weight_once_and_multiplies_it_with_every_row() {
        let descs = [
            BufDesc::new("x", DType::E4m3, Extent::Rows(64), 32),
            BufDesc::new("w", DType::E4m3, Extent::Fixed(10), 32),
            BufDesc::new("scale", DType::F32, Extent::Fixed(10), 1),
            BufDesc::new("y", DType::F32, Extent::Rows(64), 10),
        ];
        let w = Weight::Fp8 { codes: Buf(1), scale: Buf(2) };
        let op = Op::Linear { x: Act::Real(Buf(0)), w, out: Cols { buf: Buf(3), first: 0 }, add: false };
        let work = Work { rows: 7, wanted: 1, spans: vec![[0, 7, 0, 0]] };
        let got = cost(&op, &work, |buf| &descs[buf.0 as usize]);
        assert_eq!(got, Cost { bytes: 320 + 40, flops: 2 * 7 * 320 });
    }

    #[test]
    fn attention_reads_each_cached_position_once_and_attends_causally() {
        let cache = |name: &str| BufDesc::new(name, DType::Bf16, Extent::Fixed(4096), 8);
        let descs = [cache("k"), cache("v")];
        let (any, heads) = (Buf(0), Heads { q: 6, kv: 3, dim: 8 });
        let rows = Rows { seq: any, position: any, page_table: any, spans: any };
        let kv = Kv { k: Buf(0), v: Buf(1), page_tokens: 16, scales: None };
        let op = Op::Attend { q: any, rows, heads, kv, out: Act::Real(any) };
        // A prompt's three rows behind 10 positions, and a decode row behind 99.
        let work = Work { rows: 4, wanted: 2, spans: vec![[0, 3, 0, 10], [3, 1, 1, 99]] };
        let got = cost(&op, &work, |buf| &descs[buf.0 as usize]);
        let attended = 11 + 12 + 13 + 100;
        assert_eq!(got, Cost { bytes: (13 + 100) * 3 * 8 * 2 * 2, flops: 4 * attended * 6 * 8 });
    }
}
