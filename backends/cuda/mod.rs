//! The CUDA backend: every op in CUDA C++ (`kernels/`), on NVIDIA cards from Ampere on; FP8 runs on the tensor cores of
//! Ada and Hopper.
//!
//! `record` lowers ops to kernels (`lower.rs`) and these to launches on a device: a card, where they become one CUDA
//! graph, or the emulator, which runs the same sources on the CPU for tests.

mod cache;
pub mod card;
pub mod compiler;
mod device;
mod emulated;
mod kernel;
mod lower;
mod memory;
pub mod peaks;
mod sys;
mod tuning;

use quaver_core::bytes::Bytes;
use quaver_core::op::{Backend, Buf, BufDesc, DeviceInfo, Fetch, Op, Plan, Program};
use quaver_core::{Error, Result};

use self::card::Card;
pub use self::compiler::kernels_for;
use self::device::{Device, Launch, Matrix, Value};
use self::emulated::Emulator;
use self::kernel::{Arg, Kernel};
use self::memory::{Memory, error};
pub use self::sys::Properties;
use self::tuning::Tuning;
pub use self::tuning::Variant;
pub use quaver_kernels::{KERNELS, Kernel as Source};

use crate::layout::{Layout, Layouts};

/// Schedules of the emulator: each way to order threads with asynchronous work done early and late, and random orders.
pub const SCHEDULES: usize = 16;

/// A device that runs CUDA kernels.
pub struct Cuda {
    device: Box<dyn Device>,
    tuning: Tuning,
    memory: Memory,
    /// Between the blocks and the kernels of one op, shared by the plans that it was large enough for; (address, bytes) of the last one,
    /// which is the largest.
    scratch: (u64, u64),
    /// Words that blocks of one kernel count each other with, once there are any; zero between kernels.
    counters: Option<u64>,
    plans: Vec<Recorded>,
}

/// A program on the device.
struct Recorded {
    plan: usize,
    live: Buf,
    /// Rows, wanted rows and spans, at most.
    most: [u32; 3],
}

impl Cuda {
    fn new(device: Box<dyn Device>, tuning: Tuning) -> Self {
        Cuda { device, tuning, memory: Memory::default(), scratch: (0, 0), counters: None, plans: Vec::new() }
    }

    /// Opens a card of [`card::all`] with a variant of the kernels by its name, the best where None, and may use a share of
    /// its memory.
    pub fn open(index: usize, properties: &Properties, variant: Option<&str>, share: f64) -> Result<Self> {
        let variants = card::variants(properties);
        let variant = match variant {
            None => variants[0],
            Some(name) => *variants.iter().find(|variant| variant.name() == name).ok_or_else(|| {
                let names: Vec<_> = variants.iter().map(|variant| variant.name()).collect();
                Error::device("cuda", format!("there is no variant {name}; this card runs {}", names.join(", ")))
            })?,
        };
        let (card, tuning) = Card::open(index, properties, variant, share)?;
        Ok(Cuda::new(Box::new(card), tuning))
    }

    /// The emulator with the kernels of a variant, run under a schedule, one of [`SCHEDULES`].
    ///
    /// # Errors
    /// Where the machine has no C++ compiler.
    pub fn emulated(variant: Variant, schedule: usize) -> Result<Self> {
        let kernels: Vec<_> = KERNELS.iter().map(|kernel| (kernel.name, kernel.source.to_owned())).collect();
        Self::emulated_with(&kernels, variant, schedule)
    }

    /// The emulator with these kernels alone, (name, source): for tests that change one.
    pub fn emulated_with(kernels: &[(&str, String)], variant: Variant, schedule: usize) -> Result<Self> {
        // One or a few by turns, so that tests see contexts and products in one part and in several, and tiles of every size.
        let processors = if schedule.is_multiple_of(2) { 1 } else { 8 };
        let tuning = Tuning { variant, processors, most_splits: tuning::MOST_SPLITS };
        let emulator = Emulator::start(&emulated::build(kernels, variant)?, variant, schedule as u64)?;
        Ok(Cuda::new(Box::new(emulator), tuning))
    }

    /// Sums over a context are taken in one part, however a prompt was cut into steps.
    #[must_use]
    pub fn deterministic(mut self) -> Self {
        self.tuning.most_splits = 1;
        self
    }

    fn launch(&mut self, kernel: Kernel) -> Result<Launch> {
        let Kernel { file, entry, grid, threads, shared, args } = kernel;
        let args = args.into_iter().map(|arg| self.value(arg)).collect::<Result<_>>()?;
        Ok(Launch { file, entry, grid, threads, shared, args })
    }

