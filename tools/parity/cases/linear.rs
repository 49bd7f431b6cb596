//! `Linear`: every pair of formats, ragged shapes, and inputs that are hard on a sum.

use quaver_core::e4m3;
use quaver_core::op::{Cols, DType, Op, Weight};

use super::List;
use crate::parity::bound::{Bound, Truth};
use crate::parity::build::{ActKind, Axis, Builder};
use crate::parity::limits::Work;
use crate::parity::{Problem, Rng};

const STATIC: ActKind = ActKind::Static(0.0117);

#[derive(Clone, Copy, Debug, PartialEq)]
enum WeightKind {
    F32,
    Bf16,
    Fp8,
}

impl WeightKind {
    fn dtype(self) -> DType {
        match self {
            WeightKind::F32 => DType::F32,
            WeightKind::Bf16 => DType::Bf16,
            WeightKind::Fp8 => DType::E4m3,
        }
    }
}

/// What one case computes.
#[derive(Clone, Copy)]
struct Shape {
    x: ActKind,
    w: WeightKind,
    axis: Axis,
    m: usize,
    n: usize,
    k: usize,
    out: DType,
    add: bool,
    /// The first column, and columns behind the last.
    margin: (usize, usize),
    /// Rows of the weight's parts; none for one part.
    parts: &'static [usize],
    /// No rows but those in use.
    tight: bool,
}

const PLAIN: Shape = Shape {
    x: STATIC,
    w: WeightKind::Fp8,
    axis: Axis::Rows,
    m: 17,
    n: 49,
    k: 256,
    out: DType::F32,
    add: false,
    margin: (0, 0),
    parts: &[],
    tight: false,
};

pub fn add(list: &mut List) {
    let mut plain = |name: String, shape: Shape| list.add("linear", name, move |rng| random(rng, shape));
    for x in [ActKind::F32, ActKind::Bf16, STATIC, ActKind::PerToken] {
        for (weight, w) in [("f32", WeightKind::F32), ("bf16", WeightKind::Bf16), ("fp8", WeightKind::Fp8)] {
            plain(format!("{}_x_{weight}_m17_n49_k256", x.name()), Shape { x, w, ..PLAIN });
            plain(
                format!("{}_x_{weight}_bf16_out_m3_n33_k100", x.name()),
                Shape { x, w, m: 3, n: 33, k: 100, out: DType::Bf16, ..PLAIN },
            );
            plain(
                format!("{}_x_{weight}_add_m5_n7_k37", x.name()),
                Shape { x, w, m: 5, n: 7, k: 37, add: true, ..PLAIN },
            );
        }
    }
    for x in [STATIC, ActKind::PerToken] {
        for (m, n, k) in [(0, 48, 256), (1, 48, 2048), (3, 129, 512), (17, 48, 2048), (64, 97, 512), (130, 33, 256)] {
            plain(format!("{}_m{m}_n{n}_k{k}", x.name()), Shape { x, m, n, k, ..PLAIN });
        }
        let parts = Shape { x, m: 9, n: 48, parts: &[16, 23, 9], ..PLAIN };
        plain(format!("{}_weight_in_three_parts", x.name()), parts);
        plain(format!("{}_wanted_w5_n301", x.name()), Shape { x, axis: Axis::Wanted, m: 5, n: 301, ..PLAIN });
    }
    for (name, out, add) in [("f32", DType::F32, false), ("f32_add", DType::F32, true), ("bf16", DType::Bf16, false)] {
        let offset = Shape { m: 18, out, add, margin: (35, 11), parts: &[20, 29], ..PLAIN };
        plain(format!("columns_of_a_wider_buffer_{name}"), offset);
    }
    plain(
        "bf16_x_bf16_head_w3_n1001_k512".into(),
        Shape { x: ActKind::Bf16, w: WeightKind::Bf16, axis: Axis::Wanted, m: 3, n: 1001, k: 512, ..PLAIN },
    );
    // More tiles of any size than a large card has multiprocessors.
    let many = Shape { x: STATIC, m: 1100, n: 1060, k: 640, add: true, ..PLAIN };
    plain("many_tiles_static_add_m1100_n1060_k640".into(), many);
    let many = Shape { x: ActKind::Bf16, w: WeightKind::Bf16, out: DType::Bf16, add: false, ..many };
    plain("many_tiles_bf16_m1100_n1060_k640".into(), many);
    plain("one_channel_n1".into(), Shape { m: 33, n: 1, ..PLAIN });
    for (m, n, k) in decode_shapes() {
        let bf16 = Shape { x: ActKind::PerToken, out: DType::Bf16, margin: (35, 11), m, n, k, tight: true, ..PLAIN };
        plain(format!("decode_per_token_bf16_out_m{m}_n{n}_k{k}"), bf16);
        plain(format!("decode_static_add_m{m}_n{n}_k{k}"), Shape { x: STATIC, out: DType::F32, add: true, ..bf16 });
    }
    let head =
        Shape { axis: Axis::Wanted, x: ActKind::Bf16, w: WeightKind::Bf16, n: 301, k: 2048, tight: true, ..PLAIN };
    for m in [1, 2] {
        plain(format!("decode_bf16_x_bf16_head_w{m}_n301_k2048"), Shape { m, ..head });
    }
    list.drawn("linear", |rng| {
        let shape = drawn(rng);
        let Shape { x, w, m, n, k, .. } = shape;
        let extra = if shape.add { "_add" } else { "" };
        let name = format!("{}_x_{w:?}{extra}_m{m}_n{n}_k{k}", x.name()).to_lowercase();
        (name, move |rng: &mut Rng| random(rng, shape))
    });
    adversaries(list);
}

