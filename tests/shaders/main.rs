//! Every shader with every set of constants that the wgpu backend gives it, over all parity cases and the demo model:
//! valid WGSL, SPIR-V, MSL, HLSL and GLSL come of it, it declares what the backend binds, and its barriers stand in
//! uniform control flow. No device is needed.

mod uniformity;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use naga::back::pipeline_constants::process_overrides;
use naga::back::{glsl, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess};
use quaver::parity::{DEFAULT_SEED, Stage, cases};
use quaver_backends::wgpu::adapter::{MOST_BUFFERS, MOST_BUFFERS_WIDE};
use quaver_backends::wgpu::kernel::Kernel;
use quaver_backends::wgpu::tuning::Tuning;
use quaver_backends::wgpu::{e4m3_codes, kernels, peaks};
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::{KvCache, Profile};
use quaver_core::op::{Act, Buf, BufDesc, Cols, DType, Extent, Op, Program, Scale, StaticScale, Weight};
use quaver_core::reference::Reference;
use quaver_shaders::SHADERS;

/// A kernel of each shader, set of constants and choice of bindings, with the name of its tuning.
fn all_kernels() -> Vec<(&'static str, Kernel)> {
    let mut programs: Vec<(Program, Vec<BufDesc>)> = Vec::new();
    for case in cases(DEFAULT_SEED) {
        let problem = case.problem();
        programs.push((problem.program, problem.buffers.into_iter().map(|(desc, _)| desc).collect()));
    }
    let demo = Checkpoint::open(quaver::files(None, true).unwrap()).unwrap();
    for (profile, kv_cache) in
        [(Profile::Exact, KvCache::Auto), (Profile::Fast, KvCache::Auto), (Profile::Fast, KvCache::Fp8)]
    {
        let mut reference = Reference::open();
        let stage = Stage::new(&demo, &mut reference, profile, kv_cache, 512).unwrap();
        let sizes = [(1, 1), (16, 16), (512, 64)];
        programs.extend(sizes.map(|(rows, wanted)| (stage.llama.program(rows, wanted), stage.buffers().to_vec())));
    }
    let (mut kernels_of_all, mut seen) = (vec![("self-test", e4m3_codes())], HashSet::new());
    for (tuning_name, tuning) in Tuning::all() {
        kernels_of_all.extend(peaks::kernels(&tuning, 1024).map(|kernel| (tuning_name, kernel)));
        for (program, descs) in &programs {
            for kernel in kernels(program, descs, &tuning).unwrap() {
                let constants: Vec<_> = kernel.constants.iter().map(|(name, value)| (*name, value.to_bits())).collect();
                let bindings: Vec<_> = kernel.bindings.iter().map(|(at, bound)| (*at, bound.is_written())).collect();
                if seen.insert((kernel.shader, constants, bindings, kernel.params.len())) {
                    kernels_of_all.push((tuning_name, kernel));
                }
            }
        }
    }
    kernels_of_all
}

/// What a shader asks of an adapter beyond what all of WebGPU has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Needs {
    Nothing,
    Subgroups,
    /// Integers of 64 bits.
    Int64,
    /// Matrices of f16, and subgroups.
    Matrices,
}

impl Needs {
    fn of(source: &str) -> Needs {
        let needs = [("coop_mat", Needs::Matrices), ("subgroup_", Needs::Subgroups), ("u64", Needs::Int64)];
        needs.iter().find(|(word, _)| source.contains(word)).map_or(Needs::Nothing, |(_, needs)| *needs)
    }

    fn capabilities(self) -> Capabilities {
        let all = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        match self {
            Needs::Nothing => all,
            Needs::Subgroups => all | Capabilities::SUBGROUP,
            Needs::Int64 => all | Capabilities::SHADER_INT64,
            Needs::Matrices => {
                all | Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX
            }
        }
    }
}

/// Parses and validates WGSL.
fn validate(name: &str, source: &str) -> (Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(source)
        .unwrap_or_else(|error| panic!("{}", error.emit_to_string_with_path(source, name)));
    let mut validator = Validator::new(ValidationFlags::all(), Needs::of(source).capabilities());
    validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
    let info = validator.validate(&module).unwrap_or_else(|error| panic!("{name}: {}", error.emit_to_string(source)));
    (module, info)
}

