//! What a driver must get right before a variant that relies on it is used. `Wgpu::open` is the caller.

use quaver_core::bytes::Bytes;
use quaver_core::op::{Act, Backend, BufDesc, Cols, Copies, DType, Extent, Op, Program, Scale, StaticScale, Weight};
use quaver_core::{Result, e4m3};

use super::memory::Memory;
use super::{Wgpu, e4m3_codes};

/// Rows, channels and products of the trial: one tile of `linear_matrix`, sums that are promoted three times, and a rest.
const ROWS: usize = 64;
const CHANNELS: usize = 64;
const PRODUCTS: usize = 400;

/// Whole numbers that E4M3 holds, in a pattern that no other order of rows and columns gives.
fn number(row: usize, column: usize) -> f32 {
    ((7 * row + 3 * column + row * column) % 17) as f32 - 8.0
}

/// True for the sums of the trial.
pub(super) fn are_exact(sums: &[f32]) -> bool {
    let sum = |i: usize| (0..PRODUCTS).map(|k| number(i / CHANNELS, k) * number(i % CHANNELS + 1, k)).sum::<f32>();
    sums.len() == ROWS * CHANNELS && sums.iter().enumerate().all(|(i, got)| *got == sum(i))
}

impl Wgpu {
    /// True where decoding by way of f16 gives the value of every finite code, and +-480 for NaN (`e4m3.wgsl`).
    pub(super) fn decodes_fast(&mut self) -> Result<bool> {
        let dispatch = self.dispatch(&e4m3_codes(), None)?;
        self.submit(&[dispatch])?;
        let scratch = self.scratch(1024)?;
        let mut is_exact = true;
        self.gpu.read(&scratch, 0..1024, |bytes| {
            let want = |code: usize| match code {
                0x7f => 480.0,
                0xff => -480.0,
                _ => e4m3::VALUES[code],
            };
            let got = bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b));
            is_exact = got.enumerate().all(|(code, bits)| bits == want(code).to_bits());
        })?;
        Ok(is_exact)
    }

    /// True where a `Linear` over known codes has exactly the sums that it must have: whole numbers that f32 holds. Leaves
    /// no buffer and no plan behind.
    pub(super) fn multiplies(&mut self) -> Result<bool> {
        let sums = self.sums();
        self.memory = Memory::new(&self.gpu, self.tuning.most_bound);
        self.plans.clear();
        self.copies = Copies::default();
        Ok(are_exact(&sums?))
    }

    /// The sums that the device has, row by row.
    pub(super) fn sums(&mut self) -> Result<Vec<f32>> {
        let codes = |rows: usize, first: usize| -> Vec<u8> {
            let code = |i: usize| e4m3::encode(number(i / PRODUCTS + first, i % PRODUCTS));
            (0..rows * PRODUCTS).map(code).collect()
        };
        let live = self.alloc(&BufDesc::new("live", DType::U32, Extent::Fixed(1), 3))?;
        let x = self.alloc(&BufDesc::new("x", DType::E4m3, Extent::Rows(ROWS), PRODUCTS))?;
        let out = self.alloc(&BufDesc::new("out", DType::F32, Extent::Rows(ROWS), CHANNELS))?;
        let w = BufDesc::new("w", DType::E4m3, Extent::Fixed(CHANNELS), PRODUCTS);
        let w = self.load(&w, &[Bytes::from(codes(CHANNELS, 1))])?;
        let scale = BufDesc::new("scale", DType::F32, Extent::Fixed(CHANNELS), 1);
        let ones = [1f32; CHANNELS].map(f32::to_le_bytes).concat();
        let scale = self.load(&scale, &[Bytes::from(ones)])?;
        self.write(live, 0, bytemuck::cast_slice(&[ROWS as u32, 0, 0]))?;
        self.write(x, 0, &codes(ROWS, 0))?;
        let mut program = Program::new(ROWS, 0, live);
        let x = Act::Fp8 { codes: x, scale: Scale::Static(StaticScale::new(1.0)) };
        let w = Weight::Fp8 { codes: w, scale };
        program.push("self-test", Op::Linear { x, w, out: Cols { buf: out, first: 0 }, add: false });
        let plan = self.record(&program)?;
        self.run(plan)?;
        let mut sums = vec![0f32; ROWS * CHANNELS];
        self.read(out, 0, bytemuck::cast_slice_mut(&mut sums))?;
        Ok(sums)
    }
}
