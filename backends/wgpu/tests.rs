//! What the parity suite cannot see: a device that is lost, and what only large models come to (tables in several parts,
//! dispatches in several runs, steps in several submissions), brought about with small limits.

use quaver_core::bytes::Bytes;
use quaver_core::op::{
    Act, Backend, Buf, BufDesc, Cols, DType, Extent, Heads, Kv, Op, Program, Rows, Scale, StaticScale, Weight,
};
use quaver_core::reference::Reference;

use super::adapter::tests::some;
use super::tuning::{Tuning, Variant, variants};
use super::{Adapter, Wgpu, self_test};
use crate::{Kind, Spec, turn};

/// Does something with every adapter, one thread at a time where it must be so.
fn each_adapter(mut test: impl FnMut(&'static Adapter)) {
    for (device, adapter) in some().iter().enumerate() {
        let _turn = turn(&Spec { kind: Kind::Wgpu, device, ..Spec::default() });
        test(adapter);
    }
}

/// A problem in the making: buffers, and what they hold at first.
#[derive(Default)]
struct Problem {
    buffers: Vec<(BufDesc, Vec<u8>, bool)>,
}

impl Problem {
    fn push(&mut self, name: &str, dtype: DType, rows: Extent, cols: usize, bytes: Vec<u8>, is_constant: bool) -> Buf {
        self.buffers.push((BufDesc::new(name, dtype, rows, cols), bytes, is_constant));
        Buf(self.buffers.len() as u32 - 1)
    }

    fn input(&mut self, name: &str, dtype: DType, rows: Extent, cols: usize, bytes: Vec<u8>) -> Buf {
        self.push(name, dtype, rows, cols, bytes, false)
    }

    fn words(&mut self, name: &str, rows: Extent, cols: usize, words: &[u32]) -> Buf {
        self.input(name, DType::U32, rows, cols, bytemuck::cast_slice(words).to_vec())
    }

    fn output(&mut self, rows: Extent, cols: usize) -> Buf {
        self.input("out", DType::F32, rows, cols, vec![0; rows.capacity() * cols * 4])
    }

    /// What a backend without buffers makes of a program.
    fn run(&self, backend: &mut dyn Backend, program: &Program, out: Buf) -> Vec<f32> {
        for (desc, bytes, is_constant) in &self.buffers {
            if *is_constant {
                backend.load(desc, &[Bytes::from(bytes.clone())]).unwrap();
            } else {
                let buf = backend.alloc(desc).unwrap();
                backend.write(buf, 0, bytes).unwrap();
            }
        }
        let plan = backend.record(program).unwrap();
        backend.run(plan).unwrap();
        let mut values = vec![0f32; self.buffers[out.0 as usize].0.bytes() / 4];
        backend.read(out, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }
}

/// Numbers between -1 and 1 that repeat after a long while.
fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Codes of numbers between -1 and 1, 448 the largest.
fn codes(values: &[f32]) -> Vec<u8> {
    values.iter().map(|x| quaver_core::e4m3::encode(x * 448.0)).collect()
}

/// `Embed` of a table of 1200 rows.
fn embed() -> (Problem, Program, Buf) {
    let (mut p, m, vocab, d) = (Problem::default(), 11, 1200, 24);
    let live = p.words("live", Extent::Fixed(1), 3, &[m as u32, 0, 0]);
    let ids: Vec<u32> = (0..m as u32).map(|i| i * 331 % vocab as u32).collect();
    let ids = p.words("ids", Extent::Rows(m), 1, &ids);
    let sampled = p.words("sampled", Extent::Wanted(1), 44, &[0; 44]);
    let table = p.push("table", DType::F32, Extent::Fixed(vocab), d, bytes(&noise(vocab * d, 1)), true);
    let out = p.output(Extent::Rows(m), d);
    let mut program = Program::new(m, 0, live);
    program.push("embed", Op::Embed { ids, sampled, table, out });
    (p, program, out)
}

/// `Linear` over codes of so many rows and channels.
fn linear(m: usize, n: usize) -> (Problem, Program, Buf) {
    let (mut p, k) = (Problem::default(), 768);
    let live = p.words("live", Extent::Fixed(1), 3, &[m as u32, 0, 0]);
    let x = p.input("x", DType::E4m3, Extent::Rows(m), k, codes(&noise(m * k, 2)));
    let w = p.push("w", DType::E4m3, Extent::Fixed(n), k, codes(&noise(n * k, 3)), true);
    let scales: Vec<f32> = (0..n).map(|i| 1e-3 * (1.0 + i as f32)).collect();
    let scale = p.push("scales", DType::F32, Extent::Fixed(n), 1, bytes(&scales), true);
    let out = p.output(Extent::Rows(m), n);
    let x = Act::Fp8 { codes: x, scale: Scale::Static(StaticScale::new(0.01)) };
    let mut program = Program::new(m, 0, live);
    let w = Weight::Fp8 { codes: w, scale };
    program.push("linear", Op::Linear { x, w, out: Cols { buf: out, first: 0 }, add: false });
    (p, program, out)
}

/// `Linear` of two rows, and `SwiGlu` of what it gives.
fn gated() -> (Problem, Program, Buf) {
    let (mut p, mut program, gate_up) = linear(2, 160);
    let out = p.output(Extent::Rows(2), 80);
    program.push("swiglu", Op::SwiGlu { gate_up, out: Act::Real(out) });
    (p, program, out)
}

/// `Attend` of a prompt of 70 rows.
fn attend() -> (Problem, Program, Buf) {
    let (mut p, m, pages, page_tokens) = (Problem::default(), 70, 5, 16);
    let heads = Heads { q: 4, kv: 2, dim: 8 };
    let live = p.words("live", Extent::Fixed(1), 3, &[m as u32, 0, 1]);
    let positions: Vec<u32> = (0..m as u32).collect();
    let rows = Rows {
        seq: p.words("seq", Extent::Rows(m), 1, &vec![0; m]),
        position: p.words("position", Extent::Rows(m), 1, &positions),
        page_table: p.words("page_table", Extent::Fixed(1), pages, &[3, 0, 4, 1, 2]),
        spans: p.words("spans", Extent::Fixed(1), 4, &[0, m as u32, 0, 0]),
    };
    let q = p.input("q", DType::F32, Extent::Rows(m), heads.q * heads.dim, bytes(&noise(m * heads.q * heads.dim, 4)));
    let slots = pages * heads.kv * page_tokens;
    let [k, v] = [("k", 5), ("v", 6)].map(|(name, seed)| {
        p.input(name, DType::F32, Extent::Fixed(slots), heads.dim, bytes(&noise(slots * heads.dim, seed)))
    });
    let out = p.output(Extent::Rows(m), heads.q * heads.dim);
    let kv = Kv { k, v, page_tokens, scales: None };
    let mut program = Program::new(m, 0, live);
    program.push("attend", Op::Attend { q, rows, heads, kv, out: Act::Real(out) });
    (p, program, out)
}

/// Kernels and submissions of the one plan, and what comes out.
fn cut(adapter: &Adapter, variant: &Variant, tuning: Tuning, case: &(Problem, Program, Buf)) -> ([usize; 2], Vec<f32>) {
    let mut wgpu = Wgpu::with(adapter, variant.features, tuning).unwrap();
    let values = case.0.run(&mut wgpu, &case.1, case.2);
    let dispatches = &wgpu.plans[0].dispatches;
    ([dispatches.len(), wgpu.submissions(dispatches).count()], values)
}

#[test]
fn tables_in_parts_and_dispatches_in_runs_give_the_same() {
    // 64 KiB hold the rows of a step, but no table. With each case, what is bound at most, and how many kernels more there
    // are at least.
    let few = 64 << 10;
    let cases = [
        ("embed", embed(), few, 2),
        ("linear", linear(70, 150), few, 6),
        ("linear", linear(2, 150), few, 2),
        ("linear and swiglu", gated(), few, 2),
        ("linear and swiglu in runs", gated(), u64::MAX, 2),
        ("attend", attend(), few, 4),
    ];
    each_adapter(|adapter| {
        for variant in variants(adapter).iter().filter(|variant| variant.name != "portable-exact") {
            for (name, case, most_bound, least) in &cases {
                let want = case.0.run(&mut Reference::open(), &case.1, case.2);
                let small = Tuning { most_ops: 1e5, most_bound: *most_bound, ..variant.tuning.clone() };
                let ([kernels, submissions], got) = cut(adapter, variant, small, case);
                let ([whole, one], whole_got) = cut(adapter, variant, variant.tuning.clone(), case);
                let what = format!("{name}, {}: {kernels} kernels in {submissions} submissions", variant.name);
                assert!(kernels >= whole + least && one == 1, "{what}, {whole} in {one}");
                assert!(*name == "embed" || submissions > 1, "{what}");
                assert_eq!(got, whole_got, "{what}");
                let size = want.iter().fold(0f32, |size, x| size.max(x.abs()));
                let error = got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0f32, f32::max);
                assert!(error <= 1e-5 * size, "{what}: off by {error:e} of {size:e}");
            }
        }
    });
}

#[test]
fn a_lost_device_fails_every_call_and_names_itself() {
    each_adapter(|adapter| {
        let mut wgpu = Wgpu::open(adapter, None).unwrap();
        let (problem, program, out) = embed();
        problem.run(&mut wgpu, &program, out);
        let plan = wgpu.record(&program).unwrap();
        wgpu.gpu.device.destroy();
        for _ in 0..2 {
            let errors = [
                wgpu.run(plan).unwrap_err(),
                wgpu.write(Buf(1), 0, &[0; 4]).unwrap_err(),
                wgpu.read(out, 0, &mut [0; 4]).unwrap_err(),
                wgpu.alloc(&problem.buffers[0].0).unwrap_err(),
                wgpu.record(&program).unwrap_err(),
                wgpu.gpu.wait().unwrap_err(),
            ];
            for error in errors.map(|error| error.to_string()) {
                assert!(error.contains(&wgpu.gpu.info.name) && error.contains("the device was lost"), "{error}");
            }
        }
    });
}

#[test]
fn every_variant_multiplies_exactly_and_a_wrong_sum_is_found() {
    each_adapter(|adapter| {
        for Variant { name, features, tuning } in variants(adapter) {
            let mut wgpu = Wgpu::with(adapter, features, tuning).unwrap();
            assert!(wgpu.multiplies().unwrap(), "{name}");
            let mut sums = wgpu.sums().unwrap();
            assert!(self_test::are_exact(&sums), "{name}");
            sums[ROW_AND_COLUMN] += 1.0;
            assert!(!self_test::are_exact(&sums), "{name}");
        }
    });
}

/// Any sum.
const ROW_AND_COLUMN: usize = 64 * 63 + 17;

#[test]
fn a_buffer_that_is_too_large_names_the_flag_that_makes_it_smaller() {
    let adapter = &some()[0];
    let variant = &variants(adapter)[0];
    let small = Tuning { most_bound: 4 << 10, ..variant.tuning.clone() };
    let mut p = Problem::default();
    let vocab = 512;
    let live = p.words("live", Extent::Fixed(1), 3, &[1, 1, 0]);
    let logits = p.input("logits", DType::F32, Extent::Wanted(1), vocab, bytes(&noise(vocab, 7)));
    let params = p.words("params", Extent::Wanted(1), 16, &[0; 16]);
    let mask = p.words("mask", Extent::Wanted(1), vocab / 32, &vec![0; vocab / 32]);
    let history = p.words("history", Extent::Fixed(9), vocab, &vec![0; 9 * vocab]);
    let out = p.words("out", Extent::Wanted(1), 44, &[0; 44]);
    let mut wgpu = Wgpu::with(adapter, variant.features, small).unwrap();
    for (desc, ..) in &p.buffers {
        wgpu.alloc(desc).unwrap();
    }
    let mut program = Program::new(1, 1, live);
    program.push("sample", Op::Sample { logits, params, mask, history, out });
    let error = wgpu.record(&program).unwrap_err().to_string();
    assert!(error.contains("history takes 18432 bytes") && error.ends_with("lower --max-num-seqs"), "{error}");
}
