//! Every word that passes between a model and a backend: buffers, ops, programs, and the [`Backend`] trait.
//!
//! The transformer is a list. A model builds a [`Program`] once: a straight list of fused ops over numbered buffers.
//! A backend records it once (chooses kernels, binds buffers, captures a graph) and runs it once a step. What changes
//! from step to step (ids, positions, page tables, how many rows are in use) lies in small input buffers that the
//! engine writes before the run. `program.rs` checks that a program's ops and buffers fit together;
//! `reference/` says what each op computes.

use std::collections::HashMap;

use crate::bytes::Bytes;
use crate::error::Result;

/// A buffer of ONE backend; its dtype and shape are in its [`BufDesc`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buf(pub u32);

/// The element types that buffers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// FP8 codes, see [`crate::e4m3`].
    E4m3,
    /// Ids, positions, pages, and words whose meaning an op defines.
    U32,
}

impl DType {
    /// Bytes an element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 => 2,
            DType::E4m3 => 1,
        }
    }
}

/// How many rows a buffer has, and what its rows stand for. Scratch is allocated once, as large as the largest step
/// needs, and shared by the programs of all sizes; an op over it covers as many rows as the program says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// One row a token of the step: a program touches its first [`Program::rows`] of these.
    Rows(usize),
    /// One row a token whose logits are wanted: a program touches its first [`Program::wanted`] of these.
    Wanted(usize),
    /// The same in every program: weights, tables, KV pages.
    Fixed(usize),
}

impl Extent {
    /// Rows that are allocated.
    pub const fn capacity(self) -> usize {
        match self {
            Extent::Rows(n) | Extent::Wanted(n) | Extent::Fixed(n) => n,
        }
    }
}

/// Dtype and shape of a buffer: a row-major matrix `[rows, cols]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufDesc {
    /// What it is called in errors, dumps and reports: the tensor's name in the checkpoint where there is one.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its rows, and what they stand for.
    pub rows: Extent,
    /// Elements a row.
    pub cols: usize,
}

impl BufDesc {
    /// A description from its parts.
    pub fn new(name: impl Into<String>, dtype: DType, rows: Extent, cols: usize) -> Self {
        BufDesc { name: name.into(), dtype, rows, cols }
    }

    /// Bytes that the whole buffer takes.
    pub const fn bytes(&self) -> usize {
        self.rows.capacity() * self.cols * self.dtype.size()
    }
}

/// Columns of a row-major buffer, from `first` on; how many is the op's to say. So q, k and v, or gate and up, are
/// written side by side by one `Linear` or by several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cols {
    /// The buffer.
    pub buf: Buf,
    /// Its first column.
    pub first: usize,
}

/// A static quantization scale: real = code x `scale`. Quantizing multiplies by `inv`, the f32 reciprocal, computed
/// here and nowhere else, so that every backend rounds alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StaticScale {
    /// The DEquantization scale.
    pub scale: f32,
    /// `1 / scale` in f32.
    pub inv: f32,
}

impl StaticScale {
    /// The scale and its reciprocal.
    pub fn new(scale: f32) -> Self {
        StaticScale { scale, inv: 1.0 / scale }
    }
}

/// The scale of FP8 activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// One for the whole tensor, from calibration.
    Static(StaticScale),
    /// One a row, `[m, 1]` f32, written by the op that quantizes: amax / 448, the f32 epsilon where that is 0 or
    /// subnormal.
    PerToken(Buf),
}

/// Activations `[m, k]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// f32 or bf16.
    Real(Buf),
    /// E4M3 codes and their scale.
    Fp8 {
        /// `[m, k]` E4M3.
        codes: Buf,
        /// The DEquantization scale.
        scale: Scale,
    },
}

/// A weight `[n, k]`, one row an output channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// f32 or bf16.
    Real(Buf),
    /// E4M3 codes with a scale an output channel (a per-tensor scale is broadcast at load).
    Fp8 {
        /// `[n, k]` E4M3.
        codes: Buf,
        /// `[n, 1]` f32, DEquantization scales.
        scale: Buf,
    },
}

/// Marks an id of [`Op::Embed`] as a row of the last step's results.
pub const CHOSEN: u32 = 1 << 31;

/// Who each row of a step is: ragged sequences, prefill and decode mixed. Rows of one sequence stand together, in the
/// order of their positions, and appear both row by row and as spans: elementwise kernels want the former, attention
/// tiles the latter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// `[m, 1]` u32: the row's sequence, as a row of `page_table`.
    pub seq: Buf,
    /// `[m, 1]` u32: the row's position in its sequence.
    pub position: Buf,
    /// `[sequences, pages]` u32: the page that holds positions `i * page_tokens ..` of a sequence.
    pub page_table: Buf,
    /// `[sequences, 4]` u32: (first row, rows, seq, first position) of each run of rows of one sequence, in the
    /// order of the rows, all of them.
    pub spans: Buf,
}

