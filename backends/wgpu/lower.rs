//! From ops to kernels: which shader, which constants, which buffers, how many workgroups.

use quaver_core::op::{Act, Buf, Cols, DType, Extent, Heads, Kv, Line, Op, Program, Rows, Scale, Weight};
use quaver_core::{Error, Result};

use super::adapter;
use super::kernel::{Binding, Kernel, code};
use super::layout::{Layout, Layouts};
use super::tuning::Tuning;
use crate::fold;

/// The kernels of a program that `Program::check` has seen.
pub fn program(program: &Program, layouts: &Layouts, tuning: &Tuning) -> Result<Vec<Kernel>> {
    let lower = Lower { program, layouts, tuning };
    let unsupported =
        |line: &Line, why| Error::Unsupported { backend: adapter::NAME.into(), op: line.label.clone(), why };
    for line in &program.lines {
        for buf in line.op.reads().into_iter().chain(line.op.writes()) {
            lower.whole(&line.op, buf).map_err(|why| unsupported(line, why))?;
        }
    }
    let mut kernels = Vec::new();
    for (line, fold) in fold::lines(program, layouts, |op| lower.folds(op)) {
        kernels.extend(lower.line(&line.op, fold).map_err(|why| unsupported(line, why))?);
    }
    Ok(kernels)
}

/// The values of all codes as the fast decode has them, `[256]` f32 of scratch.
pub fn e4m3_codes() -> Kernel {
    Kernel::new("e4m3_codes", [1, 1, 1]).constant("FAST_E4M3", 1).bind(2, Binding::WriteScratch(1024))
}

/// Workgroups along one dimension, WebGPU's `maxComputeWorkgroupsPerDimension`.
const MOST_GROUPS: u32 = 65535;

/// A kernel of a workgroup of `side` squared threads a row, which reduces over them (`reduce.wgsl`).
fn reducing(shader: &'static str, rows: u32, side: u32) -> Kernel {
    Kernel::new(shader, [rows, 1, 1]).constant("WG", side * side).constant("SIDE", side)
}

/// What makes a buffer of an op smaller.
fn flag(op: &Op, buf: Buf) -> &'static str {
    match *op {
        Op::Sample { history, .. } if history == buf => "--max-num-seqs",
        Op::RopeAppend { kv, .. } | Op::Attend { kv, .. } | Op::CopyPages { kv, .. } if [kv.k, kv.v].contains(&buf) => {
            "--kv-cache-memory"
        }
        Op::RopeAppend { rope, rows, .. } if [rope, rows.page_table].contains(&buf) => "--max-model-len",
        Op::Attend { rows, .. } if rows.page_table == buf => "--max-model-len or --max-num-seqs",
        _ => "--max-num-batched-tokens",
    }
}

/// Where activations go: their elements, the reciprocal of their static scale, the scales of their rows.
fn destination(out: Act) -> (Buf, f32, Option<Buf>) {
    match out {
        Act::Real(data) => (data, 1.0, None),
        Act::Fp8 { codes, scale: Scale::Static(scale) } => (codes, scale.inv, None),
        Act::Fp8 { codes, scale: Scale::PerToken(scale) } => (codes, 1.0, Some(scale)),
    }
}

struct Lower<'a> {
    program: &'a Program,
    layouts: &'a Layouts,
    tuning: &'a Tuning,
}

impl<'a> Lower<'a> {
    /// The kernels of a line, with the op of the next one where it is folded in; or why they cannot be run.
    fn line(&self, op: &Op, fold: Option<&Op>) -> Result<Vec<Kernel>, String> {
        let mut kernels = self.op(op, fold)?;
        for kernel in &mut kernels {
            if quaver_shaders::find(kernel.shader).is_some_and(|shader| shader.pieces.contains(&"e4m3")) {
                kernel.constants.push(("FAST_E4M3", f64::from(u8::from(self.tuning.fast_e4m3))));
            }
        }
        for kernel in &kernels {
            if let Some(groups) = kernel.grid.iter().find(|groups| **groups > MOST_GROUPS) {
                return Err(format!(
                    "{groups} workgroups along one dimension; at most {MOST_GROUPS}: lower the rows of a step"
                ));
            }
        }
        Ok(kernels.into_iter().filter(|kernel| !kernel.grid.contains(&0)).collect())
    }

