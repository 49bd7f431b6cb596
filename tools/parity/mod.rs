//! The parity suite: every op of [`quaver_core::op`], on any backend, against the reference and against results in f64.
//!
//! An op test is a program of one op (of three, where a fused op is held against its parts). A [`Case`] makes a
//! [`Problem`] from a seed; [`run`] runs it on a fresh reference and on a fresh device, and judges every output by its
//! [`Bound`]. What a program does not own (padded rows, neighbouring columns, other pages, its inputs) must come back
//! as it was. A [`Model`] runs end to end, [`bisect`] line by line, and a [`Suite`] runs all of it on the devices of a machine.
//! `tests/parity.rs` and `quaver parity` are the callers.
//!
//! ```
//! use quaver::parity::{self, DEFAULT_SEED};
//! use quaver_backends::{Kind, Spec, open};
//! let cases = parity::cases(DEFAULT_SEED);
//! let case = cases.iter().find(|case| case.name.starts_with("quantize::")).unwrap();
//! let mut device = open(&Spec { kind: Kind::Cpu, ..Spec::default() })?;
//! let outcome = parity::run(case, device.as_mut())?;
//! assert!(outcome.passed, "{}: {}", outcome.name, outcome.detail);
//! # Ok::<(), quaver_core::Error>(())
//! ```

mod bisect;
mod bound;
mod build;
mod cases;
#[cfg(test)]
mod faults;
mod gaps;
mod limits;
mod model;
mod report;
mod rng;
mod run;
mod stage;
mod suite;

use std::fmt;
use std::sync::Arc;

use quaver_core::bytes::Bytes;
use quaver_core::op::{Buf, BufDesc, Program};

use rng::Rng;

pub use bisect::{BisectedLine, bisect};
pub use bound::{Bound, Codes, Truth};
pub use cases::cases;
pub use gaps::Gaps;
pub use limits::{Limit, ModelLimit, Work, limit, model_limit};
pub use model::{Model, divergence};
pub use report::{bisection_json, json, markdown};
pub use run::{Outcome, Ready, run};
pub use stage::Stage;
pub use suite::{DeviceReport, Suite, title};

/// The seed of a run that names none.
pub const DEFAULT_SEED: u64 = 0x0e43;

/// What a buffer holds before the program runs.
#[derive(Clone, Debug)]
pub enum Contents {
    /// A constant, in parts of consecutive rows: given to [`Backend::load`](quaver_core::op::Backend::load).
    Constant(Vec<Bytes>),
    /// Written after [`Backend::alloc`](quaver_core::op::Backend::alloc), all of it.
    Written(Vec<u8>),
    /// As [`Backend::alloc`](quaver_core::op::Backend::alloc) leaves it: zeros.
    Zeros,
}

/// A program, its buffers, and what must come out. Buffers are numbered from 0 in their order.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Each buffer and what it holds at first.
    pub buffers: Vec<(BufDesc, Contents)>,
    /// One op, or a few.
    pub program: Program,
    /// What the program must have written. Whatever else was written before the run must be unchanged after it.
    pub outputs: Vec<Output>,
}

/// Elements of a buffer that a program writes.
#[derive(Clone, Debug)]
pub struct Output {
    /// The buffer.
    pub buf: Buf,
    /// The elements, by their place in the buffer; all others must be unchanged.
    pub at: Vec<usize>,
    /// How many of `at` make a row, for errors that are judged row by row.
    pub width: usize,
    /// What they must be.
    pub bound: Bound,
}

/// A problem that is made from a seed.
#[derive(Clone)]
pub struct Case {
    /// The op, `::`, then the variant and the shape: `linear::fp8_static_m17_n48_k2048`.
    pub name: String,
    /// The op whose kernel is on trial.
    pub op: &'static str,
    /// The seed of the run; each case draws its own numbers from it and its name.
    pub seed: u64,
    make: Arc<dyn Fn(&mut Rng) -> Problem + Send + Sync>,
}

impl Case {
    /// The problem; the same for the same seed.
    pub fn problem(&self) -> Problem {
        (self.make)(&mut Rng::named(self.seed, &self.name))
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Case({}, seed {})", self.name, self.seed)
    }
}
