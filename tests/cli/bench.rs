//! `quaver bench`: what is counted and kept. Nothing here depends on how long anything takes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use quaver::core::checkpoint::TensorDType;
use serde_json::{Value, json};

use crate::support::checkpoints::{folder, open};
use crate::{Quaver, quaver};

/// `bench` with these arguments, of the smallest case where they do not say otherwise.
fn bench(args: &[&str]) -> Quaver {
    let small = [("--batch", "1"), ("--prompt-tokens", "8"), ("--gen-tokens", "4"), ("--repeat", "1")];
    let small = small.into_iter().filter(|(flag, _)| !args.contains(flag)).flat_map(|(flag, value)| [flag, value]);
    quaver(["bench"].into_iter().chain(small).chain(args.iter().copied()))
}

fn keys(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_json_has_a_row_for_every_batch_and_length() {
    let args = ["--batch", "1,3", "--prompt-tokens", "8,20", "--gen-tokens", "2", "--repeat", "2", "--json"];
    let object = bench(&args).json().remove(0);
    for key in
        ["model", "backend", "device", "machine", "rows", "variant", "load_ms", "weights_bytes", "kv_cache_bytes"]
    {
        assert!(keys(&object).contains(key), "{key}");
    }
    assert_eq!((&object["model"], &object["backend"]), (&json!("quaver-demo"), &json!("cpu")));
    assert_eq!((&object["scheme"], &object["machine"]["threads"]), (&json!("fp8-channel"), &json!(1)));
    let (median, range) = (&object["machine"]["bandwidth_gb_s"], &object["machine"]["bandwidth_gb_s_spread"]);
    assert!(range[0].as_f64() <= median.as_f64() && median.as_f64() <= range[1].as_f64());
    if cfg!(target_os = "linux") && !object["peak_memory_bytes"].is_null() {
        let (peak, weights) = (object["peak_memory_bytes"].as_u64(), object["weights_bytes"].as_u64());
        // Far from the 512 MiB that the machine is measured with.
        assert!(peak > weights && peak < Some(256 << 20), "{peak:?}");
    }
    let rows = object["rows"].as_array().unwrap();
    let sizes: Vec<_> = rows.iter().map(|row| [&row["batch"], &row["prompt_tokens"], &row["gen_tokens"]]).collect();
    assert_eq!(json!(sizes), json!([[1, 8, 2], [1, 20, 2], [3, 8, 2], [3, 20, 2]]));
    for row in rows {
        for key in [
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "ttft_ms",
            "bytes_per_token",
            "share_of_bandwidth",
            "share_of_arithmetic",
        ] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        let (batch, prompt) = (row["batch"].as_u64().unwrap(), row["prompt_tokens"].as_u64().unwrap());
        assert_eq!((&row["prefill"]["tokens"], &row["decode"]["tokens"]), (&json!(batch * prompt), &json!(batch * 2)));
        for phase in ["prefill", "decode"] {
            let share = |key: &str| row[phase][key].as_f64().unwrap();
            let floor = share("share_of_bandwidth").max(share("share_of_arithmetic"));
            assert!((share("share_of_floor") / floor - 1.0).abs() < 1e-9);
            let spread = &row[phase]["tokens_per_s_spread"];
            assert!(spread[0].as_f64() <= spread[1].as_f64() && row[phase]["ops"] == json!([]));
        }
    }
}

/// What every step must read, and multiply with each row, by the checkpoint's own tensors: scales and norms are kept in
/// f32, and the head is the embedding.
fn weights(model: &str) -> (u64, u64) {
    let (mut bytes, mut products) = (0, 0);
    for tensor in open(model).tensors() {
        let elements = tensor.shape.iter().product::<usize>() as u64;
        let (name, matrix) = (&tensor.name, tensor.shape.len() == 2 && tensor.name.ends_with(".weight"));
        bytes += match tensor.dtype {
            _ if [".input_scale", ".k_scale", ".v_scale"].iter().any(|end| name.ends_with(end)) => 0,
            TensorDType::E4m3 => elements,
            _ if matrix => 2 * elements,
            // A scale a tensor is broadcast to its channels.
            _ if name.ends_with("_scale") && elements == 1 => {
                let of = open(model).find(name.trim_end_matches("_scale")).unwrap().shape[0];
                4 * of as u64
            }
            _ => 4 * elements,
        };
        products += if matrix { elements } else { 0 };
    }
    (bytes, products)
}

#[test]
fn decoding_counts_the_weights_once_a_step_and_the_cache_once_a_sequence() {
    // 6 layers, 8 query and 2 key-value heads of 64, a width of 256.
    for (model, kv_bytes) in
        [("tiny-llama-fp8-channel", 2), ("tiny-llama-fp8", 2), ("tiny-llama", 2), ("tiny-llama-fp8-kv", 1)]
    {
        let (weights, products) = weights(model);
        let path = folder(model).display().to_string();
        let object = bench(&[&path, "--batch", "1,2", "--json"]).json().remove(0);
        assert_eq!(object["weights_bytes"], weights, "{model}");
        let position = 6 * 2 * 2 * 64 * kv_bytes;
        for (row, batch) in object["rows"].as_array().unwrap().iter().zip([1, 2]) {
            // Four steps, at positions 8 to 11 of every sequence.
            let attended: u64 = (8..12).map(|position| position + 1).sum();
            let new = position + 6 * 64 * 4 + 256 * 2;
            let bytes = 4 * weights + batch * (attended * position + 4 * new);
            assert_eq!(row["decode"]["bytes"], bytes, "{model} b{batch}");
            assert_eq!(row["bytes_per_token"], bytes as f64 / (4 * batch) as f64, "{model} b{batch}");
            let attention = 4 * 6 * 8 * 64;
            let flops = 4 * batch * 2 * products + batch * attended * attention;
            assert_eq!(row["decode"]["flops"], flops, "{model} b{batch}");
            // The head is multiplied with the last rows alone.
            let head = 4096 * 256;
            let attended = (1..=8).sum::<u64>();
            let flops = batch * (8 * 2 * (products - head) + 2 * head + attended * attention);
            assert_eq!(row["prefill"]["flops"], flops, "{model} b{batch}");
        }
    }
}

#[test]
fn more_sequences_than_the_head_takes_at_once_are_counted_too() {
    let object = bench(&["--batch", "70", "--gen-tokens", "1", "--json"]).json().remove(0);
    assert_eq!(object["rows"][0]["decode"]["tokens"], 70);
}

#[test]
fn prompts_of_several_steps_leave_room_for_those_that_wait() {
    let args = ["--batch", "4", "--prompt-tokens", "50", "--max-num-batched-tokens", "16", "--json"];
    let object = bench(&args).json().remove(0);
    assert_eq!(
        (&object["rows"][0]["prefill"]["tokens"], &object["rows"][0]["decode"]["tokens"]),
        (&json!(200), &json!(16))
    );
}

#[test]
fn the_reference_is_measured_on_one_thread() {
    let args = ["--backend", "reference", "--prompt-tokens", "1", "--gen-tokens", "1", "--json"];
    let object = bench(&args).json().remove(0);
    assert_eq!((&object["backend"], &object["machine"]["threads"]), (&json!("reference"), &json!(1)));
}

#[test]
fn every_op_is_named_with_its_time() {
    let names = [
        "attend self_attn",
        "embed embed_tokens",
        "gather wanted",
        "linear lm_head",
        "linear mlp.down_proj",
        "linear mlp.gate_up_proj",
        "linear self_attn.o_proj",
        "linear self_attn.qkv_proj",
        "rms_norm input_layernorm",
        "rms_norm norm",
        "rms_norm post_attention_layernorm",
        "rope_append self_attn.rope",
        "sample sample",
        "swiglu mlp.act_fn",
    ];
    let object = bench(&["--per-op", "--json"]).json().remove(0);
    for phase in ["prefill", "decode"] {
        let phase = &object["rows"][0][phase];
        let ops = phase["ops"].as_array().unwrap();
        assert_eq!(ops.iter().map(|op| op["op"].as_str().unwrap()).collect::<BTreeSet<_>>(), BTreeSet::from(names));
        for key in ["bytes", "flops"] {
            assert_eq!(ops.iter().map(|op| op[key].as_u64().unwrap()).sum::<u64>(), phase[key], "{key}");
        }
    }
    let text = bench(&["--per-op"]).succeeds();
    for title in ["prefill b1 p8", "decode b1 p8"] {
        let table: Vec<_> = text.lines().skip_while(|line| *line != title).skip(2).take(names.len()).collect();
        assert!(names.iter().all(|name| table.iter().any(|line| line.starts_with(name))), "{text}");
    }
}

/// The rows of a CSV file as (case, figure, value).
fn rows(path: &Path) -> Vec<[String; 3]> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let rows = reader.records().map(|row| {
        let row = row.unwrap();
        assert!(row[0].parse::<jiff::Timestamp>().is_ok() && row[0].ends_with('Z'), "{row:?}");
        [7, 8, 10].map(|i| row[i].to_owned())
    });
    rows.collect()
}

