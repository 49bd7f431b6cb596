//! A [`Backend`] in host memory, over any set of [`Kernels`]. It owns the buffers and unpacks each op into slices that
//! are trimmed to the rows in use; what is computed is the kernels' affair. `reference` and `cpu` are its two users.

mod memory;
pub mod slices;

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use self::memory::Memory;
use self::slices::{ActIn, ActOut, ColsOut, Slice, SliceMut, WeightIn};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::op::{
    Act, Backend, Buf, BufDesc, Cols, Copies, DeviceInfo, Fetch, Heads, Op, Plan, Program, StaticScale, Weight,
};
use crate::reference;
use crate::sampler::{RowParams, Sampled};

/// Who each row is: [`crate::op::Rows`] in host memory.
#[derive(Clone, Copy)]
pub struct RowsIn<'a> {
    /// `[m]`: rows of `page_table`.
    pub seq: &'a [u32],
    /// `[m]`.
    pub position: &'a [u32],
    /// `[sequences, pages]`.
    pub page_table: &'a [u32],
    /// Pages a row of `page_table`.
    pub pages: usize,
    /// (first row, rows, seq, first position) of each run of rows of one sequence.
    pub spans: &'a [[u32; 4]],
}

impl RowsIn<'_> {
    /// The row of a KV buffer that holds `position` of sequence `seq` for key-value head `head`.
    pub fn kv_row(&self, seq: u32, position: usize, heads: Heads, head: usize, page_tokens: usize) -> usize {
        let page = self.page_table[seq as usize * self.pages + position / page_tokens] as usize;
        (page * heads.kv + head) * page_tokens + position % page_tokens
    }
}

/// One layer's cache, to read: [`crate::op::Kv`] in host memory.
#[derive(Clone, Copy)]
pub struct KvIn<'a> {
    /// `[page, kv_head, token, dim]`.
    pub k: Slice<'a>,
    /// As `k`.
    pub v: Slice<'a>,
    /// Tokens a page.
    pub page_tokens: usize,
    /// DEquantization scales of k and v; 1 where the cache is not E4M3.
    pub scales: (f32, f32),
}

/// One layer's cache, to write.
pub struct KvOut<'a> {
    /// `[page, kv_head, token, dim]`.
    pub k: SliceMut<'a>,
    /// As `k`.
    pub v: SliceMut<'a>,
    /// Tokens a page.
    pub page_tokens: usize,
    /// The scales of k and v where the cache is E4M3.
    pub scales: Option<(StaticScale, StaticScale)>,
}

/// What each op computes, on slices in host memory; m and w are given by the slices' lengths. The defaults are the
/// reference, so that a set of kernels states only what it does better.
pub trait Kernels: Send {
    /// What this runs on.
    fn describe(&self) -> DeviceInfo;

    /// Runs the ops of one step: kernels with threads of their own do so on one of them, since each op by itself would
    /// take the way there and back.
    fn step(&mut self, ops: impl FnOnce(&mut Self) + Send)
    where
        Self: Sized,
    {
        ops(self);
    }

    /// [`Op::Embed`].
    fn embed(&mut self, ids: &[u32], sampled: &[Sampled], table: Slice, d: usize, out: &mut [f32]) {
        reference::embed(ids, sampled, table, d, out);
    }
    /// [`Op::RmsNorm`].
    fn rms_norm(&mut self, x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
        reference::rms_norm(x, gamma, eps, out);
    }
    /// [`Op::Quantize`].
    fn quantize(&mut self, x: &[f32], k: usize, out: ActOut) {
        reference::quantize(x, k, out);
    }
    /// [`Op::Linear`].
    fn linear(&mut self, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
        reference::linear(x, w, k, out, add);
    }
    /// [`Op::RopeAppend`].
    fn rope_append(&mut self, qkv: Slice, rope: &[f32], rows: RowsIn, heads: Heads, q: SliceMut, kv: KvOut) {
        reference::rope_append(qkv, rope, rows, heads, q, kv);
    }
    /// [`Op::Attend`].
    fn attend(&mut self, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
        reference::attend(q, rows, heads, kv, out);
    }
    /// [`Op::SwiGlu`].
    fn swiglu(&mut self, gate_up: Slice, f: usize, out: ActOut) {
        reference::swiglu(gate_up, f, out);
    }
    /// [`Op::Sample`]; `history` is `[sequences, vocab]`.
    fn sample(&mut self, logits: &[f32], params: &[RowParams], mask: &[u32], history: &mut [u32], out: &mut [Sampled]) {
        reference::sample(logits, params, mask, history, out);
    }
}

