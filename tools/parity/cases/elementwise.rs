//! `RmsNorm` and `SwiGlu`: against f64, and against themselves unfused.

use quaver_core::op::{Act, DType, Op};

use super::List;
use crate::parity::bound::{Truth, decode};
use crate::parity::build::{ActKind, Axis, Builder, encode};
use crate::parity::limits::Work;
use crate::parity::{Problem, Rng};

const EPS: f32 = 1e-5;

const OUTPUTS: [ActKind; 4] = [ActKind::F32, ActKind::Bf16, ActKind::Static(0.0117), ActKind::PerToken];

pub fn add(list: &mut List) {
    for kind in OUTPUTS {
        let name = kind.name();
        for (m, d) in [(0, 64), (1, 2048), (3, 100), (17, 2048), (64, 256), (130, 37)] {
            list.add("rms_norm", format!("{name}_m{m}_d{d}"), move |rng| {
                rms_norm(rng, kind, Axis::Rows, m, d, |_| 1.0)
            });
        }
        list.add("rms_norm", format!("{name}_wanted_w5_d512"), move |rng| {
            rms_norm(rng, kind, Axis::Wanted, 5, 512, |_| 1.0)
        });
        // A row of zeros, rows where eps matters, and rows whose squares leave f32's comfortable range.
        list.add("rms_norm", format!("{name}_rows_of_all_sizes"), move |rng| {
            rms_norm(rng, kind, Axis::Rows, 15, 512, |row| if row == 0 { 0.0 } else { 10f32.powi(row as i32 - 8) })
        });
        for (dtype, input) in [(DType::F32, "f32"), (DType::Bf16, "bf16")] {
            for (m, f) in [(0, 64), (1, 1024), (3, 100), (17, 1024), (64, 37)] {
                list.add("swiglu", format!("{input}_to_{name}_m{m}_f{f}"), move |rng| {
                    swiglu(rng, dtype, kind, m, f, 2.0)
                });
            }
            for deviation in [30, 1000] {
                list.add("swiglu", format!("{input}_to_{name}_gates_of_{deviation}"), move |rng| {
                    swiglu(rng, dtype, kind, 7, 256, deviation as f32)
                });
            }
        }
    }
    list.drawn("rms_norm", |rng| {
        let (kind, m, d) = (ActKind::draw(rng), 1 + rng.below(70), 2 + rng.below(1500));
        (format!("{}_m{m}_d{d}", kind.name()), move |rng: &mut Rng| rms_norm(rng, kind, Axis::Rows, m, d, |_| 1.0))
    });
    list.drawn("swiglu", |rng| {
        let (dtype, kind) = (rng.pick(&[DType::F32, DType::Bf16]), ActKind::draw(rng));
        let (m, f) = (1 + rng.below(70), 2 + rng.below(900));
        (format!("{dtype:?}_to_{}_m{m}_f{f}", kind.name()), move |rng: &mut Rng| swiglu(rng, dtype, kind, m, f, 2.0))
    });
    for kind in [ActKind::Bf16, ActKind::Static(0.0117), ActKind::PerToken] {
        let name = kind.name();
        list.add("rms_norm", format!("fused_equals_unfused_{name}"), move |rng| {
            let (m, d) = (23, 512);
            let (mut b, x, gamma) = rms_norm_inputs(rng, Axis::Rows, m, d, |_| 1.0);
            fused(&mut b, kind, d, |out| Op::RmsNorm { x: x.0, gamma: gamma.0, eps: EPS, out });
            b.finish()
        });
        list.add("swiglu", format!("fused_equals_unfused_{name}"), move |rng| {
            let (m, f) = (23, 512);
            let mut b = Builder::new(m, 0, 0);
            let gate_up = b.input_f32("gate_up", Axis::Rows, 2 * f, &rng.normals(m * 2 * f, 2.0));
            fused(&mut b, kind, f, |out| Op::SwiGlu { gate_up, out });
            b.finish()
        });
    }
}

/// A fused op must give the bytes of its unfused pair on the same device: the op to f32, then `Quantize`.
pub fn fused(b: &mut Builder, kind: ActKind, width: usize, op: impl Fn(Act) -> Op) {
    let fused = b.act_out(kind, Axis::Rows, width);
    let real = b.output("unfused", DType::F32, Axis::Rows, width);
    let unfused = b.act_out(kind, Axis::Rows, width);
    b.op(op(fused));
    b.op(op(Act::Real(real)));
    b.op(Op::Quantize { x: real, out: unfused });
    b.expect_same(fused, unfused);
    // The two below are judged by cases of their own; here they only have to be named as written.
    b.expect_same(Act::Real(real), Act::Real(real));
    b.expect_same(unfused, unfused);
}

type Input<T = quaver_core::op::Buf> = (T, Vec<f64>);

fn rms_norm_inputs(
    rng: &mut Rng,
    axis: Axis,
    m: usize,
    d: usize,
    size: impl Fn(usize) -> f32,
) -> (Builder, Input, Input) {
    let mut b = if axis == Axis::Rows { Builder::new(m, 0, 0) } else { Builder::new(2, m, 0) };
    let values: Vec<f32> = (0..m).flat_map(|row| rng.normals(d, size(row))).collect();
    let gammas: Vec<f32> = (0..d).map(|_| rng.between(-0.5, 2.0)).collect();
    let x = b.input_f32("x", axis, d, &values);
    let gamma = b.constant_f32("gamma", d, &gammas);
    let exact = |list: Vec<f32>| list.into_iter().map(f64::from).collect();
    (b, (x, exact(values)), (gamma, exact(gammas)))
}

fn rms_norm(rng: &mut Rng, kind: ActKind, axis: Axis, m: usize, d: usize, size: impl Fn(usize) -> f32) -> Problem {
    let (mut b, (x, values), (gamma, gammas)) = rms_norm_inputs(rng, axis, m, d, size);
    let out = b.act_out(kind, axis, d);
    b.op(Op::RmsNorm { x, gamma, eps: EPS, out });
    let row = |x: &[f64]| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
        let inv = 1.0 / (mean + f64::from(EPS)).sqrt();
        x.iter().zip(&gammas).map(|(x, g)| x * inv * g).collect::<Vec<_>>()
    };
    let value = values.chunks(d).flat_map(row).collect();
    b.expect_act(out, d, Truth::relative(value, Work::RmsNorm));
    b.finish()
}

fn swiglu(rng: &mut Rng, dtype: DType, kind: ActKind, m: usize, f: usize, deviation: f32) -> Problem {
    let mut b = Builder::new(m, 0, 0);
    let row = |rng: &mut Rng| [rng.normals(f, deviation), rng.normals(f, 2.0)].concat();
    let bytes = encode(dtype, &(0..m).flat_map(|_| row(rng)).collect::<Vec<_>>());
    let values = decode(dtype, &bytes);
    let gate_up = b.input("gate_up", dtype, Axis::Rows, 2 * f, bytes);
    let out = b.act_out(kind, Axis::Rows, f);
    b.op(Op::SwiGlu { gate_up, out });
    let (mut value, mut magnitude) = (Vec::new(), Vec::new());
    for row in values.chunks(2 * f) {
        for (&gate, &up) in row[..f].iter().zip(&row[f..]) {
            let (gate, up) = (f64::from(gate), f64::from(up));
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            let y = gate * sigmoid * up;
            value.push(y);
            magnitude.push(y.abs() * (1.0 + gate.abs() * (1.0 - sigmoid)));
        }
    }
    b.expect_act(out, f, Truth { value, magnitude, work: Work::SwiGlu });
    b.finish()
}
