//! What a card can do at best, measured on it: bytes that it reads from its memory, and products that it sums the way
//! `Linear` does. Benchmarks are held against both.

use std::time::Instant;

use quaver_core::{Error, Result};

use super::device::{Device, Launch, Value};
use super::tuning::Variant;
use super::{Cuda, Properties};
use crate::peaks::{Peaks, seconds};

/// Read in each pass: far more than any card's caches hold.
const READ: u64 = 1 << 30;
/// At least, in whole megabytes: less says nothing of the memory.
const LEAST: u64 = 256 << 20;
/// Blocks a multiprocessor.
const BLOCKS: u32 = 16;
/// Rounds of eight products.
const ROUNDS: u32 = 1024;

/// Measures a card of [`super::card::all`] with a variant of the kernels by its name, the best where None.
pub fn measure(index: usize, properties: &Properties, variant: Option<&str>, share: f64) -> Result<Peaks> {
    let mut cuda = Cuda::open(index, properties, variant, share)?;
    let bytes = READ.min(cuda.device.budget().unwrap_or(READ) / 2) / 16 * 16;
    if bytes < LEAST {
        let what = format!("a measurement of {}", cuda.device.info().name);
        let remedy = "lower --kv-cache-memory, or raise --gpu-memory-utilization";
        return Err(Error::OutOfMemory { what, need: LEAST, have: bytes, remedy });
    }
    let ([read, copy, multiply], out) = cuda.peak_launches(bytes, ROUNDS)?;
    let operations = operations(cuda.tuning.variant, &multiply);
    let bandwidth = bytes as f64 / cuda.seconds(&read, out)?;
    // Half of the memory is read and the other half written.
    let copied = bytes as f64 / cuda.seconds(&copy, out)?;
    Ok(Peaks { threads: 1, bandwidth, flops: operations / cuda.seconds(&multiply, out)?, copy: Some(copied) })
}

/// Operations of the kernel that multiplies.
fn operations(variant: Variant, launch: &Launch) -> f64 {
    let products = match variant {
        Variant::Sm80 => launch.threads / 32 * (16 * 8 * 16),
        Variant::Sm89 => launch.threads / 32 * (16 * 8 * 32),
        Variant::Sm90 => 64 * 128 * 32,
    };
    2.0 * 8.0 * f64::from(ROUNDS) * f64::from(products) * f64::from(launch.grid[0])
}

impl Cuda {
    /// The kernels that are timed: one that reads zeros, one that copies the first half of them to the second, and one that
    /// multiplies. The first and the last write to the address that is given too, where they find what is not there.
    fn peak_launches(&mut self, bytes: u64, rounds: u32) -> Result<([Launch; 3], u64)> {
        let (zeros, out) = (self.device.alloc("what is read", bytes)?, self.device.alloc("what is found", 16)?);
        let (file, threads, shared) = match self.tuning.variant {
            Variant::Sm80 => ("sm80_peak", 256, 0),
            Variant::Sm89 => ("sm89_peak", 256, 0),
            Variant::Sm90 => ("sm90_peak", 128, (64 + 128) * 128),
        };
        let grid = [self.tuning.processors * BLOCKS, 1, 1];
        let launch = |file: &'static str, threads, shared, args: &[u64]| {
            let args = args.iter().map(|&word| Value::Word(word)).collect();
            Launch { file, entry: file.into(), grid, threads, shared, args }
        };
        let read = launch("peak_read", 256, 0, &[zeros, bytes / 16, out]);
        let (pair, vectors) = (self.device.alloc("the halves", 16)?, bytes / 32);
        self.device.write(pair, bytemuck::cast_slice(&[0u32, 1]))?;
        let blocks = [vectors.div_ceil(256) as u32, 1, 1];
        let copy = Launch { grid: blocks, ..launch("copy_pages", 256, 0, &[zeros, pair, vectors, 1]) };
        Ok(([read, copy, launch(file, threads, shared, &[u64::from(rounds), out])], out))
    }

    /// Seconds that a kernel takes at best; `out` is an address to wait with.
    fn seconds(&mut self, launch: &Launch, out: u64) -> Result<f64> {
        seconds(|repeats| {
            let plan = self.device.prepare(vec![launch.clone(); repeats as usize])?;
            let wait = |device: &mut dyn Device| {
                let fetch = device.fetch(&[(out, 4)])?;
                device.take(fetch, &mut [0; 4])
            };
            wait(&mut *self.device)?;
            let start = Instant::now();
            self.device.run(plan)?;
            wait(&mut *self.device)?;
            Ok(start.elapsed())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_read_and_nothing_found_among_zeros() {
        for variant in Variant::ALL {
            let mut cuda = Cuda::emulated(variant, 0).unwrap();
            let ([read, copy, multiply], out) = cuda.peak_launches(80032, 1).unwrap();
            let Value::Word(zeros) = read.args[0] else { panic!("{read:?}") };
            let copy = cuda.device.prepare(vec![copy]).unwrap();
            let launches = [read, multiply];
            let launches = launches.map(|launch| Launch { grid: [2, 1, 1], ..launch });
            let [read, multiply] = launches.map(|launch| cuda.device.prepare(vec![launch]).unwrap());
            let mut found = |plan| {
                let mut word = [0; 4];
                cuda.device.run(plan).unwrap();
                let fetch = cuda.device.fetch(&[(out, 4)]).unwrap();
                cuda.device.take(fetch, &mut word).unwrap();
                let was = u32::from_ne_bytes(word);
                cuda.device.write(out, &[0; 4]).unwrap();
                // The last vector of all.
                cuda.device.write(zeros + 80016, &7u32.to_ne_bytes()).unwrap();
                was
            };
            assert_eq!([found(multiply), found(read)], [0, 7], "{variant:?}");
            // The last vector of the first half goes to where that one is.
            cuda.device.write(zeros + 40000, &9u32.to_ne_bytes()).unwrap();
            cuda.device.run(copy).unwrap();
            let (fetch, mut word) = (cuda.device.fetch(&[(zeros + 80016, 4)]).unwrap(), [0; 4]);
            cuda.device.take(fetch, &mut word).unwrap();
            assert_eq!(u32::from_ne_bytes(word), 9, "{variant:?}");
        }
    }
}
