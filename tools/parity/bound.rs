//! Bounds, and how an output is judged by them.

use half::bf16;
use quaver_core::e4m3;
use quaver_core::op::{Buf, DType, DeviceInfo};
use quaver_core::sampler::Sampled;

use super::limits::{TINY, U, Work, limit};

/// What an output must be. Lists run along [`Output::at`](super::Output::at).
#[derive(Clone, Debug)]
pub enum Bound {
    /// Byte-equal to the reference's; NaN equals NaN.
    Bytes,
    /// Byte-equal to another buffer on the same device: a fused op against its parts.
    Same(Buf),
    /// Numbers near their f64 values.
    Close(Truth),
    /// E4M3 codes equal to the reference's, or beside them where the real value is proven to lie at the tie.
    Codes(Codes),
    /// [`Sampled`] records: ids and counts equal, log-probabilities within 1e-5.
    Sampled,
}

/// Results in f64, and what their errors are proportional to.
#[derive(Clone, Debug)]
pub struct Truth {
    /// The results.
    pub value: Vec<f64>,
    /// See [`Work`].
    pub magnitude: Vec<f64>,
    /// What [`limit`] depends on.
    pub work: Work,
}

/// Numbers that were quantized.
#[derive(Clone, Debug)]
pub struct Codes {
    /// The real values.
    pub truth: Truth,
    /// What each row is multiplied by before it is rounded to codes.
    pub inv: Vec<f64>,
    /// What the error of each row's `inv` is proportional to, relative to it: 0 where the scale is static, magnitude
    /// over amax where it is the row's own.
    pub spread: Vec<f64>,
}

impl Codes {
    /// The codes of the real values.
    pub(super) fn of_truth(&self, width: usize) -> Vec<u8> {
        let code = |(i, x): (usize, &f64)| e4m3::encode((x * self.inv[i / width]) as f32);
        self.truth.value.iter().enumerate().map(code).collect()
    }
}

/// What is to be judged.
pub(super) struct Evidence<'a> {
    pub device: &'a DeviceInfo,
    pub dtype: DType,
    /// Elements of a row.
    pub width: usize,
    /// The elements, packed.
    pub got: &'a [u8],
    /// What they must equal, where the bound says so.
    pub want: &'a [u8],
}

/// How near an output is to its bound.
#[derive(Clone, Debug, Default)]
pub(super) struct Verdict {
    /// The error that comes nearest to its bound, or exceeds it most.
    pub error: f64,
    /// Its bound.
    pub bound: f64,
    /// Proven ties.
    pub ties: usize,
    /// Why it fails, or how near it came.
    pub detail: String,
}

impl Verdict {
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }

    /// How much of the bound is used; above 1 fails.
    pub fn ratio(&self) -> f64 {
        match (self.error, self.bound) {
            (error, bound) if error.is_nan() || bound.is_nan() => f64::INFINITY,
            (0.0, _) => 0.0,
            (error, bound) => error / bound,
        }
    }

    /// Takes over a worse finding.
    pub fn note(&mut self, error: f64, bound: f64, detail: impl FnOnce() -> String) {
        let new = Verdict { error, bound, ..Verdict::default() };
        if new.ratio() > self.ratio() {
            (self.error, self.bound, self.detail) =
                (if error.is_nan() { f64::INFINITY } else { error }, bound, detail());
        }
    }
}

impl Bound {
    pub(super) fn judge(&self, evidence: &Evidence) -> Verdict {
        match self {
            Bound::Bytes | Bound::Same(_) => bytes(evidence),
            Bound::Close(truth) => close(truth, evidence),
            Bound::Codes(quantized) => codes(quantized, evidence),
            Bound::Sampled => sampled(evidence),
        }
    }
}

/// The numbers of a buffer; exact.
pub(super) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_bits(word(b))).collect(),
        DType::U32 => bytes.chunks_exact(4).map(|b| word(b) as f32).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::E4m3 => bytes.iter().map(|&code| e4m3::decode(code)).collect(),
    }
}

fn bytes(evidence: &Evidence) -> Verdict {
    let &Evidence { dtype, width, got, want, .. } = evidence;
    let size = dtype.size();
    let is_nan = |bytes: &[u8]| dtype != DType::U32 && decode(dtype, bytes)[0].is_nan();
    let differ = |(g, w): &(&[u8], &[u8])| g != w && !(is_nan(g) && is_nan(w));
    let pairs = || got.chunks_exact(size).zip(want.chunks_exact(size));
    let count = pairs().filter(differ).count();
    let mut verdict = Verdict::default();
    verdict.note(count as f64, 0.0, || {
        let (i, (g, w)) = pairs().enumerate().find(|(_, pair)| differ(pair)).expect("counted");
        format!("{count} elements differ, the first at row {} column {}: {g:02x?}, not {w:02x?}", i / width, i % width)
    });
    if verdict.passed() {
        verdict.detail = format!("{} elements are equal", want.len() / size);
    }
    verdict
}

/// Half the distance from a value to its neighbours: what storing it may cost.
fn half_ulp(dtype: DType, value: f64) -> f64 {
    let digits = if dtype == DType::Bf16 { 8 } else { 24 };
    if value == 0.0 || !value.is_finite() { 0.0 } else { 2f64.powf(value.abs().log2().floor() - f64::from(digits)) }
}

