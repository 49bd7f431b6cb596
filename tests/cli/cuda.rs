//! The cuda backend on machines without a card, and its compiler.

use super::quaver;

/// True where this machine has a card that the backend runs on.
fn has_card() -> bool {
    let object = &quaver(["devices", "--json"]).json()[0];
    object["devices"].as_array().unwrap().iter().any(|device| device["backend"] == "cuda")
}

#[test]
fn without_a_card_the_backend_says_what_is_missing() {
    if has_card() {
        return;
    }
    let ran = quaver(["generate", "--backend", "cuda", "hi"]).run();
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (Some(1), "", 1), "{}", ran.stderr);
    let said = ran.stderr.trim_start_matches("quaver: cuda: ").trim_end();
    assert!(said.contains("NVIDIA") && said.contains("; "), "{said}");
    // `devices` gives the same reason.
    let object = &quaver(["devices", "--json"]).json()[0];
    let reason = object["unavailable"].as_array().unwrap().iter().find(|entry| entry["backend"] == "cuda").unwrap();
    assert_eq!(reason["why"], said);
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