    /// Whether the kernel of a Linear can do the next op too.
    fn folds(&self, op: &Op) -> bool {
        let Op::Linear { x, w, out: Cols { buf, .. }, .. } = *op else { return false };
        let cut = self.tuning.linear(self.rows(buf), self.cols(buf), self.cols(w.bufs()[0]), self.dtypes(x, w));
        let is_one_part = self.layout(w.bufs()[0]).parts.len() == 1;
        cut.shader == "linear_wide" && is_one_part
    }

    /// Only the tables of `Embed` and the weights of `Linear` may be in several parts.
    fn whole(&self, op: &Op, buf: Buf) -> Result<(), String> {
        let table = match *op {
            Op::Embed { table, .. } => Some(table),
            Op::Linear { w: Weight::Real(w) | Weight::Fp8 { codes: w, .. }, .. } => Some(w),
            _ => None,
        };
        let layout = self.layouts.get(buf);
        if layout.parts.len() > 1 && table != Some(buf) {
            let (name, bytes) = (&layout.desc.name, layout.desc.bytes());
            let (most, flag) = (layout.part_bytes(0), flag(op, buf));
            return Err(format!("{name} takes {bytes} bytes, the device binds about {most}; lower {flag}"));
        }
        Ok(())
    }

    /// The kernels of an op, and of the one that is folded into it.
    fn op(&self, op: &Op, fold: Option<&Op>) -> Result<Vec<Kernel>, String> {
        let wg = self.tuning.side * self.tuning.side;
        // Kernels read rows of f32 as vectors, which a single column is not (`layout.rs`).
        let width = match *op {
            Op::RmsNorm { x, .. } | Op::Quantize { x, .. } | Op::Gather { x, .. } | Op::AbsMax { x, .. } => {
                self.cols(x)
            }
            Op::Embed { out, .. } => self.cols(out),
            Op::SwiGlu { gate_up, .. } => self.cols(gate_up) / 2,
            Op::Linear { x, .. } => self.cols(x.bufs()[0]),
            _ => 2,
        };
        if width == 1 {
            return Err("rows of a single column".into());
        }
        Ok(match *op {
            Op::Embed { ids, sampled, table, out } => self.embed(ids, sampled, table, out),
            Op::RmsNorm { x, gamma, eps, out } => {
                let kernel = self.rows_kernel("rms_norm", x, out, vec![eps.to_bits()]);
                vec![kernel.read(4, x).read(5, gamma)]
            }
            Op::Quantize { x, out } => vec![self.rows_kernel("quantize", x, out, Vec::new()).read(4, x)],
            Op::Linear { x, w, out, add } => self.linear(x, w, out, add, fold),
            Op::RopeAppend { qkv, rope, rows, heads, q, kv } => vec![self.rope_append(qkv, rope, rows, heads, q, kv)],
            Op::Attend { q, rows, heads, kv, out } => self.attend(q, rows, heads, kv, out)?,
            Op::SwiGlu { gate_up, out } => {
                let kernel = self.rows_kernel("swiglu", gate_up, out, Vec::new());
                vec![kernel.constant("IN", self.code(gate_up)).read(4, gate_up)]
            }
            Op::Gather { x, wanted, out } => {
                let kernel = Kernel::new("gather", [self.rows(out), 1, 1]).constant("WG", wg);
                let kernel = kernel.constant("COLS", self.cols(out)).read(1, self.program.live);
                vec![kernel.write(2, out).read(3, x).read(4, wanted)]
            }
            Op::Sample { logits, params, mask, history, out } => {
                let side = self.tuning.sample(self.cols(logits))?;
                let kernel = reducing("sample", self.rows(out), side).constant("VOCAB", self.cols(logits));
                let kernel = kernel.constant("STRIDE", self.layout(logits).row_words()).read(1, self.program.live);
                vec![kernel.write(2, out).write(3, history).read(4, logits).read(5, params).read(6, mask)]
            }
            Op::CopyPages { kv, page_rows, pairs } => {
                let page = (page_rows * self.layouts.get(kv.k).stride / 16) as u32;
                let count = self.layouts.desc(pairs).rows.capacity() as u32;
                let copy = |cache| {
                    let kernel = Kernel::new("copy_pages", [page.div_ceil(wg), 1, 1]).constant("WG", wg);
                    kernel.params([page, count]).write(2, cache).read(3, pairs)
                };
                vec![copy(kv.k), copy(kv.v)]
            }
            Op::AbsMax { x, out } => {
                let kernel = self.reducing("abs_max", self.rows(x));
                let kernel = kernel.constant("AXIS", self.axis(x)).constant("COLS", self.cols(x));
                vec![kernel.read(1, self.program.live).write(2, out).read(3, x)]
            }
        })
    }

