//! FP8 ties. Where a value lies halfway between two codes, two programs that agree to the last bit but one may round it
//! to either, and what follows differs by much more than their arithmetic does. Such a value is found by its distance
//! to the tie, and the layer is computed again with the other code: what is left must be the arithmetic alone.

use bytemuck::cast_slice_mut;
use quaver_core::e4m3;
use quaver_core::op::{Act, Buf, BufDesc, DType, Extent, Kv, Op, Program, Scale};

use super::goldens::relative_rms;
use super::runner::Runner;

/// How near to a tie a value must lie, relative to itself and to the rms of its row, to be rounded either way: two f32
/// programs differ by up to about that much behind attention and two linears.
const NEAR: f32 = 4e-6;

/// What a position adds to that for rotated keys: Hugging Face takes the angle, which grows with the position, in f32.
const ANGLE: f32 = f32::EPSILON;

/// A code that may as well be its neighbour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tie {
    /// The token whose activation it is.
    row: usize,
    line: usize,
    buf: Buf,
    index: usize,
    other: u8,
}

/// A run of the layer with some ties rounded the other way.
struct Trial {
    error: f64,
    flipped: Vec<Tie>,
    got: Vec<f32>,
    ties: Vec<Tie>,
}

/// The layer's error against `want`, and the ties that had to be rounded the other way to bring every row within
/// `bound`. Attention is causal: rows are settled in order, each by ties of its own or of rows before it.
pub fn settle(
    runner: &mut Runner,
    layer: usize,
    ids: &[u32],
    input: &[f32],
    want: &[f32],
    bound: f64,
) -> (f64, Vec<Tie>) {
    let width = input.len() / ids.len();
    let row_error = |got: &[f32], row: usize| {
        let range = row * width..(row + 1) * width;
        relative_rms(&got[range.clone()], &want[range])
    };
    let mut flipped: Vec<Tie> = Vec::new();
    let (mut got, mut ties) = run(runner, layer, ids, input, &flipped);
    while let Some(row) = (0..ids.len()).find(|&row| row_error(&got, row) > bound) {
        let error = row_error(&got, row);
        let mut best: Option<Trial> = None;
        // The last line first: a flip there changes nothing but its own code, where an earlier one may tip later ties.
        // Rows before this one last: they were right without it.
        let mut candidates: Vec<Tie> = ties.iter().filter(|t| t.row <= row && !flipped.contains(t)).copied().collect();
        candidates.sort_by_key(|tie| (tie.row != row, std::cmp::Reverse(tie.line)));
        for tie in candidates {
            let with = [&flipped[..], &[tie]].concat();
            let (got, ties) = run(runner, layer, ids, input, &with);
            let error = row_error(&got, row);
            if best.as_ref().is_none_or(|best| error < best.error) {
                best = Some(Trial { error, flipped: with, got, ties });
            }
            if error <= bound {
                break;
            }
        }
        match best {
            Some(best) if best.error < 0.95 * error => (flipped, got, ties) = (best.flipped, best.got, best.ties),
            _ => break,
        }
    }
    (relative_rms(&got, want), flipped)
}

/// Runs a layer line by line with some codes overwritten; gives its output and the ties along the way.
fn run(runner: &mut Runner, layer: usize, ids: &[u32], input: &[f32], flipped: &[Tie]) -> (Vec<f32>, Vec<Tie>) {
    runner.write(ids, 0);
    runner.write_f32(runner.llama.outputs.residual, input);
    let program = runner.llama.layer_program(layer, ids.len());
    let mut ties = Vec::new();
    for (i, line) in program.lines.iter().enumerate() {
        let found = ties_of(runner, &program, i, ids.len());
        step(runner, &program, line.op);
        let found = found.into_iter().map(|(row, buf, index, other)| Tie { row, line: i, buf, index, other });
        ties.extend(found);
        for tie in flipped.iter().filter(|tie| tie.line == i) {
            runner.backend.write(tie.buf, tie.index, &[tie.other]).unwrap();
        }
    }
    let empty = Program { lines: Vec::new(), ..program };
    (runner.run(&empty, runner.llama.outputs.residual, input.len()), ties)
}

fn step(runner: &mut Runner, program: &Program, op: Op) {
    let mut one = Program::new(program.rows, 0, program.live);
    one.push("line", op);
    let plan = runner.backend.record(&one).unwrap();
    runner.backend.run(plan).unwrap()
}

