//! Every form of checkpoint that is accepted computes what it says: forms of one model agree to the last bit, mixtures
//! of formats agree with an emulation that knows nothing of programs, and no damage makes the loader panic.

mod support;

use proptest::prelude::*;
use quaver_backends::{Kind, Spec};
use quaver_core::checkpoint::{Checkpoint, Files, InputScale, LinearWeight};
use quaver_core::e4m3;
use quaver_core::engine::{Engine, EngineOptions};
use quaver_core::host::slices::dynamic_scale;
use quaver_core::llama::{KvCache, Profile};
use quaver_core::op::{Act, Op, Scale, Weight};
use quaver_core::sampler::SamplingParams;
use safetensors::Dtype;
use serde_json::{Value, json};
use support::checkpoints;
use support::goldens::relative_rms;
use support::runner::Runner;
use support::tiny::{Inputs, LINEARS, Opened, Random, Tensor, Tiny, VOCAB, group, quantization, survive};

/// Relative rms of a row of logits between programs that sum in different orders.
const SAME: f64 = 1e-5;
/// The same of all rows, where some hold a value so near to an FP8 tie that the programs round it apart.
const TIED: f64 = 1e-2;
/// What another model's logits differ by at least.
const OTHER: f64 = 1.5e-2;

/// The logits of every row of a prompt.
fn logits(kind: Kind, checkpoint: &Checkpoint, kv_cache: KvCache) -> Vec<f32> {
    let ids = ids();
    Runner::with_cache(checkpoint, &kind.into(), Profile::Exact, kv_cache, ids.len()).logits(&ids, ids.len())
}

fn reference(model: &Tiny) -> Vec<f32> {
    logits(Kind::Reference, &model.open().checkpoint, KvCache::Auto)
}

fn ids() -> Vec<u32> {
    Random(11).ids(20)
}

/// A greedy continuation by the engine.
fn text(checkpoint: &Checkpoint) -> Vec<u32> {
    let spec = Spec { kind: Kind::Cpu, threads: Some(2), ..Spec::default() };
    let options = EngineOptions { profile: Profile::Exact, ..EngineOptions::default() };
    let mut engine = Engine::new(checkpoint, quaver_backends::open(&spec).unwrap(), &options).unwrap();
    let params = SamplingParams { temperature: 0.0, max_tokens: 24, ..SamplingParams::default() };
    engine.submit(&ids(), params).unwrap();
    let mut tokens = Vec::new();
    while !engine.is_idle() {
        for (_, output) in engine.step().unwrap() {
            if let quaver_core::engine::Output::Token(token) = output {
                tokens.push(token.id);
            }
        }
    }
    tokens
}

/// Both forms give the same bits and the same text.
fn assert_same(a: &Opened, b: &Opened) {
    for kind in [Kind::Reference, Kind::Cpu] {
        let [a, b] = [a, b].map(|form| logits(kind, &form.checkpoint, KvCache::Auto));
        assert!(a.iter().all(|x| x.is_finite()) && a == b, "{kind}: {:.1e}", relative_rms(&a, &b));
    }
    let text_a = text(&a.checkpoint);
    assert_eq!((text_a.len(), &text_a), (24, &text(&b.checkpoint)));
}

/// The reference agrees with the emulation, and the cpu with the reference.
fn assert_emulated(opened: &Opened, kv_cache: KvCache) -> Vec<f32> {
    let want = emulation::logits(&opened.checkpoint, &ids(), kv_cache);
    let [reference, cpu] = [Kind::Reference, Kind::Cpu].map(|kind| logits(kind, &opened.checkpoint, kv_cache));
    for (name, got) in [("reference", &reference), ("cpu", &cpu)] {
        let rows = got.chunks_exact(VOCAB).zip(want.chunks_exact(VOCAB));
        let errors: Vec<f64> = rows.map(|(got, want)| relative_rms(got, want)).collect();
        let tied = errors.iter().filter(|error| **error > SAME).count();
        let error = relative_rms(got, &want);
        assert!(tied <= ids().len() / 4 && error <= TIED, "{name} against the emulation: {error:.1e}, {errors:?}");
    }
    reference
}

fn assert_other(a: &[f32], b: &[f32]) {
    let error = relative_rms(a, b);
    assert!(error >= OTHER, "two models are one: {error:.1e}");
}