    fn layout(&self, buf: Buf) -> &Layout {
        self.layouts.get(buf)
    }

    fn cols(&self, buf: Buf) -> u32 {
        self.layouts.desc(buf).cols as u32
    }

    fn code(&self, buf: Buf) -> u32 {
        code(self.layouts.desc(buf).dtype)
    }

    /// Rows of an operand that the program touches.
    fn rows(&self, buf: Buf) -> u32 {
        self.program.extent(self.layouts.desc(buf).rows) as u32
    }

    /// The word of `live` that counts an operand's rows.
    fn axis(&self, buf: Buf) -> u32 {
        u32::from(matches!(self.layouts.desc(buf).rows, Extent::Wanted(_)))
    }

    /// A kernel of a workgroup a row that reduces over its threads (`reduce.wgsl`).
    fn reducing(&self, shader: &'static str, rows: u32) -> Kernel {
        reducing(shader, rows, self.tuning.side)
    }

    /// A kernel of a workgroup a row that writes activations (`act.wgsl`); `x` has as many rows.
    fn rows_kernel(&self, shader: &'static str, x: Buf, out: Act, params: Vec<u32>) -> Kernel {
        let (data, inv, scale) = destination(out);
        let kernel = self.reducing(shader, self.rows(data));
        let kernel = kernel.constant("OUT", self.code(data)).constant("PER_TOKEN", u32::from(scale.is_some()));
        let kernel = kernel.constant("COLS", self.cols(data)).constant("AXIS", self.axis(x));
        let kernel = kernel.params([vec![inv.to_bits()], params].concat());
        let scale = scale.map_or(Binding::Unwritten, |scale| Binding::Write(scale, 0));
        kernel.read(1, self.program.live).write(2, data).bind(3, scale)
    }

    fn embed(&self, ids: Buf, sampled: Buf, table: Buf, out: Buf) -> Vec<Kernel> {
        let slices = self.layout(table).parts.iter().enumerate();
        let slice = |(part, rows): (usize, &std::ops::Range<usize>)| {
            let kernel =
                Kernel::new("embed", [self.rows(out), 1, 1]).constant("WG", self.tuning.side * self.tuning.side);
            let kernel = kernel.constant("COLS", self.cols(out)).constant("TABLE", self.code(table));
            let kernel = kernel.params([rows.start as u32, rows.len() as u32]).read(1, self.program.live);
            kernel.write(2, out).read(3, ids).read(4, sampled).bind(5, Binding::Read(table, part))
        };
        slices.map(slice).collect()
    }

    fn dtypes(&self, x: Act, w: Weight) -> [DType; 2] {
        [x.bufs()[0], w.bufs()[0]].map(|buf| self.layouts.desc(buf).dtype)
    }

