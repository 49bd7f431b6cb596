//! From ops to kernels: which entry point, which arguments, how many blocks.

use quaver_core::op::{Act, Buf, Cols, DType, Extent, Heads, Kv, Op, Program, Rows, Scale, Weight};
use quaver_core::{Error, Result};

use super::card::NAME;
use super::kernel::{Arg, Kernel, code};
use super::tuning::{GEMV_ROWS, Tuning, Variant};
use crate::fold;
use crate::layout::{Layout, Layouts};

/// Query heads times rows of an attention tile, positions that it takes at a time, and the most elements that a head may
/// have (`attend.cu`).
const QUERIES: u32 = 16;
const CHUNK: u32 = 32;
const MOST_DIM: usize = 256;
/// The same of a tile on tensor cores (`sm80_attend.cu`).
const MMA_QUERIES: u32 = 128;
const MMA_CHUNK: u32 = 64;
/// Bytes of k that `linear_wgmma.cuh` takes at a time.
const WGMMA_DEPTH: u32 = 128;
/// What a part of a context leaves behind its sums (`paging.cuh`).
const PART_TAIL: usize = 4;
/// Blocks that a row's logits are dealt to, whatever the rows, and the bytes of its draft (`sample.cu`).
const SAMPLE_PARTS: u32 = 64;
const DRAFT_BYTES: u64 = 38968;

/// Blocks along the second and third dimension of a grid (CUDA C++ Programming Guide, "Technical Specifications").
const MOST_BLOCKS: u32 = 65535;

/// The kernels of a program that `Program::check` has seen.
pub fn lower(program: &Program, layouts: &Layouts, tuning: &Tuning) -> Result<Vec<Kernel>> {
    let lower = Lower { program, layouts, tuning };
    let mut kernels = Vec::new();
    for (line, fold) in fold::lines(program, layouts, |op| lower.folds(op)) {
        let unsupported = |why| Error::Unsupported { backend: NAME.into(), op: line.label.clone(), why };
        kernels.extend(lower.line(&line.op, fold).map_err(unsupported)?);
    }
    Ok(kernels)
}

struct Lower<'a> {
    program: &'a Program,
    layouts: &'a Layouts,
    tuning: &'a Tuning,
}

/// What a Linear reads and writes, taken apart.
struct Operands {
    x: Buf,
    w: Buf,
    m: u32,
    n: u32,
    /// Elements a row of x and w, padded.
    k: u32,
    /// Of activations: of all rows, and of each; of the channels.
    scales: [Arg; 3],
    /// Where sums go.
    out: [Arg; 5],
}

impl Operands {
    /// The arguments that Linears end with (`epilogue.cuh`).
    fn epilogue(&self) -> Vec<Arg> {
        [&self.out[..], &self.scales].concat()
    }
}