#[test]
fn figures_are_appended_and_held_against_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bench.csv");
    let csv = ["--csv", file.to_str().unwrap()];
    let last = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| !line.starts_with("case ")).skip(1);
        lines.map(|line| line.split_whitespace().next_back().unwrap().to_owned()).collect()
    };
    let first = bench(&csv).succeeds();
    let count = rows(&file).len();
    assert_eq!(last(&first), vec!["-"; count]);
    assert!(rows(&file).iter().any(|[case, figure, _]| case == "decode b1 p8 g4" && figure == "speed"));
    let second = bench(&csv).succeeds();
    let kept = rows(&file);
    assert_eq!((kept.len(), fs::read_to_string(&file).unwrap().matches("time,commit,").count()), (2 * count, 1));
    for (i, ratio) in last(&second).iter().enumerate() {
        let [now, then] = [&kept[count + i], &kept[i]].map(|row| row[2].parse::<f64>().unwrap());
        let want = match &*kept[i][1] {
            "kv_cache" | "peak_memory" => "-".to_owned(),
            _ => format!("{:.3}", now / then),
        };
        assert_eq!(*ratio, want, "{:?}", kept[i]);
        assert_eq!(kept[count + i][..2], kept[i][..2]);
    }
    // Another model, or another variant, has a history of its own.
    let other = bench(&[&csv[..], &["--variant", "portable"]].concat()).succeeds();
    assert!(last(&other).iter().all(|ratio| ratio == "-"), "{other}");
}