    fn linear(&self, x: Act, w: Weight, out: Cols, add: bool, fold: Option<&Op>) -> Vec<Kernel> {
        let (data, static_scale, token_scale) = match x {
            Act::Real(data) => (data, 1.0, None),
            Act::Fp8 { codes, scale: Scale::Static(scale) } => (codes, scale.scale, None),
            Act::Fp8 { codes, scale: Scale::PerToken(scale) } => (codes, 1.0, Some(scale)),
        };
        let (weight, w_scale) = match w {
            Weight::Real(weight) => (weight, None),
            Weight::Fp8 { codes, scale } => (codes, Some(scale)),
        };
        let (m, k) = (self.rows(out.buf), self.cols(weight));
        // What is written: out itself, or what the op that is folded in makes of it.
        let (shader, target, more) = match fold {
            Some(&Op::SwiGlu { out, .. }) => {
                let (target, inv, _) = destination(out);
                (Some("linear_gated"), target, [inv.to_bits(), 0, 0, 0])
            }
            Some(&Op::RopeAppend { q, rows, kv, .. }) => {
                let [k_inv, v_inv, pages] = self.append_params(rows, kv);
                (Some("linear_rope"), q, [0, k_inv, v_inv, pages])
            }
            _ => (None, out.buf, [0; 4]),
        };
        let scale = |buf: Option<Buf>| buf.map_or(Binding::Unread, |buf| Binding::Read(buf, 0));
        let mut kernels = Vec::new();
        for (part, rows) in self.layout(weight).parts.iter().enumerate() {
            let (n, first) = (rows.len() as u32, out.first + rows.start);
            let cut = self.tuning.linear(m, n, k, self.dtypes(x, w));
            // Where two channels share a word, a tile begins with one.
            let shift = u32::from(self.layouts.desc(out.buf).dtype == DType::Bf16) * (first as u32 % 2);
            let ops = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
            let (x, y) = ((n + shift).div_ceil(cut.channels), m.div_ceil(cut.rows));
            for [(from, across), (base, down)] in self.tuning.runs(x, y, ops) {
                let kernel = Kernel::new(shader.unwrap_or(cut.shader), [across, down, 1]);
                let kernel = kernel
                    .share(ops, x, y)
                    .constants(&cut.constants)
                    .constant("AXIS", self.axis(out.buf))
                    .constant("K", k);
                let kernel = kernel.constant("X", self.code(data)).constant("W", self.code(weight));
                let kernel = kernel.constant("OUT", self.code(target)).constant("ADD", u32::from(add));
                let kernel = kernel.constant("PER_TOKEN", u32::from(token_scale.is_some()));
                let stride = self.layout(target).row_words();
                let place = [n, rows.start as u32, first as u32, stride, static_scale.to_bits(), base, from];
                let kernel = kernel.params([&place[..], &more].concat());
                let kernel = kernel.read(1, self.program.live).write(2, target).read(3, data);
                let kernel = kernel.bind(4, Binding::Read(weight, part)).bind(5, scale(w_scale));
                let kernel = kernel.bind(6, scale(token_scale));
                kernels.push(match fold {
                    Some(Op::SwiGlu { .. }) => kernel.constant("GATE_UP", self.code(out.buf)),
                    Some(&Op::RopeAppend { rope, rows, heads, kv, .. }) => self.append(kernel, rope, rows, heads, kv),
                    _ => kernel,
                });
            }
        }
        kernels
    }

    fn rope_append(&self, qkv: Buf, rope: Buf, rows: Rows, heads: Heads, q: Buf, kv: Kv) -> Kernel {
        let kernel =
            Kernel::new("rope_append", [self.rows(q), 1, 1]).constant("WG", self.tuning.side * self.tuning.side);
        let kernel = kernel.constant("OUT", self.code(qkv)).params(self.append_params(rows, kv));
        let kernel = kernel.read(1, self.program.live).write(2, q).read(3, qkv);
        self.append(kernel, rope, rows, heads, kv)
    }

