//! The one place where kernels are chosen for an adapter.

use ::wgpu::{Adapter, Backend, CooperativeScalarType, DeviceType, Features};

/// A set of kernels by its name on the command line.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Its name.
    pub name: &'static str,
    /// What a device must be opened with for it.
    pub features: Features,
    /// Its choices.
    pub tuning: Tuning,
}

/// The variants that an adapter runs, the best first.
pub fn variants(adapter: &Adapter) -> Vec<Variant> {
    let (features, limits, info) = (adapter.features(), adapter.limits(), adapter.get_info());
    // A processor that poses as a GPU waits at each barrier for threads that it runs itself; but Mesa's compiler for
    // OpenGL was not done after 90 seconds with a query in registers.
    let is_software = info.device_type == DeviceType::Cpu;
    let portable = Tuning { tiled_attend: !is_software || info.backend == Backend::Gl, ..Tuning::PORTABLE };
    let mut variants = vec![Variant { name: "portable", features: Features::empty(), tuning: portable }];
    let needs = Features::SUBGROUP;
    let is_large = limits.max_compute_invocations_per_workgroup >= 256;
    if features.contains(needs) && is_large && limits.max_compute_workgroup_storage_size >= 16 << 10 {
        variants.push(Variant { name: "subgroup", features: needs, tuning: Tuning::SUBGROUP });
    }
    let needs = needs | Features::SHADER_F16 | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let has_matrices = adapter.cooperative_matrix_properties().iter().any(|matrix| {
        [matrix.m_size, matrix.n_size, matrix.k_size] == [16; 3]
            && matrix.ab_type == CooperativeScalarType::F16
            && matrix.cr_type == CooperativeScalarType::F32
    });
    let lanes = info.subgroup_max_size;
    if has_matrices
        && features.contains(needs)
        && info.subgroup_min_size == lanes
        && limits.max_compute_invocations_per_workgroup >= 256.max(4 * lanes)
        && limits.max_compute_workgroup_storage_size >= 24 << 10
    {
        let tuning = Tuning { matrix_lanes: Some(lanes), ..Tuning::SUBGROUP };
        variants.push(Variant { name: "matrix", features: needs, tuning });
    }
    if !is_software {
        variants.reverse();
    }
    for variant in variants.iter_mut().filter(|variant| is_software && variant.tuning.tiled_attend) {
        variant.tuning.longest_part = LONGEST_TILED_PART;
    }
    variants
}

/// Positions after which a thread of `attend_tiled` has gone round loops 65535 times at most: 150 times a chunk of 16.
const LONGEST_TILED_PART: u32 = 4096;

/// How kernels are cut.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Root of the threads of a workgroup, but for `Linear` and `Attend`; at most 16.
    pub side: u32,
    /// `Linear` by subgroups where rows are few, through the memory of a workgroup where they are many.
    pub subgroups: bool,
    /// `Attend` through the memory of a workgroup.
    pub tiled_attend: bool,
    /// Threads of a subgroup, where codes are multiplied as cooperative matrices of f16.
    pub matrix_lanes: Option<u32>,
    /// Positions that a thread of `Attend` may go through. Mesa's llvmpipe ends every loop of an invocation silently
    /// when all of them together have run 65535 times (`LP_MAX_TGSI_LOOP_ITERATIONS`).
    pub longest_part: u32,
    /// Decode E4M3 by way of f16 (`e4m3.wgsl`).
    pub fast_e4m3: bool,
    /// Workgroups that keep the device busy.
    pub busy: u32,
    /// Parts that a row's context is split into, at most, to keep it so. 1 makes sums independent of how a prompt was cut
    /// into steps.
    pub most_splits: u32,
}

/// A shader and what one workgroup of it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// The shader's name.
    pub shader: &'static str,
    /// Rows of a workgroup.
    pub rows: u32,
    /// Channels of a workgroup, where there are any.
    pub channels: u32,
    /// The constants that say so.
    pub constants: Vec<(&'static str, u32)>,
}

/// Most elements of a head in `attend.wgsl`, and of all queries of a tile in `attend_tiled.wgsl`.
const MOST_DIM: u32 = 256;
const MOST_QUERIES: u32 = 2048;

impl Tuning {
    /// No subgroups, no f16, no large workgroups: runs everywhere. Cut for processors that pose as GPUs.
    pub const PORTABLE: Tuning = Tuning {
        side: 8,
        subgroups: false,
        tiled_attend: false,
        matrix_lanes: None,
        longest_part: 16384,
        fast_e4m3: true,
        busy: 8,
        most_splits: 8,
    };

