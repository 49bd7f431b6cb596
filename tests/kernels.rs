//! The CUDA kernels without a card: every one compiles for every target as it should, gives the same under every schedule
//! of the emulator, and the emulator finds races that are planted in them.
//!
//! What is `ignored` needs NVRTC and nvdisasm, in the folders that `QUAVER_NVRTC` and `PATH` name: `check.sh` installs
//! both, and runs it.

use std::process::Command;

use quaver::parity::{self, Case, DEFAULT_SEED};
use quaver_backends::cuda::compiler::{Assembled, Compiler, Entry};
use quaver_backends::cuda::{Cuda, KERNELS, SCHEDULES, Variant, kernels_for};
use quaver_core::bytes::Bytes;
use quaver_core::e4m3;
use quaver_core::op::{
    Act, Backend, BufDesc, Cols, DType, Extent, Heads, Kv, Op, Program, Rows, Scale, StaticScale, Weight,
};

/// What cards of each kind are compiled for, and PTX for those that are newer.
const ARCHITECTURES: [&str; 4] = ["sm_80", "sm_89", "sm_90a", "compute_89"];

#[test]
#[ignore = "needs NVRTC"]
fn every_kernel_compiles_for_every_target_without_spills() {
    println!("{:<12}{:<28}{:>10}{:>8}{:>8}{:>8}", "target", "kernel", "registers", "spills", "stack", "shared");
    for architecture in ARCHITECTURES {
        let compiler = Compiler::new(architecture);
        for kernel in kernels_for(architecture).unwrap() {
            let Assembled { image, entries, remarks } = compiler.compile(kernel).unwrap();
            assert!(!image.is_empty(), "{architecture} {}", kernel.name);
            if architecture.starts_with("compute") {
                continue;
            }
            assert!(!entries.is_empty(), "{architecture} {}: the assembler says nothing", kernel.name);
            assert!(remarks.is_empty(), "{architecture} {}: {}", kernel.name, remarks.join("; "));
            for Entry { name, registers, spills, stack, shared } in entries {
                println!("{architecture:<12}{name:<28}{registers:>10}{spills:>8}{stack:>8}{shared:>8}");
                assert_eq!((spills, stack), (0, 0), "{architecture} {name} keeps values in local memory");
            }
        }
    }
}

/// How often an instruction, any of whose names begins so, stands in the machine code of each entry point of a kernel file.
fn instructions(architecture: &str, kernel: &str, names: &[&str]) -> Vec<(String, usize)> {
    let kernel = KERNELS.iter().find(|own| own.name == kernel).unwrap();
    let built = Compiler::new(architecture).build(kernel).unwrap();
    let output = Command::new("nvdisasm").arg("-c").arg(built.path).output().expect("nvdisasm is on the PATH");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listing = String::from_utf8(output.stdout).unwrap();
    let sections: Vec<_> = listing.split(".section\t.text.").skip(1).collect();
    assert!(!sections.is_empty(), "{architecture} {}: nvdisasm finds no code", kernel.name);
    let count = |section: &str| {
        let (name, code) = section.split_once(',').unwrap();
        let words = code.split(|c: char| !c.is_ascii_alphanumeric());
        (name.to_owned(), words.filter(|word| names.contains(word)).count())
    };
    sections.into_iter().map(count).collect()
}

#[test]
#[ignore = "needs NVRTC and nvdisasm"]
fn products_are_the_tensor_cores_own_in_every_entry_point() {
    for (architecture, kernel, name) in [
        ("sm_80", "sm80_linear", "HMMA"),
        ("sm_80", "sm80_gemv", "HMMA"),
        ("sm_80", "sm80_attend", "HMMA"),
        ("sm_89", "sm89_linear_e4m3", "QMMA"),
        ("sm_89", "sm89_peak", "QMMA"),
        ("sm_90a", "sm90_linear_e4m3", "QGMMA"),
        ("sm_90a", "sm90_linear_bf16", "HGMMA"),
        ("sm_90a", "sm90_peak", "QGMMA"),
    ] {
        for (entry, count) in instructions(architecture, kernel, &[name]) {
            assert!(count > 0, "{architecture} {entry} has no {name}");
        }
    }
    // On Hopper mma.sync is emulated: a control that the names mean what they say.
    for (entry, count) in instructions("sm_90a", "sm89_linear_e4m3", &["QMMA", "QGMMA"]) {
        assert_eq!(count, 0, "{entry}");
    }
}

