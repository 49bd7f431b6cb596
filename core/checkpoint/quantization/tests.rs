use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::checkpoint::testing::{fp8, merged};

fn read(value: Value) -> Result<QuantizationConfig> {
    QuantizationConfig::from_json(&value)
}

fn refusal(base: Value, changes: Value) -> String {
    read(merged(base, changes)).unwrap_err().to_string()
}

/// Changes of the arguments of group_0.
fn group(changes: Value) -> Value {
    json!({"config_groups": {"group_0": changes}})
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn the_schemes_of_llm_compressor_are_read() {
    for (weights, strategy) in [("tensor", WeightStrategy::Tensor), ("channel", WeightStrategy::Channel)] {
        for (input, activations) in
            [("static", Activations::Static), ("dynamic", Activations::Dynamic), ("none", Activations::None)]
        {
            let got = read(fp8(weights, input)).unwrap();
            assert_eq!(got.scheme(Q_PROJ), Some(LinearScheme { weights: strategy, activations }), "{weights} {input}");
            assert_eq!(got.scheme("lm_head"), None);
            assert_eq!(got.kv_cache, None);
        }
    }
}

#[test]
fn files_of_2024_with_few_keys_are_read() {
    let got = read(json!({
        "config_groups": {"group_0": {
            "input_activations": {"dynamic": false, "num_bits": 8, "strategy": "tensor", "type": "float"},
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "group_size": -1, "symmetric": true, "type": "float", "observer": "minmax"}
        }},
        "format": "naive-quantized", "ignore": ["lm_head"], "quant_method": "compressed-tensors",
        "quantization_status": "frozen"
    }));
    let want = LinearScheme { weights: WeightStrategy::Channel, activations: Activations::Static };
    assert_eq!(got.unwrap().scheme(Q_PROJ), Some(want));
}

#[test]
fn every_accepted_value_is_accepted() {
    for changes in [
        json!({"format": null}),
        json!({"format": "naive-quantized", "config_groups": {"group_0": {"format": null}}}),
        json!({"format": "mixed-precision"}),
        json!({"quant_method": null}),
        json!({"quantization_status": null}),
        json!({"quantization_status": "frozen"}),
        json!({"sparsity_config": null, "transform_config": null}),
        json!({"sparsity_config": {"format": "dense"}}),
        json!({"transform_config": {"config_groups": {}}}),
        json!({"ignore": null}),
        json!({"config_groups": null}),
        json!({"something": {"new": 1}}),
    ] {
        assert!(read(merged(fp8("channel", "static"), changes.clone())).is_ok(), "{changes}");
    }
}

#[test]
fn kv_cache_scheme_is_static_fp8_per_tensor() {
    let scheme = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor", "dynamic": false});
    let with = |changes| merged(fp8("tensor", "static"), json!({"kv_cache_scheme": merged(scheme.clone(), changes)}));
    assert_eq!(read(with(json!({}))).unwrap().kv_cache, Some(KvCacheScheme::Fp8PerTensor));
    for (changes, what, supported) in [
        (json!({"strategy": "attn_head"}), "KV cache strategy static attn_head", "static tensor is"),
        (json!({"dynamic": true}), "KV cache strategy dynamic tensor", "static tensor is"),
        (json!({"type": "int"}), "KV cache type 8-bit int", "8-bit float is"),
        (json!({"symmetric": false}), "asymmetric KV cache quantization", "symmetric is"),
    ] {
        let message = format!("{what} (kv_cache_scheme) is not supported: {supported}");
        assert_eq!(refusal(with(changes), json!({})), message);
    }
}

#[test]
fn other_quantizations_are_refused_by_name() {
    for method in ["fp8", "gptq", "awq", "bitsandbytes"] {
        assert_eq!(
            read(json!({"quant_method": method, "bits": 4})).unwrap_err().to_string(),
            format!("quant_method {method} is not supported: compressed-tensors is")
        );
    }
    let formats = "float-quantized and naive-quantized are";
    for (changes, what, supported) in [
        (json!({"format": "pack-quantized"}), "format pack-quantized", formats),
        (json!({"format": "int-quantized"}), "format int-quantized", formats),
        (group(json!({"format": "nvfp4-pack-quantized"})), "format nvfp4-pack-quantized", formats),
        (
            json!({"format": "mixed-precision", "config_groups": {"group_0": {"format": null}}}),
            "format mixed-precision",
            formats,
        ),
        (json!({"quantization_status": "calibration"}), "quantization_status calibration", "compressed and frozen are"),
        (json!({"sparsity_config": {"format": "sparse-24-bitmask"}}), "sparsity format sparse-24-bitmask", "dense is"),
        (json!({"sparsity_config": {"targets": []}}), "sparsity_config without format", "dense is"),
        (
            json!({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}),
            "transform_config",
            "checkpoints without transforms are",
        ),
        (
            group(json!({"output_activations": {"num_bits": 8}})),
            "output_activations (group_0)",
            "weights and input_activations are",
        ),
        (
            group(json!({"weights": {"strategy": "block", "block_structure": [128, 128]}})),
            "weight strategy block (group_0)",
            "tensor and channel are",
        ),
        (
            group(json!({"weights": {"strategy": "group", "group_size": 128}})),
            "weight strategy group (group_0)",
            "tensor and channel are",
        ),
        (
            group(json!({"weights": {"strategy": null, "group_size": 128}})),
            "weight strategy group (group_0)",
            "tensor and channel are",
        ),
        (group(json!({"weights": {"type": "int"}})), "weight type 8-bit int (group_0)", "8-bit float is"),
        (group(json!({"weights": {"type": null}})), "weight type 8-bit int (group_0)", "8-bit float is"),
        (group(json!({"weights": {"num_bits": 4}})), "weight type 4-bit float (group_0)", "8-bit float is"),
        (group(json!({"weights": {"symmetric": false}})), "asymmetric weight quantization (group_0)", "symmetric is"),
        (group(json!({"weights": {"dynamic": true}})), "dynamic weight quantization (group_0)", "static is"),
        (group(json!({"weights": null})), "input_activations without weights (group_0)", "FP8 weights are"),
        (
            group(json!({"input_activations": {"strategy": "group", "group_size": 128, "dynamic": true}})),
            "activation strategy dynamic group (group_0)",
            "static tensor and dynamic token are",
        ),
        (
            group(json!({"input_activations": {"dynamic": true}})),
            "activation strategy dynamic tensor (group_0)",
            "static tensor and dynamic token are",
        ),
        (
            group(json!({"input_activations": {"strategy": "token"}})),
            "activation strategy static token (group_0)",
            "static tensor and dynamic token are",
        ),
        (group(json!({"input_activations": {"type": "int"}})), "activation type 8-bit int (group_0)", "8-bit float is"),
    ] {
        let message = format!("{what} is not supported: {supported}");
        assert_eq!(refusal(fp8("channel", "static"), changes), message);
    }
    assert_eq!(
        read(json!({"load_in_4bit": true})).unwrap_err().to_string(),
        "quantization_config without quant_method is not supported: compressed-tensors is"
    );
}

