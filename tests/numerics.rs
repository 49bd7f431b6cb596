//! E4M3 against PyTorch: decoding of every code, encoding of every bf16 number and of f32 ties, subnormals and extremes.

mod support;

use half::bf16;
use quaver_core::e4m3;
use support::goldens::Tensors;

fn assert_code(got: u8, want: u8, x: f32) {
    assert!(got == want || e4m3::is_nan(got) && e4m3::is_nan(want), "{x:e}: {got:#04x}, PyTorch gives {want:#04x}");
}

#[test]
fn all_256_codes_decode_as_pytorch_decodes_them() {
    let want = Tensors::open("fp8_vectors.safetensors").f32("decode_f32");
    for (code, want) in want.into_iter().enumerate() {
        let got = e4m3::decode(code as u8);
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{code:#04x}: {got} and {want}");
    }
}

#[test]
fn all_bf16_numbers_encode_as_pytorch_encodes_them() {
    let want = Tensors::open("fp8_vectors.safetensors").bytes("bf16_bits_clamped_to_e4m3");
    assert_eq!(want.len(), 1 << 16);
    for (bits, want) in (0..=u16::MAX).zip(want) {
        let x = bf16::from_bits(bits).to_f32();
        assert_code(e4m3::encode(x), want, x);
    }
}

#[test]
fn f32_ties_and_their_neighbours_encode_as_pytorch_encodes_them() {
    let vectors = Tensors::open("fp8_vectors.safetensors");
    let (inputs, want) = (vectors.f32("f32_in"), vectors.bytes("f32_clamped_to_e4m3"));
    assert_eq!(inputs.len(), want.len());
    for (x, want) in inputs.into_iter().zip(want) {
        assert_code(e4m3::encode(x), want, x);
    }
}

#[test]
fn rotary_frequencies_are_those_of_hugging_face() {
    let checkpoint = support::checkpoints::open("tiny-llama-fp8-channel");
    let config = checkpoint.config();
    let want = Tensors::open("hidden.safetensors").f32("inv_freq");
    let got = config.rope.inv_freq(config.heads.dim);
    assert_eq!(got.len(), want.len());
    for (got, want) in got.into_iter().zip(want) {
        assert!((got / f64::from(want) - 1.0).abs() < 1e-6, "{got} and {want}");
    }
}
