//! Building problems. Rows beyond those in use are poisoned: a kernel that reads them spoils its result, one that
//! writes them is found out.

use half::bf16;
use quaver_core::bytes::Bytes;
use quaver_core::e4m3;
use quaver_core::op::{Act, Buf, BufDesc, DType, Extent, Op, Program, Scale, StaticScale, Weight};

use super::bound::{Bound, Codes, Truth};
use super::limits::Work;
use super::rng::Rng;
use super::{Contents, Output, Problem};

/// A word of inputs that nothing may read: NaN in every dtype, and no row, page or token.
const UNREAD: u8 = 0xff;

/// A word of outputs before the run: about -390 in f32 and bf16.
const UNWRITTEN: u8 = 0xc3;

/// What the rows of a buffer run along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    Rows,
    Wanted,
    Fixed(usize),
}

/// A kind of activations, with the static scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ActKind {
    F32,
    Bf16,
    Static(f32),
    PerToken,
}

impl ActKind {
    /// Any kind, with a scale as calibration gives them.
    pub fn draw(rng: &mut Rng) -> Self {
        let scale = rng.between(0.003, 0.05);
        rng.pick(&[ActKind::F32, ActKind::Bf16, ActKind::Static(scale), ActKind::PerToken])
    }

    /// Of the activations.
    pub fn dtype(self) -> DType {
        match self {
            ActKind::F32 => DType::F32,
            ActKind::Bf16 => DType::Bf16,
            ActKind::Static(_) | ActKind::PerToken => DType::E4m3,
        }
    }

    /// As names of cases spell it.
    pub fn name(self) -> &'static str {
        match self {
            ActKind::F32 => "f32",
            ActKind::Bf16 => "bf16",
            ActKind::Static(_) => "fp8_static",
            ActKind::PerToken => "fp8_per_token",
        }
    }
}

/// A problem in the making.
pub struct Builder {
    padding: usize,
    buffers: Vec<(BufDesc, Contents)>,
    rows: usize,
    wanted: usize,
    program: Program,
    outputs: Vec<Output>,
}

/// Rows of the program that are not in use, and rows of the buffers that are not in the program.
const PADDING: usize = 3;

const LIVE: Buf = Buf(0);

impl Builder {
    /// A problem with so many rows, wanted rows and spans in use.
    pub fn new(rows: usize, wanted: usize, spans: usize) -> Self {
        Self::padded(PADDING, rows, wanted, spans)
    }

    /// A problem without padding, so that backends choose their kernels for exactly so many rows.
    pub fn tight(rows: usize, wanted: usize, spans: usize) -> Self {
        Self::padded(0, rows, wanted, spans)
    }

    /// A problem with so many rows of the program that are not in use, and of the buffers that are not in the program.
    pub fn padded(padding: usize, rows: usize, wanted: usize, spans: usize) -> Self {
        let live = BufDesc::new("live", DType::U32, Extent::Fixed(1), 3);
        let words = [rows, wanted, spans].map(|n| n as u32);
        let program = Program::new(rows + padding, wanted + padding, LIVE);
        let buffers = vec![(live, Contents::Written(bytemuck::cast_slice(&words).to_vec()))];
        Builder { padding, buffers, rows, wanted, program, outputs: Vec::new() }
    }

    fn push(&mut self, desc: BufDesc, contents: Contents) -> Buf {
        self.buffers.push((desc, contents));
        Buf(self.buffers.len() as u32 - 1)
    }

    /// A constant in parts of so many rows.
    pub fn constant(&mut self, name: &str, dtype: DType, cols: usize, bytes: Vec<u8>, parts: &[usize]) -> Buf {
        let row = cols * dtype.size();
        let desc = BufDesc::new(name, dtype, Extent::Fixed(bytes.len() / row), cols);
        let (bytes, mut first) = (Bytes::from(bytes), 0);
        let part = |rows: &usize| {
            first += rows * row;
            bytes.slice(first - rows * row..first)
        };
        let parts: Vec<Bytes> = parts.iter().map(part).collect();
        self.push(desc, Contents::Constant(if parts.is_empty() { vec![bytes] } else { parts }))
    }

    /// A constant f32 matrix.
    pub fn constant_f32(&mut self, name: &str, cols: usize, values: &[f32]) -> Buf {
        self.constant(name, DType::F32, cols, encode(DType::F32, values), &[])
    }

