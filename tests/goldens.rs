//! Quaver against Hugging Face: what one small model's five checkpoints compute, layer by layer and end to end, on every
//! backend. The bounds are those that two independent f32 programs keep between each other.

mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use quaver::parity::{self, Work};
use quaver_backends::cuda::Variant;
use quaver_backends::{Kind, Spec};
use quaver_core::checkpoint::{Checkpoint, InputScale, LinearWeight, LinearWeights};
use quaver_core::e4m3;
use quaver_core::engine::{Engine, EngineOptions, Output};
use quaver_core::llama::Profile;
use quaver_core::op::{Act, BufDesc, Cols, DType, DeviceInfo, Extent, Op, Program, Scale, StaticScale, Weight};
use quaver_core::sampler::SamplingParams;
use support::checkpoints::{self, MODELS};
use support::goldens::{self, Tensors, relative_rms, rms};
use support::runner::Runner;
use support::ties;

/// rms(error) / rms(value) of a layer or a linear, from the golden before it.
const LAYER: f64 = 1e-5;
/// The same of a layer whose products FP8 tensor cores sum: twice what those of the emulator bring, 9.7e-3 in the worst layer
/// of all models, since what a projection loses (`tensor_core_bound`) turns codes behind it. Weight-only arithmetic is off by
/// as much in some layers: there it is the projections that tell it.
const LAYER_NATIVE: f64 = 2e-2;
/// rms of the difference of logits there, and a lead that was not turned: on an H100 logits were off by 0.43 at the most, and a
/// lead of 0.31 was turned (2026-11-26; its kernels of Ada and Hopper, of five models).
const LOGITS_NATIVE: f64 = 0.6;
const CLEAR_GAP_NATIVE: f32 = 0.4;
/// rms of the difference of last-position logits: FP8 ties flip, and the flips cascade.
const LOGITS: f64 = 0.25;
/// The same without FP8.
const LOGITS_BF16: f64 = 1e-4;
/// A lead of the best logit that no flip has been seen to turn.
const CLEAR_GAP: f32 = 0.2;
/// Steps with a clear gap that Hugging Face itself turns, in f32 and on one machine (transformers 5.17, torch 2.14), when
/// its attention is computed another way (sdpa instead of eager) or its embedding is moved by f32 rounding (1e-7
/// relative): (model, prompt, step, the other token). Either token is accepted there.
const TURNED_BY_HUGGING_FACE: [(&str, &str, usize, u32); 2] = [
    // sdpa, the default of transformers, gives it without any change; the eager attention gives the golden token.
    ("tiny-llama-fp8-kv", "raw_2k", 20, 275),
    // In 3 of 16 runs with a moved embedding.
    ("tiny-llama-fp8-dynamic", "raw_2k", 28, 1732),
];
/// Relative difference of perplexity.
const PERPLEXITY: f64 = 1e-3;
/// The same for the fast profile.
const PERPLEXITY_FAST: f64 = 3e-3;
/// Mean KL divergence of the fast profile from the exact one, in nats a token.
const KL_FAST: f64 = 5e-3;

fn main() {
    let args = Arguments::from_args();
    let mut trials = vec![Trial::test("adapters_are_there", support::adapters_are_there)];
    let specs = quaver_backends::variants();
    let first = specs.iter().find(|spec| spec.kind == Kind::Wgpu).cloned();
    for spec in specs {
        for model in MODELS {
            let mut add = |name: &str, test: fn(&Spec, &str) -> Result<(), Failed>| {
                // Software adapters are slow: the first adapter and variant takes all goldens of one model and the short
                // ones of each; the others take the short ones of that model. `--include-ignored` runs the rest.
                let is_long = !matches!(name, "layers" | "linears" | "logits" | "teacher_forced");
                let reasons = [first.as_ref() != Some(&spec), model != "tiny-llama-fp8-channel", is_long];
                let is_exact = spec.variant.as_deref() == Some("portable-exact");
                let is_rest = spec.kind == Kind::Wgpu && (is_exact || reasons.iter().filter(|r| **r).count() > 1);
                let (name, spec) = (format!("{spec}::{model}::{name}"), spec.clone());
                let run = move || {
                    let _turn = quaver_backends::turn(&spec);
                    test(&spec, model)
                };
                trials.push(Trial::test(name, run).with_ignored_flag(is_rest));
            };
            add("layers", layers);
            add("linears", linears);
            add("logits", logits);
            add("teacher_forced", teacher_forced);
            add("perplexity", perplexity);
            add("fast_profile", fast_profile);
            if model != "tiny-llama" {
                add("control_weight_only_fails", control_weight_only_fails);
                add("control_bf16_checkpoint_fails", control_bf16_checkpoint_fails);
            }
        }
    }
    trials.extend(emulated());
    libtest_mimic::run(&args, trials).exit();
}

