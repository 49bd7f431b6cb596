//! A `Linear` and the op behind it, which backends may run as one where nothing else reads what lies between: with the
//! bytes of the two on their own, on the same device.

use quaver_core::op::{Act, Buf, Cols, DType, Heads, Op};

use super::List;
use super::batch::{Batch, Cache};
use super::rope_append::rope_table;
use crate::parity::build::{ActKind, Axis, Builder};
use crate::parity::{Problem, Rng};

const STATIC: ActKind = ActKind::Static(0.0117);

pub fn add(list: &mut List) {
    let heads = Heads { q: 6, kv: 2, dim: 32 };
    // Rows, and rows of the program that are not in use.
    for (m, padding) in [(1, 0), (2, 0), (1, 1), (3, 0)] {
        let rows = format!("m{m}_of_{}", m + padding);
        for (x, w) in [(STATIC, DType::E4m3), (ActKind::PerToken, DType::E4m3), (ActKind::Bf16, DType::Bf16)] {
            let name = x.name();
            for (between, out) in [(DType::Bf16, STATIC), (DType::F32, STATIC), (DType::Bf16, ActKind::Bf16)] {
                let name = format!("{name}_with_swiglu_{}_to_{}_{rows}", real(between), out.name());
                list.add("linear", name, move |rng| swiglu(rng, x, w, [m, padding], [48, 96], between, out));
            }
            for (between, cache) in [(DType::Bf16, Cache::Bf16), (DType::Bf16, Cache::Fp8), (DType::F32, Cache::F32)] {
                let name = format!("{name}_with_rope_{}_to_{}_{rows}", real(between), cache.name());
                list.add("linear", name, move |rng| rope(rng, x, w, [m, padding], heads, between, cache));
            }
        }
        // What stays apart: scales of the rows of its results, halves and heads that are no whole blocks.
        list.add("linear", format!("apart_from_swiglu_to_fp8_per_token_{rows}"), move |rng| {
            swiglu(rng, STATIC, DType::E4m3, [m, padding], [48, 96], DType::Bf16, ActKind::PerToken)
        });
        list.add("linear", format!("apart_from_swiglu_f40_{rows}"), move |rng| {
            swiglu(rng, STATIC, DType::E4m3, [m, padding], [40, 96], DType::Bf16, STATIC)
        });
        list.add("linear", format!("apart_from_rope_dim24_{rows}"), move |rng| {
            rope(rng, STATIC, DType::E4m3, [m, padding], Heads { q: 2, kv: 1, dim: 24 }, DType::Bf16, Cache::Bf16)
        });
    }
}

fn real(dtype: DType) -> &'static str {
    if dtype == DType::F32 { "f32" } else { "bf16" }
}

/// A `Linear` of random operands.
fn linear(b: &mut Builder, rng: &mut Rng, x: ActKind, w: DType, [m, n, k]: [usize; 3]) -> impl Fn(Buf) -> Op + use<> {
    let (values, weights) = (rng.normals(m * k, 1.0), rng.normals(n * k, 0.05));
    let (x, _) = b.act_in(x, Axis::Rows, k, &values);
    let (w, _) = match w {
        DType::E4m3 => {
            let codes = weights.iter().map(|w| quaver_core::e4m3::encode(w * 1000.0)).collect();
            let scales: Vec<f32> = (0..n).map(|_| 1e-3 * 2f32.powf(rng.between(-1.0, 1.0))).collect();
            b.fp8_weight(k, codes, &scales, &[])
        }
        dtype => b.real_weight(dtype, k, &weights, &[]),
    };
    move |buf| Op::Linear { x, w, out: Cols { buf, first: 0 }, add: false }
}

/// The two, alone; and again, with another op that reads what lies between, so that they stay apart.
fn twice(b: &mut Builder, between: [Buf; 2], linear: impl Fn(Buf) -> Op, next: [Op; 3]) {
    let [folded, apart, last] = next;
    b.op(linear(between[0]));
    b.op(folded);
    b.op(linear(between[1]));
    b.op(apart);
    b.op(last);
    // Judged by cases of their own; here they only have to be named as written.
    between.into_iter().for_each(|buf| b.expect_same(Act::Real(buf), Act::Real(buf)));
}

fn swiglu(
    rng: &mut Rng,
    x: ActKind,
    w: DType,
    [m, padding]: [usize; 2],
    [f, k]: [usize; 2],
    between: DType,
    out: ActKind,
) -> Problem {
    let mut b = Builder::padded(padding, m, 0, 0);
    let linear = linear(&mut b, rng, x, w, [m, 2 * f, k]);
    let between = ["folded", "apart"].map(|name| b.output(name, between, Axis::Rows, 2 * f));
    let outs = [0; 3].map(|_| b.act_out(out, Axis::Rows, f));
    let at = [between[0], between[1], between[1]];
    twice(&mut b, between, linear, [0, 1, 2].map(|i| Op::SwiGlu { gate_up: at[i], out: outs[i] }));
    outs.into_iter().for_each(|out| b.expect_same(out, outs[1]));
    b.finish()
}

fn rope(
    rng: &mut Rng,
    x: ActKind,
    w: DType,
    [m, padding]: [usize; 2],
    heads: Heads,
    between: DType,
    cache: Cache,
) -> Problem {
    let spans: Vec<_> = (0..m).map(|row| (15 + 16 * row, 1)).collect();
    let batch = Batch::new(rng, &spans, 16, false);
    let Heads { q: q_heads, kv: kv_heads, dim } = heads;
    let width = (q_heads + 2 * kv_heads) * dim;
    let mut b = Builder::padded(padding, m, 0, m);
    let linear = linear(&mut b, rng, x, w, [m, width, 96]);
    let qkv = ["folded", "apart"].map(|name| b.output(name, between, Axis::Rows, width));
    let rope = b.constant_f32("rope", dim, &rope_table(batch.table_cols * batch.page_tokens, dim));
    let rows = batch.inputs(&mut b);
    let outs = [0; 3].map(|_| {
        let q = b.output("q", between, Axis::Rows, q_heads * dim);
        let cache_rows = Axis::Fixed(batch.cache_rows(heads));
        let [k, v] = ["k", "v"].map(|name| b.output(name, cache.dtype(), cache_rows, dim));
        (q, batch.kv(k, v, cache))
    });
    let at = [qkv[0], qkv[1], qkv[1]];
    let op = |i: usize| Op::RopeAppend { qkv: at[i], rope, rows, heads, q: outs[i].0, kv: outs[i].1 };
    twice(&mut b, qkv, linear, [0, 1, 2].map(op));
    for (q, kv) in outs {
        let (want_q, want) = outs[1];
        for (buf, want) in [(q, want_q), (kv.k, want.k), (kv.v, want.v)] {
            b.expect_same(Act::Real(buf), Act::Real(want));
        }
    }
    b.finish()
}