    /// Every choice that the backend can come to, by the variant's name: for tests, which have no adapter to ask.
    pub fn all() -> Vec<(&'static str, Tuning)> {
        let exact = Tuning { fast_e4m3: false, ..Tuning::PORTABLE };
        let tiled = Tuning { tiled_attend: true, ..Tuning::PORTABLE };
        let mut all = vec![
            ("portable", Tuning::PORTABLE),
            ("portable, FP8 by integers", exact),
            ("portable, tiled attention", tiled),
            ("subgroup", Tuning::SUBGROUP),
        ];
        all.extend([32, 64].map(|lanes| ("matrix", Tuning { matrix_lanes: Some(lanes), ..Tuning::SUBGROUP })));
        all
    }

    /// For GPUs with subgroups.
    pub const SUBGROUP: Tuning = Tuning {
        side: 16,
        subgroups: true,
        tiled_attend: true,
        longest_part: u32::MAX,
        busy: 256,
        most_splits: 32,
        ..Tuning::PORTABLE
    };

    /// How `Linear` is cut for `m` rows and `n` channels, of codes alone or not.
    ///
    /// On lavapipe a tile of 8 x 4 has 13 GFLOP/s a core, one of 8 x 8 3 (its loops are not unrolled any more); one row
    /// with 8 channels a thread reads 2.4 GB/s a core, with 4 1.5.
    pub fn linear(&self, m: u32, n: u32, is_codes: bool) -> Cut {
        let rows = m.clamp(1, 8).next_power_of_two();
        if self.subgroups && m > 8 {
            return match self.matrix_lanes.filter(|_| is_codes) {
                Some(lanes) => cut("linear_matrix", 64, 64, &[("WG", 4 * lanes)]),
                None => cut("linear_tiled", 64, 64, &[]),
            };
        }
        if self.subgroups {
            let constants = [("WG", 128), ("TM", rows), ("TN", 2), ("CHANNELS", 8)];
            return cut("linear_row", rows, 8, &constants);
        }
        let channels = if rows <= 2 { 8 } else { 4 };
        let threads = n.div_ceil(channels) * m.div_ceil(rows);
        let workgroup = (threads / self.busy).next_power_of_two().clamp(8, 64);
        cut("linear", rows, channels * workgroup, &[("WG", workgroup), ("TM", rows), ("TN", channels)])
    }

    /// How `Attend` is cut for `m` rows of `group` query heads a kv head, of `dim` elements each.
    pub fn attend(&self, m: u32, group: u32, dim: u32) -> Result<Cut, String> {
        let queries = (MOST_QUERIES / dim.next_multiple_of(16).max(1)).min(32);
        if self.tiled_attend && group <= queries {
            let rows = (queries / group).min(m.max(1));
            return Ok(cut("attend_tiled", rows, 0, &[("WG", 128), ("TILE", rows * group)]));
        }
        if dim > MOST_DIM || group > 64 {
            return Err(format!(
                "heads of {dim} elements in groups of {group}; at most {MOST_DIM} and 64 are supported"
            ));
        }
        let rows = (64 / group).min(m.max(1));
        Ok(cut("attend", rows, 0, &[("WG", rows * group)]))
    }

    /// Parts that each row's context of at most `context` positions is split into, where there are so many workgroups
    /// without.
    pub fn splits(&self, workgroups: u32, context: u32) -> u32 {
        let most = self.most_splits.min(context.div_ceil(64)).max(1);
        (self.busy / workgroups.max(1)).clamp(1, most).max(context.div_ceil(self.longest_part))
    }
}

fn cut(shader: &'static str, rows: u32, channels: u32, constants: &[(&'static str, u32)]) -> Cut {
    Cut { shader, rows, channels, constants: constants.to_vec() }
}

/// Operations of one dispatch, at most: a third of a second at 100 GFLOP/s, well within the two seconds after which a
/// desktop takes a GPU for hung (Windows: `TdrDelay`).
const MOST_OPS: f64 = 32e9;

/// The runs (first, count) that `groups` workgroups of `ops` operations in all are dispatched in.
pub fn dispatches(groups: u32, ops: f64) -> impl Iterator<Item = (u32, u32)> {
    let runs = ((ops / MOST_OPS).ceil() as u32).clamp(1, groups.max(1));
    let step = groups.div_ceil(runs).max(1);
    (0..groups).step_by(step as usize).map(move |first| (first, step.min(groups - first)))
}