/// The shaders, parsed and validated.
fn modules() -> BTreeMap<&'static str, (Module, ModuleInfo)> {
    SHADERS.iter().map(|shader| (shader.name, validate(shader.name, shader.source))).collect()
}

#[test]
fn every_shader_is_used_and_becomes_every_language() {
    let modules = modules();
    let kernels = all_kernels();
    let used: BTreeSet<_> = kernels.iter().map(|(_, kernel)| kernel.shader).collect();
    assert_eq!(used, modules.keys().copied().collect());
    for (tuning, kernel) in &kernels {
        let (module, info) = &modules[kernel.shader];
        let name = format!("{} ({tuning}, {:?})", kernel.shader, kernel.constants);
        emit(module, info, kernel).unwrap_or_else(|why| panic!("{name}: {why}"));
    }
    println!("{} kernels of {} shaders", kernels.len(), modules.len());
}

/// Emits a kernel in each language, as the oldest version that has what it needs. Matrices are in SPIR-V and MSL only,
/// integers of 64 bits not in GLSL: naga has no others yet, and adapters of the other languages do not offer them.
fn emit(module: &Module, info: &ModuleInfo, kernel: &Kernel) -> Result<(), String> {
    let (stage, entry) = (ShaderStage::Compute, kernel.shader.to_owned());
    let constants = kernel.constants.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let (module, info) = process_overrides(module, info, Some((stage, &entry)), &constants)
        .map_err(|error| format!("constants: {error}"))?;

    let needs = Needs::of(quaver_shaders::find(kernel.shader).expect("the shader is listed").source);
    let version = if needs == Needs::Nothing { (1, 0) } else { (1, 3) };
    let options = spv::Options { lang_version: version, ..spv::Options::default() };
    let pipeline = spv::PipelineOptions { shader_stage: stage, entry_point: entry.clone() };
    let words =
        spv::write_vec(&module, &info, &options, Some(&pipeline)).map_err(|error| format!("SPIR-V: {error}"))?;
    assert_eq!(words[0], 0x0723_0203, "SPIR-V begins with its magic number");

    let version = if needs == Needs::Nothing { (2, 0) } else { (2, 3) };
    let options = msl::Options { lang_version: version, ..msl::Options::default() };
    let pipeline = msl::PipelineOptions { entry_point: Some((stage, entry.clone())), ..Default::default() };
    let (text, _) = msl::write_string(&module, &info, &options, &pipeline).map_err(|error| format!("MSL: {error}"))?;
    assert!(text.contains("kernel void "), "{text}");

    if needs == Needs::Matrices {
        return Ok(());
    }
    let model = if needs == Needs::Nothing { hlsl::ShaderModel::V5_1 } else { hlsl::ShaderModel::V6_0 };
    let options = hlsl::Options { shader_model: model, ..hlsl::Options::default() };
    let pipeline = hlsl::PipelineOptions { entry_point: Some((stage, entry.clone())) };
    let mut text = String::new();
    let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
    writer.write(&module, &info, None).map_err(|error| format!("HLSL: {error}"))?;
    assert!(text.contains("[numthreads("), "{text}");

    if needs == Needs::Int64 {
        return Ok(());
    }
    let version = if needs == Needs::Nothing { glsl::Version::new_gles(310) } else { glsl::Version::Desktop(430) };
    let options = glsl::Options { version, ..glsl::Options::default() };
    let pipeline = glsl::PipelineOptions { shader_stage: stage, entry_point: entry, multiview: None };
    let mut text = String::new();
    glsl::Writer::new(&mut text, &module, &info, &options, &pipeline, Default::default())
        .and_then(|mut writer| writer.write())
        .map_err(|error| format!("GLSL: {error}"))?;
    assert!(text.contains("void main()"), "{text}");
    Ok(())
}

#[test]
fn every_shader_declares_what_the_backend_binds() {
    let modules = modules();
    for (tuning, kernel) in all_kernels() {
        let name = format!("{} ({tuning})", kernel.shader);
        assert_eq!(declared(&modules[kernel.shader].0), bound(&kernel), "{name}");
        let most = if kernel.shader == "linear_rope" { MOST_BUFFERS_WIDE } else { MOST_BUFFERS };
        assert!(kernel.bindings.len() <= most as usize, "{name}: adapters need not bind more than {most} buffers");
    }
}