#[test]
#[ignore = "needs NVRTC and nvdisasm"]
fn no_kernel_touches_local_memory() {
    for architecture in ARCHITECTURES.into_iter().filter(|architecture| architecture.starts_with("sm")) {
        for kernel in kernels_for(architecture).unwrap() {
            for (entry, count) in instructions(architecture, kernel.name, &["LDL", "STL"]) {
                assert_eq!(count, 0, "{architecture} {entry}");
            }
        }
    }
}

fn case(name: &str) -> Case {
    parity::cases(DEFAULT_SEED).into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

/// What is wrong with a case on a device, where anything is.
fn fault(case: &Case, device: quaver::Result<Cuda>) -> Option<String> {
    match device.and_then(|mut device| parity::run(case, &mut device)) {
        Ok(outcome) => (!outcome.passed).then_some(outcome.detail),
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn kernels_are_right_under_every_schedule() {
    for (variant, name) in [
        (Variant::Sm80, "quantize::fp8_per_token_m17_k2048"),
        (Variant::Sm80, "quantize::all_256_codes_round_trip"),
        (Variant::Sm80, "quantize::every_tie_and_its_neighbours"),
        (Variant::Sm80, "quantize::saturation_infinity_nan"),
        (Variant::Sm80, "rms_norm::fp8_per_token_m17_d2048"),
        (Variant::Sm80, "linear::f32_x_f32_m17_n49_k256"),
        (Variant::Sm80, "linear::fp8_static_x_fp8_m17_n49_k256"),
        (Variant::Sm80, "sample::everything_w17"),
        (Variant::Sm80, "attend::decode_m3_ctx129_gqa4"),
        (Variant::Sm89, "linear::fp8_per_token_m130_n33_k256"),
        (Variant::Sm90, "linear::fp8_static_m17_n48_k2048"),
        (Variant::Sm90, "linear::fp8_per_token_m130_n33_k256"),
        (Variant::Sm80, "attend::f32_over_fp8_to_fp8_static_mixed_gqa4"),
        (Variant::Sm80, TILED),
        (Variant::Sm80, CODES),
        (Variant::Sm80, "abs_max::m17_k2048"),
    ] {
        for schedule in 0..SCHEDULES {
            let found = fault(&case(name), Cuda::emulated(variant, schedule));
            assert_eq!(found, None, "{name} on {variant:?} under schedule {schedule}");
        }
    }
}

/// What stands in a source, and what is put in its place.
type Changes = &'static [(&'static str, &'static str)];

/// Sums of tensor cores that are not added to f32 ones in time, with the bits that tensor cores keep: what is left out of a
/// kernel or put in its place.
const UNPROMOTED: [(&str, Variant, Changes); 2] = [
    ("sm89_linear_e4m3", Variant::Sm89, &[("if (s % 2 == 1 || s + 1 == stages) {", "if (s + 1 == stages) {")]),
    (
        "sm90_linear_e4m3",
        Variant::Sm90,
        &[
            ("ws + 2 * i, i > 0)", "ws + 2 * i, multiplied.stage > 1 || i > 0)"),
            ("sums[i] += part[i]", "if (taken.stage + 1 >= count) sums[i] += part[i]"),
        ],
    ),
];

#[test]
fn a_sum_that_is_not_promoted_is_caught() {
    let case = case("linear::all_positive_m17_n33_k8192");
    for (name, variant, changes) in UNPROMOTED {
        let mut source = KERNELS.iter().find(|kernel| kernel.name == name).unwrap().source.to_owned();
        assert_eq!(fault(&case, Cuda::emulated_with(&[(name, source.clone())], variant, 0)), None, "{name}");
        for (from, to) in changes {
            assert!(source.contains(from), "{name} has no {from:?} any more");
            source = source.replacen(from, to, 1);
        }
        let why = fault(&case, Cuda::emulated_with(&[(name, source)], variant, 0));
        assert!(why.as_ref().is_some_and(|why| why.contains("rms error")), "{name} without promotion: {why:?}");
    }
}

/// What a device makes of a Linear of `m` rows whose product with channel n is code n: all codes, decoded.
fn decoded(device: quaver::Result<Cuda>, m: usize, x: DType) -> quaver::Result<Vec<f32>> {
    const K: usize = 16;
    let mut device = device?;
    let live = device.alloc(&BufDesc::new("live", DType::U32, Extent::Fixed(1), 3))?;
    let data = device.alloc(&BufDesc::new("x", x, Extent::Rows(m), K))?;
    let out = device.alloc(&BufDesc::new("out", DType::F32, Extent::Rows(m), 256))?;
    let first_columns = (0..=255).flat_map(|code: u8| [[code].as_slice(), &[0; K - 1]].concat());
    let codes = Bytes::from(first_columns.collect::<Vec<u8>>());
    let codes = device.load(&BufDesc::new("w", DType::E4m3, Extent::Fixed(256), K), &[codes])?;
    let scale = Bytes::from(1f32.to_le_bytes().repeat(256));
    let scale = device.load(&BufDesc::new("scale", DType::F32, Extent::Fixed(256), 1), &[scale])?;
    let one = 1f32.to_le_bytes();
    let (one, act) = match x {
        DType::E4m3 => (&[0x38][..], Act::Fp8 { codes: data, scale: Scale::Static(StaticScale::new(1.0)) }),
        DType::Bf16 => (&one[2..], Act::Real(data)),
        _ => (&one[..], Act::Real(data)),
    };
    (0..m).try_for_each(|row| device.write(data, row * K * x.size(), one))?;
    device.write(live, 0, bytemuck::cast_slice(&[m as u32, 0, 0]))?;
    let mut program = Program::new(m, 0, live);
    let (w, out_columns) = (Weight::Fp8 { codes, scale }, Cols { buf: out, first: 0 });
    program.push("linear", Op::Linear { x: act, w, out: out_columns, add: false });
    let plan = device.record(&program)?;
    device.run(plan)?;
    let mut bytes = vec![0; m * 256 * 4];
    device.read(out, 0, &mut bytes)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

/// Channels whose code was not decoded to what it means.
fn wrong_codes(values: &[f32]) -> Vec<u8> {
    let is_wrong = |(code, value): (u8, &f32)| {
        let want = e4m3::decode(code);
        (*value != want && !(value.is_nan() && want.is_nan())).then_some(code)
    };
    values.chunks(256).flat_map(|row| (0..=255).zip(row).filter_map(is_wrong)).collect()
}

#[test]
fn every_kernel_that_decodes_knows_all_256_codes_with_and_without_instructions_for_them() {
    for variant in Variant::ALL {
        for (m, x) in [1, 17].into_iter().flat_map(|m| [DType::F32, DType::Bf16, DType::E4m3].map(|x| (m, x))) {
            let values = decoded(Cuda::emulated(variant, 0), m, x).unwrap();
            assert_eq!(wrong_codes(&values), [0u8; 0], "{m} rows of {x:?} on {variant:?}");
        }
    }
    // The code that does it by hand is that of Ampere alone: without its NaN, that kernel is wrong, and no other.
    let source = KERNELS.iter().find(|kernel| kernel.name == "sm80_gemv").unwrap().source;
    let nan = "if ((pair & 0x7fu) == 0x7fu) y |= 0x7e00u;";
    assert!(source.contains(nan), "codes are decoded in another way");
    let changed = [("sm80_gemv", source.replacen(nan, "", 1))];
    for (variant, wrong) in [(Variant::Sm80, vec![0x7f, 0xff]), (Variant::Sm90, vec![])] {
        let values = decoded(Cuda::emulated_with(&changed, variant, 0), 1, DType::E4m3).unwrap();
        assert_eq!(wrong_codes(&values), wrong, "{variant:?}");
    }
}

/// What a prompt of 150 tokens attends to in bf16, in runs of so many rows, as words of f32.
fn attended(mut device: Cuda, runs: &[u32]) -> quaver::Result<Vec<u32>> {
    const M: usize = 150;
    const HEADS: Heads = Heads { q: 4, kv: 1, dim: 64 };
    // Of either sign, from a quarter to two.
    let random = |salt: u32, count: usize| {
        let bits = |i: u32| (i ^ salt << 20).wrapping_mul(0x9e37_79b1) >> 16;
        (0..count as u32).map(|i| (bits(i) & 0x807f | (0x7d + bits(i) % 3) << 7) as u16).collect::<Vec<_>>()
    };
    let mut input = |name, dtype, rows, cols, bytes: &[u8]| {
        let buf = device.alloc(&BufDesc::new(name, dtype, rows, cols))?;
        device.write(buf, 0, bytes).map(|()| buf)
    };
    let mut first = 0;
    let spans = runs.iter().flat_map(|&rows| {
        first += rows;
        [first - rows, rows, 0, first - rows]
    });
    let (words, rows, tokens) = (DType::U32, Extent::Rows(M), Extent::Fixed(160));
    let (positions, pages): (Vec<u32>, Vec<u32>) = ((0..M as u32).collect(), (0..10).rev().collect());
    let live = input("live", words, Extent::Fixed(1), 3, bytemuck::cast_slice(&[M as u32, 0, runs.len() as u32]))?;
    let q = input("q", DType::Bf16, rows, 256, bytemuck::cast_slice(&random(1, M * 256)))?;
    let k = input("k", DType::Bf16, tokens, 64, bytemuck::cast_slice(&random(2, 160 * 64)))?;
    let v = input("v", DType::Bf16, tokens, 64, bytemuck::cast_slice(&random(3, 160 * 64)))?;
    let who = Rows {
        seq: input("seq", words, rows, 1, &[0; 4 * M])?,
        position: input("position", words, rows, 1, bytemuck::cast_slice(&positions))?,
        page_table: input("page_table", words, Extent::Fixed(4), 10, bytemuck::cast_slice(&pages))?,
        spans: input("spans", words, Extent::Fixed(4), 4, bytemuck::cast_slice(&spans.collect::<Vec<_>>()))?,
    };
    let out = input("out", DType::F32, rows, 256, &[])?;
    let kv = Kv { k, v, page_tokens: 16, scales: None };
    let mut program = Program::new(M, 0, live);
    program.push("attend", Op::Attend { q, rows: who, heads: HEADS, kv, out: Act::Real(out) });
    let plan = device.record(&program)?;
    device.run(plan)?;
    let mut bytes = vec![0; M * 256 * 4];
    device.read(out, 0, &mut bytes)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

#[test]
fn what_a_row_attends_to_does_not_depend_on_how_a_prompt_was_cut_where_that_is_asked_for() {
    let run = |is_asked_for: bool, runs: &[u32]| {
        let device = Cuda::emulated(Variant::Sm80, 0).unwrap();
        attended(if is_asked_for { device.deterministic() } else { device }, runs).unwrap()
    };
    for is_asked_for in [true, false] {
        let is_same = run(is_asked_for, &[150]) == run(is_asked_for, &[37, 111, 2]);
        assert_eq!(is_same, is_asked_for);
    }
}

/// A kernel, a case that runs it, and what is left out of it or put in its place.
const PLANTED: [(&str, Variant, &str, &str, &str); 25] = [
    ("quantize", Variant::Sm80, "quantize::fp8_per_token_m17_k2048", "= x;\n  __syncthreads();", "= x;"),
    ("linear", Variant::Sm80, "linear::f32_x_f32_m17_n49_k256", "at);\n    __syncthreads();", "at);"),
    ("linear", Variant::Sm80, "linear::f32_x_f32_m17_n49_k256", "}\n    __syncthreads();", "}"),
    ("sm89_linear_e4m3", Variant::Sm89, SHORT, "copy_wait<STAGES - 2>();", ""),
    ("sm89_linear_e4m3", Variant::Sm89, SHORT, "__syncthreads();\n    fetch", "fetch"),
    ("sm90_linear_e4m3", Variant::Sm90, LONG, "barrier_wait(&full[multiplied.at], multiplied.parity);", ""),
    ("sm90_linear_e4m3", Variant::Sm90, LONG, "barrier_wait(&empty[slot.at], slot.parity ^ 1);", ""),
    ("sm90_linear_e4m3", Variant::Sm90, LONG, "slot.parity ^ 1", "slot.parity"),
    (
        "sm90_linear_e4m3",
        Variant::Sm90,
        LONG,
        "barrier_arrive_expecting(&full[slot.at], X + W)",
        "barrier_arrive_expecting(&full[slot.at], X)",
    ),
    ("sm90_linear_e4m3", Variant::Sm90, LONG, "wgmma_wait<1>();", ""),
    ("sm90_linear_e4m3", Variant::Sm90, LONG, "wgmma_wait<0>();", ""),
    // The block of a tile that adds up the parts comes before the last.
    ("sm90_linear_e4m3", Variant::Sm90, SPLIT, "*before + 1 < count", "*before + 2 != count"),
    ("attend", Variant::Sm80, "attend::decode_m3_ctx129_gqa4", "__syncwarp();", ""),
    ("sm80_attend", Variant::Sm80, TILED, "copy_wait<0>();", ""),
    ("sm80_attend", Variant::Sm80, TILED, "copy_wait<0>();\n    __syncthreads();", "copy_wait<0>();"),
    ("sm80_attend", Variant::Sm80, CODES, "}\n      __syncthreads();", "}"),
    ("sm80_attend", Variant::Sm80, TILED, "if (is_shared) __syncthreads();", ""),
    ("sm80_attend", Variant::Sm80, TILED, "if (!is_shared) return;\n  __syncthreads();", "if (!is_shared) return;"),
    ("sm80_gemv", Variant::Sm80, FEW, "__syncthreads();\n  if (row >= ROWS)", "if (row >= ROWS)"),
    // Lanes without a share leave before the warp's sum.
    (
        "linear_gemv",
        Variant::Sm80,
        "linear::f32_x_fp8_add_m5_n7_k37",
        "float sums[ROWS] = {};",
        "if (lane * SIZE >= k) return;\n  float sums[ROWS] = {};",
    ),
    ("sample", Variant::Sm80, SAMPLED, "[i] = 0;\n      __syncthreads();", "[i] = 0;"),
    ("sample", Variant::Sm80, SAMPLED, "weight(own));\n      });\n      __syncthreads();", "weight(own));\n      });"),
    ("sample", Variant::Sm80, SAMPLED, "weights[i];\n      }\n      __syncthreads();", "weights[i];\n      }"),
    ("sample", Variant::Sm80, SAMPLED, "x;\n  __syncthreads();\n  all = 0;", "x;\n  all = 0;"),
    ("sample", Variant::Sm80, SAMPLED, "= own;\n    });\n    __syncthreads();", "= own;\n    });"),
];
const FEW: &str = "linear::fp8_static_x_fp8_add_m5_n7_k37";
const TILED: &str = "attend::bf16_over_bf16_prefill_70_rows_behind_100";
const CODES: &str = "attend::bf16_over_fp8_prefill_70_rows_behind_100";
const SAMPLED: &str = "sample::everything_w17";
const SHORT: &str = "linear::fp8_static_x_fp8_m17_n49_k256";
const LONG: &str = "linear::all_positive_m70_n33_k8192";
const SPLIT: &str = "linear::all_positive_m17_n33_k8192";

#[test]
fn planted_races_are_caught() {
    for (name, variant, run, from, to) in PLANTED {
        let source = KERNELS.iter().find(|kernel| kernel.name == name).unwrap().source;
        assert!(source.contains(from), "{name} has no {from:?} any more");
        // `attend` ends in another kernel.
        let mut kernels = vec![(name, source.replacen(from, to, 1))];
        kernels
            .extend(KERNELS.iter().filter(|own| own.name == "attend_merge").map(|own| (own.name, own.source.into())));
        let case = case(run);
        let caught = (0..SCHEDULES).find_map(|schedule| {
            fault(&case, Cuda::emulated_with(&kernels, variant, schedule)).map(|why| (schedule, why))
        });
        let (schedule, why) = caught.unwrap_or_else(|| panic!("{name} without {from:?} passes every schedule"));
        println!("{name} without {from:?}: schedule {schedule}: {why}");
    }
}

#[test]
fn a_block_of_more_shared_memory_than_cards_have_is_caught() {
    let case = case("linear::fp8_per_token_m130_n33_k256");
    let source = KERNELS.iter().find(|kernel| kernel.name == "sm89_linear_e4m3").unwrap().source;
    // A launch asks for 80 KiB; 99 are there.
    for (kib, is_caught) in [(19, false), (20, true)] {
        let more = format!("LAUNCH_SHARED(shared); SHARED(u8, more, {kib} << 10); (void)more;");
        assert!(source.contains("LAUNCH_SHARED(shared);"), "the kernel has no shared memory any more");
        let changed = source.replacen("LAUNCH_SHARED(shared);", &more, 1);
        let why = fault(&case, Cuda::emulated_with(&[("sm89_linear_e4m3", changed)], Variant::Sm89, 0));
        let said = why.as_ref().is_some_and(|why| why.contains("102400 bytes of shared memory; at most 101376"));
        assert_eq!((said, why.is_some()), (is_caught, is_caught), "{kib} KiB more: {why:?}");
    }
}

#[test]
fn a_kernel_that_does_not_wait_for_the_one_before_is_caught() {
    let case = case("quantize::fp8_per_token_m17_k2048");
    let source = KERNELS.iter().find(|kernel| kernel.name == "quantize").unwrap().source;
    for (to, is_caught) in [("dependency_wait();", false), ("if (blockIdx.x > 0) dependency_wait();", true), ("", true)]
    {
        let (ptx, own) = source.split_once("#line 1 \"quantize.cu\"").unwrap();
        assert!(own.contains("dependency_wait();"), "quantize does not wait any more");
        let changed = format!("{ptx}{}", own.replacen("dependency_wait();", to, 1));
        let why = fault(&case, Cuda::emulated_with(&[("quantize", changed)], Variant::Sm80, 0));
        let said = why.as_ref().is_some_and(|why| why.contains("ends without a dependency_wait"));
        assert_eq!((said, why.is_some()), (is_caught, is_caught), "{to:?}: {why:?}");
    }
}