/// FP8 tensor cores without a card: every projection, and the layers of one model.
fn emulated() -> impl Iterator<Item = Trial> {
    type Test = fn(&Spec, &str) -> Result<(), Failed>;
    let projections = [Variant::Sm90, Variant::Sm89]
        .into_iter()
        .flat_map(|variant| MODELS.into_iter().map(move |model| (variant, model, "linears", linears as Test)));
    let layers = [("layers", layers as Test), ("control_weight_only_fails", control_weight_only_fails)];
    let layers = layers.map(|(name, test)| (Variant::Sm90, "tiny-llama-fp8-channel", name, test));
    projections.chain(layers).map(|(variant, model, name, test)| {
        let spec = Spec { kind: Kind::CudaEmulated, variant: Some(variant.name().to_owned()), ..Spec::default() };
        Trial::test(format!("{spec}::{model}::{name}"), move || test(&spec, model))
    })
}

fn ensure(ok: bool, message: String) -> Result<(), Failed> {
    if ok { Ok(()) } else { Err(message.into()) }
}

/// Each layer from the golden h{i} to h{i+1}.
fn layers(spec: &Spec, model: &str) -> Result<(), Failed> {
    let hidden = Tensors::open("hidden.safetensors");
    let mut runner = Runner::new(&checkpoints::open(model), spec, Profile::Exact, 128);
    let (mut flips, mut worst) = (0, 0f64);
    for (prompt, ids) in hidden_prompts() {
        let mut input = hidden.f32(&format!("{prompt}/h0"));
        for layer in 0..runner.llama.config.layers {
            let want = hidden.f32(&format!("{model}/{prompt}/h{}", layer + 1));
            let bound = layer_bound(&runner.backend.describe(), model);
            // What is computed with fewer bits moves more codes than ties would explain.
            let (error, ties) = match bound == LAYER {
                true => ties::settle(&mut runner, layer, &ids, &input, &want, LAYER),
                false => (relative_rms(&runner.layer(layer, &ids, &input), &want), Vec::new()),
            };
            ensure(error <= bound, format!("{prompt}, layer {layer}: {error:.1e} with {} ties settled", ties.len()))?;
            flips += ties.len();
            worst = worst.max(error);
            input = want;
        }
    }
    eprintln!("{spec} {model}: layers within {worst:.1e}, {flips} FP8 ties rounded the other way");
    ensure(model != "tiny-llama" || flips == 0, "a model without FP8 has no ties".into())
}

fn hidden_prompts() -> impl Iterator<Item = (String, Vec<u32>)> {
    let names = ["chat_short", "raw_short", "raw_stress"];
    goldens::prompts().into_iter().filter(move |p| names.contains(&p.name.as_str())).map(|p| (p.name, p.ids))
}

/// True where FP8 tensor cores sum with fewer bits than f32 has.
fn is_native(device: &DeviceInfo, model: &str) -> bool {
    device.tensor_cores.is_some_and(|cores| cores.e4m3_bits < 24) && model != "tiny-llama"
}

/// The bound of a layer on a device.
fn layer_bound(device: &DeviceInfo, model: &str) -> f64 {
    if is_native(device, model) { LAYER_NATIVE } else { LAYER }
}

/// Each projection of layer 0 from its golden input.
fn linears(spec: &Spec, model: &str) -> Result<(), Failed> {
    for Judged { name, error, bound } in linear_errors(spec, model, &checkpoints::open(model)) {
        eprintln!("{spec} {model}: {name} within {error:.1e}, bound {bound:.1e}");
        ensure(error <= bound, format!("{name}: {error:.1e}, not {bound:.1e}"))?;
    }
    Ok(())
}