/// Layer 0's ops in words: `linear q_proj+k_proj fp8 <- static @0`.
fn ops(checkpoint: &Checkpoint) -> Vec<String> {
    let runner = Runner::new(checkpoint, &Kind::Reference.into(), Profile::Exact, 16);
    let lines = runner.llama.layer_program(0, 16).lines;
    lines.iter().map(|line| word(&line.label, &line.op)).collect()
}

fn word(label: &str, op: &Op) -> String {
    let act = |act: &Act| match act {
        Act::Real(_) => "real",
        Act::Fp8 { scale: Scale::Static(_), .. } => "static",
        Act::Fp8 { scale: Scale::PerToken(_), .. } => "per-token",
    };
    match op {
        Op::Linear { x, w, out, .. } => {
            let weight = if matches!(w, Weight::Real(_)) { "real" } else { "fp8" };
            let leaf = label.rsplit('.').next().unwrap();
            format!("{leaf} {weight} <- {} @{}", act(x), out.first)
        }
        Op::RmsNorm { out, .. } | Op::Quantize { out, .. } | Op::Attend { out, .. } | Op::SwiGlu { out, .. } => {
            format!("{} -> {}", op.name(), act(out))
        }
        _ => op.name().to_owned(),
    }
}

/// The ops of a layer of which only those up to `rope_append` are in question.
fn attention_ops(checkpoint: &Checkpoint) -> Vec<String> {
    ops(checkpoint).into_iter().take_while(|op| op != "rope_append").collect()
}

// ---- one model in several forms

#[test]
fn shards_with_an_index_are_the_model() {
    let model = Tiny::fp8(Inputs::Static);
    let (mut shards, mut map) = ([const { Vec::new() }; 3], serde_json::Map::new());
    for (i, (name, tensor)) in model.tensors.iter().enumerate() {
        shards[i % 3].push((name, tensor));
        map.insert(name.clone(), format!("model-{:05}-of-00003.safetensors", i % 3 + 1).into());
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into_bytes();
    let names: Vec<String> = (1..=3).map(|i| format!("model-{i:05}-of-00003.safetensors")).collect();
    let mut files: Vec<_> = names.iter().zip(shards).map(|(name, shard)| (name.as_str(), Tiny::file(shard))).collect();
    files.push(("model.safetensors.index.json", index));
    assert_same(&model.open(), &model.open_files(&files).unwrap());
}

#[test]
fn weights_in_f16_and_f32_are_those_in_bf16_where_they_can_be() {
    // What every one of the three types holds exactly.
    let mut model = Tiny::new();
    model.change("", |t| {
        let both: Vec<f32> = t.values().iter().map(|x| if x.abs() < 6.2e-5 { 0.0 } else { *x }).collect();
        Tensor::new(Dtype::BF16, &t.shape, &both)
    });
    let want = reference(&model);
    for dtype in [Dtype::F16, Dtype::F32] {
        let mut cast = model.clone();
        cast.change("", |t| t.cast(dtype, &t.shape));
        assert_same(&model.open(), &cast.open());
    }
    // A mixture, as where only some layers were fine-tuned.
    let mut mixed = model.clone();
    mixed.change("0.self_attn.k_proj.weight", |t| t.cast(Dtype::F32, &t.shape));
    mixed.change("1.mlp.up_proj.weight", |t| t.cast(Dtype::F16, &t.shape));
    mixed.change("embed_tokens.weight", |t| t.cast(Dtype::F16, &t.shape));
    let opened = mixed.open();
    assert!(logits(Kind::Reference, &opened.checkpoint, KvCache::Auto) == want);
    assert_eq!(
        attention_ops(&opened.checkpoint),
        ["rms_norm -> real", "q_proj real <- real @0", "k_proj real <- real @48", "v_proj real <- real @72"]
    );
}

#[test]
fn scales_may_have_any_dtype_and_shape_that_means_the_same() {
    let model = Tiny::fp8(Inputs::Static);
    for dtype in [Dtype::BF16, Dtype::F32] {
        for shape in [&[][..], &[1], &[1, 1]] {
            let mut other = model.clone();
            other.change(".input_scale", |t| t.cast(dtype, shape));
            other.change(".weight_scale", |t| t.cast(dtype, &t.shape[..1]));
            assert_same(&model.open(), &other.open());
        }
    }
    // One scale a tensor is that scale for each channel.
    let mut tensor = Tiny::fp8(Inputs::Static);
    tensor.change(".weight_scale", |t| Tensor::new(Dtype::BF16, &[1], &t.values()[..1]));
    let mut channel = tensor.clone();
    for (layer, (module, n, _)) in (0..2).flat_map(|layer| LINEARS.map(|linear| (layer, linear))) {
        let name = format!("model.layers.{layer}.{module}.weight_scale");
        channel.change(&name, |t| Tensor::new(Dtype::F32, &[n], &vec![t.values()[0]; n]));
    }
    for shape in [&[][..], &[1]] {
        tensor.config["quantization_config"] =
            quantization(json!({"group_0": group(&["Linear"], "tensor", Inputs::Static)}));
        tensor.change(".weight_scale", |t| t.cast(Dtype::F32, shape));
        assert_same(&tensor.open(), &channel.open());
    }
    let mut wrong = tensor.clone();
    wrong.change("0.mlp.up_proj.weight_scale", |t| Tensor::new(Dtype::F32, &[2], &[t.values()[0]; 2]));
    assert_eq!(
        refusal(&wrong.open().checkpoint),
        "tensor model.layers.0.mlp.up_proj.weight_scale: has shape [2], quantization_config calls for one scale"
    );
}

fn refusal(checkpoint: &Checkpoint) -> String {
    let backend = quaver_backends::open(&Spec { kind: Kind::Reference, ..Spec::default() }).unwrap();
    Engine::new(checkpoint, backend, &EngineOptions::default()).err().unwrap().to_string()
}

#[test]
fn the_spelling_of_transformers_4_is_the_same_model() {
    for model in ["tiny-llama-fp8-dynamic", "tiny-llama-fp8-kv"] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let legacy = checkpoints::fixtures().join(format!("configs/{model}.legacy-4x.json"));
        std::fs::copy(legacy, folder.path().join("config.json")).unwrap();
        let tensors = "model.safetensors";
        std::fs::copy(checkpoints::folder(model).join(tensors), folder.path().join(tensors)).unwrap();
        let [new, old] = [checkpoints::open(model), Checkpoint::open(Files::dir(folder.path()).unwrap()).unwrap()];
        assert_eq!(new.config(), old.config());
        let [a, b] = [&new, &old].map(|c| logits(Kind::Cpu, c, KvCache::Auto));
        assert!(a == b && text(&new) == text(&old));
    }
}

