//! The one place where kernels are chosen for an adapter.

use std::num::NonZero;

use ::wgpu::{Adapter, Backend, CooperativeScalarType, DeviceType, Features};
use quaver_core::op::DType;

use super::adapter::MOST_BUFFERS_WIDE;

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

/// The variants that an adapter runs, the best first; the last is for adapters whose f16 is not exact, and for tests.
pub fn variants(adapter: &Adapter) -> Vec<Variant> {
    let (features, limits, info) = (adapter.features(), adapter.limits(), adapter.get_info());
    // A processor that poses as a GPU waits at each barrier for threads that it runs itself; but Mesa's compiler for
    // OpenGL was not done after 90 seconds with a query in registers.
    let is_software = info.device_type == DeviceType::Cpu;
    let portable = Tuning { tiled_attend: !is_software || info.backend == Backend::Gl, ..Tuning::PORTABLE };
    let mut variants = Vec::new();
    let binds_enough = limits.max_storage_buffers_per_shader_stage >= MOST_BUFFERS_WIDE;
    if is_software && binds_enough && features.contains(Features::SHADER_INT64) {
        // Its workgroups run one a core, so that further parts of a context would bring nothing but their merge.
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get) as u32;
        let tuning = Tuning { wide: true, busy_attend: cores, ..portable.clone() };
        variants.push(Variant { name: "wide", features: Features::SHADER_INT64, tuning });
    }
    variants.push(Variant { name: "portable", features: Features::empty(), tuning: portable });
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
    let exact = variants.iter().find(|variant| variant.name == "portable").cloned();
    variants.extend(exact.map(|portable| Variant {
        name: "portable-exact",
        tuning: Tuning { fast_e4m3: false, ..portable.tuning },
        ..portable
    }));
    for variant in &mut variants {
        variant.tuning.most_rounds = if is_software { MESA_ROUNDS } else { u32::MAX };
        variant.tuning.most_threads = limits.max_compute_invocations_per_workgroup;
    }
    variants
}

/// Mesa's llvmpipe ends every loop of an invocation silently when all of them together have run 65535 times
/// (`LP_MAX_TGSI_LOOP_ITERATIONS`). The rest is for what a kernel does before and behind its long loop.
const MESA_ROUNDS: u32 = 60_000;

/// Rows from which `Linear` takes tiles through a workgroup's memory, and matrices where there are any.
pub const MATRIX_ROWS: u32 = 9;

