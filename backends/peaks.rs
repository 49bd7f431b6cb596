//! What a device can do at best: benchmarks are held against it.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use std::time::Duration;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use quaver_core::{Error, Result};

/// What a device can do at best, measured on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Threads of the processor that took part; 1 for a GPU.
    pub threads: usize,
    /// Bytes a second that are read from the device's memory.
    pub bandwidth: f64,
    /// Operations a second of the instruction that the device's kernels multiply FP8 with; a product that is added to a
    /// sum is two.
    pub flops: f64,
    /// Bytes a second that are read and written where memory is copied; None where that is not measured.
    pub copy: Option<f64>,
}

/// A measurement of a GPU repeats its kernel until it takes as long.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
const LONG_ENOUGH: Duration = Duration::from_millis(20);
#[cfg(any(feature = "cuda", feature = "wgpu"))]
const MOST_REPEATS: u32 = 1 << 14;
/// Measurements, the best of which counts.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
const PASSES: usize = 5;

/// Seconds that a kernel takes at best, where `time` runs it so many times and waits.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) fn seconds(mut time: impl FnMut(u32) -> Result<Duration>) -> Result<f64> {
    let mut repeats = 1;
    while time(repeats)? < LONG_ENOUGH {
        repeats *= 2;
        if repeats > MOST_REPEATS {
            return Err(Error::device("the measurement", "the device does not run what it is given; see its driver"));
        }
    }
    let mut best = Duration::MAX;
    for _ in 0..PASSES {
        best = best.min(time(repeats)?);
    }
    Ok(best.as_secs_f64() / f64::from(repeats))
}