    /// A buffer that is written before the run; what lies beyond `bytes` is filled with `poison`.
    fn written(&mut self, name: &str, dtype: DType, axis: Axis, cols: usize, mut bytes: Vec<u8>, poison: u8) -> Buf {
        let rows = match axis {
            Axis::Rows => Extent::Rows(self.rows + 2 * self.padding),
            Axis::Wanted => Extent::Wanted(self.wanted + 2 * self.padding),
            Axis::Fixed(n) => Extent::Fixed(n),
        };
        let desc = BufDesc::new(name, dtype, rows, cols);
        bytes.resize(desc.bytes(), poison);
        self.push(desc, Contents::Written(bytes))
    }

    /// An input.
    pub fn input(&mut self, name: &str, dtype: DType, axis: Axis, cols: usize, bytes: Vec<u8>) -> Buf {
        self.written(name, dtype, axis, cols, bytes, UNREAD)
    }

    /// An input of f32 numbers.
    pub fn input_f32(&mut self, name: &str, axis: Axis, cols: usize, values: &[f32]) -> Buf {
        self.input(name, DType::F32, axis, cols, encode(DType::F32, values))
    }

    /// An input of words.
    pub fn input_u32(&mut self, name: &str, axis: Axis, cols: usize, words: &[u32]) -> Buf {
        self.input(name, DType::U32, axis, cols, bytemuck::cast_slice(words).to_vec())
    }

    /// An output, poisoned; nothing is expected of it yet.
    pub fn output(&mut self, name: &str, dtype: DType, axis: Axis, cols: usize) -> Buf {
        self.written(name, dtype, axis, cols, Vec::new(), UNWRITTEN)
    }

    /// Activations to read, and their real values after rounding.
    pub fn act_in(&mut self, kind: ActKind, axis: Axis, k: usize, values: &[f32]) -> (Act, Vec<f64>) {
        let amax = |row: &[f32]| row.iter().fold(0f32, |amax, x| amax.max(x.abs()));
        let quantized = |values: &[f32], scale: f32| -> Vec<u8> {
            values.iter().map(|x| e4m3::encode(x * (1.0 / scale))).collect()
        };
        let real = |codes: &[u8], scale: f32| -> Vec<f64> {
            codes.iter().map(|&code| f64::from(e4m3::decode(code)) * f64::from(scale)).collect()
        };
        match kind {
            ActKind::F32 | ActKind::Bf16 => {
                let dtype = if kind == ActKind::F32 { DType::F32 } else { DType::Bf16 };
                let bytes = encode(dtype, values);
                let exact = super::bound::decode(dtype, &bytes).into_iter().map(f64::from).collect();
                (Act::Real(self.input("x", dtype, axis, k, bytes)), exact)
            }
            ActKind::Static(scale) => {
                let codes = quantized(values, scale);
                let exact = real(&codes, scale);
                let codes = self.input("x codes", DType::E4m3, axis, k, codes);
                (Act::Fp8 { codes, scale: Scale::Static(StaticScale::new(scale)) }, exact)
            }
            ActKind::PerToken => {
                let scales: Vec<f32> = values.chunks(k).map(|row| amax(row).max(1e-6) / e4m3::MAX).collect();
                let rows = values.chunks(k).zip(&scales);
                let codes: Vec<u8> = rows.flat_map(|(row, &scale)| quantized(row, scale)).collect();
                let exact = codes.chunks(k).zip(&scales).flat_map(|(row, &scale)| real(row, scale)).collect();
                let codes = self.input("x codes", DType::E4m3, axis, k, codes);
                let scale = Scale::PerToken(self.input_f32("x scales", axis, 1, &scales));
                (Act::Fp8 { codes, scale }, exact)
            }
        }
    }

    /// Activations to write.
    pub fn act_out(&mut self, kind: ActKind, axis: Axis, cols: usize) -> Act {
        match kind {
            ActKind::F32 => Act::Real(self.output("out", DType::F32, axis, cols)),
            ActKind::Bf16 => Act::Real(self.output("out", DType::Bf16, axis, cols)),
            ActKind::Static(scale) => Act::Fp8 {
                codes: self.output("out codes", DType::E4m3, axis, cols),
                scale: Scale::Static(StaticScale::new(scale)),
            },
            ActKind::PerToken => Act::Fp8 {
                codes: self.output("out codes", DType::E4m3, axis, cols),
                scale: Scale::PerToken(self.output("out scales", DType::F32, axis, 1)),
            },
        }
    }