/// A host backend; see the module.
pub struct HostBackend<K> {
    kernels: K,
    memory: Memory,
    plans: Vec<Recorded>,
    /// Copies that were not taken yet.
    fetched: Copies<Vec<u8>>,
}

/// A program, and how many spans the smallest of its `spans` buffers holds.
struct Recorded {
    program: Program,
    spans: usize,
}

/// How much of a program's sizes is in use this step.
#[derive(Clone, Copy)]
struct Live {
    rows: usize,
    wanted: usize,
    spans: usize,
}

impl<K: Kernels> HostBackend<K> {
    /// A backend without buffers.
    pub fn new(kernels: K) -> Self {
        HostBackend { kernels, memory: Memory::default(), plans: Vec::new(), fetched: Copies::default() }
    }

    fn fail(&self, why: String) -> Error {
        Error::device(self.kernels.describe().backend, why)
    }

    fn bytes(&self, src: Buf, range: Range<usize>) -> Result<&[u8]> {
        let is_whole = self.memory.find(src).is_some() && !self.memory.is_split(src);
        let bytes = is_whole.then(|| self.memory.bytes(src)).and_then(|bytes| bytes.get(range.clone()));
        bytes.ok_or_else(|| self.fail(format!("bytes {range:?} of buffer {} cannot be read", src.0)))
    }

    fn live(&self, Recorded { program, spans }: &Recorded) -> Result<Live> {
        let words = self.memory.u32s(program.live);
        let live = Live { rows: words[0] as usize, wanted: words[1] as usize, spans: words[2] as usize };
        if live.rows > program.rows || live.wanted > program.wanted || live.spans > *spans {
            let limits = format!("{} rows, {} wanted ones and {spans} spans", program.rows, program.wanted);
            let Live { rows, wanted, spans } = live;
            let why =
                format!("a step of {rows} rows, {wanted} wanted ones and {spans} spans, in a program of {limits}");
            return Err(self.fail(why));
        }
        Ok(live)
    }
}

fn execute(kernels: &mut impl Kernels, memory: &mut Memory, op: &Op, live: Live) {
    match *op {
        Op::Embed { ids, sampled, table, out } => {
            let d = memory.desc(out).cols;
            memory.write_rows(out, live.rows, |memory, out| {
                let (ids, sampled) = (&memory.u32s(ids)[..live.rows], cast_slice(memory.u32s(sampled)));
                kernels.embed(ids, sampled, memory.slice(table), d, out.into_f32());
            });
        }
        Op::RmsNorm { x, gamma, eps, out } => {
            let (m, d) = (memory.live_rows(x, live), memory.desc(x).cols);
            memory.write_act(out, m, |memory, out| {
                kernels.rms_norm(&memory.f32s(x)[..m * d], memory.f32s(gamma), eps, out);
            });
        }
        Op::Quantize { x, out } => {
            let (m, k) = (memory.live_rows(x, live), memory.desc(x).cols);
            memory.write_act(out, m, |memory, out| kernels.quantize(&memory.f32s(x)[..m * k], k, out));
        }
        Op::Linear { x, w, out, add } => linear(kernels, memory, x, w, out, add, live),
        Op::RopeAppend { qkv, rope, rows, heads, q, kv } => {
            let dtype = memory.desc(kv.k).dtype;
            let [mut k, mut v] = [kv.k, kv.v].map(|buf| memory.take(buf));
            let cache = KvOut {
                k: SliceMut::new(dtype, cast_slice_mut(&mut k)),
                v: SliceMut::new(dtype, cast_slice_mut(&mut v)),
                page_tokens: kv.page_tokens,
                scales: kv.scales,
            };
            memory.write_rows(q, live.rows, |memory, q| {
                let (qkv, rows) = (memory.rows(qkv, live.rows), memory.rows_in(rows, live));
                kernels.rope_append(qkv, memory.f32s(rope), rows, heads, q, cache);
            });
            memory.put(kv.k, k);
            memory.put(kv.v, v);
        }
        Op::Attend { q, rows, heads, kv, out } => memory.write_act(out, live.rows, |memory, out| {
            kernels.attend(memory.rows(q, live.rows), memory.rows_in(rows, live), heads, memory.kv_in(kv), out);
        }),
        Op::SwiGlu { gate_up, out } => {
            let (m, f) = (memory.live_rows(gate_up, live), memory.desc(gate_up).cols / 2);
            memory.write_act(out, m, |memory, out| kernels.swiglu(memory.rows(gate_up, m), f, out));
        }
        Op::Gather { x, wanted, out } => {
            let d = memory.desc(x).cols;
            memory.write_rows(out, live.wanted, |memory, out| {
                let (x, wanted) = (memory.f32s(x), &memory.u32s(wanted)[..live.wanted]);
                for (row, &from) in out.into_f32().chunks_exact_mut(d).zip(wanted) {
                    row.copy_from_slice(&x[from as usize * d..][..d]);
                }
            });
        }
        Op::Sample { logits, params, mask, history, out } => {
            let mut counts = memory.take(history);
            memory.write_words(out, |memory, out| {
                let logits = memory.rows(logits, live.wanted);
                let Slice::F32(logits) = logits else { unreachable!("checked by record") };
                let params = &cast_slice(memory.u32s(params))[..live.wanted];
                let mask = memory.u32s(mask);
                kernels.sample(logits, params, mask, &mut counts, &mut cast_slice_mut(out)[..live.wanted]);
            });
            memory.put(history, counts);
        }
        Op::CopyPages { kv, page_rows, pairs } => {
            for buf in [kv.k, kv.v] {
                let page = page_rows * memory.desc(buf).cols * memory.desc(buf).dtype.size();
                let mut cache = memory.take(buf);
                reference::copy_pages(cast_slice_mut(&mut cache), page, memory.u32s(pairs));
                memory.put(buf, cache);
            }
        }
        Op::AbsMax { x, out } => {
            let n = memory.live_rows(x, live) * memory.desc(x).cols;
            memory.write_rows(out, 1, |memory, out| reference::abs_max(&memory.f32s(x)[..n], out.into_f32()));
        }
    }
}

