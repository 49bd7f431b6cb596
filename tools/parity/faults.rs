//! Planted faults: the suite must find each of them, and blame the right op; the model end to end must find them too, and
//! a bisection name the line.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use quaver_core::checkpoint::Checkpoint;
use quaver_core::e4m3;
use quaver_core::host::slices::{ActIn, ActOut, ColsOut, ScaleIn, ScaleOut, Slice, SliceMut, WeightIn};
use quaver_core::host::{HostBackend, Kernels, KvIn, RowsIn};
use quaver_core::llama::Profile;
use quaver_core::op::{DeviceInfo, Heads};
use quaver_core::reference;

use super::{DEFAULT_SEED, Model, bisect, cases, run};

/// What is wrong with a set of kernels that are else the reference's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    /// `linear` leaves the last row out.
    LastRow,
    /// `linear` leaves the last term of each sum out.
    LastTerm,
    /// `linear` takes the next channel's scale.
    NeighbourScale,
    /// `linear` takes codes for values.
    NoActivationScale,
    /// `linear` writes the column behind its last.
    NextColumn,
    /// `attend` stops one position early.
    PreviousPosition,
    /// `attend` reads the page behind the right one.
    NeighbourPage,
    /// `quantize` truncates.
    Truncation,
    /// `swiglu` truncates.
    FusedTruncation,
    /// `rms_norm` forgets eps.
    NoEps,
    /// `linear` reads activations as they were before they were quantized: weight-only arithmetic.
    Unquantized,
}

struct Faulty {
    fault: Fault,
    /// What codes were before they were rounded, by where these lie.
    real: HashMap<usize, Vec<f32>>,
}

/// A device with a fault.
fn device(fault: Fault) -> HostBackend<Faulty> {
    HostBackend::new(Faulty { fault, real: HashMap::new() })
}

impl Faulty {
    /// Runs an op that writes activations, and keeps what it would write if they were real.
    fn keep(&mut self, out: ActOut, mut op: impl FnMut(ActOut)) {
        if let ActOut { data: SliceMut::E4m3(codes), .. } = &out
            && self.fault == Fault::Unquantized
        {
            let mut values = vec![0.0; codes.len()];
            op(ActOut { data: SliceMut::F32(&mut values), scale: ScaleOut::None });
            self.real.insert(codes.as_ptr() as usize, values);
        }
        op(out);
    }
}