/// A projection of a checkpoint, its error, and the bound that the model is held to.
struct Judged {
    name: String,
    error: f64,
    bound: f64,
}

/// The errors of layer 0's projections against the goldens of `model`, with the weights of any checkpoint.
fn linear_errors(spec: &Spec, model: &str, checkpoint: &Checkpoint) -> Vec<Judged> {
    let hidden = Tensors::open("hidden.safetensors");
    let (config, own) = (checkpoint.config(), checkpoints::open(model));
    let (d, f) = (config.hidden, config.intermediate);
    let (q, kv) = (config.heads.q * config.heads.dim, config.heads.kv * config.heads.dim);
    // (projection, the one whose golden input it shares, n, k)
    let projections = [
        ("self_attn.q_proj", "self_attn.q_proj", q, d),
        ("self_attn.k_proj", "self_attn.q_proj", kv, d),
        ("self_attn.v_proj", "self_attn.q_proj", kv, d),
        ("self_attn.o_proj", "self_attn.o_proj", d, q),
        ("mlp.gate_proj", "mlp.gate_proj", f, d),
        ("mlp.up_proj", "mlp.gate_proj", f, d),
        ("mlp.down_proj", "mlp.down_proj", d, f),
    ];
    let errors = projections.map(|(name, source, n, k)| {
        let golden = |name: &str, end: &str| hidden.f32(&format!("{model}/chat_short/layer0.{name}.{end}"));
        let (module, input, want) = (format!("model.layers.0.{name}"), golden(source, "in"), golden(name, "out"));
        let (device, got) = linear(spec, checkpoint, &module, n, k, &input);
        let weights = own.linear(&module, n, k).unwrap();
        let bound = LAYER + tensor_core_bound(&device, &weights, k, &input, &want);
        Judged { name: name.to_owned(), error: relative_rms(&got, &want), bound }
    });
    errors.into()
}

/// What the sums of a device's tensor cores may lose of a projection, as rms(error) / rms(value).
fn tensor_core_bound(device: &DeviceInfo, weights: &LinearWeights, k: usize, input: &[f32], want: &[f32]) -> f64 {
    let (LinearWeight::Fp8 { codes, scale }, true) = (&weights.weight, weights.input != InputScale::None) else {
        return 0.0;
    };
    let limit = |tensor_cores| {
        let device = DeviceInfo { tensor_cores, ..device.clone() };
        parity::limit(&device, Work::Linear { rows: input.len() / k, k, dtypes: [DType::E4m3; 2] })
    };
    let (with, without) = (limit(device.tensor_cores), limit(None));
    let sum = |x: &[f32], w: &[u8]| x.iter().zip(w).map(|(x, w)| (x * e4m3::decode(*w)).abs()).sum::<f32>();
    let magnitudes =
        input.chunks(k).flat_map(|x| codes.chunks(k).zip(&scale[..]).map(move |(w, scale)| sum(x, w) * scale));
    let magnitudes: Vec<f32> = magnitudes.collect();
    let zeros = vec![0.0; want.len()];
    (with.rms - without.rms) * rms(&magnitudes, &zeros) / rms(want, &zeros) + with.bias
}

/// A projection of a checkpoint as a program of two ops.
fn linear(
    spec: &Spec,
    checkpoint: &Checkpoint,
    module: &str,
    n: usize,
    k: usize,
    input: &[f32],
) -> (DeviceInfo, Vec<f32>) {
    let mut runner = Runner::new(checkpoint, spec, Profile::Exact, input.len() / k);
    let m = input.len() / k;
    let weights = checkpoint.linear(module, n, k).unwrap();
    let mut alloc =
        |name: &str, dtype, rows, cols| runner.backend.alloc(&BufDesc::new(name, dtype, rows, cols)).unwrap();
    let rows = Extent::Rows(m);
    let (x, out) = (alloc("x", DType::F32, rows, k), alloc("out", DType::F32, rows, n));
    let (codes, scales) = (alloc("codes", DType::E4m3, rows, k), alloc("scales", DType::F32, rows, 1));
    let act = match weights.input {
        InputScale::None => Act::Real(x),
        InputScale::Static(scale) => Act::Fp8 { codes, scale: Scale::Static(StaticScale::new(scale)) },
        InputScale::Dynamic => Act::Fp8 { codes, scale: Scale::PerToken(scales) },
    };
    let mut load =
        |dtype, cols, bytes| runner.backend.load(&BufDesc::new("w", dtype, Extent::Fixed(n), cols), &[bytes]).unwrap();
    let w = match weights.weight {
        LinearWeight::Real(tensor) => Weight::Real(load(DType::Bf16, k, tensor.data)),
        LinearWeight::Fp8 { codes, scale } => Weight::Fp8 {
            codes: load(DType::E4m3, k, codes),
            scale: load(DType::F32, 1, bytemuck::cast_slice::<f32, u8>(&scale).to_vec().into()),
        },
    };
    runner.write_f32(x, input);
    runner.write(&vec![0; m], 0);
    let mut program = Program::new(m, 0, runner.llama.inputs.live);
    if act != Act::Real(x) {
        program.push("quantize", Op::Quantize { x, out: act });
    }
    program.push(module, Op::Linear { x: act, w, out: Cols { buf: out, first: 0 }, add: false });
    (runner.backend.describe(), runner.run(&program, out, m * n))
}

