use serde_json::{Value, json};

use super::*;
use crate::checkpoint::testing::{self, Entry, bf16, fp8, merged};

const W: &str = "model.layers.0.self_attn.q_proj.weight";
const SCALE: &str = "model.layers.0.self_attn.q_proj.weight_scale";
const INPUT: &str = "model.layers.0.self_attn.q_proj.input_scale";
const MODULE: &str = "model.layers.0.self_attn.q_proj";
const CODES: [u8; 6] = [0x38, 0xb8, 0x7e, 0xfe, 0x00, 0x80];

/// The layer `MODULE` of 3 outputs and 2 inputs out of these tensors.
fn read(quantization: Value, entries: &[Entry]) -> Result<LinearWeights> {
    let (_dir, files) = testing::model(quantization, entries);
    Checkpoint::open(files)?.linear(MODULE, 3, 2)
}

fn refusal(quantization: Value, entries: &[Entry]) -> String {
    read(quantization, entries).unwrap_err().to_string()
}

fn codes(shape: &'static [usize]) -> Entry<'static> {
    (W, "F8_E4M3", shape, &CODES)
}

#[test]
fn a_real_weight_is_the_tensor_itself() {
    let bytes = bf16(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let got = read(Value::Null, &[(W, "BF16", &[3, 2], &bytes)]).unwrap();
    let LinearWeight::Real(tensor) = got.weight else { panic!("{got:?}") };
    assert_eq!((got.name.as_str(), got.input), (MODULE, InputScale::None));
    assert_eq!(tensor.to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

#[test]
fn an_ignored_layer_is_a_real_weight() {
    let quantization = merged(fp8("channel", "static"), json!({"ignore": ["re:.*q_proj"]}));
    let bytes = bf16(&[1.0; 6]);
    let got = read(quantization, &[(W, "BF16", &[3, 2], &bytes)]).unwrap();
    assert!(matches!((got.weight, got.input), (LinearWeight::Real(_), InputScale::None)));
}

#[test]
fn scales_of_every_dtype_and_shape_are_read() {
    let two = [bf16(&[2.0]), half::f16::from_f32(2.0).to_le_bytes().into(), 2f32.to_le_bytes().into()];
    let rows = bf16(&[0.5, 1.0, 2.0]);
    for (strategy, dtype, shape, bytes, want) in [
        ("tensor", "BF16", &[][..], &two[0], [2.0, 2.0, 2.0]),
        ("tensor", "F16", &[1], &two[1], [2.0, 2.0, 2.0]),
        ("tensor", "F32", &[1, 1], &two[2], [2.0, 2.0, 2.0]),
        ("channel", "BF16", &[3, 1], &rows, [0.5, 1.0, 2.0]),
        ("channel", "BF16", &[3], &rows, [0.5, 1.0, 2.0]),
    ] {
        for (activations, input) in
            [("none", InputScale::None), ("static", InputScale::Static(2.0)), ("dynamic", InputScale::Dynamic)]
        {
            let entries = [codes(&[3, 2]), (SCALE, dtype, shape, bytes), (INPUT, "BF16", &[1], &two[0])];
            let got = read(fp8(strategy, activations), &entries).unwrap();
            let LinearWeight::Fp8 { codes, scale } = got.weight else { panic!("{got:?}") };
            assert_eq!(&*codes, &CODES);
            assert_eq!((&scale[..], got.input), (&want[..], input), "{strategy} {dtype} {shape:?} {activations}");
        }
    }
}

#[test]
fn scales_that_spoil_results_are_refused_by_tensor() {
    for (value, shown) in [(0.0, "0e0"), (-0.5, "-5e-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf"), (1e-40, "1e-40")] {
        let rows: Vec<u8> = [1.0, value, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let message = |i| format!("scale {i} is {shown}; scales must be positive and finite: quantize the model again");
        assert_eq!(
            refusal(fp8("channel", "dynamic"), &[codes(&[3, 2]), (SCALE, "F32", &[3, 1], &rows)]),
            format!("tensor {SCALE}: {}", message(1))
        );
        let entries =
            [codes(&[3, 2]), (SCALE, "BF16", &[1][..], &bf16(&[1.0])), (INPUT, "F32", &[1], &value.to_le_bytes())];
        assert_eq!(refusal(fp8("tensor", "static"), &entries), format!("tensor {INPUT}: {}", message(0)));
    }
}

#[test]
fn nan_codes_are_refused_by_place() {
    for nan in [0x7f, 0xff] {
        let bytes = [0, 0, 0, nan, 0, 0];
        assert_eq!(
            refusal(fp8("tensor", "dynamic"), &[(W, "F8_E4M3", &[3, 2], &bytes), (SCALE, "BF16", &[1], &bf16(&[1.0]))]),
            format!("tensor {W}: holds NaN at row 1, column 1; quantize the model again")
        );
    }
    let mut long = vec![0x7e; 10_000];
    assert_eq!(find_nan(&long), None);
    long[9_999] = 0xff;
    assert_eq!(find_nan(&long), Some(9_999));
    long[4_096] = 0x7f;
    assert_eq!(find_nan(&long), Some(4_096));
}

#[test]
fn tensors_that_disagree_with_the_config_are_refused() {
    let one = bf16(&[1.0]);
    let scale: Entry = (SCALE, "BF16", &[1], &one);
    let real = bf16(&[1.0; 6]);
    let take = "take the model's files from one source, whole";
    for (quantization, entries, why) in [
        (Value::Null, vec![], format!("{W}: is missing; {take}")),
        (
            Value::Null,
            vec![("model.layers.0.self_attn.qkv_proj.weight", "BF16", &[6][..], &real[..])],
            format!(
                "{W}: is missing, and model.layers.0.self_attn.qkv_proj.weight in its place is not supported; save \
                 the layers unfused, in format float-quantized"
            ),
        ),
        (
            Value::Null,
            vec![("model.layers.0.self_attn.q_proj.weight_packed", "I8", &[6], &CODES)],
            format!(
                "{W}: is missing, and {MODULE}.weight_packed in its place is not supported; save the layers unfused, \
                 in format float-quantized"
            ),
        ),
        (
            fp8("tensor", "dynamic"),
            vec![codes(&[2, 3]), scale],
            format!("{W}: has shape [2, 3], config.json calls for [3, 2]; take both from one model"),
        ),
        (fp8("tensor", "dynamic"), vec![codes(&[3, 2])], format!("{SCALE}: is missing; {take}")),
        (fp8("tensor", "static"), vec![codes(&[3, 2]), scale], format!("{INPUT}: is missing; {take}")),
        (
            fp8("channel", "dynamic"),
            vec![codes(&[3, 2]), scale],
            format!("{SCALE}: has shape [1], quantization_config calls for [3, 1]"),
        ),
        (
            fp8("tensor", "dynamic"),
            vec![codes(&[3, 2]), (SCALE, "BF16", &[3, 1], &real[..6])],
            format!("{SCALE}: has shape [3, 1], quantization_config calls for one scale"),
        ),
        (
            fp8("tensor", "dynamic"),
            vec![codes(&[3, 2]), (SCALE, "F8_E4M3", &[1], &CODES[..1])],
            format!("{SCALE}: is F8_E4M3; F32, F16 or BF16 is needed here"),
        ),
        (
            fp8("tensor", "dynamic"),
            vec![(W, "BF16", &[3, 2], &real[..]), scale],
            format!("{W}: is BF16 where quantization_config calls for F8_E4M3; save the model compressed"),
        ),
        (
            Value::Null,
            vec![codes(&[3, 2]), scale],
            format!("{W}: is F8_E4M3, but quantization_config does not quantize this layer; take both from one model"),
        ),
        (Value::Null, vec![(W, "I8", &[3, 2], &CODES)], format!("{W}: is I8; F32, F16, BF16 or F8_E4M3 is needed")),
    ] {
        assert_eq!(refusal(quantization, &entries), format!("tensor {why}"));
    }
}

#[test]
fn kv_scales_are_read_where_the_config_asks_for_them() {
    let (k, v) = (bf16(&[0.5]), bf16(&[0.25]));
    let entries: [Entry; 2] = [
        ("model.layers.0.self_attn.k_scale", "BF16", &[1], &k),
        ("model.layers.0.self_attn.v_scale", "BF16", &[1], &v),
    ];
    let scheme = json!({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}});
    let with = merged(fp8("tensor", "static"), scheme);
    let open = |quantization: &Value, entries: &[Entry]| {
        let (_dir, files) = testing::model(quantization.clone(), entries);
        Checkpoint::open(files).unwrap()
    };
    let checkpoint = open(&with, &entries);
    assert_eq!(checkpoint.kv_scales(0).unwrap(), Some((0.5, 0.25)));
    assert_eq!(open(&fp8("tensor", "static"), &entries).kv_scales(0).unwrap(), None);
    assert_eq!(open(&Value::Null, &entries).kv_scales(0).unwrap(), None);
    let of_2024: [Entry; 2] = [
        ("model.layers.0.self_attn.k_proj.output_scale", "BF16", &[1], &k),
        ("model.layers.0.self_attn.v_proj.output_scale", "BF16", &[1], &v),
    ];
    assert_eq!(open(&with, &of_2024).kv_scales(0).unwrap(), Some((0.5, 0.25)));
    let both = [entries[0], entries[1], (of_2024[0].0, "BF16", &[1], &v), of_2024[1]];
    assert_eq!(open(&with, &both).kv_scales(0).unwrap(), Some((0.5, 0.25)));
    assert_eq!(
        open(&with, &entries[..1]).kv_scales(0).unwrap_err().to_string(),
        "tensor model.layers.0.self_attn.v_scale: is missing; take the model's files from one source, whole"
    );
}
