//! Finding the op that is wrong: a model's program, line by line, on the reference and on a device.
//!
//! Each line is run on both from the same state, which the reference left, and what it wrote is compared: so an error is
//! the line's own, and the first that exceeds its bound is the one to look at. Beside it stands how far the device drifts
//! where it goes on from its own state, as it does in earnest: what flipped FP8 ties come to, and what a fault becomes.

use quaver_core::Result;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::{KvCache, Profile};
use quaver_core::op::{Backend, Buf, BufDesc, DType, DeviceInfo, Op};
use quaver_core::reference::Reference;

use super::bound::{Bound, Evidence, Verdict, are_neighbours, decode};
use super::model::relative_rms;
use super::stage::Stage;

/// A line of the program on a device.
#[derive(Clone, Debug)]
pub struct BisectedLine {
    /// For instance `model.layers.3.self_attn.o_proj`.
    pub label: String,
    /// Its op.
    pub op: &'static str,
    /// The error of what it wrote, from the reference's state: rms(error) / rms(value) of real numbers, the share of FP8
    /// codes that are not the same, infinite where one is not even next to it, or the number of wrong samples.
    pub error: f64,
    /// The bound of that.
    pub bound: f64,
    /// rms(error) / rms(value) of what the program up to here leaves on the device by itself; 0 where no numbers are written.
    pub drift: f64,
    /// Which buffer is wrong and where.
    pub detail: String,
}

impl BisectedLine {
    /// True where the line is right.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// Runs a model's program over `ids` line by line. `open` opens the device, twice.
pub fn bisect(
    checkpoint: &Checkpoint,
    ids: &[u32],
    profile: Profile,
    mut open: impl FnMut() -> Result<Box<dyn Backend>>,
) -> Result<Vec<BisectedLine>> {
    let (m, mut reference, mut fed, mut own) = (ids.len(), Reference::open(), open()?, open()?);
    let info = fed.describe();
    let stage = |device| Stage::new(checkpoint, device, profile, KvCache::Auto, m);
    let mut stages = [stage(&mut reference)?, stage(&mut *fed)?, stage(&mut *own)?];
    for stage in &mut stages {
        stage.write(0, ids)?;
    }
    let (lines, buffers) = (stages[0].llama.program(m, m).lines, stages[0].buffers().to_vec());
    let mut found = Vec::new();
    for line in lines {
        let mut written = Vec::new();
        for stage in &mut stages {
            let plan = stage.record(std::slice::from_ref(&line), m)?;
            stage.run(plan)?;
            written.push(line.op.writes().iter().map(|buf| stage.read(*buf, m)).collect::<Result<Vec<_>>>()?);
        }
        let (mut worst, mut drift) = (Verdict::default(), 0f64);
        for (i, buf) in line.op.writes().into_iter().enumerate() {
            let [want, fed, own] = [0, 1, 2].map(|stage: usize| &written[stage][i]);
            let desc = &buffers[buf.0 as usize];
            let verdict = compare(&line.op, buf, desc, &info, [fed, want]);
            worst = if verdict.ratio() > worst.ratio() || i == 0 { verdict } else { worst };
            if desc.dtype != DType::U32 {
                drift = drift.max(relative_rms(&decode(desc.dtype, own), &decode(desc.dtype, want)));
            }
            stages[1].put(buf, want)?;
        }
        let Verdict { error, bound, detail, .. } = worst;
        found.push(BisectedLine { label: line.label, op: line.op.name(), error, bound, drift, detail });
    }
    Ok(found)
}

/// rms(error) / rms(value) that f32 sums of any order keep from the same input.
const F32: f64 = 1e-5;

/// The same where the sum is stored as bf16: one in ten may round the other way.
const BF16: f64 = 1.3e-3;

/// The share of FP8 codes that may round the other way, and how many always may.
const CODES: (f64, f64) = (1e-3, 2.0);

/// What an op wrote to a buffer, from the same input.
fn compare(op: &Op, buf: Buf, desc: &BufDesc, device: &DeviceInfo, [got, want]: [&[u8]; 2]) -> Verdict {
    let mut verdict = Verdict::default();
    match (desc.dtype, *op) {
        (DType::U32, Op::Sample { out, .. }) if out == buf => {
            verdict = Bound::Sampled.judge(&Evidence { device, dtype: desc.dtype, width: desc.cols, got, want });
        }
        (DType::U32, _) => {
            verdict = Bound::Bytes.judge(&Evidence { device, dtype: desc.dtype, width: desc.cols, got, want });
        }
        (DType::E4m3, _) => {
            let pairs = || got.iter().zip(want).enumerate().filter(|(_, (got, want))| got != want);
            let far = pairs().find(|(_, (got, want))| !are_neighbours(**got, **want));
            let count = pairs().count() as f64 / want.len() as f64;
            let error = if far.is_some() { f64::INFINITY } else { count };
            let bound = CODES.0 + CODES.1 / want.len() as f64;
            verdict.note(error, bound, || match far {
                Some((i, (got, want))) => {
                    format!("row {} column {} is code {got:#04x}, not {want:#04x}", i / desc.cols, i % desc.cols)
                }
                None => "FP8 codes rounded the other way".into(),
            });
        }
        (dtype, _) => {
            let [got, want] = [got, want].map(|bytes| decode(dtype, bytes));
            // What codes sum to on tensor cores (`limits.rs`); where they keep as many bits as f32 has, that is nothing.
            let bits = device.tensor_cores.map(|cores| cores.e4m3_bits).filter(|_| matches!(op, Op::Linear { .. }));
            let lost = bits.map_or(0.0, |bits| 32.0 * 0.5f64.powi(bits as i32));
            let bound = lost + if dtype == DType::Bf16 { BF16 } else { F32 };
            verdict.note(relative_rms(&got, &want), bound, || "rms(error) / rms(value)".into());
            // A lost row in many others is as wrong as a lost buffer.
            for (row, (got, want)) in got.chunks(desc.cols).zip(want.chunks(desc.cols)).enumerate() {
                verdict.note(relative_rms(got, want), 10.0 * bound, || format!("rms(error) / rms(value) of row {row}"));
            }
        }
    }
    Verdict { detail: format!("{}: {}", desc.name, verdict.detail), ..verdict }
}