impl Lower<'_> {
    /// The kernels of a line, with the op of the next one where it is folded in; or why they cannot be run.
    fn line(&self, op: &Op, fold: Option<&Op>) -> Result<Vec<Kernel>, String> {
        // Kernels read and write rows as vectors, which a single column of f32 is not (`layout.rs`).
        let rows = match *op {
            Op::RmsNorm { x, out, .. } | Op::Quantize { x, out } => vec![x, out.bufs()[0]],
            Op::Gather { x, out, .. } => vec![x, out],
            Op::SwiGlu { out, .. } | Op::Attend { out, .. } => vec![out.bufs()[0]],
            Op::Linear { x, .. } => vec![x.bufs()[0]],
            Op::Embed { out: x, .. } | Op::AbsMax { x, .. } => vec![x],
            Op::RopeAppend { .. } | Op::Sample { .. } | Op::CopyPages { .. } => Vec::new(),
        };
        if rows.into_iter().any(|buf| self.cols(buf) == 1) {
            return Err("rows of a single column".into());
        }
        let kernels = self.op(op, fold)?;
        if let Some(blocks) = kernels.iter().flat_map(|kernel| &kernel.grid[1..]).find(|blocks| **blocks > MOST_BLOCKS)
        {
            return Err(format!(
                "{blocks} blocks along one dimension; at most {MOST_BLOCKS}: lower the rows of a step"
            ));
        }
        Ok(kernels.into_iter().filter(|kernel| !kernel.grid.contains(&0)).collect())
    }

    /// Whether the kernel of a Linear can do the next op too.
    fn folds(&self, op: &Op) -> bool {
        let Op::Linear { x, w, out, .. } = *op else { return false };
        self.rows(out.buf) <= GEMV_ROWS && self.gemv_type(x.bufs()[0], w.bufs()[0]).is_some()
    }

    fn op(&self, op: &Op, fold: Option<&Op>) -> Result<Vec<Kernel>, String> {
        let live = Arg::Buf(self.program.live);
        Ok(match *op {
            Op::Embed { ids, sampled, table, out } => {
                let [ids, sampled, from, to] = [ids, sampled, table, out].map(Arg::Buf);
                let args = [live, ids, sampled, from, self.code(table), to, self.columns(out)];
                vec![Kernel::new("embed", [self.rows(out), 1, 1], 256, args)]
            }
            Op::RmsNorm { x, gamma, eps, out } => {
                let kernel = self.rows_kernel("rms_norm", x, out, &[Arg::Buf(x), Arg::Buf(gamma), Arg::F32(eps)]);
                let threads = self.cols(x).div_ceil(4).next_multiple_of(32).min(1024);
                vec![Kernel { threads, ..kernel }]
            }
            Op::Quantize { x, out } => vec![self.rows_kernel("quantize", x, out, &[Arg::Buf(x)])],
            Op::Linear { x, w, out, add } => vec![self.linear(x, w, out, add, fold)],
            Op::RopeAppend { qkv, rope, rows, heads, q, kv } => vec![self.rope_append(qkv, rope, rows, heads, q, kv)],
            Op::Attend { q, rows, heads, kv, out } => self.attend(q, rows, heads, kv, out)?,
            Op::SwiGlu { gate_up, out } => {
                let kernel = self.rows_kernel("swiglu", gate_up, out, &[Arg::Buf(gate_up), self.code(gate_up)]);
                vec![self.spread(kernel, out)]
            }
            Op::Gather { x, wanted, out } => {
                let args = [live, Arg::Buf(wanted), Arg::Buf(x), Arg::Buf(out), self.columns(out)];
                vec![Kernel::new("gather", [self.rows(out), 1, 1], 256, args)]
            }
            Op::Sample { logits, params, mask, history, out } => self.sample([logits, params, mask, history], out),
            Op::CopyPages { kv, page_rows, pairs } => {
                let vectors = (page_rows * self.layout(kv.k).stride / 16) as u32;
                let count = self.layouts.desc(pairs).rows.capacity() as u32;
                let copy = |cache| {
                    let args = [Arg::Buf(cache), Arg::Buf(pairs), Arg::U32(vectors), Arg::U32(count)];
                    Kernel::new("copy_pages", [vectors.div_ceil(256), 1, 1], 256, args)
                };
                vec![copy(kv.k), copy(kv.v)]
            }
            Op::AbsMax { x, out } => {
                let args = [live, self.axis(x), Arg::Buf(x), Arg::Buf(out), self.columns(x)];
                vec![Kernel::new("abs_max", [self.rows(x), 1, 1], 256, args)]
            }
        })
    }

    fn layout(&self, buf: Buf) -> &Layout {
        self.layouts.get(buf)
    }

    fn cols(&self, buf: Buf) -> u32 {
        self.layouts.desc(buf).cols as u32
    }

    fn columns(&self, buf: Buf) -> Arg {
        Arg::U32(self.cols(buf))
    }

    /// Elements from one row to the next.
    fn stride(&self, buf: Buf) -> Arg {
        let layout = self.layout(buf);
        Arg::U32((layout.stride / layout.desc.dtype.size()) as u32)
    }

    fn code(&self, buf: Buf) -> Arg {
        Arg::U32(code(self.layouts.desc(buf).dtype))
    }

    /// Rows of an operand that the program touches.
    fn rows(&self, buf: Buf) -> u32 {
        self.program.extent(self.layouts.desc(buf).rows) as u32
    }

    /// The word of `live` that counts an operand's rows.
    fn axis(&self, buf: Buf) -> Arg {
        Arg::U32(u32::from(matches!(self.layouts.desc(buf).rows, Extent::Wanted(_))))
    }

    /// A kernel of a block a row that writes activations (`act.cuh`); `x` has as many rows.
    fn rows_kernel(&self, file: &'static str, x: Buf, out: Act, args: &[Arg]) -> Kernel {
        let (data, inv, scale) = match out {
            Act::Real(data) => (data, 1.0, Arg::Null),
            Act::Fp8 { codes, scale: Scale::Static(scale) } => (codes, scale.inv, Arg::Null),
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => (codes, 1.0, Arg::Buf(scale)),
        };
        let live = Arg::Buf(self.program.live);
        let act = [live, self.axis(x), Arg::Buf(data), scale, Arg::F32(inv), self.code(data), self.columns(data)];
        Kernel::new(file, [self.rows(data), 1, 1], 256, [&act[..], args].concat())
    }

    /// A kernel of [`Self::rows_kernel`] whose rows are spread over blocks, unless they have scales, which one block finds.
    fn spread(&self, kernel: Kernel, out: Act) -> Kernel {
        match out {
            Act::Fp8 { scale: Scale::PerToken(_), .. } => kernel,
            _ => self.spread_columns(kernel, self.cols(out.bufs()[0])),
        }
    }

    /// A kernel of a block a row of so many columns, four a thread, with as many blocks a row as few rows need to fill the card:
    /// of 64 threads at least.
    fn spread_columns(&self, kernel: Kernel, cols: u32) -> Kernel {
        let (rows, groups) = (kernel.grid[0], cols.div_ceil(4));
        let blocks = (4 * self.tuning.processors / rows.max(1)).min(groups.div_ceil(64)).max(1);
        let threads = groups.div_ceil(blocks).next_multiple_of(32).min(256);
        Kernel { grid: [rows, blocks, 1], threads, ..kernel }
    }

    fn linear(&self, x: Act, w: Weight, out: Cols, add: bool, fold: Option<&Op>) -> Kernel {
        let (x, static_scale, token_scales) = match x {
            Act::Real(data) => (data, 1.0, Arg::Null),
            Act::Fp8 { codes, scale: Scale::Static(scale) } => (codes, scale.scale, Arg::Null),
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => (codes, 1.0, Arg::Buf(scale)),
        };
        let (w, w_scales) = match w {
            Weight::Real(weight) => (weight, Arg::Null),
            Weight::Fp8 { codes, scale } => (codes, Arg::Buf(scale)),
        };
        let (first, add) = (Arg::U32(out.first as u32), Arg::U32(u32::from(add)));
        let (weight, m) = (self.layout(w), self.rows(out.buf));
        let k = (weight.stride / weight.desc.dtype.size()) as u32;
        let operands = Operands {
            x,
            w,
            m,
            n: weight.desc.rows.capacity() as u32,
            k,
            scales: [Arg::F32(static_scale), token_scales, w_scales],
            out: [Arg::Buf(out.buf), self.code(out.buf), self.stride(out.buf), first, add],
        };
        let dtypes = [x, w].map(|buf| self.layouts.desc(buf).dtype);
        match (dtypes, self.tuning.variant) {
            _ if m <= GEMV_ROWS => match self.gemv_type(x, w) {
                Some(name) => self.gemv_mma(name, &operands, fold),
                None => self.gemv(&operands),
            },
            ([DType::E4m3, DType::E4m3], Variant::Sm90) => self.wgmma("sm90_linear_e4m3", &operands),
            ([DType::Bf16, DType::Bf16], Variant::Sm90) => self.wgmma("sm90_linear_bf16", &operands),
            ([DType::E4m3, DType::E4m3], Variant::Sm89) => self.mma("sm89_linear_e4m3", "sm89_linear_e4m3", &operands),
            ([DType::E4m3, DType::E4m3], Variant::Sm80) => self.mma("sm80_linear", "sm80_linear_e4m3", &operands),
            ([DType::Bf16, DType::Bf16], _) => self.mma("sm80_linear", "sm80_linear_bf16", &operands),
            _ => self.simt(&operands),
        }
    }

    /// What the types of operands are called whose few rows run on tensor cores.
    fn gemv_type(&self, x: Buf, w: Buf) -> Option<&'static str> {
        match [x, w].map(|buf| self.layouts.desc(buf).dtype) {
            [DType::E4m3, DType::E4m3] => Some("e4m3"),
            [DType::Bf16, DType::Bf16] => Some("bf16"),
            _ => None,
        }
    }

    /// `mma.sync`: operands of one type (`linear_mma.cuh`).
    fn mma(&self, file: &'static str, entry: &str, operands: &Operands) -> Kernel {
        let &Operands { x, w, m, n, .. } = operands;
        let (tile, threads) = if m <= 64 { (64, 128) } else { (128, 256) };
        let row_bytes = Arg::U32(self.layout(w).stride as u32);
        let args = [Arg::Buf(self.program.live), self.axis(x), Arg::Buf(x), Arg::Buf(w), Arg::U32(n), row_bytes];
        let grid = [n.div_ceil(tile), m.div_ceil(tile), 1];
        let kernel = Kernel::new(file, grid, threads, [&args[..], &operands.epilogue()].concat());
        Kernel { entry: format!("{entry}_{tile}"), shared: 4 * 2 * tile * 80, ..kernel }
    }

    /// `wgmma`: operands of one type (`linear_wgmma.cuh`).
    fn wgmma(&self, file: &'static str, operands: &Operands) -> Kernel {
        let &Operands { x, w, m, n, .. } = operands;
        let tile = self.tuning.wgmma_tile(m, n);
        // WGMMA_THREADS.
        let threads = if tile == 64 { 160 } else { 384 };
        let row_bytes = self.layout(w).stride as u32;
        let [tiles_n, tiles_m] = [n, m].map(|size| size.div_ceil(tile));
        let parts = self.tuning.depth_parts(tile, tiles_n * tiles_m, row_bytes.div_ceil(WGMMA_DEPTH));
        let [xs, ws] = [x, w].map(|buf| Arg::Boxes { buf, rows: tile });
        let (scratch, counters) = (Arg::Scratch(self.tuning.parts_bytes()), Arg::Counters(self.tuning.processors));
        let slots = self.tuning.wgmma_slots(tile, tiles_n * tiles_m * parts);
        let numbers = [n, row_bytes, slots].map(Arg::U32);
        let args = [&[Arg::Buf(self.program.live), self.axis(x), xs, ws], &numbers[..], &[scratch, counters]].concat();
        let kernel = Kernel::new(file, [tiles_n, tiles_m, parts], threads, [&args[..], &operands.epilogue()].concat());
        Kernel { entry: format!("{file}_{tile}"), shared: slots * WGMMA_DEPTH * 2 * tile, ..kernel }
    }

    /// Few rows of operands of one type, on tensor cores, and what is folded in (`gemv_mma.cuh`).
    fn gemv_mma(&self, name: &str, operands: &Operands, fold: Option<&Op>) -> Kernel {
        let &Operands { x, w, n, out: [_, between, ..], .. } = operands;
        let row_bytes = Arg::U32(self.layout(w).stride as u32);
        let args = [Arg::Buf(self.program.live), self.axis(x), Arg::Buf(x), Arg::Buf(w), Arg::U32(n), row_bytes];
        let (file, more) = match fold {
            Some(&Op::SwiGlu { out, .. }) => {
                let inv = if let Act::Fp8 { scale: Scale::Static(scale), .. } = out { scale.inv } else { 1.0 };
                let data = out.bufs()[0];
                ("sm80_gemv_gated", vec![Arg::Buf(data), self.code(data), Arg::F32(inv), between])
            }
            Some(&Op::RopeAppend { rope, rows, heads, q, kv, .. }) => {
                ("sm80_gemv_rope", [vec![between], self.heads(rope, rows, heads, q, kv)].concat())
            }
            _ => ("sm80_gemv", operands.out.to_vec()),
        };
        let kernel = Kernel::new(file, [n.div_ceil(16), 1, 1], 256, [&args[..], &operands.scales, &more].concat());
        Kernel { entry: format!("{file}_{name}"), ..kernel }
    }

    /// A warp a channel, for few rows of other types.
    fn gemv(&self, operands: &Operands) -> Kernel {
        let &Operands { x, w, m, n, k, .. } = operands;
        let name = |buf: Buf| match self.layouts.desc(buf).dtype {
            DType::Bf16 => "bf16",
            DType::E4m3 => "e4m3",
            _ => "f32",
        };
        let rows = m.next_power_of_two();
        let args = [Arg::Buf(self.program.live), self.axis(x), Arg::Buf(x), Arg::Buf(w), Arg::U32(n), Arg::U32(k)];
        let kernel = Kernel::new(
            "linear_gemv",
            [n.div_ceil(8), m.div_ceil(rows), 1],
            256,
            [&args[..], &operands.epilogue()].concat(),
        );
        Kernel { entry: format!("linear_gemv_{}_{}_{rows}", name(x), name(w)), ..kernel }
    }

    /// Any pair of element types, without tensor cores.
    fn simt(&self, operands: &Operands) -> Kernel {
        let &Operands { x, w, m, n, k, .. } = operands;
        let live = Arg::Buf(self.program.live);
        let (n_arg, k_arg) = (Arg::U32(n), Arg::U32(k));
        let args = [live, self.axis(x), Arg::Buf(x), self.code(x), Arg::Buf(w), self.code(w), n_arg, k_arg];
        Kernel::new("linear", [n.div_ceil(64), m.div_ceil(64), 1], 256, [&args[..], &operands.epilogue()].concat())
    }

    fn rope_append(&self, qkv: Buf, rope: Buf, rows: Rows, heads: Heads, q: Buf, kv: Kv) -> Kernel {
        let args = [Arg::Buf(self.program.live), Arg::Buf(qkv), self.code(qkv)];
        let args = [&args[..], &self.heads(rope, rows, heads, q, kv)].concat();
        let kernel = Kernel::new("rope_append", [self.rows(q), 1, 1], 256, args);
        self.spread_columns(kernel, ((heads.q + 2 * heads.kv) * heads.dim.next_multiple_of(4)) as u32)
    }

    /// The arguments of `heads.cuh`.
    fn heads(&self, rope: Buf, rows: Rows, heads: Heads, q: Buf, kv: Kv) -> Vec<Arg> {
        let [k_inv, v_inv] = kv.scales.map_or([1.0; 2], |(k, v)| [k.inv, v.inv]).map(Arg::F32);
        let [q_heads, kv_heads, dim, page] = [heads.q, heads.kv, heads.dim, kv.page_tokens].map(|n| Arg::U32(n as u32));
        vec![
            Arg::Buf(rope),
            Arg::Buf(rows.seq),
            Arg::Buf(rows.position),
            Arg::Buf(rows.page_table),
            self.columns(rows.page_table),
            Arg::Buf(q),
            Arg::Buf(kv.k),
            Arg::Buf(kv.v),
            self.code(kv.k),
            q_heads,
            kv_heads,
            dim,
            page,
            k_inv,
            v_inv,
        ]
    }

    /// `inputs` are the buffers of a Sample in its order, but for the results.
    fn sample(&self, inputs: [Buf; 4], out: Buf) -> Vec<Kernel> {
        let (logits, inputs) = (inputs[0], inputs.map(Arg::Buf));
        let (rows, vocab) = (self.rows(out), self.cols(logits));
        let most = self.layouts.desc(out).rows.capacity().max(rows as usize);
        let drafts = Arg::Scratch(DRAFT_BYTES * most as u64);
        let args =
            [&[Arg::Buf(self.program.live)], &inputs[..], &[drafts, Arg::U32(vocab), self.stride(logits)]].concat();
        let with_out = [&args[..], &[Arg::Buf(out)]].concat();
        let kernel = |entry: &str, blocks, threads, args| {
            let kernel = Kernel::new("sample", [blocks, rows, 1], threads, args);
            Kernel { entry: entry.into(), ..kernel }
        };
        // Blocks a row so that all rows together fill the card, none for less than four tokens a thread.
        let blocks = |at_once: u32, threads: u32| {
            (at_once * self.tuning.processors / rows.max(1)).min(vocab.div_ceil(4 * threads)).max(1)
        };
        vec![
            kernel("sample_parts", SAMPLE_PARTS, 128, args),
            kernel("sample_draft", blocks(4, 256), 256, with_out.clone()),
            kernel("sample", blocks(1, 1024), 1024, with_out),
        ]
    }

    fn attend(&self, q: Buf, rows: Rows, heads: Heads, kv: Kv, out: Act) -> Result<Vec<Kernel>, String> {
        let Heads { q: q_heads, kv: kv_heads, dim } = heads;
        let (group, m) = ((q_heads / kv_heads) as u32, self.rows(q));
        let cache = self.layouts.desc(kv.k).dtype;
        // Tensor cores want bf16.
        let is_bf16 = self.layouts.desc(q).dtype == DType::Bf16 && cache != DType::F32;
        let is_mma = is_bf16 && matches!(dim, 64 | 128);
        let queries = if is_mma { MMA_QUERIES } else { QUERIES };
        if dim > MOST_DIM || group > QUERIES {
            return Err(format!(
                "heads of {dim} elements in groups of {group}; at most {MOST_DIM} and {QUERIES} are supported"
            ));
        }
        let context = self.cols(rows.page_table) * kv.page_tokens as u32;
        // What `PageOf` divides exactly (`paging.cuh`).
        if u64::from(context) * kv.page_tokens as u64 > u64::from(u32::MAX) {
            return Err(format!("contexts of {context} tokens in pages of {}", kv.page_tokens));
        }
        let cut = |m: u32| {
            let tile = queries / group;
            let spans = m.min(self.layouts.desc(rows.spans).rows.capacity() as u32);
            let tiles = (m + spans * (tile - 1)) / tile;
            (tiles, self.tuning.splits(tiles * kv_heads as u32, context))
        };
        let (tiles, splits) = cut(m);
        // As much as a program of any size needs, so that it is allocated once. Sizes are powers of two, or the largest.
        let most = self.layouts.desc(q).rows.capacity() as u32;
        let sizes = (0..u32::BITS).map(|i| 1 << i).take_while(|m| *m < most).chain([m, most]);
        let part_rows = sizes.map(|m| u64::from(m) * u64::from(cut(m).1)).max().unwrap_or(0);
        let parts = Arg::Scratch(4 * part_rows * (q_heads * (dim + PART_TAIL)) as u64);
        let [k_scale, v_scale] = kv.scales.map_or([1.0; 2], |(k, v)| [k.scale, v.scale]);
        let factor = (f64::from(k_scale) / (dim as f64).sqrt()) as f32;
        let (width, grid) = (dim.next_multiple_of(16) as u32, [tiles, kv_heads as u32, splits]);
        let (live, [q_arg, k, v]) = (Arg::Buf(self.program.live), [q, kv.k, kv.v].map(Arg::Buf));
        let who = [Arg::Buf(rows.page_table), self.columns(rows.page_table), Arg::Buf(rows.spans), parts];
        let [group, kv_heads, dim_arg, page] =
            [group, kv_heads as u32, dim as u32, kv.page_tokens as u32].map(Arg::U32);
        let attend = if is_mma {
            let may_share = Arg::U32(u32::from(self.tuning.most_splits > 1));
            let tail = [group, kv_heads, page, Arg::F32(factor)];
            let args = [&[live, q_arg, may_share, k, v], &who[..], &tail].concat();
            let pair = 2 * MMA_CHUNK * (2 * width + 16);
            let (name, shared) = match cache {
                DType::E4m3 => ("e4m3", pair + 2 * MMA_CHUNK * width),
                _ => ("bf16", 2 * pair),
            };
            Kernel { entry: format!("sm80_attend_{name}_{dim}"), shared, ..Kernel::new("sm80_attend", grid, 256, args) }
        } else {
            let tail = [group, kv_heads, dim_arg, page, Arg::F32(factor)];
            let args = [&[live, q_arg, self.code(q), k, v, self.code(kv.k)], &who[..], &tail].concat();
            let shared = 4 * (QUERIES * width + CHUNK * (width + 4) + CHUNK * width + QUERIES * CHUNK);
            Kernel { shared, ..Kernel::new("attend", grid, 128, args) }
        };
        let merge = [parts, dim_arg, Arg::U32(splits), Arg::F32(v_scale)];
        let merge = self.rows_kernel("attend_merge", q, out, &merge);
        Ok(vec![
            attend,
            match out {
                // What a thread has merged it keeps, four columns of it, while the row's scale is found.
                Act::Fp8 { scale: Scale::PerToken(_), .. } => {
                    let threads = ((q_heads * dim).div_ceil(4) as u32).next_multiple_of(32).min(512);
                    Kernel { threads, ..merge }
                }
                _ => self.spread(merge, out),
            },
        ])
    }
}

