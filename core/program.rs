//! Checks that the ops and buffers of a [`Program`] fit together. Every backend calls [`Program::check`] first thing in
//! `record`, so that kernels may rely on dtypes and shapes.

use crate::error::{Error, Result};
use crate::op::{Act, Buf, BufDesc, Cols, DType, Extent, Heads, Kv, Line, Op, Program, Rows, Scale, Weight};
use crate::sampler::{Mask, RowParams, Sampled};

/// What the rows of an operand run along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    Rows,
    Wanted,
}

const F32: &[DType] = &[DType::F32];
const U32: &[DType] = &[DType::U32];
const E4M3: &[DType] = &[DType::E4m3];
const REAL: &[DType] = &[DType::F32, DType::Bf16];

impl Program {
    /// Err([`Program`](Error::Program)) with the line and the reason where a dtype, a shape or an aliasing is wrong.
    /// `desc` gives the description of a buffer, None where there is no such buffer.
    pub fn check<'a>(&self, desc: impl Fn(Buf) -> Option<&'a BufDesc>) -> Result<()> {
        let check = Check { program: self, desc: &desc };
        let fail = |line: usize, op: &str, why| Error::Program { line, op: op.into(), why };
        check.fixed(self.live, "live", U32, 3).map_err(|why| fail(0, "program", why))?;
        for (i, line) in self.lines.iter().enumerate() {
            check.line(line).and_then(|()| check.distinct(&line.op)).map_err(|why| fail(i, &line.label, why))?;
        }
        Ok(())
    }

    /// The rows of `extent` that this program touches, before `live` says how many of them are in use.
    pub fn extent(&self, extent: Extent) -> usize {
        match extent {
            Extent::Rows(_) => self.rows,
            Extent::Wanted(_) => self.wanted,
            Extent::Fixed(n) => n,
        }
    }
}

struct Check<'p, D> {
    program: &'p Program,
    desc: D,
}

type Why<T = ()> = std::result::Result<T, String>;

