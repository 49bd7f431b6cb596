//! `Linear` by itself: how fast a device multiplies the shapes of a model, for as many rows as steps have.

use std::time::Instant;

use quaver_backends::Spec;
use quaver_core::cost::{self, Work};
use quaver_core::op::{Act, Backend, Buf, BufDesc, Cols, DType, Extent, Op, Program, Scale, StaticScale, Weight};
use quaver_core::{Result, philox::philox};

use super::report::{Figure, Floor, Machine, Phase, Spread, Subject};

/// A projection: `w` is `[n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// As checkpoints call it.
    pub name: &'static str,
    /// Channels.
    pub n: usize,
    /// Products of a sum.
    pub k: usize,
}

/// The projections of a layer of Llama-3.2-1B.
pub const LLAMA_1B: [Shape; 4] = [
    Shape { name: "qkv_proj", n: 3072, k: 2048 },
    Shape { name: "o_proj", n: 2048, k: 2048 },
    Shape { name: "gate_up_proj", n: 16384, k: 2048 },
    Shape { name: "down_proj", n: 2048, k: 8192 },
];

/// Bytes of weights that one run goes through, at least: more than any device's caches hold.
const WEIGHTS: usize = 256 << 20;
/// Seconds that are measured at a time, at least.
const LONG_ENOUGH: f64 = 0.05;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Gemm {
    /// What ran it.
    pub subject: Subject,
    /// A figure for every shape and number of rows.
    pub figures: Vec<Figure>,
}

/// Times `Linear` of these shapes for each number of rows, with both operands of a dtype, E4M3 or bf16; every run of a
/// kernel reads weights that were not read just before.
///
/// # Errors
/// Where the device has no memory for the largest of them.
pub fn run(
    spec: &Spec,
    shapes: &[Shape],
    rows: &[usize],
    dtype: DType,
    repeat: usize,
    mut on_progress: impl FnMut(&str),
) -> Result<Gemm> {
    let peaks = quaver_backends::peaks(spec)?;
    let machine = Machine::new(&[peaks]);
    let info = quaver_backends::open(spec)?.describe();
    let most = rows.iter().copied().max().unwrap_or(1);
    let mut figures = machine.figures();
    for shape in shapes {
        let mut bench = Bench::new(spec, *shape, most, dtype)?;
        for &rows in rows {
            on_progress(&format!("{}, {rows} rows", shape.name));
            let seconds = bench.time(rows, repeat)?;
            let phase = bench.phase(rows, seconds, &machine);
            let us = Spread { median: seconds.median * 1e6, min: seconds.min * 1e6, max: seconds.max * 1e6 };
            figures.push(Figure {
                case: format!("linear {} {} m{rows}", shape.name, if dtype == DType::E4m3 { "fp8" } else { "bf16" }),
                name: "time",
                unit: "us",
                value: us.median,
                spread: Some(us),
                phase: Some(phase),
            });
        }
    }
    let model = "random operands".to_owned();
    Ok(Gemm { subject: Subject { machine: quaver_backends::cpu::name(peaks.threads), device: info, model }, figures })
}

/// A device with the operands of one shape.
struct Bench {
    device: Box<dyn Backend>,
    live: Buf,
    x: Act,
    weights: Vec<Weight>,
    out: Buf,
    descs: Vec<BufDesc>,
}

impl Bench {
    fn new(spec: &Spec, Shape { n, k, .. }: Shape, rows: usize, dtype: DType) -> Result<Self> {
        let mut device = quaver_backends::open(spec)?;
        let mut descs = Vec::new();
        let mut alloc = |device: &mut dyn Backend, name: &str, dtype, rows, cols| {
            descs.push(BufDesc::new(name, dtype, rows, cols));
            device.alloc(&descs[descs.len() - 1])
        };
        let live = alloc(&mut *device, "live", DType::U32, Extent::Fixed(1), 3)?;
        let data = alloc(&mut *device, "x", dtype, Extent::Rows(rows), k)?;
        let out = alloc(&mut *device, "out", DType::Bf16, Extent::Rows(rows), n)?;
        device.write(data, 0, &numbers(rows * k, dtype))?;
        let (bytes, scales) = (numbers(n * k, dtype), vec![1f32; n]);
        let mut load = |name: &str, dtype, cols, bytes: &[u8]| {
            descs.push(BufDesc::new(name, dtype, Extent::Fixed(n), cols));
            device.load(&descs[descs.len() - 1], &[bytes.to_vec().into()])
        };
        let copies = WEIGHTS.div_ceil(bytes.len());
        let mut weights = Vec::with_capacity(copies);
        for _ in 0..copies {
            let own = load("w", dtype, k, &bytes)?;
            weights.push(match dtype {
                DType::E4m3 => {
                    let scale = load("scale", DType::F32, 1, bytemuck::cast_slice(&scales))?;
                    Weight::Fp8 { codes: own, scale }
                }
                _ => Weight::Real(own),
            });
        }
        let x = match dtype {
            DType::E4m3 => Act::Fp8 { codes: data, scale: Scale::Static(StaticScale::new(1.0)) },
            _ => Act::Real(data),
        };
        Ok(Bench { device, live, x, weights, out, descs })
    }