/// A shape that nobody thought of.
fn drawn(rng: &mut Rng) -> Shape {
    let add = rng.below(3) == 0;
    Shape {
        x: ActKind::draw(rng),
        w: rng.pick(&[WeightKind::F32, WeightKind::Bf16, WeightKind::Fp8, WeightKind::Fp8]),
        axis: rng.pick(&[Axis::Rows, Axis::Wanted]),
        m: 1 + rng.below(40),
        n: 1 + rng.below(120),
        k: 2 + rng.below(1200),
        out: if add { DType::F32 } else { rng.pick(&[DType::F32, DType::Bf16]) },
        add,
        margin: (rng.below(20), rng.below(20)),
        parts: &[],
        tight: rng.below(2) == 0,
    }
}

/// One and two rows, as decoding has them: kernels of their own on GPUs.
fn decode_shapes() -> impl Iterator<Item = (usize, usize, usize)> {
    let of_rows = |m| [1, 7, 49, 301].into_iter().flat_map(move |n| [37, 96, 2048].map(|k| (m, n, k)));
    [1, 2].into_iter().flat_map(of_rows)
}

fn adversaries(list: &mut List) {
    list.add("linear", "all_code_pairs", |_| code_pairs());
    // Rows of decoding, for a thread's tile, for several tiles, and for the large tiles of GPUs.
    for m in [2, 5, 17, 70] {
        let tight = m == 2;
        let positive = |rng: &mut Rng, n| rng.normals(n, 1.0).into_iter().map(f32::abs).collect::<Vec<_>>();
        for (name, x, w) in [("", STATIC, WeightKind::Fp8), ("bf16_", ActKind::Bf16, WeightKind::Bf16)] {
            list.add("linear", format!("all_positive_{name}m{m}_n33_k8192"), move |rng| {
                let shape = Shape { x, w, m, n: 33, k: 8192, tight, ..PLAIN };
                let (x, w) = (positive(rng, m * 8192), positive(rng, 33 * 8192));
                problem(rng, shape, &x, &w)
            });
        }
        list.add("linear", format!("saturating_rows_m{m}_n33_k8192"), move |rng| {
            let shape = Shape { m, n: 33, k: 8192, x: ActKind::Static(1.0), tight, ..PLAIN };
            let x: Vec<f32> = (0..m * 8192).map(|i| if i / 8192 % 2 == 0 { 448.0 } else { -448.0 }).collect();
            // The channels' scales make the largest weight of each 448 as well.
            let w: Vec<f32> = (0..33 * 8192).map(|i| if i % 3 == 0 { -1.0 } else { 1.0 }).collect();
            problem(rng, shape, &x, &w)
        });
    }
    list.add("linear", "fp8_subnormals", |rng| {
        let shape = Shape { x: ActKind::Static(1.0), m: 17, n: 33, k: 512, ..PLAIN };
        let x: Vec<f32> = (0..17 * 512).map(|_| (rng.below(15) as f32 - 7.0) / 512.0).collect();
        let codes = (0..33 * 512).map(|_| (rng.below(8) + 128 * rng.below(2)) as u8).collect();
        with_codes(rng, shape, &x, codes)
    });
    for m in [1, 2, 17] {
        list.add("linear", format!("nan_in_the_last_row_m{m}"), move |_| nan_row(m));
    }
    for x in [STATIC, ActKind::PerToken, ActKind::Bf16] {
        list.add("linear", format!("outlier_channels_{}", x.name()), move |rng| {
            let shape = Shape { x, m: 17, n: 33, k: 2048, ..PLAIN };
            let mut values = rng.normals(17 * 2048, 0.02);
            for row in values.chunks_mut(2048) {
                [3, 700, 2047].into_iter().for_each(|outlier| row[outlier] *= 200.0);
            }
            let w = rng.normals(33 * 2048, 1.0);
            problem(rng, shape, &values, &w)
        });
    }
    list.add("linear", "large_terms_cancel_k2048", |rng| {
        let shape = Shape { x: ActKind::Static(1.0), m: 17, n: 33, k: 2048, ..PLAIN };
        let pair = |rng: &mut Rng| [448.0, rng.between(-0.1, 0.1), -448.0, rng.between(-0.1, 0.1)];
        let x: Vec<f32> = (0..17 * 512).flat_map(|_| pair(rng)).collect();
        problem(rng, shape, &x, &vec![1.0; 33 * 2048])
    });
}