// ---- heads

#[test]
fn a_head_of_its_own_is_used_and_one_that_is_the_embedding_is_not_loaded_twice() {
    let tied = Tiny::new();
    let table = tied.tensors["model.embed_tokens.weight"].clone();
    let mut both = tied.clone();
    both.tensors.insert("lm_head.weight".into(), table.clone());
    assert_same(&tied.open(), &both.open());
    let head = |opened: &Opened| {
        let runner = Runner::new(&opened.checkpoint, &Kind::Reference.into(), Profile::Exact, 16);
        let lines = runner.llama.program(16, 16).lines;
        let table = lines.iter().find_map(|line| match line.op {
            Op::Embed { table, .. } => Some(table),
            _ => None,
        });
        let head = lines.iter().find(|line| line.label == "lm_head").map(|line| match line.op {
            Op::Linear { w, .. } => w.bufs()[0],
            _ => panic!("lm_head is no linear"),
        });
        head == table
    };
    assert!(head(&both.open()));
    let mut untied = both.clone();
    untied.config["tie_word_embeddings"] = false.into();
    assert_same(&tied.open(), &untied.open());
    assert!(!head(&untied.open()));
    // A head that differs is the file's, whatever the config says.
    let other: Vec<f32> = table.values().iter().rev().copied().collect();
    let other = Tensor::new(Dtype::BF16, &table.shape, &other);
    both.tensors.insert("lm_head.weight".into(), other.clone());
    untied.tensors.insert("lm_head.weight".into(), other);
    assert_same(&both.open(), &untied.open());
    assert_other(&reference(&tied), &reference(&both));
    assert_emulated(&both.open(), KvCache::Auto);
    // Without one, an untied model has no head.
    untied.tensors.remove("lm_head.weight");
    assert_eq!(
        refusal(&untied.open().checkpoint),
        "tensor lm_head.weight: is missing; take the model's files from one source, whole"
    );
}