/// Last-position logits of every prompt.
fn logits(spec: &Spec, model: &str) -> Result<(), Failed> {
    let goldens = Tensors::open("logits.safetensors");
    let mut runner = Runner::new(&checkpoints::open(model), spec, Profile::Exact, 2048);
    let bound = match model {
        "tiny-llama" => LOGITS_BF16,
        _ if is_native(&runner.backend.describe(), model) => LOGITS_NATIVE,
        _ => LOGITS,
    };
    for prompt in goldens::prompts() {
        let got = runner.logits(&prompt.ids, 1);
        let error = rms(&got, &goldens.f32(&format!("{model}/emu_f32/{}", prompt.name)));
        ensure(error <= bound, format!("{}: rms {error:.2e}", prompt.name))?;
    }
    Ok(())
}

/// The most probable token behind every token of the golden continuations, computed by the engine.
fn teacher_forced(spec: &Spec, model: &str) -> Result<(), Failed> {
    let goldens = goldens::goldens();
    let mut engine = engine(&checkpoints::open(model), spec, Profile::Exact);
    // And how many of ten steps have such a lead.
    let (clear_gap, most) = if is_native(&engine.device(), model) { (CLEAR_GAP_NATIVE, 6) } else { (CLEAR_GAP, 8) };
    let (mut steps, mut clear) = (0, 0);

    for prompt in goldens::prompts() {
        let golden = &goldens[model]["hf_f32"].prompts[&prompt.name];
        let ids = [&prompt.ids[..], &golden.ids].concat();
        let scores = score(&mut engine, &ids, 1);
        let best = scores[prompt.ids.len() - 1..].iter().map(|score| score.top[0].0);
        for (step, ((best, golden_id), gap)) in best.zip(&golden.ids).zip(&golden.gap).enumerate() {
            let verdict = *gap >= clear_gap;
            let turned = TURNED_BY_HUGGING_FACE.contains(&(model, &prompt.name, step, best));
            ensure(
                !verdict || best == *golden_id || turned,
                format!("{} step {step}: {best}, not {golden_id}, at a gap of {gap}", prompt.name),
            )?;
            (steps, clear) = (steps + 1, clear + usize::from(verdict));
        }
    }
    ensure(clear * 10 > steps * most, format!("only {clear} of {steps} steps allow a verdict"))
}

fn engine(checkpoint: &Checkpoint, spec: &Spec, profile: Profile) -> Engine {
    let options = EngineOptions { profile, ..EngineOptions::default() };
    Engine::new(checkpoint, quaver_backends::open(spec).unwrap(), &options).unwrap()
}

/// The scores of all tokens but the first, with `top_n` alternatives.
fn score(engine: &mut Engine, ids: &[u32], top_n: usize) -> Vec<quaver_core::engine::Token> {
    let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(top_n), ..SamplingParams::default() };
    engine.submit(ids, params).unwrap();
    let mut scores = Vec::new();
    while !engine.is_idle() {
        for (_, output) in engine.step().unwrap() {
            if let Output::Prompt(more) = output {
                scores.extend(more);
            }
        }
    }
    assert_eq!(scores.len(), ids.len() - 1);
    scores
}