/// How kernels are cut.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Root of the threads of a workgroup, but for `Linear` and `Attend`; at most 16.
    pub side: u32,
    /// `Linear` of one or two rows with weights read as integers of 64 bits, and with the op behind it folded in.
    pub wide: bool,
    /// `Linear` by subgroups where rows are few, through the memory of a workgroup where they are many.
    pub subgroups: bool,
    /// `Attend` through the memory of a workgroup.
    pub tiled_attend: bool,
    /// Threads of a subgroup, where codes are multiplied as cooperative matrices of f16.
    pub matrix_lanes: Option<u32>,
    /// How often the loops of a thread may run, all together.
    pub most_rounds: u32,
    /// Threads that a workgroup may have.
    pub most_threads: u32,
    /// Decode E4M3 by way of f16 (`e4m3.wgsl`), where the device does so exactly.
    pub fast_e4m3: bool,
    /// Operations of one dispatch of `Linear` or `Attend`, and half of those of a submission, at most.
    pub most_ops: f64,
    /// Bytes of a buffer that are bound at once, at most, where the device binds more.
    pub most_bound: u64,
    /// Workgroups of `Linear` that keep the device busy.
    pub busy: u32,
    /// The same of `Attend`.
    pub busy_attend: u32,
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
        wide: false,
        subgroups: false,
        tiled_attend: false,
        matrix_lanes: None,
        most_rounds: MESA_ROUNDS,
        most_threads: 256,
        fast_e4m3: true,
        most_ops: MOST_OPS,
        most_bound: u64::MAX,
        busy: 8,
        busy_attend: 8,
        most_splits: 8,
    };

    /// Every choice that the backend can come to, by the variant's name: for tests, which have no adapter to ask.
    pub fn all() -> Vec<(&'static str, Tuning)> {
        let exact = Tuning { fast_e4m3: false, ..Tuning::PORTABLE };
        let tiled = Tuning { tiled_attend: true, ..Tuning::PORTABLE };
        let mut all = vec![
            ("portable", Tuning::PORTABLE),
            ("portable-exact", exact),
            ("portable, tiled attention", tiled),
            ("wide", Tuning { wide: true, busy_attend: 2, ..Tuning::PORTABLE }),
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
        most_rounds: u32::MAX,
        busy: 256,
        busy_attend: 256,
        most_splits: 32,
        ..Tuning::PORTABLE
    };

    /// How `Linear` is cut for `m` rows and `n` channels of `k` elements, x and w of these dtypes.
    ///
    /// On lavapipe a tile of 8 x 4 has 13.7 GFLOP/s a core, one of 8 x 8 a third (its loops are not unrolled any more); one
    /// row with 8 channels a thread reads 2.7 GB/s a core, with 4 1.5. Weights of 64 bits are a sixth faster for one row, a
    /// tenth for two, and not at all where a thread has four channels.
    pub fn linear(&self, m: u32, n: u32, k: u32, [x, w]: [DType; 2]) -> Cut {
        let rows = m.clamp(1, 8).next_power_of_two();
        if self.subgroups && m >= MATRIX_ROWS {
            return match self.matrix_lanes.filter(|_| [x, w] == [DType::E4m3; 2]) {
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
        let constants = [("WG", workgroup), ("TM", rows), ("TN", channels)];
        // Blocks of 16 weights that are 32 bytes.
        let step = match [x, w] {
            [DType::E4m3, DType::E4m3] if k.is_multiple_of(32) => 2,
            [_, DType::Bf16] => 1,
            _ => 0,
        };
        if self.wide && rows <= 2 && step > 0 {
            return cut("linear_wide", rows, channels * workgroup, &[&constants[..], &[("STEP", step)]].concat());
        }
        cut("linear", rows, channels * workgroup, &constants)
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

    /// Parts that each row's context of at most `context` positions is split into, where there are so many workgroups of
    /// a cut of `Attend` without.
    pub fn splits(&self, cut: &Cut, dim: u32, workgroups: u32, context: u32) -> u32 {
        let most = self.most_splits.min(context.div_ceil(64)).max(1);
        (self.busy_attend / workgroups.max(1)).clamp(1, most).max(context.div_ceil(self.longest_part(cut.shader, dim)))
    }

    /// Positions that a thread of `Attend` goes through, at most: whole chunks of 16. Their rounds are counted as the
    /// shaders have their loops, unrolled or not, with one more where each ends.
    fn longest_part(&self, shader: &str, dim: u32) -> u32 {
        let blocks = dim.div_ceil(16);
        let rounds = match shader {
            // Scores of four vectors of positions, block by block; values block by block, four vectors each; sections.
            "attend" => 11 * blocks + 17,
            // Scores: at most four queries or vectors, block by block; weights of 16 positions; values of four vectors.
            _ => 4 * (blocks + 2) + 130,
        };
        (self.most_rounds / rounds).max(1).saturating_mul(16)
    }

    /// Root of the threads that `Sample` has for a vocabulary.
    pub fn sample(&self, vocab: u32) -> Result<u32, String> {
        let fits =
            |side: &u32| side * side <= self.most_threads && sample_rounds(vocab, *side) <= u64::from(self.most_rounds);
        [self.side, 16].into_iter().find(fits).ok_or_else(|| {
            format!(
                "a vocabulary of {vocab} tokens is more than loops of a software adapter end with; take --backend cpu"
            )
        })
    }

    /// The runs (first, count) along x and along y that a grid is dispatched in whose `x` by `y` workgroups have `ops`
    /// operations in all: of whole lines of x, unless one alone has too many.
    pub fn runs(&self, x: u32, y: u32, ops: f64) -> Vec<[(u32, u32); 2]> {
        let line = ops / f64::from(y.max(1));
        let most = |ops: f64, groups: u32| ((self.most_ops / ops) as u32).clamp(1, groups.max(1));
        let (x_step, y_step) =
            if line > self.most_ops { (most(line / f64::from(x.max(1)), x), 1) } else { (x, most(line, y)) };
        pieces(y, y_step).flat_map(|y| pieces(x, x_step).map(move |x| [x, y])).collect()
    }
}

/// How often the loops of a thread of `sample.wgsl` run at most: 27 passes over the vocabulary (20 of them for
/// alternatives), two cuts that bisect words of 32 bits and then ids, the reductions behind each, and Philox' rounds.
fn sample_rounds(vocab: u32, side: u32) -> u64 {
    let passes = u64::from(27 + 2 * (32 + vocab.max(1).ilog2() + 1));
    let blocks = u64::from(vocab.div_ceil(4).div_ceil(side * side));
    passes * (blocks + 1 + 4 * (u64::from(side) + 1)) + 11 * blocks
}

fn pieces(groups: u32, step: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..groups).step_by(step.max(1) as usize).map(move |first| (first, step.min(groups - first)))
}

fn cut(shader: &'static str, rows: u32, channels: u32, constants: &[(&'static str, u32)]) -> Cut {
    Cut { shader, rows, channels, constants: constants.to_vec() }
}

