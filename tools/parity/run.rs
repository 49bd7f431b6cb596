//! Running a case on two backends, and the outcome.
//!
//! What the reference computes is computed once a case ([`Ready`]), however many devices are held against it.

use std::time::Instant;

use quaver_core::op::{Backend, Buf, DeviceInfo};
use quaver_core::reference::Reference;
use quaver_core::{Error, Result};

use super::bound::{Bound, Evidence, Verdict};
use super::{Case, Contents, Output, Problem};

/// How a case went on a device.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case's name.
    pub name: String,
    /// Its op.
    pub op: &'static str,
    /// The seed that it was made from.
    pub seed: u64,
    /// The error that came nearest to its bound, or exceeded it most; the number of wrong elements where they have to
    /// be equal.
    pub error: f64,
    /// Its bound.
    pub bound: f64,
    /// True where every output lies within its bound.
    pub passed: bool,
    /// Microseconds from queueing the program, which had never run before, to the first byte of its output.
    pub us: f64,
    /// Codes that differ from the reference's where the real value was proven to lie at the tie between the two.
    pub ties: usize,
    /// What is wrong and where; how near it came where nothing is.
    pub detail: String,
    /// Why it need not pass, where [`Gaps`](super::Gaps) lists it and it does not.
    pub known_gap: Option<String>,
}

impl Outcome {
    /// What did not even run.
    pub fn failed(name: impl Into<String>, op: &'static str, seed: u64, detail: impl Into<String>) -> Self {
        let verdict = Verdict { error: f64::INFINITY, detail: detail.into(), ..Verdict::default() };
        Outcome::new(name.into(), op, seed, 0.0, vec![verdict])
    }

    /// The worst of some verdicts.
    pub(super) fn new(name: String, op: &'static str, seed: u64, us: f64, verdicts: Vec<Verdict>) -> Self {
        let ties = verdicts.iter().map(|verdict| verdict.ties).sum();
        let worst = verdicts.into_iter().max_by(|a, b| a.ratio().total_cmp(&b.ratio())).unwrap_or_default();
        let (passed, Verdict { error, bound, detail, .. }) = (worst.passed(), worst);
        Outcome { name, op, seed, error, bound, passed, us, ties, detail, known_gap: None }
    }
}

/// A case's problem with the reference's results.
pub struct Ready {
    name: String,
    op: &'static str,
    seed: u64,
    problem: Problem,
    reference: Execution,
    /// Where the reference itself contradicts the f64 results.
    faults: Vec<Verdict>,
}

impl Ready {
    /// Runs a case on a fresh reference.
    pub fn new(case: &Case) -> Result<Self> {
        let problem = case.problem();
        let (mut device, info) = (Reference::open(), Reference::open().describe());
        let reference = execute(&problem, &mut device)?;
        let own = problem.outputs.iter().map(|output| judge(&problem, output, &info, &reference, None));
        let faults = own.filter(|verdict| !verdict.passed()).collect();
        Ok(Ready { name: case.name.clone(), op: case.op, seed: case.seed, problem, reference, faults })
    }

    /// Runs it on a device, which must be fresh: without buffers.
    ///
    /// # Errors
    /// What the device says where it cannot run the program at all.
    pub fn run(&self, device: &mut dyn Backend) -> Result<Outcome> {
        let info = device.describe();
        let got = execute(&self.problem, device)?;
        let mut verdicts = self.faults.clone();
        verdicts.push(untouched(&self.problem, &got));
        let outputs = self.problem.outputs.iter();
        verdicts.extend(outputs.map(|output| judge(&self.problem, output, &info, &got, Some(&self.reference))));
        Ok(Outcome::new(self.name.clone(), self.op, self.seed, got.us, verdicts))
    }
}

/// Runs a case on a fresh reference and on `device`, which must be fresh as well: without buffers.
///
/// # Errors
/// What the device says where it cannot run the program at all.
pub fn run(case: &Case, device: &mut dyn Backend) -> Result<Outcome> {
    Ready::new(case)?.run(device)
}

/// What a run left behind.
struct Execution {
    /// Every buffer that was not a constant, whole.
    buffers: Vec<Vec<u8>>,
    us: f64,
}