    /// What `append.wgsl` has for constants and bindings.
    fn append(&self, kernel: Kernel, rope: Buf, rows: Rows, heads: Heads, kv: Kv) -> Kernel {
        let kernel = kernel.constant("DIM", heads.dim as u32).constant("Q_HEADS", heads.q as u32);
        let kernel = kernel.constant("KV_HEADS", heads.kv as u32).constant("PAGE", kv.page_tokens as u32);
        let kernel = kernel.constant("KV", self.code(kv.k)).write(7, kv.k).write(8, kv.v).read(9, rope);
        kernel.read(10, rows.seq).read(11, rows.position).read(12, rows.page_table)
    }

    /// What it has for parameters.
    fn append_params(&self, rows: Rows, kv: Kv) -> [u32; 3] {
        let [k_inv, v_inv] = kv.scales.map_or([1.0; 2], |(k, v)| [k.inv, v.inv]).map(f32::to_bits);
        [k_inv, v_inv, self.cols(rows.page_table)]
    }

    fn attend(&self, q: Buf, rows: Rows, heads: Heads, kv: Kv, out: Act) -> Result<Vec<Kernel>, String> {
        let Heads { q: q_heads, kv: kv_heads, dim } = heads;
        let (group, m) = ((q_heads / kv_heads) as u32, self.rows(q));
        let cut = self.tuning.attend(m, group, dim as u32)?;
        let spans = m.min(self.layouts.desc(rows.spans).rows.capacity() as u32);
        let tiles = (m + spans * (cut.rows - 1)) / cut.rows;
        let context = self.cols(rows.page_table) * kv.page_tokens as u32;
        let splits = self.tuning.splits(&cut, dim as u32, tiles * kv_heads as u32, context);
        let parts = 4 * u64::from(m) * u64::from(splits) * (q_heads * (dim + 2)) as u64;
        let [k_scale, v_scale] = kv.scales.map_or([1.0; 2], |(k, v)| [k.scale, v.scale]);
        // A row's head that is one workgroup's is written at once, in whole words, unless the row's scale is still to find.
        let (data, inv, row_scale) = destination(out);
        let is_whole = splits == 1 && dim % 16 == 0 && row_scale.is_none();
        let written = match is_whole {
            true => [Binding::Unwritten, Binding::Write(data, 0)],
            false => [Binding::WriteScratch(parts), Binding::Unwritten],
        };
        let factor = (f64::from(k_scale) / (dim as f64).sqrt()) as f32;

        let ops = 4.0 * f64::from(m) * f64::from(context) * (q_heads * dim) as f64;
        let attend = |[(from, heads), (base, count)]: [(u32, u32); 2]| {
            let attend = Kernel::new(cut.shader, [count, heads, splits]).constants(&cut.constants);
            let attend = attend.share(ops, kv_heads as u32, tiles * splits);
            let attend = attend.constant("DIM", dim as u32).constant("GROUP", group);
            let attend = attend.constant("KV_HEADS", kv_heads as u32).constant("PAGE", kv.page_tokens as u32);
            let attend = attend.constant("IN", self.code(q)).constant("KV", self.code(kv.k));
            let part = [factor.to_bits(), self.cols(rows.page_table), splits, base, from];
            let whole = [v_scale.to_bits(), inv.to_bits(), self.layout(data).row_words()];
            let attend = attend.params([&part[..], &whole].concat()).read(1, self.program.live);
            let attend = attend.bind(2, written[0]).read(3, q).read(4, kv.k).read(5, kv.v);
            let attend = attend.read(6, rows.page_table).read(7, rows.spans);
            let attend = attend.constant("WHOLE", u32::from(is_whole)).constant("OUT", self.code(data));
            attend.bind(8, written[1])
        };
        let mut kernels: Vec<_> = self.tuning.runs(kv_heads as u32, tiles, ops).into_iter().map(attend).collect();
        if !is_whole {
            let merge = self.rows_kernel("attend_merge", q, out, vec![v_scale.to_bits(), splits]);
            kernels.push(merge.constant("DIM", dim as u32).bind(4, Binding::ReadScratch(parts)));
        }
        Ok(kernels)
    }
}
