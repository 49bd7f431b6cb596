//! The one place where kernels are chosen for an adapter.

/// How kernels are cut for an adapter.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Root of the threads of a workgroup, but for `Linear` and `Attend`; at most 16.
    pub side: u32,
    /// Threads of a workgroup of `Attend`.
    pub attend_workgroup: u32,
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
    /// For processors that pose as GPUs.
    pub const SOFTWARE: Tuning = Tuning { side: 8, attend_workgroup: 64, fast_e4m3: true, busy: 8 };

    /// The tile for `m` rows and `n` channels.
    pub fn linear(&self, m: u32, _n: u32) -> Tile {
        if let Ok(t) = std::env::var("TILE") {
            let v: Vec<u32> = t.split(',').map(|x| x.parse().unwrap()).collect();
            return Tile { rows: v[0], channels: v[1], workgroup: v[2] };
        }
        let rows = if m >= 8 { 8 } else { m.next_power_of_two().max(1) };
        Tile { rows, channels: 4, workgroup: 64 }
    }

    /// Parts that each row's context is split into, where there are so many workgroups without.
    pub fn splits(&self, workgroups: u32) -> u32 {
        (self.busy / workgroups.max(1)).clamp(1, 8)
    }
}
