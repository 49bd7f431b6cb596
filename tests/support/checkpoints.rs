//! The five checkpoints that the goldens cover: one small model in BF16, and what llm-compressor made of it. The
//! repository keeps one of them whole (the built-in demo) and the BF16 linears; the others follow from these by
//! llm-compressor's arithmetic, and a digest of the original's tensors proves each that is made here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use quaver_core::checkpoint::{Checkpoint, Files};
use quaver_core::e4m3;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

/// The checkpoints that the goldens cover.
pub const MODELS: [&str; 5] =
    ["tiny-llama", "tiny-llama-fp8", "tiny-llama-fp8-channel", "tiny-llama-fp8-dynamic", "tiny-llama-fp8-kv"];

/// The fixtures of the integration tests.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The built-in demo model's files: tiny-llama-fp8-channel.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/demo")
}

/// Opens a checkpoint by its name, making it first where the repository does not hold it.
pub fn open(model: &str) -> Checkpoint {
    Checkpoint::open(Files::dir(folder(model)).unwrap()).unwrap()
}

/// A checkpoint with another `quantization_config`: the controls.
pub fn open_with_config(model: &str, name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> Checkpoint {
    let from = folder(model);
    let mut config = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    edit(&mut config);
    let to = scratch().join(name);
    place(&to, |to| {
        fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
        fs::write(to.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    });
    Checkpoint::open(Files::dir(to).unwrap()).unwrap()
}

/// The folder of a checkpoint.
pub fn folder(model: &str) -> PathBuf {
    match model {
        "tiny-llama-fp8-channel" => demo(),
        _ => {
            let to = scratch().join(model);
            place(&to, |to| {
                let (tensors, digest) = make(model);
                let digests = fs::read(fixtures().join("digests.json")).unwrap();
                let digests: BTreeMap<String, String> = serde_json::from_slice(&digests).unwrap();
                assert_eq!(digest, digests[model], "{model} differs from llm-compressor's");
                let views =
                    tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
                fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
                fs::copy(fixtures().join(format!("configs/{model}.json")), to.join("config.json")).unwrap();
                fs::copy(demo().join("generation_config.json"), to.join("generation_config.json")).unwrap();
            });
            to
        }
    }
}

fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("checkpoints")
}

/// Fills a folder beside its place and renames it: test processes run side by side.
fn place(to: &Path, fill: impl FnOnce(&Path)) {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    if to.join("config.json").exists() {
        return;
    }
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let part = to.with_extension(format!("part-{}-{count}", std::process::id()));
    fs::create_dir_all(&part).unwrap();
    fill(&part);
    // Another process may have been faster; its folder is as good.
    if fs::rename(&part, to).is_err() {
        fs::remove_dir_all(&part).unwrap();
    }
}

struct Owned {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn read(path: &Path) -> BTreeMap<String, Owned> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let own = |t: TensorView| Owned { dtype: t.dtype(), shape: t.shape().to_vec(), data: t.data().to_vec() };
    file.tensors().into_iter().map(|(name, t)| (name, own(t))).collect()
}

/// The tensors of a checkpoint that is not in the repository, and their digest.
fn make(model: &str) -> (BTreeMap<String, Owned>, String) {
    let channel = read(&demo().join("model.safetensors"));
    let tensors = match model {
        "tiny-llama" => {
            let mut tensors = channel;
            tensors.retain(|name, tensor| tensor.dtype == Dtype::BF16 && !name.ends_with("_scale"));
            tensors.extend(read(&fixtures().join("tiny-llama-linears.safetensors")));
            tensors
        }
        "tiny-llama-fp8-dynamic" => channel.into_iter().filter(|(name, _)| !name.ends_with(".input_scale")).collect(),
        "tiny-llama-fp8" | "tiny-llama-fp8-kv" => {
            let real = read(&fixtures().join("tiny-llama-linears.safetensors"));
            let mut tensors = BTreeMap::new();
            for (name, tensor) in channel {
                match name.strip_suffix("_scale") {
                    Some(weight) if weight.ends_with(".weight") => {
                        let (scale, codes) = quantize_per_tensor(&real[weight]);
                        tensors.insert(weight.to_owned(), codes);
                        tensors.insert(name, scale);
                    }
                    _ if tensor.dtype == Dtype::F8_E4M3 => {}
                    _ => drop(tensors.insert(name, tensor)),
                }
            }
            if model == "tiny-llama-fp8-kv" {
                tensors.extend(read(&fixtures().join("kv-scales.safetensors")));
            }
            tensors
        }
        _ => panic!("no such fixture: {model}"),
    };
    let mut digest = Sha256::new();
    for (name, tensor) in &tensors {
        digest.update(name);
        digest.update(&tensor.data);
    }
    let digest = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    (tensors, digest)
}

/// llm-compressor's arithmetic for a per-tensor weight, in bf16: the scale is amax / 448, and the quotient is rounded
/// to bf16 before it is rounded to E4M3.
fn quantize_per_tensor(weight: &Owned) -> (Owned, Owned) {
    let values: Vec<f32> = weight.data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    let amax = values.iter().fold(0f32, |amax, w| amax.max(w.abs()));
    let scale = bf16::from_f32(amax / e4m3::MAX);
    let code = |w: &f32| e4m3::encode(bf16::from_f32(w / scale.to_f32()).to_f32() + 0.0);
    let scale_data = scale.to_le_bytes().to_vec();
    (
        Owned { dtype: Dtype::BF16, shape: vec![1], data: scale_data },
        Owned { dtype: Dtype::F8_E4M3, shape: weight.shape.clone(), data: values.iter().map(code).collect() },
    )
}

/// Writes a BF16 checkpoint's tensors as F16, with its config.
pub fn write_as_f16(model: &str, to: &Path) {
    let from = folder(model);
    let mut tensors = read(&from.join("model.safetensors"));
    for tensor in tensors.values_mut() {
        assert_eq!(tensor.dtype, Dtype::BF16);
        tensor.dtype = Dtype::F16;
        for bytes in tensor.data.chunks_exact_mut(2) {
            let value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            bytes.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
        }
    }
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}