/// The ties among the codes that a line is about to write: (row, buffer, element, other code).
fn ties_of(runner: &mut Runner, program: &Program, line: usize, rows: usize) -> Vec<(usize, Buf, usize, u8)> {
    let heads = runner.llama.config.heads;
    match program.lines[line].op {
        Op::RmsNorm { x, gamma, eps, out } => {
            let width = runner.llama.config.hidden;
            ties_of_act(runner, program, rows, width, out, |out| Op::RmsNorm { x, gamma, eps, out })
        }
        Op::Attend { q, rows: who, heads, kv, out } => {
            let op = |out| Op::Attend { q, rows: who, heads, kv, out };
            ties_of_act(runner, program, rows, heads.q * heads.dim, out, op)
        }
        Op::SwiGlu { gate_up, out } => {
            let width = runner.llama.config.intermediate;
            ties_of_act(runner, program, rows, width, out, |out| Op::SwiGlu { gate_up, out })
        }
        Op::RopeAppend { qkv, rope, rows: who, q, kv, .. } => {
            let Some((k_scale, v_scale)) = kv.scales else { return Vec::new() };
            let sizes = runner.llama.sizes;
            let n = sizes.pages * heads.kv * sizes.page_tokens;
            let row_of = |i: usize| Runner::position_of(&sizes, heads, i / heads.dim);
            let desc = BufDesc::new("real cache", DType::F32, Extent::Fixed(n), heads.dim);
            let [k, v] = [0, 1].map(|_| runner.backend.alloc(&desc).unwrap());
            let real = Kv { k, v, scales: None, ..kv };
            step(runner, program, Op::RopeAppend { qkv, rope, rows: who, heads, q, kv: real });
            let mut ties = Vec::new();
            for (real, codes, scale) in [(k, kv.k, k_scale), (v, kv.v, v_scale)] {
                let values = read(runner, real, n * heads.dim);
                let near = near_ties(&values, heads.dim, |i| (scale.inv, NEAR + ANGLE * row_of(i * heads.dim) as f32));
                let near = near.map(|(i, other)| (row_of(i), codes, i, other));
                ties.extend(near.filter(|(row, ..)| *row < rows));
            }
            ties
        }
        _ => Vec::new(),
    }
}

fn ties_of_act(
    runner: &mut Runner,
    program: &Program,
    rows: usize,
    width: usize,
    out: Act,
    op: impl Fn(Act) -> Op,
) -> Vec<(usize, Buf, usize, u8)> {
    let Act::Fp8 { codes, scale } = out else { return Vec::new() };
    let desc = BufDesc::new("real", DType::F32, Extent::Rows(rows), width);
    let real = runner.backend.alloc(&desc).unwrap();
    step(runner, program, op(out));
    step(runner, program, op(Act::Real(real)));
    let values = read(runner, real, rows * width);
    let invs: Vec<f32> = match scale {
        Scale::Static(s) => vec![s.inv; rows],
        Scale::PerToken(buf) => read(runner, buf, rows).into_iter().map(|scale| 1.0 / scale).collect(),
    };
    near_ties(&values, width, |row| (invs[row], NEAR)).map(|(i, other)| (i / width, codes, i, other)).collect()
}

fn read(runner: &mut Runner, buf: Buf, n: usize) -> Vec<f32> {
    let mut values = vec![0f32; n];
    runner.backend.read(buf, 0, cast_slice_mut(&mut values)).unwrap();
    values
}

/// The elements that lie near a tie, with the code on its other side.
fn near_ties(
    values: &[f32],
    width: usize,
    inv_and_near: impl Fn(usize) -> (f32, f32),
) -> impl Iterator<Item = (usize, u8)> {
    values.chunks_exact(width).enumerate().flat_map(move |(row, x)| {
        let (inv, near) = inv_and_near(row);
        let rms = (x.iter().map(|x| x * x).sum::<f32>() / width as f32).sqrt();
        let ties = x.iter().enumerate().filter_map(move |(i, &x)| {
            let near = near * (x.abs() + rms) * inv;
            let code = e4m3::encode(x * inv);
            let other = [x * inv - near, x * inv + near].map(e4m3::encode).into_iter().find(|other| *other != code);
            other.map(|other| (row * width + i, other))
        });
        ties.collect::<Vec<_>>()
    })
}
