//! The cuda backend on machines without a card, and its compiler.

use serde_json::Value;

use super::{HOOK, greedy, quaver};

/// What `devices` lists. Its stderr is no matter here: drivers of other GPUs may complain there.
fn devices() -> Value {
    serde_json::from_str(&quaver(["devices", "--json"]).run().stdout).unwrap()
}

/// The entry of the cuda backend in a list of `devices`.
fn cuda(list: &Value) -> Option<&Value> {
    list.as_array().unwrap().iter().find(|entry| entry["backend"] == "cuda")
}

#[test]
fn without_a_card_the_backend_says_what_is_missing() {
    let object = devices();
    if cuda(&object["devices"]).is_some() {
        return;
    }
    let ran = quaver(["generate", "--backend", "cuda", "hi"]).run();
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (Some(1), "", 1), "{}", ran.stderr);
    let said = ran.stderr.trim_start_matches("quaver: cuda: ").trim_end();
    assert!(said.contains("NVIDIA") && said.contains("; "), "{said}");
    // `devices` gives the same reason.
    assert_eq!(cuda(&object["unavailable"]).unwrap()["why"], said);
}

#[test]
fn without_a_driver_the_error_names_it() {
    let ran = quaver(["generate", "--backend", "cuda", "hi"]).run();
    if !ran.stderr.contains("libcuda") {
        return;
    }
    let why = "there is no NVIDIA driver (libcuda); install one, or take --backend wgpu or cpu";
    assert_eq!(ran.stderr, format!("quaver: cuda: {why}\n"));
}

#[test]
fn shares_of_memory_and_architectures_that_mean_nothing_are_refused() {
    for share in ["0", "1.5", "-1", "nan", "most"] {
        quaver(["generate", &format!("--gpu-memory-utilization={share}"), "hi"])
            .fails_with(2, &["--gpu-memory-utilization", "above 0 and at most 1"]);
    }
    let supported = "give one such as sm_80, sm_89, sm_90a, compute_89";
    quaver(["kernels", "build", "--arch", "sm_75"])
        .fails(1, &format!("cuda: there is no architecture sm_75; {supported}"));
    quaver(["kernels", "build"]).fails_with(2, &["--arch"]);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().join("cache");
    quaver(["kernels", "build", "--arch", "sm_80"])
        .env("QUAVER_CACHE", path.to_str().unwrap())
        .fails_with(1, &["cannot write", path.to_str().unwrap()]);
}

/// Every kernel that a step takes, one after the other: prefill on the products of Hopper, then decoding.
#[test]
fn the_emulated_kernels_answer_like_the_cpu() {
    let (prompt, answer) = HOOK;
    let ran = greedy(&["--backend", "cuda-emulated", "--kv-cache-memory", "16M", "-n", "24", prompt]).succeeds();
    assert_eq!(ran.trim_end(), answer);
}
