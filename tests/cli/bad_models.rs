//! Models that a stranger damaged: each is refused in one line that names the file or the tensor, by every command that
//! opens it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::checkpoints::{demo, fixtures};
use crate::{HOOK, greedy, quaver};

const WEIGHT: &str = "model.layers.3.mlp.up_proj.weight";
const FILE: &str = "model.safetensors";

/// A copy of the demo model, to damage.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(demo()).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
        }
        Copy { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn edit(self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) -> Self {
        let path = self.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        edit(&mut bytes);
        fs::write(path, bytes).unwrap();
        self
    }

    fn edit_json(self, file: &str, edit: impl FnOnce(&mut Value)) -> Self {
        self.edit(file, |bytes| {
            let mut json = serde_json::from_slice(bytes).unwrap();
            edit(&mut json);
            *bytes = serde_json::to_vec(&json).unwrap();
        })
    }

    /// Edits the header of model.safetensors, and leaves the data as they are.
    fn edit_header(self, edit: impl FnOnce(&mut Value)) -> Self {
        self.edit(FILE, |bytes| {
            let (mut header, data) = split(bytes);
            edit(&mut header);
            let header = header.to_string();
            *bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[data..]].concat();
        })
    }

    /// Edits the data of one tensor.
    fn edit_tensor(self, name: &str, edit: impl FnOnce(&mut [u8])) -> Self {
        self.edit(FILE, |bytes| {
            let (header, data) = split(bytes);
            let [start, end] = [0, 1].map(|i| data + header[name]["data_offsets"][i].as_u64().unwrap() as usize);
            edit(&mut bytes[start..end]);
        })
    }

    fn remove(self, file: &str) -> Self {
        fs::remove_file(self.path().join(file)).unwrap();
        self
    }

    /// Asserts that `generate` and `inspect` refuse the model with one message.
    fn is_refused(&self, message: &str) {
        let path = self.path().to_str().unwrap();
        greedy(&["--model", path, HOOK.0]).fails(1, message);
        quaver(["inspect", "--json", "--model", path]).fails(1, message);
    }
}

/// The header of a safetensors file, and where the data begin.
fn split(bytes: &[u8]) -> (Value, usize) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), 8 + length)
}

#[test]
fn a_folder_that_is_no_model_is_refused() {
    for command in ["generate", "chat", "inspect"] {
        let args = [command, "--model", "/absent"].into_iter().chain((command == "generate").then_some("hi"));
        quaver(args).fails(1, "/absent: is not there; give the folder that holds the model's config.json");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let message = format!("{path}: holds no config.json; give the folder of a Hugging Face checkpoint");
    greedy(&["--model", path, "hi"]).fails(1, &message);
    let copy = Copy::new();
    let file = copy.path().join("config.json").display().to_string();
    let message = format!("{file}: is not a folder; give the folder that holds the model's config.json");
    greedy(&["--model", &file, "hi"]).fails(1, &message);
}

#[test]
fn a_damaged_config_is_refused() {
    Copy::new().edit("config.json", |bytes| bytes.truncate(1)).is_refused(
        "config.json: is not valid JSON: EOF while parsing an object at line 1 column 1; download the model again",
    );
    Copy::new()
        .edit_json("config.json", |config| config["hidden_size"] = json!(-1))
        .is_refused("config.json: `hidden_size` must be a whole number from 1 to 262144, found -1");
    Copy::new()
        .edit_json("config.json", |config| config["architectures"] = json!(["GPT2LMHeadModel"]))
        .is_refused("architecture GPT2LMHeadModel is not supported: LlamaForCausalLM is");
}

#[test]
fn an_unknown_quantization_is_refused_from_the_config_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixtures().join("configs/tiny-llama-fp8-block.json"), dir.path().join("config.json")).unwrap();
    let path = dir.path().to_str().unwrap();
    for command in ["generate", "inspect"] {
        let args = [command, "--model", path].into_iter().chain((command == "generate").then_some("hi"));
        quaver(args).fails(1, "weight strategy block (group_0) is not supported: tensor and channel are");
    }
    Copy::new()
        .edit_json("config.json", |config| config["quantization_config"]["quant_method"] = json!("gptq"))
        .is_refused("quant_method gptq is not supported: compressed-tensors is");
}

#[test]
fn truncated_and_lying_tensor_files_are_refused() {
    let length = fs::metadata(demo().join(FILE)).unwrap().len() as usize;
    let (_, data) = split(&fs::read(demo().join(FILE)).unwrap());
    let held = length - data;
    Copy::new().edit(FILE, |bytes| bytes.truncate(length - 1)).is_refused(&format!(
        "{FILE}: describes {held} bytes of tensors and holds {}; download the file again",
        held - 1
    ));
    Copy::new()
        .edit(FILE, |bytes| bytes.truncate(5))
        .is_refused(&format!("{FILE}: has 5 bytes, fewer than a safetensors header; download the file again"));
    Copy::new().edit(FILE, |bytes| bytes[..8].fill(0xff)).is_refused(&format!(
        "{FILE}: claims a header of {} bytes and has {} behind the claim; download the file again",
        u64::MAX,
        length - 8
    ));
    let copy = Copy::new().edit_header(|header| header[WEIGHT]["data_offsets"] = json!([0, 1]));
    quaver(["inspect", "--model", copy.path().to_str().unwrap()])
        .fails_with(1, &[FILE, "has a header that cannot be used", "download the file again"]);
}

