//! The cpu backend: the reference's ops over all cores. A row's result depends neither on the number of threads nor on
//! the rows beside it: every sum is taken by one thread in an order that its length alone decides.

mod attend;
mod linear;
mod machine;
#[cfg(test)]
mod tests;

use quaver_core::host::slices::{ActIn, ActOut, ColsOut, Slice, WeightIn};
use quaver_core::host::{HostBackend, Kernels, KvIn, RowsIn};
use quaver_core::op::{DeviceInfo, Heads};
use quaver_core::{Error, Result, reference};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// The cpu backend.
pub type Cpu = HostBackend<CpuKernels>;

/// Kernels over a pool of threads that park while there is nothing to do.
pub struct CpuKernels {
    pool: ThreadPool,
    linear: linear::Scratch,
    attended: Vec<f32>,
}

/// Opens the cpu backend with a number of threads, one a core where None.
pub fn open(threads: Option<usize>) -> Result<Cpu> {
    kernels(threads).map(HostBackend::new)
}

fn kernels(threads: Option<usize>) -> Result<CpuKernels> {
    let threads = threads.unwrap_or_else(default_threads);
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("quaver-cpu-{i}")).build();
    let pool = pool.map_err(|e| Error::device("cpu", format!("cannot start {threads} threads: {e}")))?;
    Ok(CpuKernels { pool, linear: linear::Scratch::default(), attended: Vec::new() })
}

/// One thread a core that this process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// What the cpu backend is on this machine.
pub fn describe(threads: usize) -> DeviceInfo {
    DeviceInfo {
        backend: "cpu",
        name: format!("{}, {threads} thread{}", machine::processor(), if threads == 1 { "" } else { "s" }),
        driver: "portable vectors".into(),
        memory: machine::memory(),
        native_fp8: false,
    }
}

impl Kernels for CpuKernels {
    fn describe(&self) -> DeviceInfo {
        describe(self.pool.current_num_threads())
    }

    fn rms_norm(&mut self, x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
        let d = gamma.len();
        let rows = x.chunks_exact(d).zip(out.rows(d)).collect::<Vec<_>>();
        self.pool.install(|| {
            rows.into_par_iter().for_each_init(
                || vec![0.0; d],
                |row, (x, mut out)| {
                    reference::rms_norm_row(x, gamma, eps, row);
                    out.store(row);
                },
            );
        });
    }

    fn quantize(&mut self, x: &[f32], k: usize, out: ActOut) {
        let rows = x.chunks_exact(k).zip(out.rows(k)).collect::<Vec<_>>();
        self.pool.install(|| rows.into_par_iter().for_each(|(x, mut out)| out.store(x)));
    }

    fn linear(&mut self, x: ActIn, w: WeightIn, k: usize, out: ColsOut, add: bool) {
        let scratch = &mut self.linear;
        self.pool.install(|| linear::linear(scratch, x, w, k, out, add));
    }

    fn attend(&mut self, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
        let attended = &mut self.attended;
        self.pool.install(|| attend::attend(attended, q, rows, heads, kv, out));
    }

    fn swiglu(&mut self, gate_up: Slice, f: usize, out: ActOut) {
        let rows = out.rows(f);
        self.pool.install(|| {
            rows.into_par_iter().enumerate().for_each_init(
                || (vec![0.0; 2 * f], vec![0.0; f]),
                |(row, y), (i, mut out)| {
                    gate_up.row(i, 2 * f).load(row);
                    reference::swiglu_row(row, y);
                    out.store(y);
                },
            );
        });
    }
}