#[test]
fn a_file_that_is_no_benchmark_is_refused_and_left_alone() {
    const HEADER: &str = "time,commit,machine,backend,device,variant,model,case,figure,unit,value,share_of_floor";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file.csv");
    let name = file.display().to_string();
    for (text, why) in [
        ("a,b\n1,2\n".to_owned(), format!("is no file of quaver bench: its header is not {HEADER}")),
        (
            format!("{HEADER}\n,,,,,,,,,,much,\n"),
            "row 2 has the value \"much\"; mend it or give another file".to_owned(),
        ),
    ] {
        fs::write(&file, &text).unwrap();
        bench(&["--csv", &name]).fails(1, &format!("{name}: {why}"));
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
    fs::write(&file, format!("{HEADER}\n1,2\n")).unwrap();
    bench(&["--csv", &name]).fails_with(1, &["row 2 is damaged", "mend it or give another file"]);
    bench(&["--csv", "/dev/null"]).fails_with(1, &["/dev/null: is no file of at most 64 MiB; give another one"]);
    let missing = dir.path().join("none/file.csv").display().to_string();
    bench(&["--csv", &missing]).fails_with(1, &["cannot open", &missing]);
}

#[test]
fn sizes_that_cannot_be_run_are_refused() {
    for (args, message) in [
        (&["--batch", "0"][..], "invalid value '0' for '--batch <N,..>': 0 is not in 1..=4096 (see quaver --help)"),
        (
            &["--batch", "1,,2"],
            "invalid value '' for '--batch <N,..>': cannot parse integer from empty string (see quaver --help)",
        ),
        (
            &["--prompt-tokens", "0"],
            "invalid value '0' for '--prompt-tokens <N,..>': 0 is not in 1..=4294967295 (see quaver --help)",
        ),
        (
            &["--gen-tokens", "0"],
            "invalid value '0' for '--gen-tokens <N>': 0 is not in 1..=4294967295 (see quaver --help)",
        ),
        (&["--repeat", "0"], "invalid value '0' for '--repeat <N>': 0 is not in 1..=1000 (see quaver --help)"),
    ] {
        quaver([&["bench"], args].concat()).fails(2, message);
    }
    let long = |tokens: &str, comes_to: &str, context: &str| {
        format!(
            "prompts of {tokens} tokens: with 4 generated ones a sequence comes to {comes_to}, the context holds \
             {context}; lower --prompt-tokens or --gen-tokens"
        )
    };
    bench(&["--prompt-tokens", "5000"]).fails(1, &long("5000", "5005", "4096"));
    bench(&["--prompt-tokens", "8,4294967295"]).fails(1, &long("4294967295", "4294967300", "4096"));
    bench(&["--max-model-len", "10"]).fails(1, &long("8", "13", "10"));
    // Pages of 16 tokens, of 3072 bytes a token.
    bench(&["--batch", "8", "--kv-cache-memory", "200K"]).fails(
        1,
        "the KV cache of 8 sequences of 13 tokens needs 393216 bytes, 204800 are available; raise --kv-cache-memory or \
         lower --batch",
    );
    bench(&["--model", "nowhere/at/all"]).fails_with(1, &["nowhere/at/all"]);
}
