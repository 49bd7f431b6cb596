//! What a GPU can do at best, measured on it: bytes that it reads from its memory, and products that it sums the way
//! `Linear` does. Benchmarks are held against both.

use std::time::{Duration, Instant};

use ::wgpu::Adapter;
use quaver_core::Result;

use super::Wgpu;
use super::kernel::{Binding, Kernel};
use super::tuning::Tuning;
use crate::peaks::{Peaks, seconds};

/// Read in each pass: more than caches hold, where the device binds as much.
const MOST_READ: u64 = 512 << 20;
/// Threads of a kernel: more than the largest device runs at a time.
const THREADS: u32 = 1 << 19;

/// The kernels that are timed: one that reads so many bytes, one that multiplies.
pub fn kernels(tuning: &Tuning, bytes: u64) -> [Kernel; 2] {
    let kernel = |shader, workgroup| {
        let kernel = Kernel::new(shader, [THREADS / workgroup, 1, 1]).constant("WG", workgroup);
        kernel.bind(2, Binding::Unwritten)
    };
    let (workgroup, x) = (tuning.side * tuning.side, Binding::ReadScratch(bytes));
    let multiply = match tuning.matrix_lanes {
        Some(lanes) => kernel("peak_matrices", lanes),
        None => kernel("peak_products", workgroup).bind(3, x),
    };
    [kernel("peak_read", workgroup).bind(3, x), multiply]
}

/// Operations of the kernel that multiplies.
fn operations(tuning: &Tuning) -> f64 {
    let products_of_a_thread = match tuning.matrix_lanes {
        Some(lanes) => f64::from(256 * 4 * 16 * 16 * 16) / f64::from(lanes),
        None => f64::from(256 * 8 * 4),
    };
    2.0 * products_of_a_thread * f64::from(THREADS)
}

/// Measures an adapter with a variant of the kernels by its name, the best where None. Takes as much of its memory as it
/// reads, 512 MiB at most.
pub fn measure(adapter: &Adapter, variant: Option<&str>) -> Result<Peaks> {
    let mut wgpu = Wgpu::open(adapter, variant)?;
    let limits = wgpu.gpu.device.limits();
    let bytes = MOST_READ.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size) / 16 * 16;
    let [read, multiply] = kernels(&wgpu.tuning, bytes);
    let bandwidth = bytes as f64 / seconds(|repeats| wgpu.time(&read, repeats))?;
    let flops = operations(&wgpu.tuning) / seconds(|repeats| wgpu.time(&multiply, repeats))?;
    Ok(Peaks { threads: 1, bandwidth, flops, copy: None })
}

impl Wgpu {
    /// Runs a kernel so many times in one pass, and waits for it.
    fn time(&mut self, kernel: &Kernel, repeats: u32) -> Result<Duration> {
        let dispatches = (0..repeats).map(|_| self.dispatch(kernel, None)).collect::<Result<Vec<_>>>()?;
        self.gpu.wait()?;
        let start = Instant::now();
        self.submit(&dispatches)?;
        self.gpu.wait()?;
        Ok(start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wgpu::adapter;
    use crate::wgpu::variants;

    #[test]
    fn every_adapter_is_measured_in_every_variant() {
        let vulkan = |adapter: &&Adapter| adapter.get_info().backend != ::wgpu::Backend::Gl;
        for adapter in adapter::tests::some().iter().filter(vulkan) {
            for variant in variants(adapter) {
                let peaks = measure(adapter, Some(variant)).unwrap();
                assert!([peaks.bandwidth, peaks.flops].iter().all(|x| x.is_finite() && *x > 0.0), "{peaks:?}");
                println!("{variant}: {peaks:?}");
            }
        }
    }
}