fn linear(kernels: &mut impl Kernels, memory: &mut Memory, x: Act, w: Weight, out: Cols, add: bool, live: Live) {
    let (m, stride) = (memory.live_rows(out.buf, live), memory.desc(out.buf).cols);
    let (data, scale) = match w {
        Weight::Real(data) => (data, None),
        Weight::Fp8 { codes, scale } => (codes, Some(scale)),
    };
    let BufDesc { dtype, rows, cols: k, .. } = *memory.desc(data);
    memory.write_rows(out.buf, m, |memory, y| {
        let parts: Vec<_> = memory.parts(data).map(|part| Slice::new(dtype, part)).collect();
        let w = WeightIn { parts: &parts, scale: scale.map(|scale| memory.f32s(scale)) };
        let out = ColsOut { data: y, stride, first: out.first, n: rows.capacity() };
        kernels.linear(memory.act(x, m), w, k, out, add);
    });
}

impl<K: Kernels> Backend for HostBackend<K> {
    fn describe(&self) -> DeviceInfo {
        self.kernels.describe()
    }

    fn supports(&self, _op: &Op) -> Result<()> {
        Ok(())
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        let remedy = "lower --max-model-len, --max-num-seqs, --max-num-batched-tokens or --kv-cache-memory";
        let why = || format!("there is no memory for the {} bytes of {}; {remedy}", desc.bytes(), desc.name);
        self.memory.alloc(desc).ok_or_else(|| self.fail(why()))
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        let (got, row) = (parts.iter().map(|part| part.len()).sum::<usize>(), desc.cols * desc.dtype.size());
        if got != desc.bytes() || parts.is_empty() || parts.iter().any(|part| part.len() % row != 0) {
            let (name, need) = (&desc.name, desc.bytes());
            return Err(self.fail(format!("{name} takes {need} bytes in whole rows, {got} were given")));
        }
        Ok(self.memory.share(desc, parts))
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        let range = offset..offset + bytes.len();
        match self.memory.bytes_mut(dst).and_then(|buffer| buffer.get_mut(range.clone())) {
            Some(buffer) => buffer.copy_from_slice(bytes),
            None => return Err(self.fail(format!("bytes {range:?} of buffer {} cannot be written", dst.0))),
        }
        Ok(())
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        program.check(|buf| self.memory.find(buf))?;
        for (i, line) in program.lines.iter().enumerate() {
            let fail = |buf, what| {
                let why = format!("{} is {what}", self.memory.desc(buf).name);
                Err(Error::Program { line: i, op: line.label.clone(), why })
            };
            let weight = match line.op {
                Op::Linear { w: Weight::Real(data) | Weight::Fp8 { codes: data, .. }, .. } => Some(data),
                _ => None,
            };
            let reads = line.op.reads();
            if let Some(&buf) = reads.iter().find(|&&buf| Some(buf) != weight && self.memory.is_split(buf)) {
                return fail(buf, "in several parts, which only the weight of a linear may be");
            }
            if let Some(&buf) = line.op.writes().iter().find(|&&buf| self.memory.is_constant(buf)) {
                return fail(buf, "a constant");
            }
        }
        let spans = program.lines.iter().filter_map(|line| match line.op {
            Op::RopeAppend { rows, .. } | Op::Attend { rows, .. } => Some(self.memory.desc(rows.spans).rows.capacity()),
            _ => None,
        });
        let spans = spans.min().unwrap_or(usize::MAX);
        self.plans.push(Recorded { program: program.clone(), spans });
        Ok(Plan(self.plans.len() as u32 - 1))
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        let Some(recorded) = self.plans.get(plan.0 as usize) else {
            return Err(self.fail(format!("there is no plan {}", plan.0)));
        };
        let live = self.live(recorded)?;
        let (memory, lines) = (&mut self.memory, &recorded.program.lines);
        self.kernels.step(|kernels| lines.iter().for_each(|line| execute(kernels, memory, &line.op, live)));
        Ok(())
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        let bytes = self.bytes(src, offset..offset + bytes)?.to_vec();
        Ok(self.fetched.keep(bytes))
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        let bytes = self.fetched.take(&fetch).filter(|bytes| bytes.len() == into.len());
        let bytes = bytes.ok_or_else(|| self.fail(format!("there is no copy {} of {} bytes", fetch.0, into.len())))?;
        into.copy_from_slice(&bytes);
        Ok(())
    }