#[test]
fn a_head_may_be_fp8() {
    for inputs in [Inputs::Static, Inputs::Dynamic, Inputs::None] {
        let mut model = Tiny::fp8(inputs);
        let table = model.tensors["model.embed_tokens.weight"].clone();
        model.tensors.insert("lm_head.weight".into(), table);
        model.config["tie_word_embeddings"] = false.into();
        let real = reference(&model);
        model.quantize("lm_head", inputs);
        model.config["quantization_config"]["ignore"] = json!([]);
        let got = assert_emulated(&model.open(), KvCache::Auto);
        assert_other(&got, &real);
        let opened = model.open();
        let runner = Runner::new(&opened.checkpoint, &Kind::Reference.into(), Profile::Exact, 16);
        let lines = runner.llama.head_program(16).lines;
        let words: Vec<String> = lines.iter().map(|line| word(&line.label, &line.op)).collect();
        let kind = match inputs {
            Inputs::Static => "static",
            Inputs::Dynamic => "per-token",
            Inputs::None => "real",
        };
        let [norm, head] = [format!("rms_norm -> {kind}"), format!("lm_head fp8 <- {kind} @0")];
        assert_eq!(words, ["gather", &norm, &head, "sample"]);
    }
}

// ---- mixtures

#[test]
fn a_layer_of_one_format_has_four_linears() {
    for (inputs, kind) in [(Inputs::Static, "static"), (Inputs::Dynamic, "per-token"), (Inputs::None, "real")] {
        let opened = Tiny::fp8(inputs).open();
        let got = assert_emulated(&opened, KvCache::Auto);
        assert_other(&got, &reference(&Tiny::new()));
        let into = |op: &str| format!("{op} -> {kind}");
        let linear = |name: &str| format!("{name} fp8 <- {kind} @0");
        let want = [
            into("rms_norm"),
            linear("qkv_proj"),
            "rope_append".into(),
            into("attend"),
            linear("o_proj"),
            into("rms_norm"),
            linear("gate_up_proj"),
            into("swiglu"),
            linear("down_proj"),
        ];
        assert_eq!(ops(&opened.checkpoint), want);
    }
}

/// A model of which some linears are quantized, each as said; the rest is left alone.
fn mixed(schemes: &[(&str, Inputs)]) -> Tiny {
    let mut model = Tiny::new();
    let mut groups = serde_json::Map::new();
    for (i, (pattern, inputs)) in schemes.iter().enumerate() {
        groups.insert(format!("group_{i}"), group(&[&format!("re:.*{pattern}$")], "channel", *inputs));
        for (layer, (module, ..)) in (0..2).flat_map(|layer| LINEARS.map(|linear| (layer, linear))) {
            if module.ends_with(pattern) {
                model.quantize(&format!("model.layers.{layer}.{module}"), *inputs);
            }
        }
    }
    model.config["quantization_config"] = quantization(Value::Object(groups));
    model
}

#[test]
fn attention_and_mlp_may_differ() {
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|p| (p, Inputs::Static));
    let mlp = ["gate_proj", "up_proj", "down_proj"].map(|p| (p, Inputs::Dynamic));
    let opened = mixed(&[&attention[..], &mlp].concat()).open();
    assert_emulated(&opened, KvCache::Auto);
    assert_eq!(
        ops(&opened.checkpoint),
        [
            "rms_norm -> static",
            "qkv_proj fp8 <- static @0",
            "rope_append",
            "attend -> static",
            "o_proj fp8 <- static @0",
            "rms_norm -> per-token",
            "gate_up_proj fp8 <- per-token @0",
            "swiglu -> per-token",
            "down_proj fp8 <- per-token @0",
        ]
    );
}

#[test]
fn an_ignored_projection_stays_real_beside_its_neighbours() {
    let plain = Tiny::new();
    for inputs in [Inputs::Static, Inputs::Dynamic] {
        let all = Tiny::fp8(inputs);
        let mut model = all.clone();
        model.config["quantization_config"]["ignore"] = json!(["lm_head", "re:.*k_proj$"]);
        for layer in 0..2 {
            let name = format!("model.layers.{layer}.self_attn.k_proj.weight");
            model.tensors.insert(name.clone(), plain.tensors[&name].clone());
        }
        let opened = model.open();
        let got = assert_emulated(&opened, KvCache::Auto);
        assert_other(&got, &reference(&all));
        let kind = if inputs == Inputs::Static { "static" } else { "per-token" };
        assert_eq!(
            attention_ops(&opened.checkpoint),
            [
                "rms_norm -> real",
                &format!("quantize -> {kind}"),
                "quantize -> real",
                &format!("q_proj fp8 <- {kind} @0"),
                "k_proj real <- real @48",
                &format!("v_proj fp8 <- {kind} @72"),
            ]
        );
        // A target that names one module goes before the class: the same as to ignore it.
        let mut named = model.clone();
        let targets: Vec<String> = (0..2).map(|layer| format!("model.layers.{layer}.self_attn.k_proj")).collect();
        named.config["quantization_config"]["ignore"] = json!(["lm_head"]);
        named.config["quantization_config"]["config_groups"]["group_1"] = json!({"targets": targets});
        assert_same(&opened, &named.open());
    }
}

