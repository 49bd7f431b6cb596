//! Which ops can be folded into the `Linear` before them, so that what lies between the two is never written.

use quaver_core::op::{Act, Buf, Cols, Line, Op, Program, Scale};

use crate::layout::Layouts;

/// Gate and up, and heads, must be multiples of so many channels: kernels that fold ops take channels in blocks.
const BLOCK: usize = 16;

/// The lines of a program that are lowered, each with the op of the next where its kernel does both: where it can, and `does`
/// says so of the `Linear`.
pub fn lines<'a>(
    program: &'a Program,
    layouts: &Layouts,
    does: impl Fn(&Op) -> bool,
) -> Vec<(&'a Line, Option<&'a Op>)> {
    let (mut lines, mut i) = (Vec::new(), 0);
    while let Some(line) = program.lines.get(i) {
        let fold = behind(program, layouts, i).filter(|_| does(&line.op));
        lines.push((line, fold));
        i += 1 + usize::from(fold.is_some());
    }
    lines
}

/// The op of the line behind line `i`, where that line is a `Linear`, and the next takes whole heads, or gate and up, from a
/// buffer that is between the two alone.
fn behind<'a>(program: &'a Program, layouts: &Layouts, i: usize) -> Option<&'a Op> {
    let [Line { op: linear, .. }, Line { op: next, .. }] = program.lines.get(i..i + 2)? else { return None };
    let Op::Linear { out: Cols { buf, .. }, .. } = *linear else { return None };
    let width = match *next {
        Op::SwiGlu { gate_up, out: Act::Real(_) | Act::Fp8 { scale: Scale::Static(_), .. } } if gate_up == buf => {
            layouts.desc(gate_up).cols / 2
        }
        Op::RopeAppend { qkv, heads, .. } if qkv == buf => heads.dim,
        _ => return None,
    };
    let is_apart = next.writes().iter().all(|buf| !linear.reads().contains(buf));
    // What is between two lines alone is all that the first one writes.
    (width.is_multiple_of(BLOCK) && is_apart && is_between(program, layouts, buf)).then_some(next)
}

/// Whether every line that reads a buffer is behind one that overwrites all of it, and no other line writes it.
fn is_between(program: &Program, layouts: &Layouts, buf: Buf) -> bool {
    let (mut is_whole, mut is_between) = (false, true);
    for Line { op, .. } in &program.lines {
        let fills = fills(op, layouts, buf);
        is_between &= is_whole || !op.reads().contains(&buf);
        is_between &= fills || !op.writes().contains(&buf);
        is_whole = fills;
    }
    is_between
}

/// Whether an op is a `Linear` that overwrites a whole buffer.
fn fills(op: &Op, layouts: &Layouts, buf: Buf) -> bool {
    matches!(*op, Op::Linear { w, out: Cols { buf: own, first: 0 }, add: false, .. }
        if own == buf && layouts.desc(w.bufs()[0]).rows.capacity() == layouts.desc(buf).cols)
}
