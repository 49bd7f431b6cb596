//! The one place where kernels are chosen for an adapter.

/// How kernels are cut for an adapter.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Threads of a workgroup, but for `Linear` and `Attend`; at most 256.
    pub workgroup: u32,
    /// Threads of a workgroup of `Attend`.
    pub attend_workgroup: u32,
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
    /// For processors that pose as GPUs.
    pub const SOFTWARE: Tuning = Tuning { workgroup: 64, attend_workgroup: 64, busy: 8 };

    /// The tile for `m` rows and `n` channels.
    pub fn linear(&self, m: u32, _n: u32) -> Tile {
        let rows = if m >= 8 { 8 } else { m.next_power_of_two().max(1) };
        Tile { rows, channels: 4, workgroup: 64 }
    }

    /// Parts that each row's context is split into, where there are so many workgroups without.
    pub fn splits(&self, workgroups: u32) -> u32 {
        (self.busy / workgroups.max(1)).clamp(1, 8)
    }
}