impl<'a, D: Fn(Buf) -> Option<&'a BufDesc>> Check<'_, D> {
    fn line(&self, line: &Line) -> Why {
        match line.op {
            Op::Embed { ids, sampled, table, out } => {
                self.step(ids, "ids", U32, 1, Axis::Rows)?;
                self.step(sampled, "sampled", U32, size_of::<Sampled>() / 4, Axis::Wanted)?;
                let d = self.step_any(out, "out", F32, Axis::Rows)?.cols;
                self.fixed(table, "table", REAL, d).map(drop)
            }
            Op::RmsNorm { x, gamma, eps, out } => {
                let (axis, d) = self.activation(x, "x", F32)?;
                if self.fixed(gamma, "gamma", F32, d)?.rows.capacity() != 1 {
                    return Err("gamma must have one row".into());
                }
                if !(eps.is_finite() && eps >= 0.0) {
                    return Err(format!("eps is {eps}"));
                }
                self.act(out, "out", d, axis)
            }
            Op::Quantize { x, out } => {
                let (axis, k) = self.activation(x, "x", F32)?;
                self.act(out, "out", k, axis)
            }
            Op::Linear { x, w, out, add } => {
                let (codes, scale) = match w {
                    Weight::Real(w) => (self.desc(w, "w", REAL)?, None),
                    Weight::Fp8 { codes, scale } => (self.desc(codes, "w", E4M3)?, Some(scale)),
                };
                let (n, k) = (codes.rows.capacity(), codes.cols);
                if !matches!(codes.rows, Extent::Fixed(_)) {
                    return Err(format!("{} is no weight: its rows change from step to step", codes.name));
                }
                if let Some(scale) = scale
                    && self.fixed(scale, "weight scale", F32, 1)?.rows.capacity() != n
                {
                    return Err(format!("the weight has {n} rows, its scale {}", self.get(scale)?.rows.capacity()));
                }
                let (axis, _) = self.activation(x.bufs()[0], "x", &[DType::F32, DType::Bf16, DType::E4m3])?;
                self.act(x, "x", k, axis)?;
                self.cols(out, n, axis, add)
            }
            Op::RopeAppend { qkv, rope, rows, heads, q, kv } => {
                self.heads(heads)?;
                self.step(qkv, "qkv", REAL, (heads.q + 2 * heads.kv) * heads.dim, Axis::Rows)?;
                self.step(q, "q", &[self.get(qkv)?.dtype], heads.q * heads.dim, Axis::Rows)?;
                self.rows(rows)?;
                self.kv(kv, heads)?;
                let positions = self.fixed(rope, "rope", F32, heads.dim)?.rows.capacity();
                let context = self.get(rows.page_table)?.cols * kv.page_tokens;
                if positions < context {
                    return Err(format!("the rotary table ends at {positions}, the page table at {context}"));
                }
                Ok(())
            }
            Op::Attend { q, rows, heads, kv, out } => {
                self.heads(heads)?;
                self.step(q, "q", REAL, heads.q * heads.dim, Axis::Rows)?;
                self.rows(rows)?;
                self.kv(kv, heads)?;
                self.act(out, "out", heads.q * heads.dim, Axis::Rows)
            }
            Op::SwiGlu { gate_up, out } => {
                let (axis, cols) = self.activation(gate_up, "gate_up", REAL)?;
                if cols % 2 != 0 {
                    return Err(format!("gate_up has {cols} columns, an odd number"));
                }
                self.act(out, "out", cols / 2, axis)
            }
            Op::Gather { x, wanted, out } => {
                let d = self.step_any(x, "x", F32, Axis::Rows)?.cols;
                self.step(wanted, "wanted", U32, 1, Axis::Wanted)?;
                self.step(out, "out", F32, d, Axis::Wanted)
            }
            Op::Sample { logits, params, mask, history, out } => {
                let vocab = self.step_any(logits, "logits", F32, Axis::Wanted)?.cols;
                self.step(params, "params", U32, size_of::<RowParams>() / 4, Axis::Wanted)?;
                self.step(mask, "mask", U32, Mask::width(vocab), Axis::Wanted)?;
                self.fixed(history, "history", U32, vocab)?;
                self.step(out, "out", U32, size_of::<Sampled>() / 4, Axis::Wanted)
            }
            Op::CopyPages { kv, page_rows, pairs } => {
                let k = self.desc(kv.k, "k", &[DType::F32, DType::Bf16, DType::E4m3])?;
                let v = self.desc(kv.v, "v", &[k.dtype])?;
                if page_rows == 0 || k.rows != v.rows || k.rows.capacity() % page_rows != 0 {
                    return Err(format!("pages of {page_rows} rows do not divide the cache"));
                }
                self.fixed(pairs, "pairs", U32, 2).map(drop)
            }
            Op::AbsMax { x, out } => {
                self.activation(x, "x", F32)?;
                if self.fixed(out, "out", F32, 1)?.rows.capacity() != 1 {
                    return Err("out must be one number".into());
                }
                Ok(())
            }
        }
    }

    fn get(&self, buf: Buf) -> Why<&'a BufDesc> {
        (self.desc)(buf).ok_or_else(|| format!("there is no buffer {}", buf.0))
    }

    fn desc(&self, buf: Buf, role: &str, dtypes: &[DType]) -> Why<&'a BufDesc> {
        let desc = self.get(buf)?;
        if !dtypes.contains(&desc.dtype) {
            return Err(format!("{role} ({}) is {:?}, not {dtypes:?}", desc.name, desc.dtype));
        }
        Ok(desc)
    }

    fn fixed(&self, buf: Buf, role: &str, dtypes: &[DType], cols: usize) -> Why<&'a BufDesc> {
        let desc = self.desc(buf, role, dtypes)?;
        if !matches!(desc.rows, Extent::Fixed(_)) || desc.cols != cols {
            return Err(format!("{role} ({}) is {:?} x {}, not fixed rows of {cols}", desc.name, desc.rows, desc.cols));
        }
        Ok(desc)
    }

    /// An operand whose rows run along either axis; gives the axis and the columns.
    fn activation(&self, buf: Buf, role: &str, dtypes: &[DType]) -> Why<(Axis, usize)> {
        let desc = self.desc(buf, role, dtypes)?;
        let axis = match desc.rows {
            Extent::Rows(_) => Axis::Rows,
            Extent::Wanted(_) => Axis::Wanted,
            Extent::Fixed(_) => return Err(format!("{role} ({}) has fixed rows, not those of the step", desc.name)),
        };
        self.step_any(buf, role, dtypes, axis).map(|desc| (axis, desc.cols))
    }

    fn step_any(&self, buf: Buf, role: &str, dtypes: &[DType], axis: Axis) -> Why<&'a BufDesc> {
        let desc = self.desc(buf, role, dtypes)?;
        let need = self.program.extent(desc.rows);
        match (desc.rows, axis) {
            (Extent::Rows(have), Axis::Rows) | (Extent::Wanted(have), Axis::Wanted) if have >= need => Ok(desc),
            (Extent::Rows(have), Axis::Rows) | (Extent::Wanted(have), Axis::Wanted) => {
                Err(format!("{role} ({}) has {have} rows, the program {need}", desc.name))
            }
            (rows, axis) => Err(format!("{role} ({}) has rows along {rows:?}, not {axis:?}", desc.name)),
        }
    }

    fn step(&self, buf: Buf, role: &str, dtypes: &[DType], cols: usize, axis: Axis) -> Why {
        let desc = self.step_any(buf, role, dtypes, axis)?;
        if desc.cols != cols {
            return Err(format!("{role} ({}) has {} columns, not {cols}", desc.name, desc.cols));
        }
        Ok(())
    }

    fn act(&self, act: Act, role: &str, cols: usize, axis: Axis) -> Why {
        match act {
            Act::Real(buf) => self.step(buf, role, REAL, cols, axis),
            Act::Fp8 { codes, scale } => {
                self.step(codes, role, E4M3, cols, axis)?;
                match scale {
                    Scale::Static(s) => static_scale(s.scale, s.inv),
                    Scale::PerToken(scale) => self.step(scale, "scale", F32, 1, axis),
                }
            }
        }
    }

    fn cols(&self, out: Cols, n: usize, axis: Axis, add: bool) -> Why {
        let desc = self.step_any(out.buf, "out", if add { F32 } else { REAL }, axis)?;
        if out.first + n > desc.cols {
            return Err(format!("{n} columns from {} do not fit {} ({} columns)", out.first, desc.name, desc.cols));
        }
        Ok(())
    }

    fn heads(&self, heads: Heads) -> Why {
        let Heads { q, kv, dim } = heads;
        if kv == 0 || q == 0 || q % kv != 0 || dim == 0 || dim % 2 != 0 {
            return Err(format!("{q} query heads, {kv} kv heads of {dim} elements do not go together"));
        }
        Ok(())
    }

    fn rows(&self, rows: Rows) -> Why {
        self.step(rows.seq, "seq", U32, 1, Axis::Rows)?;
        self.step(rows.position, "position", U32, 1, Axis::Rows)?;
        self.fixed(rows.spans, "spans", U32, 4)?;
        let pages = self.desc(rows.page_table, "page_table", U32)?.cols;
        self.fixed(rows.page_table, "page_table", U32, pages).map(drop)
    }

    fn kv(&self, kv: Kv, heads: Heads) -> Why {
        let dtypes = if kv.scales.is_some() { E4M3 } else { REAL };
        let k = self.fixed(kv.k, "k", dtypes, heads.dim)?;
        let v = self.fixed(kv.v, "v", &[k.dtype], heads.dim)?;
        let page = heads.kv * kv.page_tokens;
        if page == 0 || k.rows != v.rows || k.rows.capacity() % page != 0 {
            return Err(format!("pages of {} x {} rows do not divide the cache", heads.kv, kv.page_tokens));
        }
        match kv.scales {
            Some((k, v)) => static_scale(k.scale, k.inv).and(static_scale(v.scale, v.inv)),
            None => Ok(()),
        }
    }

    fn distinct(&self, op: &Op) -> Why {
        let (reads, writes) = (op.reads(), op.writes());
        for (i, out) in writes.iter().enumerate() {
            if reads.contains(out) || writes[..i].contains(out) {
                return Err(format!("{} is used twice", self.get(*out)?.name));
            }
        }
        Ok(())
    }
}

fn static_scale(scale: f32, inv: f32) -> Why {
    if scale.is_finite() && scale > 0.0 && inv == 1.0 / scale {
        return Ok(());
    }
    Err(format!("a static scale of {scale} with the reciprocal {inv}"))
}