#[test]
fn neighbours_that_agree_are_one_linear_and_those_that_do_not_are_not() {
    let opened = mixed(&[("q_proj", Inputs::Dynamic), ("k_proj", Inputs::Dynamic), ("up_proj", Inputs::Static)]).open();
    assert_emulated(&opened, KvCache::Auto);
    assert_eq!(
        ops(&opened.checkpoint),
        [
            "rms_norm -> real",
            "quantize -> per-token",
            "quantize -> real",
            "q_proj+k_proj fp8 <- per-token @0",
            "v_proj real <- real @72",
            "rope_append",
            "attend -> real",
            "o_proj real <- real @0",
            "rms_norm -> real",
            "quantize -> real",
            "quantize -> static",
            "gate_proj real <- real @0",
            "up_proj fp8 <- static @40",
            "swiglu -> real",
            "down_proj real <- real @0",
        ]
    );
}

#[test]
fn static_scales_that_differ_keep_projections_apart() {
    let same = Tiny::fp8(Inputs::Static);
    let mut model = same.clone();
    for (projection, scale) in [("q_proj", 0.0125), ("k_proj", 0.02), ("v_proj", 0.004)] {
        let scale = Tensor::new(Dtype::BF16, &[1], &[scale]);
        model.change(&format!("{projection}.input_scale"), |_| scale.clone());
    }
    let opened = model.open();
    let got = assert_emulated(&opened, KvCache::Auto);
    assert_other(&got, &reference(&same));
    assert_eq!(
        attention_ops(&opened.checkpoint),
        [
            "rms_norm -> real",
            "quantize -> static",
            "quantize -> static",
            "quantize -> static",
            "q_proj fp8 <- static @0",
            "k_proj fp8 <- static @48",
            "v_proj fp8 <- static @72",
        ]
    );
}

// ---- KV caches

#[test]
fn an_fp8_cache_is_used_where_scales_are_brought_and_where_it_is_asked_for() {
    let plain = Tiny::fp8(Inputs::Dynamic);
    let real = reference(&plain);
    let forced = assert_emulated(&plain.open(), KvCache::Fp8);
    assert_other(&forced, &real);
    let mut scaled = plain.clone();
    scaled.config["quantization_config"]["kv_cache_scheme"] =
        json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor", "dynamic": false});
    let mut of_2024 = scaled.clone();
    for layer in 0..2 {
        for (which, scale) in [("k", 0.0125), ("v", 0.0078125)] {
            let scale = Tensor::new(Dtype::BF16, &[1], &[scale]);
            let module = format!("model.layers.{layer}.self_attn");
            scaled.tensors.insert(format!("{module}.{which}_scale"), scale.clone());
            of_2024.tensors.insert(format!("{module}.{which}_proj.output_scale"), scale);
        }
    }
    let opened = scaled.open();
    let auto = assert_emulated(&opened, KvCache::Auto);
    assert_other(&auto, &real);
    assert_other(&auto, &forced);
    // Scales that are there are used where FP8 is asked for.
    assert!(logits(Kind::Reference, &opened.checkpoint, KvCache::Fp8) == auto);
    assert_same(&opened, &of_2024.open());
    // A config that promises scales and a file without them do not go together.
    scaled.tensors.remove("model.layers.1.self_attn.v_scale");
    assert_eq!(
        refusal(&scaled.open().checkpoint),
        "tensor model.layers.1.self_attn.v_scale: is missing; take the model's files from one source, whole"
    );
}

// ---- damage

/// Paths of all values of a JSON object.
fn paths(value: &Value, at: &str, into: &mut Vec<String>) {
    if let Value::Object(map) = value {
        for (key, value) in map {
            let path = format!("{at}/{key}");
            paths(value, &path, into);
            into.push(path);
        }
    }
}

