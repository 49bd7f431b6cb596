//! A [`Backend`] around another that counts what its runs take and, if asked to, times every op. Since a program is data,
//! this is the one place that measures any backend; `quaver bench` is its caller.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::pod_read_unaligned;

use crate::bytes::Bytes;
use crate::cost::{Cost, Work, cost};
use crate::error::Result;
use crate::op::{Backend, Buf, BufDesc, DeviceInfo, Fetch, Line, Op, Plan, Program};

/// What runs took since [`Reading::reset`].
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Of all ops.
    pub cost: Cost,
    /// By op and place, such as `linear mlp.down_proj`; empty unless ops are timed.
    pub ops: BTreeMap<String, OpTotal>,
}

/// What the runs of one op took, those of all layers together.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpTotal {
    /// Bytes and operations.
    pub cost: Cost,
    /// Time, the wait for the device included.
    pub time: Duration,
}

/// Reads a meter whose backend belongs to an engine.
#[derive(Clone, Default)]
pub struct Reading(Arc<Mutex<Totals>>);

impl Reading {
    /// What runs took so far.
    pub fn totals(&self) -> Totals {
        self.lock().clone()
    }

    /// Starts anew.
    pub fn reset(&self) {
        *self.lock() = Totals::default();
    }

    fn lock(&self) -> MutexGuard<'_, Totals> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
pub struct Meter {
    inner: Box<dyn Backend>,
    timed: bool,
    buffers: Vec<BufDesc>,
    programs: Vec<Recorded>,
    /// What was written to the buffers that say how large a step is.
    written: HashMap<Buf, Vec<u8>>,
    reading: Reading,
}

struct Recorded {
    lines: Vec<Line>,
    live: Buf,
    spans: Option<Buf>,
    /// One of the whole, or one a line where ops are timed.
    plans: Vec<Plan>,
}

impl Meter {
    /// Measures a backend; where `timed`, runs each op by itself and waits for it.
    pub fn new(inner: Box<dyn Backend>, timed: bool) -> Self {
        let reading = Reading::default();
        Meter { inner, timed, buffers: Vec::new(), programs: Vec::new(), written: HashMap::new(), reading }
    }

    /// Where the totals can be read.
    pub fn reading(&self) -> Reading {
        self.reading.clone()
    }

    fn work(&self, recorded: &Recorded) -> Work {
        let words = |buf: Buf| self.written[&buf].chunks_exact(4).map(pod_read_unaligned::<u32>);
        let live: Vec<u64> = words(recorded.live).map(u64::from).collect();
        let spans: Vec<u32> = recorded.spans.map(|spans| words(spans).collect()).unwrap_or_default();
        // A program without attention, such as the head alone, names no spans.
        let spans = spans.as_chunks::<4>().0.iter().take(live[2] as usize).copied().collect();
        Work { rows: live[0], wanted: live[1], spans }
    }
}

impl Backend for Meter {
    fn describe(&self) -> DeviceInfo {
        self.inner.describe()
    }

    fn supports(&self, op: &Op) -> Result<()> {
        self.inner.supports(op)
    }

    fn budget(&self) -> Option<u64> {
        self.inner.budget()
    }

    fn scratch(&self, program: &Program, buffers: &[BufDesc]) -> Result<u64> {
        self.inner.scratch(program, buffers)
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.buffers.push(desc.clone());
        self.inner.alloc(desc)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.buffers.push(desc.clone());
        self.inner.load(desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.inner.write(dst, offset, bytes)?;
        if let Some(written) = self.written.get_mut(&dst) {
            written[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        let Program { rows, wanted, live, .. } = *program;
        let single = |line: &Line| self.inner.record(&Program { rows, wanted, live, lines: vec![line.clone()] });
        let plans = match self.timed {
            true => program.lines.iter().map(single).collect::<Result<_>>()?,
            false => vec![self.inner.record(program)?],
        };
        let spans = program.lines.iter().find_map(|line| match line.op {
            Op::Attend { rows, .. } => Some(rows.spans),
            _ => None,
        });
        for buf in spans.into_iter().chain([live]) {
            self.written.entry(buf).or_insert_with(|| vec![0; self.buffers[buf.0 as usize].bytes()]);
        }
        self.programs.push(Recorded { lines: program.lines.clone(), live, spans, plans });
        Ok(Plan(self.programs.len() as u32 - 1))
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        let Some(recorded) = self.programs.get(plan.0 as usize) else { return self.inner.run(plan) };
        let work = self.work(recorded);
        let mut times = Vec::new();
        for &plan in &recorded.plans {
            let start = Instant::now();
            self.inner.run(plan)?;
            if self.timed {
                self.inner.read(recorded.live, 0, &mut [0; 4])?;
                times.push(start.elapsed());
            }
        }
        let mut totals = self.reading.lock();
        for (i, line) in recorded.lines.iter().enumerate() {
            let cost = cost(&line.op, &work, |buf| &self.buffers[buf.0 as usize]);
            totals.cost += cost;
            if let Some(&time) = times.get(i) {
                let total = totals.ops.entry(place(line)).or_default();
                total.cost += cost;
                total.time += time;
            }
        }
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        self.inner.is_asynchronous()
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        self.inner.fetch(src, offset, bytes)
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        self.inner.take(fetch, into)
    }
}

/// The op and its label without the layer: `linear mlp.down_proj`.
fn place(line: &Line) -> String {
    let label = line.label.strip_prefix("model.").unwrap_or(&line.label);
    let label = label.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).map_or(label, |(_, rest)| rest);
    format!("{} {label}", line.op.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Act, Cols, DType, Extent, Weight};
    use crate::reference::Reference;

    fn run_linear(timed: bool) -> (Vec<u8>, Totals) {
        let mut meter = Meter::new(Box::new(Reference::open()), timed);
        let reading = meter.reading();
        let mut alloc = |name: &str, dtype, rows, cols| meter.alloc(&BufDesc::new(name, dtype, rows, cols)).unwrap();
        let live = alloc("live", DType::U32, Extent::Fixed(1), 3);
        let (x, y) = (alloc("x", DType::F32, Extent::Rows(4), 2), alloc("y", DType::F32, Extent::Rows(4), 3));
        let desc = BufDesc::new("w", DType::F32, Extent::Fixed(3), 2);
        let w = meter.load(&desc, &[Bytes::from(bytemuck::cast_slice(&[1f32; 6]).to_vec())]).unwrap();
        let mut program = Program::new(4, 0, live);
        let op = Op::Linear { x: Act::Real(x), w: Weight::Real(w), out: Cols { buf: y, first: 0 }, add: false };
        program.push("model.layers.7.mlp.down_proj", op);
        let plan = meter.record(&program).unwrap();
        meter.write(live, 0, bytemuck::cast_slice(&[2u32, 0, 1])).unwrap();
        meter.write(x, 0, bytemuck::cast_slice(&[1f32, 2.0, 3.0, 4.0])).unwrap();
        meter.run(plan).unwrap();
        let mut out = vec![0; 24];
        meter.read(y, 0, &mut out).unwrap();
        (out, reading.totals())
    }

    #[test]
    fn a_metered_run_computes_the_same_and_counts_what_it_took() {
        for timed in [false, true] {
            let (out, totals) = run_linear(timed);
            assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&out), [3.0, 3.0, 3.0, 7.0, 7.0, 7.0]);
            assert_eq!(totals.cost, Cost { bytes: 24, flops: 2 * 2 * 6 });
            let places: Vec<_> = totals.ops.keys().cloned().collect();
            assert_eq!(places, if timed { vec!["linear mlp.down_proj".to_owned()] } else { vec![] });
        }
    }
}