/// Attention heads: `q` query heads share `kv` key-value heads, in groups of `q / kv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key-value heads.
    pub kv: usize,
    /// Elements a head.
    pub dim: usize,
}

/// The KV cache of one layer: pages of `page_tokens` positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kv {
    /// Keys after RoPE, `[page, kv_head, token, dim]` flattened to rows of `dim`; f32, bf16 or E4M3.
    pub k: Buf,
    /// Values, shaped as `k`.
    pub v: Buf,
    /// Tokens a page.
    pub page_tokens: usize,
    /// The scales of K and V where the cache is E4M3.
    pub scales: Option<(StaticScale, StaticScale)>,
}

/// One fused operation. m is the number of rows of the step, w of those whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// `out[i] = table[ids[i]]`.
    Embed {
        /// `[m, 1]` u32: tokens; or [`CHOSEN`] + a row of `sampled`, for the token that the last step chose there.
        ids: Buf,
        /// `[w, 44]` u32: [`crate::sampler::Sampled`], what the last step's `Sample` wrote. So a step can be queued before
        /// the host knows what the one before it chose. A row that chose none stands for token 0: it failed.
        sampled: Buf,
        /// `[vocab, d]` f32 or bf16.
        table: Buf,
        /// `[m, d]` f32: the residual stream.
        out: Buf,
    },
    /// `out = x / sqrt(mean(x^2) + eps) * gamma`, then rounded or quantized as `out` says.
    RmsNorm {
        /// `[m, d]` f32.
        x: Buf,
        /// `[1, d]` f32.
        gamma: Buf,
        /// Added to the mean square.
        eps: f32,
        /// `[m, d]`.
        out: Act,
    },
    /// Rounds or quantizes `x`: what every fused op that writes an [`Act`] must equal.
    Quantize {
        /// `[m, k]` f32.
        x: Buf,
        /// `[m, k]`.
        out: Act,
    },
    /// `out[m, n] (+)= x[m, k] . w[n, k]^T`.
    Linear {
        /// `[m, k]`.
        x: Act,
        /// `[n, k]`.
        w: Weight,
        /// n columns of an f32 or bf16 buffer.
        out: Cols,
        /// Add to what `out` holds (f32 only): the residual.
        add: bool,
    },
    /// Rotates q and k by their positions, appends k and v to their pages. Halves of a head are rotated against each
    /// other: `(x[i], x[i + dim/2])`.
    RopeAppend {
        /// `[m, (q + 2 kv) dim]` f32 or bf16.
        qkv: Buf,
        /// `[positions, dim]` f32: dim/2 cosines, then dim/2 sines.
        rope: Buf,
        /// Who each row is.
        rows: Rows,
        /// Head counts.
        heads: Heads,
        /// `[m, q dim]`, of the dtype of `qkv`.
        q: Buf,
        /// The layer's cache.
        kv: Kv,
    },
    /// Causal attention of every row over the positions of its sequence up to its own: softmax(q k^T / sqrt(dim)) v.
    Attend {
        /// `[m, q dim]` f32 or bf16.
        q: Buf,
        /// Who each row is.
        rows: Rows,
        /// Head counts.
        heads: Heads,
        /// The layer's cache.
        kv: Kv,
        /// `[m, q dim]`.
        out: Act,
    },
    /// `out = silu(gate) * up`, silu(x) = x / (1 + exp(-x)).
    SwiGlu {
        /// `[m, 2 f]` f32 or bf16: gate, then up.
        gate_up: Buf,
        /// `[m, f]`.
        out: Act,
    },
    /// `out[i] = x[wanted[i]]`; with `RmsNorm` and `Linear` behind it, the logits of the wanted rows.
    Gather {
        /// `[m, d]` f32.
        x: Buf,
        /// `[w, 1]` u32: rows of `x`.
        wanted: Buf,
        /// `[w, d]` f32.
        out: Buf,
    },
    /// Chooses a token for each wanted row, or scores a given one; see [`crate::sampler`]. No sequence has more than one
    /// row that chooses.
    Sample {
        /// `[w, vocab]` f32.
        logits: Buf,
        /// `[w, 16]` u32: [`crate::sampler::RowParams`].
        params: Buf,
        /// `[w, ceil(vocab / 32)]` u32: the words of a [`crate::sampler::Mask`]; read where the row's parameters say so.
        mask: Buf,
        /// `[sequences, vocab]` u32: [`crate::sampler::Count`]s of the tokens of each sequence, for the penalties. The
        /// op adds the token that it chose.
        history: Buf,
        /// `[w, 44]` u32: [`crate::sampler::Sampled`].
        out: Buf,
    },
    /// Copies whole pages of one layer: the copy-on-write of a shared page.
    CopyPages {
        /// The layer's cache.
        kv: Kv,
        /// Rows of a page: kv heads x page tokens.
        page_rows: usize,
        /// `[n, 2]` u32: (source, destination) pages; equal ones are skipped, so (0, 0) pads.
        pairs: Buf,
    },
    /// `out = max(out, max |x|)`: the observer of calibration.
    AbsMax {
        /// `[m, k]` f32.
        x: Buf,
        /// `[1, 1]` f32.
        out: Buf,
    },
}