fn strange_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0u64), Just(1), Just(2), Just(3), Just(1 << 12), Just(1 << 18), Just(1 << 24), Just(u64::MAX)]
            .prop_map(Value::from),
        (0u64..1 << 23).prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        prop_oneof![Just(1e-30), Just(0.5), Just(1e15), Just(1e308), Just(-1.0)].prop_map(|x: f64| json!(x)),
        "[a-zA-Z0-9_.*+()\\[\\]-]{0,12}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([1, 4_000_000_000u64])),
        Just(json!(["re:(", "Linear"])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_change_of_config_json_makes_a_model_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), strange_value()), 1..4),
    ) {
        let mut model = Tiny::fp8(Inputs::Static);
        // Without these, most sizes disagree with the shapes and go no further.
        model.config["rope_parameters"] = json!({
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        });
        let mut all = Vec::new();
        paths(&model.config, "", &mut all);
        for (which, value) in changes {
            if let Some(at) = model.config.pointer_mut(&all[which.index(all.len())]) {
                *at = value;
            }
        }
        survive(model.open_files(&[("model.safetensors", Tiny::file(&model.tensors))]));
    }

    #[test]
    fn no_flipped_byte_of_the_tensors_makes_a_model_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..20),
        in_header in any::<bool>(),
    ) {
        let model = Tiny::fp8(Inputs::Dynamic);
        let mut file = Tiny::file(&model.tensors);
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let range = if in_header { 0..header } else { header..file.len() };
        for (at, flip) in flips {
            let at = range.start + at.index(range.len());
            file[at] ^= flip;
        }
        survive(model.open_files(&[("model.safetensors", file)]));
    }
}

#[test]
fn sizes_that_the_tensors_do_not_bear_out_are_refused_before_memory_is_taken() {
    let model = Tiny::fp8(Inputs::Static);
    for (key, value, tensor) in [
        ("vocab_size", 1 << 22, "model.embed_tokens.weight: has shape [96, 32], config.json calls for [4194304, 32]"),
        ("hidden_size", 1 << 18, "model.embed_tokens.weight: has shape [96, 32], config.json calls for [96, 262144]"),
        ("num_hidden_layers", 1 << 12, "model.layers.2.self_attn.q_proj.weight: is missing"),
        (
            "head_dim",
            1 << 12,
            "model.layers.0.self_attn.q_proj.weight: has shape [48, 32], config.json calls for [16384, 32]",
        ),
        (
            "intermediate_size",
            1 << 20,
            "model.layers.0.mlp.gate_proj.weight: has shape [40, 32], config.json calls for [1048576, 32]",
        ),
    ] {
        let mut lying = model.clone();
        lying.config[key] = value.into();
        let opened = lying.open();
        let options = EngineOptions { kv_cache_memory: 1 << 40, ..EngineOptions::default() };
        let backend = quaver_backends::open(&Spec::default()).unwrap();
        let message = Engine::new(&opened.checkpoint, backend, &options).err().unwrap().to_string();
        assert!(message.starts_with(&format!("tensor {tensor}; take")), "{message}");
    }
}

/// A Llama on a page: f64 sums over whole matrices, every linear by itself, and E4M3 where the checkpoint says so.
mod emulation {
    use super::*;