    fn read(&mut self, src: Buf, offset: usize, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(self.bytes(src, offset..offset + into.len())?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{DType, Extent, Kv, Rows};
    use crate::reference::Reference;

    #[test]
    fn a_buffer_larger_than_memory_is_refused() {
        let desc = BufDesc::new("cache", DType::F32, Extent::Fixed(1 << 30), 1 << 30);
        let error = Reference::open().alloc(&desc).unwrap_err();
        assert_eq!(
            error.to_string(),
            "reference: there is no memory for the 4611686018427387904 bytes of cache; lower --max-model-len, \
             --max-num-seqs, --max-num-batched-tokens or --kv-cache-memory"
        );
    }

    #[test]
    fn a_step_larger_than_its_program_is_refused() {
        let mut backend = Reference::open();
        let mut alloc = |name: &str, dtype, rows, cols| backend.alloc(&BufDesc::new(name, dtype, rows, cols)).unwrap();
        let (rows, fixed) = (Extent::Rows(4), Extent::Fixed(4));
        let live = alloc("live", DType::U32, Extent::Fixed(1), 3);
        let who = Rows {
            seq: alloc("seq", DType::U32, rows, 1),
            position: alloc("position", DType::U32, rows, 1),
            page_table: alloc("page_table", DType::U32, Extent::Fixed(2), 1),
            spans: alloc("spans", DType::U32, Extent::Fixed(2), 4),
        };
        let (q, out) = (alloc("q", DType::F32, rows, 2), alloc("out", DType::F32, rows, 2));
        let [k, v] = ["k", "v"].map(|name| alloc(name, DType::F32, fixed, 2));
        let kv = Kv { k, v, page_tokens: 2, scales: None };
        let mut program = Program::new(3, 0, live);
        let heads = Heads { q: 1, kv: 1, dim: 2 };
        program.push("attend", Op::Attend { q, rows: who, heads, kv, out: Act::Real(out) });
        let plan = backend.record(&program).unwrap();
        for (step, fits) in [([3u32, 0, 2], true), ([4, 0, 2], false), ([3, 1, 2], false), ([3, 0, 3], false)] {
            backend.write(live, 0, cast_slice(&step)).unwrap();
            let result = backend.run(plan);
            let [rows, wanted, spans] = step;
            let why = format!(
                "reference: a step of {rows} rows, {wanted} wanted ones and {spans} spans, in a program of 3 rows, 0 \
                 wanted ones and 2 spans"
            );
            assert_eq!(result.map(drop).map_err(|e| e.to_string()), if fits { Ok(()) } else { Err(why) });
        }
    }

    #[test]
    fn reading_a_constant_in_several_parts_is_refused() {
        let mut backend = Reference::open();
        let parts = [vec![1u8; 4], vec![2u8; 8]].map(Bytes::from);
        let buf = backend.load(&BufDesc::new("w", DType::F32, Extent::Fixed(3), 1), &parts).unwrap();
        let error = backend.read(buf, 0, &mut [0; 12]).unwrap_err();
        assert_eq!(error.to_string(), "reference: bytes 0..12 of buffer 0 cannot be read");
    }
}