fn execute(problem: &Problem, device: &mut dyn Backend) -> Result<Execution> {
    for (i, (desc, contents)) in problem.buffers.iter().enumerate() {
        let buf = match contents {
            Contents::Constant(parts) => device.load(desc, parts)?,
            Contents::Zeros | Contents::Written(_) => device.alloc(desc)?,
        };
        if buf != Buf(i as u32) {
            let why = format!("buffer {i} is called {}: parity needs a backend without buffers", buf.0);
            return Err(Error::device(device.describe().backend, why));
        }
        if let Contents::Written(bytes) = contents {
            device.write(buf, 0, bytes)?;
        }
    }
    for line in &problem.program.lines {
        device.supports(&line.op)?;
    }
    let plan = device.record(&problem.program)?;
    let begin = Instant::now();
    device.run(plan)?;
    device.read(problem.outputs[0].buf, 0, &mut [0; 4])?;
    let us = begin.elapsed().as_secs_f64() * 1e6;
    let mut buffers = Vec::with_capacity(problem.buffers.len());
    for (i, (desc, contents)) in problem.buffers.iter().enumerate() {
        let mut bytes = Vec::new();
        if !matches!(contents, Contents::Constant(_)) {
            bytes.resize(desc.bytes(), 0);
            device.read(Buf(i as u32), 0, &mut bytes)?;
        }
        buffers.push(bytes);
    }
    Ok(Execution { buffers, us })
}

/// The elements of an output, packed.
fn pack(problem: &Problem, output: &Output, buffer: &[u8]) -> Vec<u8> {
    let size = problem.buffers[output.buf.0 as usize].0.dtype.size();
    output.at.iter().flat_map(|at| &buffer[at * size..(at + 1) * size]).copied().collect()
}

/// Judges an output of `run`; `reference` is None where it is the reference's own, whose codes must be those of the f64
/// values.
fn judge(
    problem: &Problem,
    output: &Output,
    device: &DeviceInfo,
    run: &Execution,
    reference: Option<&Execution>,
) -> Verdict {
    let packed = |run: &Execution, buf: Buf| pack(problem, output, &run.buffers[buf.0 as usize]);
    let got = packed(run, output.buf);
    let want = match (&output.bound, reference) {
        (Bound::Same(other), _) => packed(run, *other),
        (Bound::Codes(codes), None) => codes.of_truth(output.width),
        _ => packed(reference.unwrap_or(run), output.buf),
    };
    let dtype = problem.buffers[output.buf.0 as usize].0.dtype;
    let verdict = output.bound.judge(&Evidence { device, dtype, width: output.width, got: &got, want: &want });
    let who = if reference.is_none() { "the reference itself, " } else { "" };
    let name = &problem.buffers[output.buf.0 as usize].0.name;
    Verdict { detail: format!("{who}{name}: {}", verdict.detail), ..verdict }
}

/// Everything that is no output must be as it was.
fn untouched(problem: &Problem, run: &Execution) -> Verdict {
    let mut verdict = Verdict::default();
    for (i, (desc, contents)) in problem.buffers.iter().enumerate() {
        let zeros = vec![0; desc.bytes()];
        let before = match contents {
            Contents::Constant(_) => continue,
            Contents::Written(bytes) => bytes,
            Contents::Zeros => &zeros,
        };
        let size = desc.dtype.size();
        let mut is_output = vec![false; before.len() / size];
        for output in problem.outputs.iter().filter(|output| output.buf.0 as usize == i) {
            output.at.iter().for_each(|&at| is_output[at] = true);
        }
        let elements = before.chunks_exact(size).zip(run.buffers[i].chunks_exact(size));
        let mut changed =
            elements.zip(is_output).enumerate().filter(|(_, ((before, now), is_output))| !is_output && before != now);
        if let Some((at, _)) = changed.next() {
            let (row, column) = (at / desc.cols, at % desc.cols);
            let name = &desc.name;
            verdict.error = 1.0 + changed.count() as f64;
            verdict.detail =
                format!("{name}: {} elements were overwritten, the first at row {row} column {column}", verdict.error);
        }
    }
    verdict
}