/// How many kernels of a program take the next op in.
fn folded(program: &Program, descs: &[BufDesc], tuning: &Tuning) -> usize {
    let kernels = kernels(program, descs, tuning).unwrap();
    kernels.iter().filter(|kernel| ["linear_gated", "linear_rope"].contains(&kernel.shader)).count()
}

#[test]
fn what_can_be_folded_is_and_nothing_else() {
    let wide = Tuning { wide: true, ..Tuning::PORTABLE };
    let mut seen = 0;
    for case in cases(DEFAULT_SEED) {
        let problem = case.problem();
        let descs: Vec<_> = problem.buffers.into_iter().map(|(desc, _)| desc).collect();
        // The two ops stand in these cases twice: alone, and with a further reader of what lies between.
        let folds = case.name.contains("_with_") && problem.program.rows <= 2 && case.op == "linear";
        assert_eq!(folded(&problem.program, &descs, &wide), usize::from(folds), "{}", case.name);
        assert_eq!(folded(&problem.program, &descs, &Tuning::PORTABLE), 0, "{}", case.name);
        seen += usize::from(folds);
    }
    assert!(seen > 0);
}

#[test]
fn an_op_that_overwrites_what_the_product_reads_stays_apart() {
    let descs = [
        BufDesc::new("live", DType::U32, Extent::Fixed(1), 3),
        BufDesc::new("x", DType::E4m3, Extent::Rows(1), 96),
        BufDesc::new("w", DType::E4m3, Extent::Fixed(192), 96),
        BufDesc::new("scales", DType::F32, Extent::Fixed(192), 1),
        BufDesc::new("gate_up", DType::Bf16, Extent::Rows(1), 192),
        BufDesc::new("out", DType::E4m3, Extent::Rows(1), 96),
    ];
    let [live, x, codes, scale, gate_up, out] = [0, 1, 2, 3, 4, 5].map(Buf);
    let act = |codes| Act::Fp8 { codes, scale: Scale::Static(StaticScale::new(0.01)) };
    for (out, count) in [(out, 1), (x, 0)] {
        let mut program = Program::new(1, 0, live);
        let w = Weight::Fp8 { codes, scale };
        program.push("linear", Op::Linear { x: act(x), w, out: Cols { buf: gate_up, first: 0 }, add: false });
        program.push("swiglu", Op::SwiGlu { gate_up, out: act(out) });
        let wide = Tuning { wide: true, ..Tuning::PORTABLE };
        assert_eq!(folded(&program, &descs, &wide), count);
    }
}

/// A resource by its binding: the words of a uniform, or whether storage is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Uniform { words: u32 },
    Storage { is_written: bool },
}

/// What a module declares.
fn declared(module: &Module) -> BTreeMap<u32, Resource> {
    let resources = module.global_variables.iter().filter_map(|(_, variable)| {
        let binding = variable.binding.as_ref()?;
        assert_eq!(binding.group, 0);
        let size = module.types[variable.ty].inner.size(module.to_ctx());
        let resource = match variable.space {
            AddressSpace::Uniform => Resource::Uniform { words: size / 4 },
            AddressSpace::Storage { access } => Resource::Storage { is_written: access.contains(StorageAccess::STORE) },
            space => panic!("{:?} lies in {space:?}", variable.name),
        };
        Some((binding.binding, resource))
    });
    resources.collect()
}

/// What the backend binds.
fn bound(kernel: &Kernel) -> BTreeMap<u32, Resource> {
    let storage = kernel.bindings.iter().map(|(at, bound)| (*at, Resource::Storage { is_written: bound.is_written() }));
    let uniform = Resource::Uniform { words: kernel.params.len() as u32 };
    storage.chain((!kernel.params.is_empty()).then_some((0, uniform))).collect()
}

#[test]
fn every_barrier_stands_in_uniform_control_flow() {
    for (name, (module, _)) in modules() {
        let barriers = uniformity::barriers(&module, name);
        assert!(barriers.faulty.is_empty(), "{name}: {:?}", barriers.faulty);
        let shader = quaver_shaders::find(name).unwrap();
        let reduces = shader.pieces.contains(&"reduce");
        assert_eq!(reduces, barriers.all.contains("a barrier in share"), "{name}: {:?}", barriers.all);
    }
}