#[cfg(test)]
mod tests {
    use quaver_core::op::{BufDesc, StaticScale};

    use super::*;
    use crate::cuda::tuning::{MOST_SPLITS, Variant};

    /// The entry point of a Linear of `m` rows, 256 channels and k = 512.
    fn linear(variant: Variant, m: usize, x: DType, w: DType) -> String {
        let mut layouts = Layouts::default();
        let mut add = |name: &str, dtype, rows, cols| {
            layouts.push(Layout::new(&BufDesc::new(name, dtype, rows, cols), u64::MAX >> 1))
        };
        let live = add("live", DType::U32, Extent::Fixed(1), 3);
        let (data, out) = (add("x", x, Extent::Rows(m), 512), add("out", DType::F32, Extent::Rows(m), 256));
        let (codes, scale) = (add("w", w, Extent::Fixed(256), 512), add("scale", DType::F32, Extent::Fixed(256), 1));
        let op = Op::Linear {
            x: match x {
                DType::E4m3 => Act::Fp8 { codes: data, scale: Scale::Static(StaticScale::new(0.5)) },
                _ => Act::Real(data),
            },
            w: if w == DType::E4m3 { Weight::Fp8 { codes, scale } } else { Weight::Real(codes) },
            out: Cols { buf: out, first: 0 },
            add: false,
        };
        let tuning = Tuning { variant, processors: 132, most_splits: MOST_SPLITS };
        let mut program = Program::new(m, 0, live);
        program.push("linear", op);
        let kernels = lower(&program, &layouts, &tuning).unwrap();
        assert_eq!(kernels.len(), 1);
        kernels[0].entry.clone()
    }