    pub fn logits(checkpoint: &Checkpoint, ids: &[u32], kv_cache: KvCache) -> Vec<f32> {
        let config = checkpoint.config();
        let (d, f, heads) = (config.hidden, config.intermediate, config.heads);
        let (q_width, kv_width) = (heads.q * heads.dim, heads.kv * heads.dim);
        let tensor = |name: &str| checkpoint.tensor(name).unwrap().to_f32().unwrap();
        let norm = |x: &[f32], gamma: &str| -> Vec<f32> {
            let gamma = tensor(gamma);
            let row = |x: &[f32]| {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
                let inv = (1.0 / (mean + f64::from(config.rms_eps)).sqrt()) as f32;
                x.iter().zip(&gamma).map(|(x, g)| x * inv * g).collect::<Vec<_>>()
            };
            x.chunks_exact(d).flat_map(row).collect()
        };
        let add = |x: &mut [f32], y: &[f32]| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let table = tensor("model.embed_tokens.weight");
        let mut x: Vec<f32> = ids.iter().flat_map(|id| table[*id as usize * d..][..d].to_vec()).collect();
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let by = |module: &str, n, k, x: &[f32]| linear(checkpoint, &name(module), n, k, x);
            let normed = norm(&x, &name("input_layernorm.weight"));
            let mut q = by("self_attn.q_proj", q_width, d, &normed);
            let mut k = by("self_attn.k_proj", kv_width, d, &normed);
            let mut v = by("self_attn.v_proj", kv_width, d, &normed);
            rotate(checkpoint, &mut q, q_width);
            rotate(checkpoint, &mut k, kv_width);
            let scales = checkpoint.kv_scales(layer).unwrap();
            let scales = if kv_cache == KvCache::Fp8 { scales.or(Some((1.0, 1.0))) } else { scales };
            if let Some((k_scale, v_scale)) = scales {
                k.iter_mut().for_each(|x| *x = through_e4m3(*x, k_scale));
                v.iter_mut().for_each(|x| *x = through_e4m3(*x, v_scale));
            }
            let mut attended = Vec::new();
            for (row, q) in q.chunks_exact(q_width).enumerate() {
                for (head, q) in q.chunks_exact(heads.dim).enumerate() {
                    let of = |kv: &[f32], t: usize, i: usize| {
                        f64::from(kv[t * kv_width + head / (heads.q / heads.kv) * heads.dim + i])
                    };
                    let score = |t: usize| {
                        let product: f64 = q.iter().enumerate().map(|(i, q)| f64::from(*q) * of(&k, t, i)).sum();
                        (product / (heads.dim as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = (0..=row).map(score).collect();
                    let sum: f64 = weights.iter().sum();
                    let mean = |i| weights.iter().enumerate().map(|(t, w)| w * of(&v, t, i)).sum::<f64>() / sum;
                    attended.extend((0..heads.dim).map(|i| mean(i) as f32));
                }
            }
            add(&mut x, &by("self_attn.o_proj", d, q_width, &attended));
            let normed = norm(&x, &name("post_attention_layernorm.weight"));
            let gate = by("mlp.gate_proj", f, d, &normed);
            let up = by("mlp.up_proj", f, d, &normed);
            let gated: Vec<f32> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            add(&mut x, &by("mlp.down_proj", d, f, &gated));
        }
        let x = norm(&x, "model.norm.weight");
        match checkpoint.find("lm_head.weight") {
            Some(_) => linear(checkpoint, "lm_head", config.vocab, d, &x),
            None => product(&x, &table, d),
        }
    }

    /// Halves of each head against each other, by the row's angle.
    fn rotate(checkpoint: &Checkpoint, x: &mut [f32], width: usize) {
        let dim = checkpoint.config().heads.dim;
        let inv_freq = checkpoint.config().rope.inv_freq(dim);
        for (position, row) in x.chunks_exact_mut(width).enumerate() {
            for head in row.chunks_exact_mut(dim) {
                for (i, freq) in inv_freq.iter().enumerate() {
                    let (sin, cos) = (position as f64 * freq).sin_cos();
                    let (sin, cos) = (sin as f32, cos as f32);
                    let (a, b) = (head[i], head[i + dim / 2]);
                    (head[i], head[i + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    }

    fn through_e4m3(x: f32, scale: f32) -> f32 {
        e4m3::decode(e4m3::encode(x * (1.0 / scale))) * scale
    }

    /// A linear with its input rounded as the checkpoint says.
    fn linear(checkpoint: &Checkpoint, module: &str, n: usize, k: usize, x: &[f32]) -> Vec<f32> {
        let weights = checkpoint.linear(module, n, k).unwrap();
        let x: Vec<f32> = match weights.input {
            InputScale::None => x.to_vec(),
            InputScale::Static(scale) => x.iter().map(|x| through_e4m3(*x, scale)).collect(),
            InputScale::Dynamic => {
                let row = |row: &[f32]| row.iter().map(|x| through_e4m3(*x, dynamic_scale(row))).collect::<Vec<_>>();
                x.chunks_exact(k).flat_map(row).collect()
            }
        };
        let w = match weights.weight {
            LinearWeight::Real(tensor) => tensor.to_f32().unwrap(),
            LinearWeight::Fp8 { codes, scale } => {
                codes.iter().enumerate().map(|(i, code)| e4m3::decode(*code) * scale[i / k]).collect()
            }
        };
        product(&x, &w, k)
    }

    /// x[m, k] . w[n, k]^T.
    fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
        let dot =
            |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32;
        x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
    }
}