#[test]
fn a_row_that_differs_within_a_workgroup_is_found() {
    let shader = quaver_shaders::find("rms_norm").unwrap();
    let source = shader.source.replace("let row = workgroup.x;", "let row = workgroup.x + lid / 32u;");
    assert_ne!(source, shader.source);
    let (module, _) = validate("rms_norm", &source);
    let barriers = uniformity::barriers(&module, "rms_norm");
    assert!(barriers.faulty.contains("a barrier in share"), "{:?}", barriers.all);
}

#[test]
fn barriers_that_some_threads_miss_are_found() {
    // (body of an entry point, whether all threads come to its barriers)
    let bodies = [
        ("workgroupBarrier();", true),
        ("if (group.x < n[0]) { workgroupBarrier(); }", true),
        ("if (group.x >= n[0]) { return; } workgroupBarrier();", true),
        ("for (var i = 0u; i < n[group.x]; i++) { if (i == 7u) { continue; } workgroupBarrier(); }", true),
        ("for (var i = lid; i < 9u; i += 3u) { out[i] = 1u; } workgroupBarrier();", true),
        ("words[lid] = lid; workgroupBarrier(); if (words[3] == 2u) { workgroupBarrier(); }", true),
        ("same = group.x; if (same == 1u) { workgroupBarrier(); }", true),
        ("switch (group.x) { case 1u: { workgroupBarrier(); } default: {} }", true),
        ("if (early(group.x) > 1u) { workgroupBarrier(); }", true),
        ("if (lid < 8u) { workgroupBarrier(); }", false),
        ("if (lid < 8u) { return; } workgroupBarrier();", false),
        ("if (group.x > 1u) { if (lid < 8u) { return; } } workgroupBarrier();", false),
        ("for (var i = 0u; i < lid; i++) { workgroupBarrier(); }", false),
        ("for (var i = 0u; i < 9u; i++) { workgroupBarrier(); if (i == lid) { break; } }", false),
        ("for (var i = 0u; i < 9u; i++) { if (i == lid) { continue; } workgroupBarrier(); }", false),
        ("var x = 0u; if (lid == 1u) { x = 2u; } if (x == 2u) { workgroupBarrier(); }", false),
        ("var x = 0u; change(&x, lid); if (x == 2u) { workgroupBarrier(); }", false),
        ("var i = 0u; loop { if (i >= lid) { break; } i++; } if (i == 2u) { workgroupBarrier(); }", false),
        ("if (out[0] == 1u) { workgroupBarrier(); }", false),
        ("if (n[lid] == 1u) { workgroupBarrier(); }", false),
        ("if (words[lid] == 1u) { workgroupBarrier(); }", false),
        ("own = lid; waits();", false),
        ("if (early(lid) > 1u) { workgroupBarrier(); }", false),
        ("switch (lid) { case 1u: { workgroupBarrier(); } default: {} }", false),
        ("if (lid < 8u) { waits(); }", false),
        ("for (var i = group.x; i < 9u; i++) { out[i] = subgroupAdd(lid); }", true),
        ("for (var i = subgroup; i < 9u; i++) { out[i] = subgroupAdd(lid); }", true),
        ("for (var i = lid; i < 9u; i++) { out[i] = subgroupAdd(lid); }", false),
        ("if (subgroup == 1u) { workgroupBarrier(); }", false),
    ];
    for (body, is_sound) in bodies {
        let source = format!(
            "@group(0) @binding(1) var<storage, read> n: array<u32>;
             @group(0) @binding(2) var<storage, read_write> out: array<u32>;
             var<workgroup> words: array<u32, 64>;
             var<private> same: u32;
             var<private> own: u32;
             fn waits() {{ if (own == 0u) {{ workgroupBarrier(); }} }}
             fn early(x: u32) -> u32 {{ if (x == 3u) {{ return 1u; }} return 2u; }}
             fn change(x: ptr<function, u32>, y: u32) {{ *x = y; }}
             @compute @workgroup_size(64) fn test(
               @builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32,
               @builtin(subgroup_id) subgroup: u32,
             ) {{ {body} }}"
        );
        let (module, _) = validate(body, &source);
        let barriers = uniformity::barriers(&module, "test");
        assert_eq!(barriers.faulty.is_empty(), is_sound, "{body}: {:?}", barriers.faulty);
        assert!(!barriers.all.is_empty(), "{body}");
    }
}