#[test]
fn values_of_the_wrong_kind_are_refused() {
    for (changes, why) in [
        (json!({"config_groups": []}), "invalid type: sequence, expected a map"),
        (json!({"ignore": "lm_head"}), "invalid type: string \"lm_head\", expected a sequence"),
        (group(json!({"targets": 1})), "config group group_0: invalid type: integer `1`, expected a sequence"),
        (
            json!({"config_groups": {"group_0": 1}}),
            "config group group_0: invalid type: integer `1`, expected struct RawGroup",
        ),
    ] {
        assert_eq!(
            refusal(fp8("channel", "static"), changes),
            format!("config.json: `quantization_config` cannot be read: {why}")
        );
    }
}

#[test]
fn ignored_modules_are_met_by_name_pattern_or_class() {
    for (ignore, q_proj, head) in [
        (json!([]), true, true),
        (json!([Q_PROJ]), false, true),
        (json!(["re:.*self_attn", "lm_head"]), false, false),
        (json!(["re:self_attn"]), true, true),
        (json!(["Linear"]), false, false),
        (json!(["q_proj", "model.layers.0"]), true, true),
    ] {
        let got = read(merged(fp8("tensor", "static"), json!({"ignore": ignore}))).unwrap();
        assert_eq!((got.scheme(Q_PROJ).is_some(), got.scheme("lm_head").is_some()), (q_proj, head), "{ignore}");
    }
}

#[test]
fn a_name_goes_before_a_pattern_and_a_pattern_before_a_class() {
    let group = |weights: &str, activations: &str, targets: Value| {
        merged(fp8(weights, activations)["config_groups"]["group_0"].clone(), json!({"targets": targets}))
    };
    let down = "model.layers.0.mlp.down_proj";
    let got = read(merged(
        fp8("tensor", "static"),
        json!({"config_groups": {
            "group_0": group("tensor", "static", json!(["Linear"])),
            "group_1": group("channel", "dynamic", json!(["re:.*_proj", down])),
            "group_2": group("channel", "none", json!(["re:.*down_proj", "re:.*mlp.*", down])),
            "group_3": {"targets": ["lm"], "weights": null}
        }}),
    ))
    .unwrap();
    for (module, weights, activations) in [
        ("other", WeightStrategy::Tensor, Activations::Static),
        (Q_PROJ, WeightStrategy::Channel, Activations::Dynamic),
        // Both groups name it: the later one holds.
        (down, WeightStrategy::Channel, Activations::None),
        // `re:.*_proj` stands before `re:.*mlp.*` in alphabetical order.
        ("model.layers.0.mlp.up_proj", WeightStrategy::Channel, Activations::Dynamic),
        ("model.layers.1.mlp.down_proj", WeightStrategy::Channel, Activations::Dynamic),
    ] {
        assert_eq!(got.scheme(module), Some(LinearScheme { weights, activations }), "{module}");
    }
    assert_eq!(got.scheme("lm"), None);
}

#[test]
fn patterns_and_targets_without_end_are_refused() {
    let many: Vec<String> = (0..600).map(|i| format!("re:{i}")).collect();
    assert_eq!(
        refusal(fp8("tensor", "static"), json!({"ignore": many})),
        "config.json: `quantization_config` cannot be read: more than 16384 targets, or 512 patterns"
    );
}

proptest! {
    #[test]
    fn no_change_of_a_config_makes_it_panic(at in any::<prop::sample::Index>(), to in "[\\[\\]{}\",:a-z0-9 .-]{0,3}") {
        let mut text = fp8("channel", "static").to_string();
        let at = at.index(text.len());
        text.replace_range(at..at + 1, &to);
        if let Ok(value) = serde_json::from_str(&text) {
            let _ = read(value).map(|config| config.scheme(Q_PROJ));
        }
    }
}