    fn value(&mut self, arg: Arg) -> Result<Value> {
        Ok(Value::Word(match arg {
            Arg::Buf(buf) => self.memory.address(buf),
            Arg::Scratch(bytes) => self.scratch(bytes)?,
            Arg::Counters(words) => self.counters(words)?,
            Arg::Null => 0,
            Arg::U32(word) => u64::from(word),
            Arg::F32(number) => u64::from(number.to_bits()),
            Arg::Boxes { buf, rows } => {
                let layout = self.memory.layouts.get(buf);
                let (width, all) = (layout.stride as u64, layout.desc.rows.capacity() as u64);
                let matrix = Matrix { address: self.memory.address(buf), width, rows: all, box_rows: rows };
                return Ok(Value::Map(self.device.map(&matrix)?));
            }
        }))
    }

    /// As many counters as any kernel asks for: all ask for the same.
    fn counters(&mut self, words: u32) -> Result<u64> {
        if self.counters.is_none() {
            self.counters = Some(self.device.alloc("counters", 4 * u64::from(words))?);
        }
        Ok(self.counters.unwrap_or_default())
    }

    /// Scratch of at least so many bytes.
    fn scratch(&mut self, bytes: u64) -> Result<u64> {
        if self.scratch.1 < bytes {
            self.scratch = (self.device.alloc("scratch", bytes)?, bytes);
        }
        Ok(self.scratch.0)
    }
}

/// Bytes of scratch that the one of these kernels needs which needs most.
fn most_scratch(kernels: &[Kernel]) -> u64 {
    let args = kernels.iter().flat_map(|kernel| &kernel.args);
    args.map(|arg| if let Arg::Scratch(bytes) = arg { *bytes } else { 0 }).max().unwrap_or(0)
}

impl Backend for Cuda {
    fn describe(&self) -> DeviceInfo {
        self.device.info().clone()
    }

    fn supports(&self, _op: &Op) -> Result<()> {
        Ok(())
    }

    fn budget(&self) -> Option<u64> {
        self.device.budget()
    }

    fn scratch(&self, program: &Program, buffers: &[BufDesc]) -> Result<u64> {
        let mut layouts = Layouts::default();
        for desc in buffers {
            layouts.push(Layout::new(desc, u64::MAX >> 1));
        }
        let kernels = lower::lower(program, &layouts, &self.tuning)?;
        let of_own = kernels.iter().flat_map(|kernel| &kernel.args);
        let counters = of_own.map(|arg| if let Arg::Counters(words) = arg { 4 * u64::from(*words) } else { 0 });
        Ok(most_scratch(&kernels) + counters.max().unwrap_or(0))
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.memory.alloc(&mut *self.device, desc, false)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.memory.load(&mut *self.device, desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.memory.write(&mut *self.device, dst, offset, bytes)
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        program.check(|buf| self.memory.layouts.find(buf).map(|layout| &layout.desc))?;
        for (i, line) in program.lines.iter().enumerate() {
            if let Some(&buf) = line.op.writes().iter().find(|&&buf| self.memory.is_constant(buf)) {
                let why = format!("{} is a constant", self.memory.layouts.desc(buf).name);
                return Err(Error::Program { line: i, op: line.label.clone(), why });
            }
        }
        let kernels = lower::lower(program, &self.memory.layouts, &self.tuning)?;
        // At once, as what is allocated is never freed.
        self.scratch(most_scratch(&kernels))?;
        let launches = kernels.into_iter().map(|kernel| self.launch(kernel)).collect::<Result<_>>()?;
        let spans = program.lines.iter().filter_map(|line| match line.op {
            Op::Attend { rows, .. } => Some(self.memory.layouts.desc(rows.spans).rows.capacity() as u32),
            _ => None,
        });
        let most = [program.rows as u32, program.wanted as u32, spans.min().unwrap_or(u32::MAX)];
        let plan = self.device.prepare(launches)?;
        self.plans.push(Recorded { plan, live: program.live, most });
        Ok(Plan(self.plans.len() as u32 - 1))
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        let Some(Recorded { plan, live, most }) = self.plans.get(plan.0 as usize) else {
            return Err(error(&*self.device, format!("there is no plan {}", plan.0)));
        };
        let live = self.memory.live(*live);
        if live.iter().zip(most).any(|(live, most)| live > most) {
            let why = format!("a step of {live:?} rows, wanted ones and spans, in a program of {most:?}");
            return Err(error(&*self.device, why));
        }
        self.device.run(*plan)
    }

    fn is_asynchronous(&self) -> bool {
        self.device.is_asynchronous()
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        self.memory.fetch(&mut *self.device, src, offset..offset + bytes)
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        self.device.take(fetch, into)
    }
}
