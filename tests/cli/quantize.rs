//! `quaver quantize`: the command around the quantizer.

use std::fs;

use crate::quaver;
use crate::support::checkpoints;

/// The fixture model's folder, with a tokenizer, a licence and a card of its own.
fn source(folder: &std::path::Path) -> String {
    let to = folder.join("source");
    fs::create_dir(&to).unwrap();
    let model = checkpoints::folder("tiny-llama");
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(model.join(file), to.join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(checkpoints::demo().join(file), to.join(file)).unwrap();
    }
    fs::write(to.join("LICENSE.txt"), "terms").unwrap();
    fs::write(to.join("NOTICE"), "built with").unwrap();
    fs::write(to.join("README.md"), "---\nlicense: apache-2.0\ntags:\n- x\n---\n# Card\n").unwrap();
    to.display().to_string()
}

#[test]
fn a_quantized_model_answers_and_brings_everything_along() {
    let folder = tempfile::tempdir().unwrap();
    let (source, to) = (source(folder.path()), folder.path().join("out"));
    let model = to.display().to_string();
    let texts = folder.path().join("texts.jsonl");
    let lines = [
        r#"{"text": "It was a cold morning in the old house."}"#,
        r#"{"messages": [{"role": "user", "content": "Who is Captain Hook?"}, {"role": "assistant", "content": "A pirate."}]}"#,
        r#"{"prompt": "Once upon a time"}"#,
        r#"{"input_ids": [4080, 895, 305]}"#,
    ];
    fs::write(&texts, lines.join("\n")).unwrap();
    let texts = texts.display().to_string();
    let args =
        ["quantize", &source, &model, "--scheme", "fp8", "--kv-cache", "--calibration", &texts, "--backend", "cpu"];
    assert_eq!(quaver(args).succeeds(), "");
    for (file, text) in [("LICENSE.txt", "terms"), ("NOTICE", "built with")] {
        assert_eq!(fs::read_to_string(to.join(file)).unwrap(), text);
    }
    let card = fs::read_to_string(to.join("README.md")).unwrap();
    let flags = "--scheme fp8 --kv-cache --ignore lm_head --calibration texts.jsonl --samples 512 \
                 --max-seq-len 2048 --batch-size 1 --backend cpu\n";
    for part in ["---\nlicense: apache-2.0\n", "| calibration | 4 samples,", "of texts.jsonl, run on cpu (", flags] {
        assert!(card.contains(part), "{part:?} is not in {card}");
    }
    let answer = quaver(["generate", "--model", &model, "--temperature", "0", "Who is Captain Hook?"]).succeeds();
    assert_eq!(answer, "Captain Hook is a pirate, and the great enemy of Peter Pan.\n");
}

#[test]
fn a_seed_draws_the_samples_and_the_card_repeats_them() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let texts = folder.path().join("texts.jsonl");
    let lines = ["It was a cold morning.", "Nobody said a word.", "Once upon a time", "A pirate!", "The fire was out."];
    fs::write(&texts, lines.map(|text| serde_json::json!({"text": text}).to_string()).join("\n")).unwrap();
    let texts = texts.display().to_string();
    let quantized = |name: &str, more: &[&str]| {
        let to = folder.path().join(name);
        let args = ["quantize", &source, to.to_str().unwrap(), "--scheme", "fp8", "--calibration", &texts];
        assert_eq!(quaver([&args, more].concat()).succeeds(), "");
        (fs::read(to.join("model.safetensors")).unwrap(), fs::read_to_string(to.join("README.md")).unwrap())
    };
    let (first, _) = quantized("first", &["--samples", "2"]);
    let (drawn, card) = quantized("drawn", &["--samples", "2", "--shuffle", "7", "--max-seq-len", "16"]);
    assert!(drawn != first);
    let (_, flags) = card.split_once("--calibration texts.jsonl ").unwrap();
    let flags: Vec<&str> = flags.lines().next().unwrap().split(' ').collect();
    assert!(flags.starts_with(&["--samples", "2", "--max-seq-len", "16", "--shuffle", "7"]), "{flags:?}");
    assert!(quantized("again", &flags).0 == drawn);
}

