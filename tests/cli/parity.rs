//! `quaver parity`: its reports, its exit codes, its list of known gaps.

use std::fs;

use serde_json::{Value, json};

use crate::{Quaver, quaver};

/// `parity` on one variant of the cpu's kernels, which every machine has.
fn parity(args: &[&str]) -> Quaver {
    quaver([&["parity", "--backend", "cpu", "--variant", "portable"], args].concat())
}

#[test]
fn the_json_names_adapter_driver_variant_case_seed_error_bound_and_time() {
    let object = parity(&["--seed", "7", "--json", "quantize::", "gather::"]).json().remove(0);
    assert_eq!(object["seed"], 7);
    let [device] = &object["devices"].as_array().unwrap()[..] else { panic!("{object}") };
    assert_eq!((&device["backend"], &device["variant"]), (&json!("cpu"), &json!("portable")));
    assert!(!device["adapter"].as_str().unwrap().is_empty() && device["driver"] == "portable", "{device}");
    let cases = device["cases"].as_array().unwrap();
    assert_eq!(
        (&device["passed"], &device["failed"], &device["known_gaps"]),
        (&json!(cases.len()), &json!(0), &json!(0))
    );
    for case in cases {
        let op = case["op"].as_str().unwrap();
        assert!(["quantize", "gather"].contains(&op) && case["name"].as_str().unwrap().starts_with(op), "{case}");
        assert_eq!((&case["seed"], &case["passed"], &case["known_gap"]), (&json!(7), &json!(true), &Value::Null));
        assert!(case["error"].as_f64() <= case["bound"].as_f64() && case["us"].as_f64() > Some(0.0), "{case}");
    }
}

#[test]
fn a_seed_draws_shapes_and_draws_them_again() {
    let list = |seed| parity(&["--list", "--seed", seed, "linear::drawn"]).succeeds();
    assert_eq!(list("7"), list("7"));
    assert_ne!(list("7"), list("8"));
    assert!(list("7").lines().count() >= 3, "{}", list("7"));
}

#[test]
fn a_known_gap_that_passes_is_a_failure_and_the_report_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let [gaps, report] = ["gaps.txt", "report.md"].map(|name| dir.path().join(name));
    fs::write(&gaps, "# one\ncpu-portable | gather::m1_w1_d64 | a test plants it\n").unwrap();
    let [gaps, report] = [&gaps, &report].map(|path| path.to_str().unwrap());
    let ran = parity(&["gather::m1", "--known-gaps", gaps, "--markdown", report]).run();
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.stderr, "quaver: 1 of 2 cases failed; replay with --seed 3651\n");
    let why = "passes, but is listed as a known gap (a test plants it): take it off the list";
    assert!(ran.stdout.contains(&format!("FAILED gather::m1_w1_d64: {why}")), "{}", ran.stdout);
    let report = fs::read_to_string(report).unwrap();
    for part in ["| cpu | portable |", why, "| gather::m17_w3_d2048 | 3651 |", "quaver parity --seed 3651"] {
        assert!(report.contains(part), "{part:?} is not in {report}");
    }
}

#[test]
fn what_names_nothing_is_refused() {
    parity(&["no_such_op"]).fails(2, "no case holds no_such_op (see quaver parity --list)");
    let none = "no device here is what --backend, --device and --variant name (see quaver devices)";
    quaver(["parity", "--backend", "cpu", "--variant", "sse"]).fails(1, none);
    let dir = tempfile::tempdir().unwrap();
    let gaps = dir.path().join("gaps.txt");
    fs::write(&gaps, "cpu | linear::gone | slow\n").unwrap();
    let message = "linear::gone: is a known gap, but no case; mend the list (see --list)";
    parity(&["--known-gaps", gaps.to_str().unwrap()]).fails(1, message);
}

#[test]
fn a_bisection_goes_through_every_line() {
    let object = parity(&["--bisect", "--json"]).json().remove(0);
    let device = &object["devices"][0];
    assert_eq!(device["first"], Value::Null);
    let lines = device["lines"].as_array().unwrap();
    let last = lines.last().unwrap();
    assert_eq!((&lines[0]["op"], &last["op"]), (&json!("embed"), &json!("sample")));
    assert!(lines.iter().any(|line| line["label"] == "model.layers.5.mlp.down_proj"), "{object}");
    assert!(lines.iter().all(|line| line["passed"] == true && line["error"].as_f64() <= line["bound"].as_f64()));
}