/// Perplexity of the held-out text.
fn perplexity(spec: &Spec, model: &str) -> Result<(), Failed> {
    within_perplexity(spec, model, Profile::Exact, PERPLEXITY)
}

fn within_perplexity(spec: &Spec, model: &str, profile: Profile, bound: f64) -> Result<(), Failed> {
    let mut engine = engine(&checkpoints::open(model), spec, profile);
    let (mut nll, mut tokens) = (0.0, 0);
    for window in goldens::windows() {
        let scores = score(&mut engine, &window, 0);
        nll -= scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>();
        tokens += scores.len();
    }
    let (got, want) = ((nll / tokens as f64).exp(), goldens::goldens()[model]["hf_f32"].ppl);
    let error = (got / want - 1.0).abs();
    eprintln!("{spec} {model} {profile:?}: perplexity {got:.4}, Hugging Face {want:.4}, off by {:.3}%", 100.0 * error);
    ensure(tokens == 8960 && error <= bound, format!("perplexity {got} of {tokens} tokens, golden {want}"))
}

/// The fast profile against Hugging Face's perplexity, and its distributions against the exact profile's.
fn fast_profile(spec: &Spec, model: &str) -> Result<(), Failed> {
    within_perplexity(spec, model, Profile::Fast, PERPLEXITY_FAST)?;
    let checkpoint = checkpoints::open(model);
    let [mut exact, mut fast] =
        [Profile::Exact, Profile::Fast].map(|profile| Runner::new(&checkpoint, spec, profile, 257));
    let vocab = checkpoint.config().vocab;
    let (mut kl, mut rows) = (0.0, 0);
    for window in goldens::windows().iter().take(4) {
        let [exact, fast] = [&mut exact, &mut fast].map(|runner| runner.logits(window, window.len()));
        kl += exact.chunks_exact(vocab).zip(fast.chunks_exact(vocab)).map(|(p, q)| divergence(p, q)).sum::<f64>();
        rows += window.len();
    }
    let kl = kl / rows as f64;
    eprintln!("{spec} {model}: KL of fast from exact {kl:.1e} nats a token");
    ensure(kl <= KL_FAST, format!("KL {kl:.2e}"))
}

/// The KL divergence of softmax(q) from softmax(p).
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + x.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
    };
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - p_sum, f64::from(q) - q_sum);
        p.exp() * (p - q)
    });
    terms.sum()
}

/// Weights alone in FP8 are not this checkpoint's arithmetic, and the tests see it.
fn control_weight_only_fails(spec: &Spec, model: &str) -> Result<(), Failed> {
    let checkpoint = checkpoints::open_with_config(model, &format!("{model}-weight-only"), |config| {
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = serde_json::Value::Null;
    });
    control_fails(spec, model, &checkpoint)
}

/// Neither is the unquantized model.
fn control_bf16_checkpoint_fails(spec: &Spec, model: &str) -> Result<(), Failed> {
    control_fails(spec, model, &checkpoints::open("tiny-llama"))
}

/// Every linear is far outside its bound, and every layer where FP8 tensor cores do not sum: there layers tell nothing
/// ([`LAYER_NATIVE`]).
fn control_fails(spec: &Spec, model: &str, checkpoint: &Checkpoint) -> Result<(), Failed> {
    for Judged { name, error, bound } in linear_errors(spec, model, checkpoint) {
        ensure(error > 100.0 * LAYER && error > 2.0 * bound, format!("{name} passes the control: {error:.1e}"))?;
    }
    let hidden = Tensors::open("hidden.safetensors");
    let mut runner = Runner::new(checkpoint, spec, Profile::Exact, 128);
    if layer_bound(&runner.backend.describe(), model) != LAYER {
        return Ok(());
    }
    for (prompt, ids) in hidden_prompts() {
        for layer in 0..runner.llama.config.layers {
            let input = match layer {
                0 => hidden.f32(&format!("{prompt}/h0")),
                _ => hidden.f32(&format!("{model}/{prompt}/h{layer}")),
            };
            let want = hidden.f32(&format!("{model}/{prompt}/h{}", layer + 1));
            let error = relative_rms(&runner.layer(layer, &ids, &input), &want);
            ensure(error > 10.0 * LAYER, format!("{prompt}, layer {layer} passes the control: {error:.1e}"))?;
        }
    }
    Ok(())
}