impl Kernels for Faulty {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo { backend: "cpu", ..reference::ReferenceKernels.describe() }
    }

    fn rms_norm(&mut self, x: &[f32], gamma: &[f32], eps: f32, out: ActOut) {
        let eps = if self.fault == Fault::NoEps { 1e-30 } else { eps };
        self.keep(out, |out| reference::rms_norm(x, gamma, eps, out));
    }

    fn quantize(&mut self, x: &[f32], k: usize, out: ActOut) {
        match out {
            ActOut { data: SliceMut::E4m3(codes), scale: ScaleOut::Static(inv) } if self.fault == Fault::Truncation => {
                truncate(codes, x, inv);
            }
            out => self.keep(out, |out| reference::quantize(x, k, out)),
        }
    }

    fn swiglu(&mut self, gate_up: Slice, f: usize, out: ActOut) {
        match out {
            ActOut { data: SliceMut::E4m3(codes), scale: ScaleOut::Static(inv) }
                if self.fault == Fault::FusedTruncation =>
            {
                let mut values = vec![0.0; codes.len()];
                reference::swiglu(gate_up, f, ActOut { data: SliceMut::F32(&mut values), scale: ScaleOut::None });
                truncate(codes, &values, inv);
            }
            out => self.keep(out, |out| reference::swiglu(gate_up, f, out)),
        }
    }

    fn linear(&mut self, x: ActIn, w: WeightIn, k: usize, mut out: ColsOut, add: bool) {
        let m = x.data.len() / k;
        match self.fault {
            Fault::LastRow if m > 0 => {
                let x = ActIn { data: x.data.range(0, (m - 1) * k), ..x };
                let out = ColsOut { data: out.data.first((m - 1) * out.stride), ..out };
                reference::linear(x, w, k, out, add);
            }
            Fault::LastTerm => {
                let mut values: Vec<f32> = w.rows(k).flat_map(Slice::to_vec).collect();
                values.chunks_mut(k).for_each(|row| row[k - 1] = 0.0);
                reference::linear(x, WeightIn { parts: &[Slice::F32(&values)], ..w }, k, out, add);
            }
            Fault::NeighbourScale => {
                let mut scales = w.scale.map(<[f32]>::to_vec);
                scales.iter_mut().for_each(|scales| scales.rotate_left(1));
                reference::linear(x, WeightIn { scale: scales.as_deref(), ..w }, k, out, add);
            }
            Fault::NoActivationScale => reference::linear(ActIn { scale: ScaleIn::None, ..x }, w, k, out, add),
            Fault::NextColumn => {
                let next = out.first + out.n;
                if m > 0 && next < out.stride {
                    out.data.range(next, 1).store(&[0.0], 1.0);
                }
                reference::linear(x, w, k, out, add);
            }
            Fault::Unquantized => match x.data {
                Slice::E4m3(codes) if self.real.contains_key(&(codes.as_ptr() as usize)) => {
                    let real = &self.real[&(codes.as_ptr() as usize)][..codes.len()];
                    reference::linear(ActIn { data: Slice::F32(real), scale: ScaleIn::None }, w, k, out, add);
                }
                _ => reference::linear(x, w, k, out, add),
            },
            _ => reference::linear(x, w, k, out, add),
        }
    }

    fn attend(&mut self, q: Slice, rows: RowsIn, heads: Heads, kv: KvIn, out: ActOut) {
        let previous = |position: &u32| position - u32::from(self.fault == Fault::PreviousPosition && *position > 0);
        let pages = (kv.k.len() / (heads.kv * kv.page_tokens * heads.dim)) as u32;
        let neighbour =
            |&page: &u32| if self.fault == Fault::NeighbourPage { page.wrapping_add(1) % pages } else { page };
        let position: Vec<u32> = rows.position.iter().map(previous).collect();
        let page_table: Vec<u32> = rows.page_table.iter().map(neighbour).collect();
        let rows = RowsIn { position: &position, page_table: &page_table, ..rows };
        self.keep(out, |out| reference::attend(q, rows, heads, kv, out));
    }
}

/// Codes of values, rounded towards zero.
fn truncate(codes: &mut [u8], values: &[f32], inv: f32) {
    for (code, x) in codes.iter_mut().zip(values) {
        *code = e4m3::encode(x * inv);
        *code -= u8::from(e4m3::decode(*code).abs() > (x * inv).abs());
    }
}

/// The ops that have a failing case.
fn blamed(fault: Fault) -> Vec<&'static str> {
    let failed = |case: &super::Case| {
        let outcome = run(case, &mut device(fault)).expect("a host backend runs every program");
        assert!(outcome.passed != (outcome.error > outcome.bound), "{outcome:?}");
        !outcome.passed
    };
    let ops: BTreeSet<_> = cases(DEFAULT_SEED).iter().filter(|case| failed(case)).map(|case| case.op).collect();
    ops.into_iter().collect()
}

#[test]
fn sound_kernels_pass() {
    assert!(blamed(Fault::Nothing).is_empty());
}

#[test]
fn a_dropped_row_is_found() {
    assert_eq!(blamed(Fault::LastRow), ["linear"]);
}

#[test]
fn a_dropped_term_is_found() {
    assert_eq!(blamed(Fault::LastTerm), ["linear"]);
}

#[test]
fn the_scale_of_another_channel_is_found() {
    assert_eq!(blamed(Fault::NeighbourScale), ["linear"]);
}

#[test]
fn a_forgotten_activation_scale_is_found() {
    assert_eq!(blamed(Fault::NoActivationScale), ["linear"]);
}