fn random(rng: &mut Rng, shape: Shape) -> Problem {
    let (x, w) = (rng.normals(shape.m * shape.k, 1.0), rng.normals(shape.n * shape.k, 0.05));
    problem(rng, shape, &x, &w)
}

/// A case of these values. Channels of an FP8 weight get scales that differ widely, so that no neighbour's will do.
fn problem(rng: &mut Rng, shape: Shape, x: &[f32], w: &[f32]) -> Problem {
    let mut b = builder(shape);
    let (w, w_exact) = match shape.w {
        WeightKind::F32 => b.real_weight(DType::F32, shape.k, w, shape.parts),
        WeightKind::Bf16 => b.real_weight(DType::Bf16, shape.k, w, shape.parts),
        WeightKind::Fp8 => {
            let quantized = |row: &[f32]| {
                let amax = row.iter().fold(1e-6f32, |amax, x| amax.max(x.abs()));
                row.iter().map(|x| e4m3::encode(x / amax * e4m3::MAX)).collect::<Vec<_>>()
            };
            let codes = w.chunks(shape.k).flat_map(quantized).collect();
            b.fp8_weight(shape.k, codes, &scales(rng, shape.n), shape.parts)
        }
    };
    finish(b, rng, shape, x, w, &w_exact)
}

fn with_codes(rng: &mut Rng, shape: Shape, x: &[f32], codes: Vec<u8>) -> Problem {
    let mut b = builder(shape);
    let (w, w_exact) = b.fp8_weight(shape.k, codes, &scales(rng, shape.n), shape.parts);
    finish(b, rng, shape, x, w, &w_exact)
}

fn builder(shape: Shape) -> Builder {
    let (rows, wanted) = if shape.axis == Axis::Rows { (shape.m, 0) } else { (2, shape.m) };
    if shape.tight { Builder::tight(rows, wanted, 0) } else { Builder::new(rows, wanted, 0) }
}

fn scales(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| 2e-4 * 2f32.powf(rng.between(-3.0, 3.0))).collect()
}

