//! Hugging Face's goldens.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use serde::Deserialize;

use super::checkpoints::fixtures;

/// A prompt of `prompts.json`.
#[derive(Deserialize)]
pub struct Prompt {
    pub name: String,
    pub ids: Vec<u32>,
}

/// What a program computed for a model: `hf_f32`, `emu_f32`.
#[derive(Deserialize)]
pub struct Golden {
    pub ppl: f64,
    pub prompts: BTreeMap<String, Continuation>,
}

/// The greedy continuation of a prompt.
#[derive(Deserialize)]
pub struct Continuation {
    /// The tokens, an end-of-text token included.
    pub ids: Vec<u32>,
    /// How far the best logit lay above the second, at every step.
    pub gap: Vec<f32>,
}

pub fn prompts() -> Vec<Prompt> {
    json("prompts.json")
}

/// `[model][program]`.
pub fn goldens() -> BTreeMap<String, BTreeMap<String, Golden>> {
    json("goldens.json")
}

fn json<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&fs::read(fixtures().join("goldens").join(name)).unwrap()).unwrap()
}

/// Tensors of one golden file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn open(name: &str) -> Self {
        Tensors(fs::read(fixtures().join("goldens").join(name)).unwrap())
    }

    /// A tensor's bytes.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// An f32 tensor.
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

/// The windows of the held-out text: BOS and 256 tokens each.
pub fn windows() -> Vec<Vec<u32>> {
    let bytes = Tensors::open("test_windows.safetensors").bytes("windows");
    let ids: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    ids.chunks_exact(257).map(<[u32]>::to_vec).collect()
}

/// rms(a - b) / rms(b).
pub fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    (square_error(a, b) / norm).sqrt()
}

/// rms(a - b).
pub fn rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    (square_error(a, b) / a.len() as f64).sqrt()
}

fn square_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}
