//! `quaver synth`: checkpoints with random weights.

use std::fs;

use crate::{greedy, quaver};

#[test]
fn every_scheme_makes_a_checkpoint_that_serves_text() {
    let folder = tempfile::tempdir().unwrap();
    for scheme in ["bf16", "fp8", "fp8-channel", "fp8-dynamic"] {
        let model = folder.path().join(scheme).display().to_string();
        assert_eq!(quaver(["synth", &model, "--shape", "tiny", "--scheme", scheme]).succeeds(), "");
        let answer = greedy(&["--model", &model, "--ignore-eos", "-n", "8", "--json", "hello there"]).json().remove(0);
        assert_eq!(answer["usage"]["completion_tokens"], 8, "{scheme}");
        let inspected = quaver(["inspect", "--model", &model, "--json"]).json().remove(0);
        assert_eq!((&inspected["parameters"], &inspected["vocab_size"]), (&6_556_928.into(), &4096.into()), "{scheme}");
    }
}

#[test]
fn the_same_seed_makes_the_same_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |name: &str, seed: &str| {
        let model = folder.path().join(name);
        quaver(["synth", &model.display().to_string(), "--shape", "tiny", "--seed", seed]).succeeds();
        fs::read(model.join("model.safetensors")).unwrap()
    };
    let first = weights("a", "1");
    assert!(first == weights("b", "1"));
    assert!(first != weights("c", "2"));
}

#[test]
fn a_folder_that_is_there_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().display().to_string();
    let message = format!("{model}: is there already; give a folder that is not, or remove it");
    quaver(["synth", &model, "--shape", "tiny"]).fails(1, &message);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
