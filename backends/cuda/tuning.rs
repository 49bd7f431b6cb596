//! The one place where kernels are chosen for a device.

use quaver_core::op::TensorCores;
use quaver_core::{Error, Result};

/// Which instructions a device has, as far as kernels differ by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// Ampere: products of bf16; FP8 is decoded to it, exactly.
    Sm80,
    /// Ada and newer: `mma.sync` on E4M3.
    Sm89,
    /// Hopper: `wgmma` on E4M3 and bf16.
    Sm90,
}

impl Variant {
    /// All of them, the newest first.
    pub const ALL: [Variant; 3] = [Variant::Sm90, Variant::Sm89, Variant::Sm80];

    /// What it is called in a [`Spec`](crate::Spec).
    pub const fn name(self) -> &'static str {
        match self {
            Variant::Sm80 => "sm80",
            Variant::Sm89 => "sm89",
            Variant::Sm90 => "sm90",
        }
    }

    /// How its tensor cores sum (`tensor_sum` in `kernels/emulator/emulator.cpp` has the sources). Ampere's multiply codes
    /// as bf16.
    pub const fn tensor_cores(self) -> TensorCores {
        let e4m3_bits = match self {
            Variant::Sm80 => 24,
            Variant::Sm89 | Variant::Sm90 => 13,
        };
        TensorCores { bf16_bits: 24, e4m3_bits, e4m3_rows: GEMV_ROWS as usize + 1 }
    }

    /// By its name; the newest where there is none.
    pub fn parse(backend: &'static str, name: Option<&str>) -> Result<Self> {
        let Some(name) = name else { return Ok(Variant::ALL[0]) };
        Variant::ALL.into_iter().find(|variant| variant.name() == name).ok_or_else(|| {
            let names = Variant::ALL.map(Variant::name).join(", ");
            Error::device(backend, format!("there is no variant {name}; there are {names}"))
        })
    }
}

/// How kernels are chosen and cut.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    pub variant: Variant,
    /// Multiprocessors.
    pub processors: u32,
    /// Parts that a row's context is split into, at most. 1 makes sums independent of how a prompt was cut into steps.
    pub most_splits: u32,
}

/// See [`Tuning::most_splits`].
pub const MOST_SPLITS: u32 = 64;

/// Rows up to which a Linear streams its weights through registers.
pub const GEMV_ROWS: u32 = 8;

impl Tuning {
    /// Parts that each row's context of at most `context` positions is split into at most, where there are so many blocks
    /// without: enough for two blocks a multiprocessor. A kernel takes fewer where the context in use is short (`paging.cuh`).
    pub fn splits(&self, blocks: u32, context: u32) -> u32 {
        (2 * self.processors / blocks.max(1)).min(context.div_ceil(64)).clamp(1, self.most_splits)
    }

    /// Rows and channels of a tile of `wgmma`: 128 read half as much a product, and need as many tiles as half of the
    /// multiprocessors at least.
    pub fn wgmma_tile(&self, m: u32, n: u32) -> u32 {
        if m <= 64 || 2 * m.div_ceil(128) * n.div_ceil(128) <= self.processors { 64 } else { 128 }
    }

    /// Stages that a block of `wgmma` has under way: what a multiprocessor's shared memory holds of its blocks, which are two small
    /// ones where there are enough.
    pub fn wgmma_slots(&self, tile: u32, blocks: u32) -> u32 {
        // MOST_SLOTS, or half of them.
        if tile == 64 && blocks <= self.processors { 12 } else { 6 }
    }

    /// Parts that a product of so many tiles of `tile` rows and channels is cut into along k, which is `stages` deep: enough
    /// blocks for every multiprocessor, of which each holds more than one small one. None has fewer than 16: so many took 7.2 us
    /// whole on an H100, and 9.5 in four parts (`o_proj` of 64 rows).
    pub fn depth_parts(&self, tile: u32, tiles: u32, stages: u32) -> u32 {
        let blocks = self.processors * if tile == 64 { 2 } else { 1 };
        (blocks / tiles.max(1)).min(stages / 16).max(1)
    }

    /// Bytes of the sums of all parts of a product, at most: those of a tile of 128 rows and channels a multiprocessor.
    pub fn parts_bytes(&self) -> u64 {
        u64::from(self.processors) * 4 * 128 * 128
    }
}
