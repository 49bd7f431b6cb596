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

/// The device script on the processor in a GPU's place: what it leaves is whole, though its time ends before its work.
#[test]
#[cfg(target_os = "linux")]
fn the_device_script_writes_down_what_it_has_measured() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/gpu-check.sh");
    let mut command = std::process::Command::new("bash");
    command.arg(script).arg(&out).arg(env!("CARGO_BIN_EXE_quaver"));
    command.env("GPU_CHECK_DEVICES", "cpu 0").env("GPU_CHECK_SHAPE", "tiny").env("GPU_CHECK_SECONDS", "90");
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap_or_else(|e| panic!("{name}: {e}: {said}"));
    let (report, csv) = (read("report.md"), read("bench.csv"));
    for part in ["## Figures", "| cpu-0 fp8-channel | decode b1 p128 g64 | speed |", "## cpu-"] {
        assert!(report.contains(part), "{part:?} is not in {report}");
    }
    // A speed has its share of the floor.
    let row = csv.lines().find(|row| row.contains(",decode b1 p128 g64,speed,")).expect("it is in the report");
    assert!(row.rsplit(',').next().unwrap().parse::<f64>().unwrap() > 0.0, "{row}");
}

/// Every kernel that a step takes, one after the other: prefill on the products of Hopper, then decoding.
#[test]
fn the_emulated_kernels_answer_like_the_cpu() {
    let (prompt, answer) = HOOK;
    let ran = greedy(&["--backend", "cuda-emulated", "--kv-cache-memory", "16M", "-n", "24", prompt]).succeeds();
    assert_eq!(ran.trim_end(), answer);
}