fn close(truth: &Truth, evidence: &Evidence) -> Verdict {
    let limit = limit(evidence.device, truth.work);
    let (got, width) = (decode(evidence.dtype, evidence.got), evidence.width);
    let mut verdict = Verdict::default();
    let (mut all, mut largest, mut worst_row) = (Squares::default(), 0f64, 0f64);
    let allowed =
        |sums: &Squares, n: usize| limit.rms * rms(sums.magnitudes, n) + limit.bias * rms(sums.values, n) + TINY;
    for (row, got) in got.chunks(width).enumerate() {
        let mut row_sums = Squares::default();
        for (column, &got) in got.iter().enumerate() {
            let (value, magnitude) = (truth.value[row * width + column], truth.magnitude[row * width + column]);
            // What storing costs is no error of the sum.
            let got = f64::from(got);
            let stored = half_ulp(evidence.dtype, if got.abs() > value.abs() { got } else { value });
            let distance = (got - value).abs();
            let error = if distance <= stored { 0.0 } else { distance - stored };
            [&mut row_sums, &mut all].into_iter().for_each(|sums| sums.add(error, value, magnitude));
            largest = largest.max((error - TINY) / (magnitude + TINY));
            verdict.note(error, limit.element * magnitude + TINY, || {
                format!("row {row} column {column} is {got:e}, not {value:e} (magnitude {magnitude:e})")
            });
        }
        // The root mean square of a few errors is as wild as they are.
        if width >= MANY {
            let (error, magnitude) = (rms(row_sums.errors, width), rms(row_sums.magnitudes, width));
            worst_row = worst_row.max(error / (magnitude + TINY));
            verdict.note(error, allowed(&row_sums, width), || format!("rms error of row {row}"));
        }
    }
    if got.len() >= MANY {
        verdict.note(rms(all.errors, got.len()), allowed(&all, got.len()), || "rms error of all rows".into());
    }
    if verdict.passed() {
        let unit = (rms(all.magnitudes, 1) + TINY) * U;
        let (largest, worst_row, whole) = (largest / U, worst_row / U, rms(all.errors, 1) / unit);
        let (element, row) = (limit.element / U, allowed(&all, 1) / unit);
        verdict.detail = format!(
            "in units of 2^-24 x magnitude: {largest:.2} of {element:.1}, rms of a row {worst_row:.3} and of all {whole:.3} of {row:.1}"
        );
    }
    verdict
}

/// Sums of squares.
#[derive(Default)]
struct Squares {
    errors: f64,
    values: f64,
    magnitudes: f64,
}

impl Squares {
    fn add(&mut self, error: f64, value: f64, magnitude: f64) {
        self.errors += error * error;
        self.values += value * value;
        self.magnitudes += magnitude * magnitude;
    }
}

/// So many errors have a meaningful root mean square.
const MANY: usize = 32;

fn rms(squares: f64, n: usize) -> f64 {
    (squares / n as f64).sqrt()
}

/// Codes in the order of their values, -0 before +0.
fn order(code: u8) -> i32 {
    let magnitude = i32::from(code & 0x7f);
    if code & 0x80 != 0 { -1 - magnitude } else { magnitude }
}

/// True for codes that one tie may round to.
pub(super) fn are_neighbours(a: u8, b: u8) -> bool {
    (order(a) - order(b)).abs() == 1
}

fn codes(quantized: &Codes, evidence: &Evidence) -> Verdict {
    let Codes { truth, inv, spread } = quantized;
    let limit = limit(evidence.device, truth.work).element;
    let mut verdict = Verdict::default();
    let mut ties = 0;
    for (i, (&got, &want)) in evidence.got.iter().zip(evidence.want).enumerate() {
        if got == want || (e4m3::is_nan(got) && e4m3::is_nan(want)) {
            continue;
        }
        let row = i / evidence.width;
        let scaled = truth.value[i] * inv[row];
        let tie = (f64::from(e4m3::decode(got)) + f64::from(e4m3::decode(want))) / 2.0;
        // The error of the value, that of the row's scale, and four roundings on the way from value to code.
        let slack = limit * truth.magnitude[i] * inv[row] + scaled.abs() * (limit * spread[row] + 4.0 * U);
        let distance = if are_neighbours(got, want) { (scaled - tie).abs() } else { f64::INFINITY };
        ties += usize::from(distance <= slack);
        verdict.note(distance, slack, || {
            let (row, column) = (row, i % evidence.width);
            format!("row {row} column {column} is code {got:#04x}, not {want:#04x}, at {scaled} before rounding")
        });
    }
    verdict.ties = ties;
    if verdict.passed() {
        verdict.detail = format!("{} codes, {ties} proven ties", evidence.got.len());
    }
    verdict
}

/// What log-probabilities may differ by, absolute, and relative beyond 1.
const LOGPROB: f64 = 1e-5;

fn sampled(evidence: &Evidence) -> Verdict {
    let mut verdict = Verdict::default();
    let record = size_of::<Sampled>();
    for (row, (got, want)) in evidence.got.chunks(record).zip(evidence.want.chunks(record)).enumerate() {
        let [got, want]: [Sampled; 2] = [got, want].map(bytemuck::pod_read_unaligned);
        let ids = |s: &Sampled| (s.token, s.rank, s.bad_logits, s.top_ids);
        if ids(&got) != ids(&want) {
            verdict.note(1.0, 0.0, || format!("row {row} has {:?}, not {:?}", ids(&got), ids(&want)));
        }
        let logprobs = |s: Sampled| std::iter::once(s.logprob).chain(s.top_logprobs);
        for (got, want) in logprobs(got).zip(logprobs(want)).filter(|(got, want)| got != want) {
            let error = f64::from((got - want).abs());
            verdict.note(error, LOGPROB * f64::from(want.abs()).max(1.0), || {
                format!("row {row}: log-probability {got}, not {want}")
            });
        }
    }
    if verdict.passed() {
        verdict.detail = format!("{} rows chose alike", evidence.want.len() / record);
    }
    verdict
}
