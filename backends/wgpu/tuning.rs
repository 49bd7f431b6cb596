//! The one place where kernels are chosen for an adapter.

/// How kernels are cut for an adapter.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Root of the threads of a workgroup, but for `Linear` and `Attend`; at most 16.
    pub side: u32,
    /// Threads of a workgroup of `Attend`.
    pub attend_workgroup: u32,
    /// Positions that a thread of `Attend` may go through. Mesa's llvmpipe ends every loop of an invocation silently
    /// when all of them together have run 65535 times (`LP_MAX_TGSI_LOOP_ITERATIONS`).
    pub longest_part: u32,
    /// Decode E4M3 by way of f16 (`e4m3.wgsl`).
    pub fast_e4m3: bool,
    /// Workgroups that keep the device busy.
    pub busy: u32,
}

/// What a workgroup of `linear` computes.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// Rows a thread.
    pub rows: u32,
    /// Channels a thread.
    pub channels: u32,
    /// Threads.
    pub workgroup: u32,
}

impl Tuning {
    /// No subgroups, no f16, no large workgroups: runs everywhere. Cut for processors that pose as GPUs.
    pub const PORTABLE: Tuning =
        Tuning { side: 8, attend_workgroup: 64, longest_part: 16384, fast_e4m3: true, busy: 8 };

    /// Every choice that the backend can come to, by the variant's name: for tests, which have no adapter to ask.
    pub fn all() -> Vec<(&'static str, Tuning)> {
        let exact = Tuning { fast_e4m3: false, ..Tuning::PORTABLE };
        vec![("portable", Tuning::PORTABLE), ("portable, FP8 by integers", exact)]
    }

    /// The tile for `m` rows and `n` channels. On lavapipe a tile of 8 x 4 has 13 GFLOP/s a core, one of 8 x 8 3 (its
    /// loops are not unrolled any more); one row with 8 channels a thread reads 2.4 GB/s a core, with 4 1.5.
    pub fn linear(&self, m: u32, n: u32) -> Tile {
        let rows = m.clamp(1, 8).next_power_of_two();
        let channels = if rows <= 2 { 8 } else { 4 };
        let threads = n.div_ceil(channels) * m.div_ceil(rows);
        let workgroup = (threads / self.busy).next_power_of_two().clamp(8, 64);
        Tile { rows, channels, workgroup }
    }

    /// Parts that each row's context of at most `context` positions is split into, where there are so many workgroups
    /// without.
    pub fn splits(&self, workgroups: u32, context: u32) -> u32 {
        (self.busy / workgroups.max(1)).clamp(1, 8).max(context.div_ceil(self.longest_part))
    }
}