#[test]
fn mistakes_are_told_before_anything_is_computed() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("out").display().to_string();
    let source = checkpoints::folder("tiny-llama").display().to_string();
    let static_scales =
        "static scales need --calibration FILE: JSON lines or a text of the kind that the model will see";
    quaver(["quantize", &source, &to, "--scheme", "fp8"]).fails(2, static_scales);
    quaver(["quantize", &source, &to, "--kv-cache"]).fails(2, static_scales);
    quaver(["quantize", &source, &to, "--calibration", "x.jsonl"])
        .fails(2, "fp8-dynamic has no static scales: leave --calibration out, or add --kv-cache");
    quaver(["quantize", &source, &to, "--scheme", "int8"])
        .fails_with(2, &["the schemes are fp8, fp8-channel, fp8-dynamic"]);
    let texts = folder.path().join("texts.jsonl");
    let path = texts.display().to_string();
    for (text, why) in [
        ("", "has no sample; give a JSON object a line, such as {\"text\": ...}"),
        ("{\"txt\": \"a\"}", "line 1: has none of text, messages, prompt and input_ids; give one"),
        ("{\"text\": \"a\"}\nnonsense", "line 2: expected ident at line 1 column 2; a JSON object a line is expected"),
    ] {
        fs::write(&texts, text).unwrap();
        let message = format!("{path}: {why}");
        quaver(["quantize", &source, &to, "--scheme", "fp8", "--calibration", &path]).fails(1, &message);
    }
    quaver(["quantize", &source, &to, "--ignore", "none"]).fails(
        1,
        "tensor lm_head: is the embedding in this model (tie_word_embeddings), which stays as it is; --ignore it",
    );
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_run_that_is_killed_leaves_nothing_that_the_next_one_does_not_remove() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(folder.path()), folder.path().join("Llama-3.2"));
    let texts = folder.path().join("texts.txt");
    fs::write(&texts, "It was a cold morning in the old house. ".repeat(20_000)).unwrap();
    let (to, texts) = (out.display().to_string(), texts.display().to_string());
    let calibrated = ["--scheme", "fp8", "--calibration", &texts, "--backend", "reference"];
    let mut run = quaver([&["quantize", &source, &to], &calibrated[..]].concat()).command.spawn().unwrap();
    let part = folder.path().join(format!("Llama-3.2.part-{}", run.id()));
    while !part.exists() {
        assert_eq!(run.try_wait().unwrap(), None);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    assert!(!out.exists() && part.exists());
    assert_eq!(quaver(["quantize", &source, &to]).succeeds(), "");
    assert!(out.join("config.json").exists() && !part.exists());
}

/// A model of 16 layers whose weights, all zeros, take no place on the disk; the bytes of its file.
#[cfg(target_os = "linux")]
fn large_source(folder: &std::path::Path) -> u64 {
    let text = fs::read_to_string(checkpoints::folder("tiny-llama").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("hidden_size", 1024),
        ("intermediate_size", 4096),
        ("num_hidden_layers", 16),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 4),
    ] {
        config[key] = value.into();
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0u64);
    let mut add = |name: String, shape: &[u64]| {
        let start = end;
        end += shape.iter().product::<u64>() * 2;
        header.insert(name, serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    };
    add("model.embed_tokens.weight".into(), &[4096, 1024]);
    add("model.norm.weight".into(), &[1024]);
    for layer in 0..16 {
        let mut add = |part: &str, shape: &[u64]| add(format!("model.layers.{layer}.{part}.weight"), shape);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(norm, &[1024]);
        }
        for (part, n, k) in [("q", 1024, 1024), ("k", 256, 1024), ("v", 256, 1024), ("o", 1024, 1024)] {
            add(&format!("self_attn.{part}_proj"), &[n, k]);
        }
        for (part, n, k) in [("gate", 4096, 1024), ("up", 4096, 1024), ("down", 1024, 4096)] {
            add(&format!("mlp.{part}_proj"), &[n, k]);
        }
    }
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let header = serde_json::to_vec(&header).unwrap();
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    let length = 8 + header.len() as u64 + end;
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
    length
}

#[test]
#[cfg(target_os = "linux")]
fn memory_holds_a_few_tensors_whatever_the_models_size() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("source"), folder.path().join("out"));
    let source_mib = large_source(&from) >> 20;
    let mut run = quaver(["quantize".as_ref(), from.as_os_str(), to.as_os_str()]).command.spawn().unwrap();
    let mut peak_mib = 0;
    while run.try_wait().unwrap().is_none() {
        // The mark only rises, so that the last look counts; a process that has ended has none.
        let status = fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap_or_default();
        let mark = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak_mib = mark.map_or(peak_mib, |kib| kib.parse::<u64>().unwrap() >> 10);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(run.wait().unwrap().success());
    eprintln!("{peak_mib} MiB in memory at most, for a source of {source_mib}");
    assert!(source_mib > 450 && (1..100).contains(&peak_mib), "{peak_mib} MiB of {source_mib}");
}