    /// A weight whose codes are given: `[n, k]` with scales `[n]`.
    pub fn fp8_weight(&mut self, k: usize, codes: Vec<u8>, scales: &[f32], parts: &[usize]) -> (Weight, Vec<f64>) {
        let real = |(row, &scale): (&[u8], &f32)| {
            row.iter().map(|&code| f64::from(e4m3::decode(code)) * f64::from(scale)).collect::<Vec<_>>()
        };
        let exact = codes.chunks(k).zip(scales).flat_map(real).collect();
        let codes = self.constant("w codes", DType::E4m3, k, codes, parts);
        (Weight::Fp8 { codes, scale: self.constant_f32("w scales", 1, scales) }, exact)
    }

    /// A weight of rounded values.
    pub fn real_weight(&mut self, dtype: DType, k: usize, values: &[f32], parts: &[usize]) -> (Weight, Vec<f64>) {
        let bytes = encode(dtype, values);
        let exact = super::bound::decode(dtype, &bytes).into_iter().map(f64::from).collect();
        (Weight::Real(self.constant("w", dtype, k, bytes, parts)), exact)
    }

    /// Appends an op.
    pub fn op(&mut self, op: Op) {
        self.program.push(op.name(), op);
    }

    /// Expects something of certain elements.
    pub fn expect_at(&mut self, buf: Buf, at: Vec<usize>, width: usize, bound: Bound) {
        self.outputs.push(Output { buf, at, width, bound });
    }

    /// Expects something of all columns of the rows in use.
    pub fn expect(&mut self, buf: Buf, bound: Bound) {
        let desc = &self.buffers[buf.0 as usize].0;
        let width = desc.cols;
        let rows = match desc.rows {
            Extent::Rows(_) => self.rows,
            Extent::Wanted(_) => self.wanted,
            Extent::Fixed(n) => n,
        };
        self.expect_at(buf, (0..rows * width).collect(), width, bound);
    }

    /// Expects activations near their f64 values, codes and scales included.
    pub fn expect_act(&mut self, act: Act, width: usize, truth: Truth) {
        let (codes, scale) = match act {
            Act::Real(buf) => return self.expect(buf, Bound::Close(truth)),
            Act::Fp8 { codes, scale } => (codes, scale),
        };
        let rows = truth.value.len() / width;
        let (inv, spread) = match scale {
            Scale::Static(scale) => (vec![f64::from(scale.inv); rows], vec![0.0; rows]),
            Scale::PerToken(buf) => {
                let largest = |list: &[f64]| list.iter().fold(0f64, |max, x| max.max(x.abs()));
                let amax: Vec<f64> = truth.value.chunks(width).map(largest).collect();
                let magnitude: Vec<f64> = truth.magnitude.chunks(width).map(largest).collect();
                let max = f64::from(e4m3::MAX);
                let scale_of = |&amax: &f64| if amax == 0.0 { f64::from(f32::EPSILON) } else { amax / max };
                let value: Vec<f64> = amax.iter().map(scale_of).collect();
                let scaled = |(magnitude, scale): (&f64, &f64)| magnitude / max + scale * 2f64.powi(-24);
                let scale_magnitude = magnitude.iter().zip(&value).map(scaled).collect();
                let inv = value.iter().map(|scale| 1.0 / scale).collect();
                let spread = magnitude.iter().zip(&amax).map(|(m, amax)| if *amax == 0.0 { 0.0 } else { m / amax });
                let spread = spread.collect();
                self.expect(buf, Bound::Close(Truth { value, magnitude: scale_magnitude, work: truth.work }));
                (inv, spread)
            }
        };
        self.expect(codes, Bound::Codes(Codes { truth, inv, spread }));
    }

    /// Expects activations that are byte-equal to the reference's.
    pub fn expect_act_bytes(&mut self, act: Act) {
        act.bufs().into_iter().for_each(|buf| self.expect(buf, Bound::Bytes));
    }

    /// Expects activations that are byte-equal to others of the same device.
    pub fn expect_same(&mut self, act: Act, other: Act) {
        act.bufs().into_iter().zip(other.bufs()).for_each(|(buf, other)| self.expect(buf, Bound::Same(other)));
    }

    /// The problem.
    pub fn finish(self) -> Problem {
        Problem { buffers: self.buffers, program: self.program, outputs: self.outputs }
    }
}

impl Truth {
    /// Values that are their own magnitudes.
    pub fn relative(value: Vec<f64>, work: Work) -> Self {
        let magnitude = value.iter().map(|x| x.abs()).collect();
        Truth { value, magnitude, work }
    }
}

/// The bytes of numbers, rounded to nearest even where the dtype is not f32.
pub fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => bytemuck::cast_slice(values).to_vec(),
        DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::E4m3 => values.iter().map(|&x| e4m3::encode(x)).collect(),
        DType::U32 => values.iter().flat_map(|&x| (x as u32).to_le_bytes()).collect(),
    }
}