impl Op {
    /// The op's name, one of those that shaders, kernels, reference functions and parity cases bear.
    pub const fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Quantize { .. } => "quantize",
            Op::Linear { .. } => "linear",
            Op::RopeAppend { .. } => "rope_append",
            Op::Attend { .. } => "attend",
            Op::SwiGlu { .. } => "swiglu",
            Op::Gather { .. } => "gather",
            Op::Sample { .. } => "sample",
            Op::CopyPages { .. } => "copy_pages",
            Op::AbsMax { .. } => "abs_max",
        }
    }
}

impl Act {
    /// Its buffers: the elements first.
    pub fn bufs(&self) -> Vec<Buf> {
        match *self {
            Act::Real(buf) => vec![buf],
            Act::Fp8 { codes, scale: Scale::Static(_) } => vec![codes],
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => vec![codes, scale],
        }
    }
}

impl Weight {
    /// Its buffers: the elements first.
    pub fn bufs(&self) -> Vec<Buf> {
        match *self {
            Weight::Real(buf) => vec![buf],
            Weight::Fp8 { codes, scale } => vec![codes, scale],
        }
    }
}

impl Op {
    /// The buffers that the op reads and does not write.
    pub fn reads(&self) -> Vec<Buf> {
        match *self {
            Op::Embed { ids, sampled, table, .. } => vec![ids, sampled, table],
            Op::RmsNorm { x, gamma, .. } => vec![x, gamma],
            Op::Quantize { x, .. } | Op::AbsMax { x, .. } => vec![x],
            Op::Linear { x, w, .. } => [x.bufs(), w.bufs()].concat(),
            Op::RopeAppend { qkv, rope, rows, .. } => vec![qkv, rope, rows.seq, rows.position, rows.page_table],
            Op::Attend { q, rows, kv, .. } => {
                vec![q, rows.seq, rows.position, rows.page_table, rows.spans, kv.k, kv.v]
            }
            Op::SwiGlu { gate_up, .. } => vec![gate_up],
            Op::Gather { x, wanted, .. } => vec![x, wanted],
            Op::Sample { logits, params, mask, .. } => vec![logits, params, mask],
            Op::CopyPages { pairs, .. } => vec![pairs],
        }
    }

    /// The buffers that the op writes, some of which it may read as well (a residual, a cache, a history).
    pub fn writes(&self) -> Vec<Buf> {
        match *self {
            Op::Embed { out, .. } | Op::Gather { out, .. } | Op::AbsMax { out, .. } => vec![out],
            Op::RmsNorm { out, .. } | Op::Quantize { out, .. } | Op::Attend { out, .. } | Op::SwiGlu { out, .. } => {
                out.bufs()
            }
            Op::Linear { out, .. } => vec![out.buf],
            Op::RopeAppend { q, kv, .. } => vec![q, kv.k, kv.v],
            Op::Sample { history, out, .. } => vec![history, out],
            Op::CopyPages { kv, .. } => vec![kv.k, kv.v],
        }
    }
}

/// One line of a program: an op and what it is called in errors, profiles and bisections.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// For instance `model.layers.3.self_attn.o_proj`.
    pub label: String,
    /// What it does.
    pub op: Op,
}

/// A step of a model as a list. Sizes are upper bounds: the step's own are in `live`, and what lies beyond them is
/// padding, whose contents are undefined: no op reads it into its results, and none writes it.
///
/// What a line writes and the next one alone reads may never reach its buffer, where a backend runs the two as one. To see
/// it, run the line in a program of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Rows of the step, at most.
    pub rows: usize,
    /// Rows whose logits are wanted, at most; 0 where the program ends before the head.
    pub wanted: usize,
    /// `[1, 3]` u32: rows, wanted rows and spans that are in use this step.
    pub live: Buf,
    /// The ops, in order.
    pub lines: Vec<Line>,
}

impl Program {
    /// An empty program of a size.
    pub fn new(rows: usize, wanted: usize, live: Buf) -> Self {
        Program { rows, wanted, live, lines: Vec::new() }
    }

    /// Appends an op.
    pub fn push(&mut self, label: impl Into<String>, op: Op) {
        self.lines.push(Line { label: label.into(), op });
    }
}

