//! `quaver inspect` and `quaver devices`, for people and for machines.

use serde_json::{Value, json};

use crate::support::checkpoints::folder;
use crate::{quaver, support};

fn inspect(model: Option<&str>, args: &[&str]) -> Value {
    let model = model.map(|model| folder(model).display().to_string());
    let model: Vec<_> = model.iter().flat_map(|model| ["--model", model]).collect();
    quaver([&["inspect", "--json"], &model[..], args].concat()).json().remove(0)
}

#[test]
fn the_demo_model_is_described() {
    let object = inspect(None, &[]);
    for (key, want) in [
        ("model", json!("quaver-demo")),
        ("architecture", json!("LlamaForCausalLM")),
        ("parameters", json!(6_556_928)),
        ("vocab_size", json!(4096)),
        ("hidden_size", json!(256)),
        ("layers", json!(6)),
        ("heads", json!(8)),
        ("kv_heads", json!(2)),
        ("head_dim", json!(64)),
        ("intermediate_size", json!(768)),
        ("rms_norm_eps", json!(1e-5)),
        ("context", json!(4096)),
        ("head", json!("tied")),
        ("bos_token_id", json!(4080)),
        ("eos_token_ids", json!([4081, 4088, 4089])),
        ("sampling", json!({"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0, "repetition_penalty": 1})),
        ("tokenizer", json!({"vocab_size": 4096})),
        ("chat_template", json!(true)),
    ] {
        assert_eq!(object[key], want, "{key}");
    }
    assert_eq!((&object["rope"]["theta"], &object["rope"]["type"]), (&json!(500_000.0), &json!("llama3")));
    assert_eq!(
        object["quantization"],
        json!({
            "method": "compressed-tensors", "ignored": ["lm_head"], "kv_cache": null,
            "targets": [{"target": "Linear", "weights": "channel", "activations": "static"}],
        })
    );
}

#[test]
fn each_scheme_is_named() {
    for (model, weights, activations, kv_cache) in [
        ("tiny-llama-fp8", "tensor", "static", Value::Null),
        ("tiny-llama-fp8-dynamic", "channel", "dynamic", Value::Null),
        ("tiny-llama-fp8-kv", "tensor", "static", json!("fp8 static tensor")),
    ] {
        let object = inspect(Some(model), &[]);
        let quantization = &object["quantization"];
        let target = json!({"target": "Linear", "weights": weights, "activations": activations});
        assert_eq!((&quantization["targets"], &quantization["kv_cache"]), (&json!([target]), &kv_cache), "{model}");
        assert_eq!((&object["tokenizer"], &object["chat_template"]), (&Value::Null, &json!(false)));
    }
    let object = inspect(Some("tiny-llama"), &[]);
    assert_eq!(object["quantization"], Value::Null);
    let model = folder("tiny-llama").display().to_string();
    let text = quaver(["inspect", "--model", &model]).succeeds();
    assert!(text.contains("none (bf16)"), "{text}");
}

#[test]
fn the_memory_plan_follows_from_the_sizes() {
    let memory = |model, args: &[&str]| inspect(model, args)["memory"].clone();
    // 6 layers of keys and values for 2 heads of 64.
    let elements = 2 * 6 * 2 * 64;
    for (model, args, dtype, bytes) in [
        (None, &[][..], "bf16", 2),
        (None, &["--profile", "exact"], "f32", 4),
        (None, &["--kv-cache-dtype", "fp8"], "fp8", 1),
        (Some("tiny-llama-fp8-kv"), &[], "fp8", 1),
    ] {
        let plan = memory(model, args);
        assert_eq!(plan["kv_cache_dtype"], dtype);
        assert_eq!(plan["kv_cache_bytes_per_token"], elements * bytes);
        assert_eq!((&plan["max_model_len"], &plan["max_num_seqs"]), (&json!(4096), &json!(16)));
        assert_eq!(plan["kv_cache_tokens"], 16 * 4096);
        assert_eq!(plan["kv_cache_bytes"], 16 * 4096 * elements * bytes);
    }
    let plan = memory(None, &["--max-model-len", "100", "--max-num-seqs", "3"]);
    // Pages have 16 tokens.
    assert_eq!((&plan["kv_cache_tokens"], &plan["max_model_len"]), (&json!(3 * 112), &json!(100)));
    assert_eq!(plan["rotary_table_bytes"], 112 * 64 * 4);
    let plan = memory(None, &["--kv-cache-memory", "1M"]);
    assert_eq!(plan["kv_cache_bytes"], 21 * 16 * elements * 2);
    let parts = ["weights_bytes", "rotary_table_bytes", "kv_cache_bytes", "scratch_bytes"];
    let sum: u64 = parts.iter().map(|part| plan[part].as_u64().unwrap()).sum();
    assert_eq!(plan["total_bytes"], sum);
    // Codes as they are, and scales and norms in f32.
    let weights = plan["weights_bytes"].as_u64().unwrap();
    assert!((7_600_000..7_800_000).contains(&weights), "{weights}");
}

#[test]
fn f16_is_said_to_be_cast() {
    let dir = tempfile::tempdir().unwrap();
    support::checkpoints::write_as_f16("tiny-llama", dir.path());
    let path = dir.path().to_str().unwrap();
    let object = &quaver(["inspect", "--json", "--model", path]).json()[0];
    let dtype = &object["dtypes"][0];
    assert_eq!((&dtype["dtype"], &dtype["loaded_as"]), (&json!("F16"), &json!("F32")));
    assert_eq!(dtype["bytes"].as_u64().unwrap(), 2 * object["parameters"].as_u64().unwrap());
    assert_eq!(object["memory"]["weights_bytes"].as_u64().unwrap(), 4 * object["parameters"].as_u64().unwrap());
    let text = quaver(["inspect", "--model", path]).succeeds();
    assert!(text.contains("F16: ") && text.contains(", cast to F32 at load"), "{text}");
}

#[test]
fn tensors_are_listed_where_asked_for() {
    assert_eq!(inspect(None, &[]).get("tensors"), None);
    let object = inspect(None, &["--tensors"]);
    let tensors = object["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 140);
    let want = json!({"name": "model.embed_tokens.weight", "dtype": "BF16", "shape": [4096, 256], "bytes": 2 << 20});
    assert_eq!(tensors[0], want);
    let stored: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    let dtypes: u64 = object["dtypes"].as_array().unwrap().iter().map(|dtype| dtype["bytes"].as_u64().unwrap()).sum();
    assert_eq!(stored, dtypes);
    let text = quaver(["inspect", "--tensors"]).succeeds();
    let line = text.lines().find(|line| line.starts_with("model.norm.weight ")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["model.norm.weight", "BF16", "[256]", "512"]);
}

#[test]
fn the_summary_is_for_people() {
    let text = quaver(["inspect"]).succeeds();
    for line in [
        "parameters      6,556,928 (6.6M)",
        "attention       8 heads, 2 key-value heads, of 64",
        "context         4096 tokens",
        "head            tied: the embedding",
        "stored          F8_E4M3: 42 tensors, 5.2 MiB",
        "                Linear: weights E4M3, one scale a channel; activations E4M3, one static scale",
        "ignored         lm_head",
        "memory for      16 sequences of up to 4096 tokens",
        "  kv cache      192.0 MiB: 65,536 tokens of 3,072 bytes in bf16",
    ] {
        assert!(text.lines().any(|have| have == line), "{line:?} is not in\n{text}");
    }
}

#[test]
fn sizes_that_make_no_plan_are_refused() {
    quaver(["inspect", "--max-model-len", "5000"])
        .fails(1, "--max-model-len 5000: the model is made for 4096 tokens; give 1 to 4096");
    quaver(["inspect", "--max-num-seqs", "0"])
        .fails(2, "invalid value '0' for '--max-num-seqs <N>': 0 is not in 1..=65535 (see quaver --help)");
}

#[test]
fn devices_are_listed_with_what_auto_takes() {
    let object = &quaver(["devices", "--json"]).json()[0];
    let devices = object["devices"].as_array().unwrap();
    assert_eq!(devices.iter().filter(|device| device["auto"] == true).count(), 1);
    let cpu = devices.iter().find(|device| device["backend"] == "cpu").unwrap();
    assert_eq!((&cpu["device"], &cpu["fp8"]), (&json!(0), &json!("emulated")));
    assert!(cpu["name"].is_string() && cpu["driver"].is_string());
    if cfg!(target_os = "linux") {
        assert!(cpu["memory_bytes"].as_u64().unwrap() > 1 << 20);
    }
    assert!(devices.iter().any(|device| device["backend"] == "reference"));
    // Every backend has a device, or a reason why it has none.
    let reasons = object["unavailable"].as_array().unwrap();
    for backend in ["cuda", "wgpu"] {
        let named = |list: &[Value]| list.iter().any(|entry| entry["backend"] == backend);
        assert!(named(devices) || named(reasons), "{backend}");
    }
    let auto = &devices.iter().find(|device| device["auto"] == true).unwrap()["backend"];
    let used = quaver(["generate", "--backend", "auto", "--json", "-n", "0", "hi"]).json();
    assert_eq!(&used[0]["backend"], auto);
    let text = quaver(["devices"]).succeeds();
    assert!(text.starts_with("backend ") && text.contains("auto takes this one"), "{text}");
}