#[test]
fn shapes_that_disagree_with_the_config_are_refused() {
    Copy::new().edit_header(|header| header[WEIGHT]["shape"] = json!([256, 768])).is_refused(&format!(
        "tensor {WEIGHT}: has shape [256, 768], config.json calls for [768, 256]; take both from one model"
    ));
    Copy::new().edit_json("config.json", |config| config["vocab_size"] = json!(5000)).is_refused(
        "tensor model.embed_tokens.weight: has shape [4096, 256], config.json calls for [5000, 256]; \
         take both from one model",
    );
    Copy::new().edit_json("config.json", |config| config["num_hidden_layers"] = json!(7)).is_refused(
        "tensor model.layers.6.self_attn.q_proj.weight: is missing; take the model's files from one source, whole",
    );
}

#[test]
fn values_that_would_poison_every_answer_are_refused() {
    Copy::new()
        .edit_tensor(WEIGHT, |codes| codes[2 * 256 + 3] = 0x7f)
        .is_refused(&format!("tensor {WEIGHT}: holds NaN at row 2, column 3; quantize the model again"));
    let scale = |bits: u16| {
        Copy::new().edit_tensor(&format!("{WEIGHT}_scale"), |scales| scales[8..10].copy_from_slice(&bits.to_le_bytes()))
    };
    for (bits, value) in [(0x0000, "0e0"), (0xbf80, "-1e0"), (0x7f80, "inf"), (0x7fc0, "NaN")] {
        scale(bits).is_refused(&format!(
            "tensor {WEIGHT}_scale: scale 4 is {value}; scales must be positive and finite: quantize the model again"
        ));
    }
    let input = "model.layers.3.mlp.up_proj.input_scale";
    Copy::new().edit_tensor(input, |scale| scale.fill(0)).is_refused(&format!(
        "tensor {input}: scale 0 is 0e0; scales must be positive and finite: quantize the model again"
    ));
}

#[test]
fn missing_tensor_files_and_shards_are_named() {
    let copy = Copy::new().remove(FILE);
    let path = copy.path().display();
    let (index, why) = ("model.safetensors.index.json", "download the whole model, in safetensors format");
    copy.is_refused(&format!("{path}: holds neither {FILE} nor {index}; {why}"));
    let map = json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    fs::write(copy.path().join(index), map.to_string()).unwrap();
    copy.is_refused(&format!(
        "{index}: lists model-00001-of-00002.safetensors and 1 more, which the model does not hold; \
         download the missing shards"
    ));
}

#[test]
fn damaged_text_files_are_refused() {
    let copy = Copy::new().edit("tokenizer.json", |bytes| bytes.truncate(100));
    greedy(&["--model", copy.path().to_str().unwrap(), "hi"]).fails_with(1, &["tokenizer.json: "]);
    let copy = Copy::new().edit_json("generation_config.json", |config| config["temperature"] = json!("hot"));
    quaver(["generate", "hi", "--model", copy.path().to_str().unwrap()])
        .fails_with(1, &["generation_config.json: `temperature` must be a number", "found \"hot\""]);
}

#[test]
fn models_without_tokenizer_or_template_do_what_they_can() {
    let copy = Copy::new().remove("tokenizer.json");
    let path = copy.path().to_str().unwrap();
    let none = format!("tokenizer.json: {path} has none; give token ids (--prompt-ids)");
    greedy(&["--model", path, "--raw", "hi"]).fails(1, &none);
    let object = &greedy(&["--model", path, "--json", "-n", "2", "--prompt-ids", "4080,895,305"]).json()[0];
    assert_eq!((&object["text"], object["token_ids"].as_array().unwrap().len()), (&json!(""), 2));

    let remove = |config: &mut Value| drop(config.as_object_mut().unwrap().remove("chat_template"));
    let copy = Copy::new().edit_json("tokenizer_config.json", remove);
    let path = copy.path().to_str().unwrap();
    assert_eq!(
        greedy(&["--model", path, "-n", "4", "It was"]).succeeds(),
        greedy(&["--raw", "-n", "4", "It was"]).succeeds()
    );
    greedy(&["--model", path, "--chat", "hi"])
        .fails(1, "chat template: this model brings none; give a plain text (generate --raw, or /v1/completions)");
    quaver(["chat", "--model", path])
        .fails(1, &format!("chat template: {path} brings none, so that it cannot chat; use quaver generate --raw"));
}

#[test]
fn an_empty_prompt_is_refused_where_the_model_puts_nothing_before_it() {
    let copy = Copy::new().edit_json("tokenizer.json", |json| json["post_processor"] = Value::Null);
    let path = copy.path().to_str().unwrap();
    greedy(&["--model", path, "--raw", ""]).fails(1, "the prompt is empty; give at least one token");
    greedy(&["--raw", "-n", "1", ""]).succeeds();
}