    #[test]
    fn linears_take_the_tensor_cores_of_each_variant() {
        use DType::{Bf16, E4m3, F32};
        for (variant, m, x, w, entry) in [
            (Variant::Sm90, 1, E4m3, E4m3, "sm80_gemv_e4m3"),
            (Variant::Sm90, 5, Bf16, Bf16, "sm80_gemv_bf16"),
            (Variant::Sm90, 5, Bf16, E4m3, "linear_gemv_bf16_e4m3_8"),
            (Variant::Sm90, 64, E4m3, E4m3, "sm90_linear_e4m3_64"),
            (Variant::Sm90, 512, E4m3, E4m3, "sm90_linear_e4m3_64"),
            (Variant::Sm90, 8192, E4m3, E4m3, "sm90_linear_e4m3_128"),
            (Variant::Sm90, 64, Bf16, Bf16, "sm90_linear_bf16_64"),
            (Variant::Sm90, 8192, Bf16, Bf16, "sm90_linear_bf16_128"),
            (Variant::Sm89, 64, Bf16, Bf16, "sm80_linear_bf16_64"),
            (Variant::Sm89, 64, E4m3, E4m3, "sm89_linear_e4m3_64"),
            (Variant::Sm89, 512, E4m3, E4m3, "sm89_linear_e4m3_128"),
            (Variant::Sm80, 512, E4m3, E4m3, "sm80_linear_e4m3_128"),
            (Variant::Sm90, 512, F32, Bf16, "linear"),
            (Variant::Sm90, 512, Bf16, E4m3, "linear"),
        ] {
            assert_eq!(linear(variant, m, x, w), entry, "{variant:?}, {m} rows of {x:?} by {w:?}");
        }
    }
}