#[test]
fn a_stray_write_is_found() {
    assert_eq!(blamed(Fault::NextColumn), ["linear"]);
}

#[test]
fn a_position_too_few_is_found() {
    assert_eq!(blamed(Fault::PreviousPosition), ["attend"]);
}

#[test]
fn a_wrong_page_is_found() {
    assert_eq!(blamed(Fault::NeighbourPage), ["attend"]);
}

/// The fused ops of the faulty set still round to nearest, so that their own `Quantize` contradicts them.
#[test]
fn truncation_is_found() {
    assert_eq!(blamed(Fault::Truncation), ["attend", "quantize", "rms_norm", "swiglu"]);
}

#[test]
fn truncation_in_a_fused_op_is_found() {
    assert_eq!(blamed(Fault::FusedTruncation), ["swiglu"]);
}

#[test]
fn a_forgotten_eps_is_found() {
    assert_eq!(blamed(Fault::NoEps), ["rms_norm"]);
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let files = crate::files(None, true).unwrap();
    let ids = Model::text(&files.require("tokenizer.json").unwrap()).unwrap();
    Model::new(Checkpoint::open(files).unwrap(), ids).unwrap()
});

/// The outcomes of the model that fail.
fn model_failures(fault: Fault, profile: Profile) -> Vec<String> {
    let outcomes = MODEL.run(profile, DEFAULT_SEED, &mut device(fault)).unwrap();
    for outcome in &outcomes {
        println!("{fault:?} {}: {:.2e} of {:.2e}: {}", outcome.name, outcome.error, outcome.bound, outcome.detail);
    }
    outcomes.into_iter().filter(|outcome| !outcome.passed).map(|outcome| outcome.name).collect()
}

#[test]
fn a_sound_model_passes_in_both_profiles() {
    for profile in [Profile::Exact, Profile::Fast] {
        assert_eq!(model_failures(Fault::Nothing, profile), [""; 0]);
    }
}

/// A lost row, a wrong scale, a wrong page and unquantized activations show behind the first layer and in the logits.
#[test]
fn faults_are_found_end_to_end() {
    let shown = |fault, profile, names: [&str; 2]| {
        let failures = model_failures(fault, profile);
        assert!(names.iter().all(|name| failures.iter().any(|failure| failure == name)), "{fault:?}: {failures:?}");
    };
    for fault in [Fault::LastRow, Fault::NeighbourScale, Fault::NeighbourPage, Fault::Unquantized] {
        shown(fault, Profile::Exact, ["model::exact_layer_0", "model::exact_logits"]);
    }
    for fault in [Fault::LastRow, Fault::NeighbourScale, Fault::NeighbourPage] {
        shown(fault, Profile::Fast, ["model::fast_layer_0", "model::fast_logits"]);
    }
}

#[test]
fn bisection_names_the_first_line_that_is_wrong() {
    let ids = &MODEL.ids()[..21];
    for (fault, first) in [
        (Fault::Nothing, None),
        (Fault::LastRow, Some(("linear", "model.layers.0.self_attn.qkv_proj"))),
        (Fault::NeighbourScale, Some(("linear", "model.layers.0.self_attn.qkv_proj"))),
        (Fault::NeighbourPage, Some(("attend", "model.layers.0.self_attn"))),
        (Fault::FusedTruncation, Some(("swiglu", "model.layers.0.mlp.act_fn"))),
        (Fault::Unquantized, Some(("linear", "model.layers.0.self_attn.qkv_proj"))),
    ] {
        for profile in [Profile::Exact, Profile::Fast] {
            let lines = bisect(MODEL.checkpoint(), ids, profile, || Ok(Box::new(device(fault)))).unwrap();
            let wrong = lines.iter().find(|line| !line.passed());
            assert_eq!(wrong.map(|line| (line.op, line.label.as_str())), first, "{fault:?}, {profile:?}: {wrong:?}");
        }
    }
}