fn finish(mut b: Builder, rng: &mut Rng, shape: Shape, x: &[f32], w: Weight, w_exact: &[f64]) -> Problem {
    let Shape { m, n, k, axis, out, add, margin, .. } = shape;
    let (x, x_exact) = b.act_in(shape.x, axis, k, x);
    let cols = margin.0 + n + margin.1;
    let before = rng.normals(m * cols, 1.0);
    let y = if add { b.input_f32("out", axis, cols, &before) } else { b.output("out", out, axis, cols) };
    b.op(Op::Linear { x, w, out: Cols { buf: y, first: margin.0 }, add });
    let (mut value, mut magnitude, mut at) = (Vec::new(), Vec::new(), Vec::new());
    for (i, x) in x_exact.chunks(k).enumerate() {
        for (j, w) in w_exact.chunks(k).enumerate() {
            let place = i * cols + margin.0 + j;
            let residual = if add { f64::from(before[place]) } else { 0.0 };
            let (sum, size) = sums(x, w);
            value.push(residual + sum);
            magnitude.push(residual.abs() + size);
            at.push(place);
        }
    }
    b.expect_at(
        y,
        at,
        n,
        Bound::Close(Truth {
            value,
            magnitude,
            work: Work::Linear { rows: m, k, dtypes: [shape.x.dtype(), shape.w.dtype()] },
        }),
    );
    b.finish()
}

/// The sum of x w, and that of |x||w|.
fn sums(x: &[f64], w: &[f64]) -> (f64, f64) {
    // In eight lanes, for the compiler's vector registers.
    let (mut sum, mut size) = ([0.0; 8], [0.0; 8]);
    for (x, w) in x.chunks(8).zip(w.chunks(8)) {
        for (lane, (x, w)) in x.iter().zip(w).enumerate() {
            sum[lane] += x * w;
            size[lane] += (x * w).abs();
        }
    }
    (sum.iter().sum(), size.iter().sum())
}

/// Small whole numbers, whose sums are exact, and a NaN among the codes of the last row: all of its results are NaN, and
/// no other's.
fn nan_row(m: usize) -> Problem {
    let (n, k) = (33, 512);
    let mut values: Vec<f32> = (0..m * k).map(|i| (i % 3) as f32 - 1.0).collect();
    values[(m - 1) * k + 300] = f32::NAN;
    let mut b = builder(Shape { m, tight: m <= 2, ..PLAIN });
    let (x, _) = b.act_in(ActKind::Static(1.0), Axis::Rows, k, &values);
    let (w, _) = b.fp8_weight(k, vec![e4m3::encode(1.0); n * k], &vec![1.0; n], &[]);
    let out = b.output("out", DType::F32, Axis::Rows, n);
    b.op(Op::Linear { x, w, out: Cols { buf: out, first: 0 }, add: false });
    b.expect(out, Bound::Bytes);
    b.finish()
}

/// Every code times every code: row i has code i in one place, channel j has code j there, and zeros elsewhere. A
/// product is exact in f32.
fn code_pairs() -> Problem {
    let k = 64;
    let finite: Vec<u8> = (0..=255).filter(|&code| !e4m3::is_nan(code)).collect();
    let n = finite.len();
    let matrix = || finite.iter().flat_map(|&code| (0..k).map(move |i| if i == 21 { code } else { 0 })).collect();
    let mut b = Builder::new(n, 0, 0);
    let values: Vec<u8> = matrix();
    let values: Vec<f32> = values.into_iter().map(e4m3::decode).collect();
    let (x, _) = b.act_in(ActKind::Static(1.0), Axis::Rows, k, &values);
    let (w, _) = b.fp8_weight(k, matrix(), &vec![1.0; n], &[]);
    let out = b.output("out", DType::F32, Axis::Rows, n);
    b.op(Op::Linear { x, w, out: Cols { buf: out, first: 0 }, add: false });
    let value = |&code: &u8| f64::from(e4m3::decode(code));
    let value: Vec<f64> = finite.iter().flat_map(|a| finite.iter().map(move |b| value(a) * value(b))).collect();
    b.expect(out, Bound::Close(Truth::relative(value, Work::Exact)));
    b.finish()
}