/// A recorded program of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan(pub u32);

/// A copy to the host that was queued, of one backend; see [`Backend::fetch`].
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Fetch(pub u64);

/// What a backend keeps of its copies that were queued and not taken yet.
#[derive(Debug)]
pub struct Copies<T> {
    kept: HashMap<u64, T>,
    last: u64,
}

impl<T> Default for Copies<T> {
    fn default() -> Self {
        Copies { kept: HashMap::new(), last: 0 }
    }
}

impl<T> Copies<T> {
    /// Keeps one, and numbers it.
    pub fn keep(&mut self, copy: T) -> Fetch {
        self.last += 1;
        self.kept.insert(self.last, copy);
        Fetch(self.last)
    }

    /// Gives one back, once.
    pub fn take(&mut self, fetch: &Fetch) -> Option<T> {
        self.kept.remove(&fetch.0)
    }
}

/// What a backend runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `reference`, `cpu`, `wgpu`, `cuda`.
    pub backend: &'static str,
    /// The device's own name.
    pub name: String,
    /// Driver and version; the instruction set on a CPU.
    pub driver: String,
    /// Bytes of memory that can be used, where it is known.
    pub memory: Option<u64>,
    /// True where FP8 products run on FP8 hardware, false where codes are decoded first.
    pub native_fp8: bool,
    /// Which of its kernels an opened device runs, where there is a choice and `driver` does not tell.
    pub variant: Option<&'static str>,
    /// How it sums the products of a [`Op::Linear`], where that is with fewer bits than f32 has.
    pub tensor_cores: Option<TensorCores>,
}

/// The sums of tensor cores: addends lose what lies some bits behind the leading one of the largest, towards zero. They are
/// added to f32 sums every 128 products, or 256 of E4M3 in few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorCores {
    /// Bits that they keep of bf16 products, or [`TensorCores::ALL_BITS`] where these run without them, as does a [`Op::Linear`]
    /// of f32 or of mixed types.
    pub bf16_bits: u32,
    /// Of E4M3 products, where a [`Op::Linear`] has at least `e4m3_rows` rows; of fewer as many as of bf16 ones.
    pub e4m3_bits: u32,
    /// See `e4m3_bits`.
    pub e4m3_rows: usize,
}

impl TensorCores {
    /// So many that nothing is lost.
    pub const ALL_BITS: u32 = 64;
}

/// A device that runs programs. Runs, writes and copies happen in the order of the calls; only [`Backend::take`] waits.
pub trait Backend: Send {
    /// Name, driver, memory, native or emulated FP8.
    fn describe(&self) -> DeviceInfo;

    /// Err([`Unsupported`](crate::Error::Unsupported)) with the reason where this backend cannot run an op.
    fn supports(&self, op: &Op) -> Result<()>;

    /// Bytes that may still be allocated, where the backend knows: a model that needs more is refused before it is loaded.
    fn budget(&self) -> Option<u64> {
        None
    }

    /// Bytes that recording a program takes besides its buffers, whose descriptions these are, and that all programs over
    /// them share.
    ///
    /// # Errors
    /// Where the program cannot be recorded.
    fn scratch(&self, program: &Program, buffers: &[BufDesc]) -> Result<u64> {
        let _ = (program, buffers);
        Ok(0)
    }

    /// A new buffer, zeroed. Buffers are numbered from 0 in the order in which `alloc` and `load` made them, so that
    /// one numbering serves the same program on several backends.
    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf>;

    /// A constant, numbered as [`Backend::alloc`] says: `parts` hold consecutive rows. A host backend keeps the shared
    /// bytes instead of copying them.
    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf>;

    /// Overwrites bytes of a buffer that `alloc` made, from byte `offset` on, before the next run.
    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Prepares a program; fails here, naming the op and the reason, rather than at the first token.
    fn record(&mut self, program: &Program) -> Result<Plan>;

    /// Queues a run; does not wait, unless the backend has no queue.
    fn run(&mut self, plan: Plan) -> Result<()>;

    /// True where [`Backend::run`] returns before the work is done, so that the host can prepare the next step meanwhile.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Queues a copy of `bytes` bytes of a buffer from byte `offset` on, as all runs so far leave them.
    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch>;

    /// Waits for a copy, and for nothing that was queued behind it; `into` has the size that was asked for.
    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()>;

    /// Forgets all buffers, plans and copies, so that the next buffer is the first again, and keeps what was compiled; false
    /// where the backend does not, and must be opened anew.
    fn clear(&mut self) -> bool {
        false
    }

    /// The two together.
    fn read(&mut self, src: Buf, offset: usize, into: &mut [u8]) -> Result<()> {
        let fetch = self.fetch(src, offset, into.len())?;
        self.take(fetch, into)
    }
}