    /// Seconds of one Linear of so many rows.
    fn time(&mut self, rows: usize, repeat: usize) -> Result<Spread> {
        self.device.write(self.live, 0, bytemuck::cast_slice(&[rows as u32, 0, 0]))?;
        let mut program = Program::new(rows, 0, self.live);
        self.weights.iter().for_each(|&w| program.push("linear", self.op(w)));
        let plan = self.device.record(&program)?;
        let out = self.out;
        let mut run = |times: usize| -> Result<f64> {
            let start = Instant::now();
            (0..times).try_for_each(|_| self.device.run(plan))?;
            // Waits for all.
            self.device.read(out, 0, &mut [0; 4])?;
            Ok(start.elapsed().as_secs_f64())
        };
        run(1)?;
        let times = (LONG_ENOUGH / run(1)?).ceil().clamp(1.0, 1e4) as usize;
        let linears = (times * self.weights.len()) as f64;
        let seconds = (0..repeat).map(|_| Ok(run(times)? / linears)).collect::<Result<Vec<f64>>>()?;
        Ok(Spread::new(seconds))
    }

    fn op(&self, w: Weight) -> Op {
        Op::Linear { x: self.x, w, out: Cols { buf: self.out, first: 0 }, add: false }
    }

    fn phase(&self, rows: usize, seconds: Spread, machine: &Machine) -> Phase {
        let work = Work { rows: rows as u64, ..Work::default() };
        let mut cost = cost::cost(&self.op(self.weights[0]), &work, |buf| &self.descs[buf.0 as usize]);
        // By itself, it reads its rows and writes them, too.
        let bytes = |buf: Buf| self.descs[buf.0 as usize].cols * self.descs[buf.0 as usize].dtype.size();
        cost.bytes += (rows * (bytes(self.x.bufs()[0]) + bytes(self.out))) as u64;
        let of = |seconds: f64| rows as f64 / seconds;
        let tokens_per_s = Spread { median: of(seconds.median), min: of(seconds.max), max: of(seconds.min) };
        Phase { tokens: rows, seconds, tokens_per_s, cost, floor: Floor::new(cost, machine), ops: Vec::new() }
    }
}

/// The bytes of numbers between -2 and 2, or near them.
fn numbers(count: usize, dtype: DType) -> Vec<u8> {
    let words = (0..count.div_ceil(4) as u32).flat_map(|i| philox([i, 0, 0, 0], [0; 2]));
    match dtype {
        // The sign, and codes below that of 2.
        DType::E4m3 => words.map(|word| (word & 0x80) as u8 | ((word >> 8) as u8 % 0x40)).take(count).collect(),
        _ => words
            .flat_map(|word| (((word & 0x8000) | 0x3f00 | (word >> 16 & 0xff)) as u16).to_le_bytes())
            .take(2 * count)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use quaver_backends::Kind;

    use super::*;

    #[test]
    fn a_figure_counts_weights_rows_and_products() {
        let spec = Spec { kind: Kind::Cpu, threads: Some(1), ..Spec::default() };
        let shape = Shape { name: "o_proj", n: 32, k: 1 << 20 };
        let gemm = run(&spec, &[shape], &[1, 3], DType::E4m3, 1, |_| ()).unwrap();
        let [.., one, three] = &gemm.figures[..] else { panic!("{gemm:?}") };
        assert_eq!([&one.case, &three.case], ["linear o_proj fp8 m1", "linear o_proj fp8 m3"]);
        for (figure, rows) in [(one, 1), (three, 3)] {
            let phase = figure.phase.as_ref().unwrap();
            assert_eq!(phase.cost.flops, 2 * 32 * (1 << 20) * rows);
            assert_eq!(phase.cost.bytes, (32 << 20) + 4 * 32 + rows * ((1 << 20) + 2 * 32));
            assert!(figure.value > 0.0 && (figure.value / 1e6 - phase.seconds.median).abs() < 1e-12);
        }
    }

    #[test]
    fn operands_are_numbers() {
        assert!(numbers(4096, DType::E4m3).iter().all(|&code| quaver_core::e4m3::decode(code).abs() < 2.0));
        let values = numbers(4096, DType::Bf16);
        let mut values = values.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        assert!(values.all(|x| x.abs() < 2.0));
    }
}