/// A third of a second at 100 GFLOP/s, well within the two seconds after which a desktop takes a GPU for hung (Windows:
/// `TdrDelay`).
const MOST_OPS: f64 = 32e9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_dispatch_exceeds_its_operations_and_all_workgroups_run_once() {
        let tuning = Tuning { most_ops: 1000.0, ..Tuning::PORTABLE };
        for (x, y, ops) in
            [(7, 5, 100.0), (7, 5, 3000.0), (7, 5, 20_000.0), (1, 40, 39_999.0), (0, 3, 10.0), (3, 0, 10.0)]
        {
            let runs = tuning.runs(x, y, ops);
            let mut seen = vec![0; (x * y) as usize];
            for [(x_first, x_count), (y_first, y_count)] in runs {
                let groups = f64::from(x_count * y_count);
                assert!(groups == 1.0 || ops / f64::from(x * y) * groups <= tuning.most_ops);
                for row in y_first..y_first + y_count {
                    (x_first..x_first + x_count).for_each(|column| seen[(row * x + column) as usize] += 1);
                }
            }
            assert!(seen.iter().all(|count| *count == 1), "{x} {y} {ops}: {seen:?}");
        }
    }

    #[test]
    fn parts_of_a_context_are_as_long_as_loops_run_on_mesa() {
        let cut = |dim| Tuning::PORTABLE.attend(1, 4, dim).unwrap();
        let splits = |tuning: &Tuning, dim| tuning.splits(&cut(dim), dim, 64, 16_000);
        assert_eq!(splits(&Tuning::PORTABLE, 64), 2);
        assert_eq!(splits(&Tuning::PORTABLE, 256), 4);
        assert_eq!(splits(&Tuning { most_rounds: u32::MAX, ..Tuning::PORTABLE }, 256), 1);
    }

    #[test]
    fn a_vocabulary_gets_the_threads_that_it_needs_or_is_refused() {
        let side = |vocab| Tuning::PORTABLE.sample(vocab);
        assert_eq!((side(4096), side(128_256), side(300_000)), (Ok(8), Ok(16), Ok(16)));
        assert!(side(500_000).unwrap_err().contains("a vocabulary of 500000 tokens"));
        assert!(Tuning { most_threads: 128, ..Tuning::PORTABLE }.sample(300_000).is_err());
        assert_eq!(Tuning::SUBGROUP.sample(1 << 24), Ok(16));
    }
}
