//! The cpu backend: the reference's ops over all cores. A row's result depends neither on the number of threads nor on
//! the rows beside it: every sum is taken by one thread in an order that its length alone decides.

mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod isa;
mod linear;
mod machine;
mod peaks;
mod portable;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(test)]
mod tests;
mod vector;

use std::sync::Arc;

use quaver_core::host::slices::{ActIn, ActOut, ColsOut, Slice, SliceMut, WeightIn};
use quaver_core::host::{HostBackend, Kernels, KvIn, KvOut, RowsIn};
use quaver_core::op::{DeviceInfo, Heads};
use quaver_core::sampler::{Mask, NO_TOKEN, RowParams, Sampled, Sampler};
use quaver_core::{Error, Result};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::isa::Isa;
use self::linear::Linear;
use self::machine::processor;
use crate::Peaks;

/// The cpu backend.
pub type Cpu = HostBackend<CpuKernels>;

/// Kernels over a pool of threads that park while there is nothing to do.
pub struct CpuKernels {
    isa: Isa,
    pool: Arc<ThreadPool>,
    /// Decoded activations.
    linear: Vec<linear::CacheLine>,
    /// Results of attention before they are rounded.
    attended: Vec<f32>,
}

/// Opens the cpu backend with a number of threads, one a core where None, and an instruction set by its name, the best
/// of this machine where None.
pub fn open(threads: Option<usize>, isa: Option<&str>) -> Result<Cpu> {
    kernels(threads, Isa::find(isa)?).map(HostBackend::new)
}

fn kernels(threads: Option<usize>, isa: Isa) -> Result<CpuKernels> {
    let threads = threads.unwrap_or_else(default_threads);
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("quaver-cpu-{i}")).build();
    let pool = pool.map_err(|e| Error::device("cpu", format!("cannot start {threads} threads: {e}")))?;
    Ok(CpuKernels { isa, pool: Arc::new(pool), linear: Vec::new(), attended: Vec::new() })
}

/// What the threads can do at best with an instruction set, by their names as [`open`] takes them. Takes about a second.
pub fn peaks(threads: Option<usize>, isa: Option<&str>) -> Result<Peaks> {
    let CpuKernels { isa, pool, .. } = kernels(threads, Isa::find(isa)?)?;
    Ok(peaks::measure(&pool, isa))
}

/// One thread a hardware thread that this process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// The processor and how many threads of it are used.
pub fn name(threads: usize) -> String {
    format!("{}, {threads} thread{}", processor(), if threads == 1 { "" } else { "s" })
}

/// What the cpu backend is on this machine.
pub fn describe(threads: usize, isa: Isa) -> DeviceInfo {
    DeviceInfo {
        backend: "cpu",
        name: name(threads),
        driver: isa.name().into(),
        memory: machine::memory(),
        native_fp8: false,
        ..DeviceInfo::default()
    }
}

impl Kernels for CpuKernels {
    fn describe(&self) -> DeviceInfo {
        describe(self.pool.current_num_threads(), self.isa)
    }

    fn step(&mut self, ops: impl FnOnce(&mut Self) + Send) {
        let pool = self.pool.clone();
        pool.install(|| ops(self));
    }

    fn rms_norm(&mut self, x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
        let (d, isa) = (gamma.len(), self.isa);
        let rows = x.chunks_exact(d).zip(out.rows(d)).collect::<Vec<_>>();
        for_each(rows, |row: &mut Vec<f32>, (x, mut out)| {
            row.resize(d, 0.0);
            isa.run(vector::RmsNorm { x, gamma, eps, row, out: &mut out });
        });
    }

    fn quantize(&mut self, x: &[f32], k: usize, out: ActOut) {
        let isa = self.isa;
        let rows = x.chunks_exact(k).zip(out.rows(k)).collect::<Vec<_>>();
        for_each(rows, |_: &mut (), (x, mut out)| isa.run(vector::Store(&mut out, x)));
    }

    fn linear(&mut self, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
        linear::linear(self.isa, Linear { x, w, k, out, add }, &mut self.linear);
    }

    fn rope_append(&mut self, qkv: Slice, rope: &[f32], rows: RowsIn, heads: Heads, q: SliceMut, kv: KvOut) {
        self.isa.run(vector::RopeAppend { qkv, rope, rows, heads, q, kv });
    }

    fn attend(&mut self, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
        attend::attend(self.isa, &mut self.attended, q, rows, heads, kv, out);
    }

    fn swiglu(&mut self, gate_up: Slice, f: usize, out: ActOut) {
        let isa = self.isa;
        let rows = out.rows(f).into_iter().enumerate().collect();
        for_each(rows, |(row, y): &mut (Vec<f32>, Vec<f32>), (i, mut out)| {
            row.resize(2 * f, 0.0);
            y.resize(f, 0.0);
            isa.run(vector::SwiGlu { gate_up: gate_up.row(i, 2 * f), row, y, out: &mut out });
        });
    }

    fn sample(&mut self, logits: &[f32], params: &[RowParams], mask: &[u32], history: &mut [u32], out: &mut [Sampled]) {
        if params.is_empty() {
            return;
        }
        let vocab = logits.len() / params.len();
        let mut histories: Vec<_> = history.chunks_exact_mut(vocab).map(Some).collect();
        let mut tasks = Vec::new();
        let masks = mask.chunks_exact(Mask::width(vocab));
        for (((logits, params), mask), out) in logits.chunks_exact(vocab).zip(params).zip(masks).zip(out) {
            // A row that scores leaves the history alone. One that chooses needs it, and has it to itself: a sequence
            // has one next token.
            let chooses = params.target == NO_TOKEN;
            let history = if chooses { histories[params.seq as usize].take() } else { None };
            tasks.push((logits, params, mask, history.unwrap_or_default(), out));
        }
        for_each(tasks, |sampler: &mut Sampler, (logits, params, mask, history, out)| {
            *out = sampler.sample(logits, params, mask, history);
        });
    }
}

/// Deals items out to the threads, each with scratch of its own; a single one stays on this thread.
fn for_each<T: Send, S: Default + Send>(items: Vec<T>, f: impl Fn(&mut S, T) + Send + Sync) {
    match items.len() {
        0 | 1 => items.into_iter().for_each(|item| f(&mut S::default(), item)),
        _ => items.into_par_iter().for_each_init(S::default, f),
    }
}
