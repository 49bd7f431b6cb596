//! Evaluation against what Hugging Face and lm-evaluation-harness computed of the same model and the same text.

mod support;

use std::fs;

use quaver::LlmOptions;
use quaver::core::evaluate::{Tally, Window};
use quaver::core::llama::Profile;
use quaver::eval::{self, Metric, Model, Task};
use quaver_core::checkpoint::Files;
use quaver_core::engine::EngineOptions;
use support::checkpoints::{self, fixtures};
use support::goldens;

fn options() -> LlmOptions {
    let engine = EngineOptions { profile: Profile::Exact, ..EngineOptions::default() };
    LlmOptions { device: quaver_backends::Kind::Cpu.into(), engine, ..LlmOptions::default() }
}

fn open(model: &str) -> Model {
    Model::open(Files::dir(checkpoints::folder(model)).unwrap(), &options(), 256).unwrap()
}

fn windows() -> Vec<Window> {
    goldens::windows().into_iter().map(|ids| Window { ids, from: 1 }).collect()
}

#[test]
fn perplexity_is_hugging_faces_within_a_thousandth() {
    let mut calls = 0;
    let got = eval::perplexity(&mut open("tiny-llama-fp8-channel"), &windows(), None, |_| calls += 1).unwrap();
    assert_eq!((got.tally.tokens, got.windows, calls), (8960, 35, 35));
    assert_perplexity("tiny-llama-fp8-channel", got.tally);
}

fn assert_perplexity(model: &str, tally: Tally) {
    let (got, want) = (tally.perplexity(), goldens::goldens()[model]["hf_f32"].ppl);
    let off = (got / want - 1.0).abs();
    eprintln!("{model}: perplexity {got:.4}, Hugging Face {want:.4}, off by {:.3}%", 100.0 * off);
    assert!(off <= 1e-3, "{model}: {off}");
}

/// What Hugging Face's f32 logits give for the quantized models beside the bf16 one (mean, median and 99th percentile
/// of the divergence in nats; the share of tokens with the same likeliest one), on the same windows.
const HUGGING_FACE: [(&str, [f64; 4]); 4] = [
    ("tiny-llama-fp8", [0.002_491_047, 0.001_864_789, 0.012_116_12, 0.961_830_4]),
    ("tiny-llama-fp8-channel", [0.002_541_793, 0.001_895_993, 0.011_971_42, 0.957_924_1]),
    ("tiny-llama-fp8-dynamic", [0.002_239_819, 0.001_681_921, 0.010_735_59, 0.960_491_1]),
    ("tiny-llama-fp8-kv", [0.003_463_212, 0.002_542_514, 0.016_905_46, 0.953_125]),
];

#[test]
fn comparison_and_both_perplexities_are_hugging_faces() {
    for (model, [kl_mean, kl_median, kl_p99, top1]) in HUGGING_FACE {
        let (mut base, mut quant) = (open("tiny-llama"), open(model));
        let got = eval::compare(&mut base, &mut quant, &windows(), None, |_| ()).unwrap();
        let figures = [got.kl_mean(), got.kl_quantile(0.5), got.kl_quantile(0.99), got.top1_agreement()];
        eprintln!("{model}: {figures:?}, Hugging Face {:?}", [kl_mean, kl_median, kl_p99, top1]);
        // FP8 ties that fall the other way move the logits of single tokens by as much as quantization does: the means
        // of 8960 of them stay, the 90 worst ones change places.
        for (got, want, bound) in [
            (figures[0], kl_mean, 0.03),
            (figures[1], kl_median, 0.03),
            (figures[2], kl_p99, 0.1),
            (figures[3], top1, 0.005),
        ] {
            assert!((got / want - 1.0).abs() <= bound, "{model}: {got}, not {want}");
        }
        assert_perplexity("tiny-llama", got.base);
        assert_perplexity(model, got.quant);
    }
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let got = eval::compare(&mut open("tiny-llama"), &mut open("tiny-llama"), &windows()[..3], None, |_| ()).unwrap();
    assert_eq!((got.kl_mean(), got.top1_agreement(), got.perplexity_ratio()), (0.0, 1.0, 1.0));
}

#[test]
fn a_run_that_was_broken_off_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    let run = |windows: &[Window], path| {
        let mut scored = Vec::new();
        let result = eval::perplexity(&mut open("tiny-llama"), windows, path, |tally| scored.push(tally.tokens));
        result.map(|got| (got, scored)).map_err(|e| e.to_string())
    };
    let windows = &windows()[..4];
    let (whole, _) = run(windows, None).unwrap();
    assert_eq!(run(windows, Some(&*journal)).unwrap().0, whole);
    // What a process that is killed while it writes leaves behind: two windows and a half.
    let text = fs::read_to_string(&journal).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let marked = lines[1].replace("\"tokens\":256", "\"tokens\":255");
    fs::write(&journal, format!("{}\n{marked}\n{}\n{}", lines[0], lines[2], &lines[3][..20])).unwrap();
    // The marked window shows that it was not scored again.
    let (_, scored) = run(windows, Some(&*journal)).unwrap();
    assert_eq!(scored, [255, 511, 767, 1023]);
    assert_eq!(fs::read_to_string(&journal).unwrap().lines().count(), 5);
    let error = run(&windows[..3], Some(&*journal)).unwrap_err();
    let why = "is of another model, text or arithmetic; give another file, or remove it to begin anew";
    assert_eq!(error, format!("{}: {why}", journal.display()));
}

#[test]
fn results_of_a_model_that_has_changed_since_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, journal) = (folder.path().join("model"), folder.path().join("journal"));
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(checkpoints::folder("tiny-llama").join(file), model.join(file)).unwrap();
    }
    let run = || {
        let mut quant = Model::open(Files::dir(&model).unwrap(), &options(), 256).unwrap();
        let windows = &windows()[..2];
        let mut fresh = 0;
        let got = eval::compare(&mut open("tiny-llama"), &mut quant, windows, Some(&*journal), |_| fresh += 1);
        got.map(|got| (got, fresh)).map_err(|e| e.to_string())
    };
    let first = run().unwrap();
    assert_eq!(run().unwrap(), first);
    assert_eq!(fs::read_to_string(&journal).unwrap().lines().count(), 3);
    // Another model of the same name and size.
    let weights = fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
    weights.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1)).unwrap();
    let why = "is of another model, text or arithmetic; give another file, or remove it to begin anew";
    assert_eq!(run().unwrap_err(), format!("{}: {why}", journal.display()));
}

#[test]
fn a_window_may_have_as_many_tokens_as_the_model_has_positions() {
    let edit = |config: &mut serde_json::Value| config["max_position_embeddings"] = 256.into();
    let files = checkpoints::open_with_config("tiny-llama", "tiny-llama-256-positions", edit).files().clone();
    let mut model = Model::open(files, &options(), 256).unwrap();
    let (whole, mut longer) = (&windows()[..2], windows()[..1].to_vec());
    let want = eval::perplexity(&mut open("tiny-llama"), whole, None, |_| ()).unwrap();
    assert_eq!(eval::perplexity(&mut model, whole, None, |_| ()).unwrap(), want);
    longer[0].ids.push(13);
    let error = eval::perplexity(&mut model, &longer, None, |_| ()).unwrap_err().to_string();
    assert_eq!(error, "a window of 258 tokens: 257 fit, of which the last is only scored; give shorter ones");
}

#[test]
fn tasks_score_what_lm_evaluation_harness_scores() {
    // lm_eval 0.4.13, `hf` in float32 with add_bos_token, on tiny-llama and these files.
    let harness = [
        ("choices", &[(Metric::Acc, 0.4375), (Metric::AccNorm, 0.8125)][..]),
        ("truths", &[(Metric::Mc2, 0.626_593_6)]),
        ("contexts", &[(Metric::Acc, 0.833_333_3)]),
        ("answers", &[(Metric::ExactMatch, 0.625)]),
    ];
    let model = checkpoints::folder("tiny-llama");
    let with_tokenizer = tempfile::tempdir().unwrap();
    for from in [&model, &checkpoints::demo()] {
        for entry in fs::read_dir(from).unwrap() {
            let (path, to) = (entry.as_ref().unwrap().path(), with_tokenizer.path().join(entry.unwrap().file_name()));
            if !to.exists() {
                fs::copy(path, to).unwrap();
            }
        }
    }
    for (name, scores) in harness {
        let task = Task::read(&fixtures().join(format!("tasks/{name}.jsonl")), usize::MAX).unwrap();
        let (length, metrics, mut lines) = (task.len(), task.metrics(), 0);
        let model = with_tokenizer.path().to_str();
        let task = eval::tokenize(vec![task], model, &options(), || ()).unwrap().remove(0);
        let report = task.run(model, &options(), || lines += 1).unwrap();
        assert_eq!((report.lines, lines), (length, length), "{name}");
        assert!(metrics.into_iter().eq(scores.iter().map(|(metric, _)| *metric)), "{name}");
        assert!(report.scores.keys().eq(scores.iter().map(|(metric, _)| metric)), "{name}");
        for &(metric, want) in scores {
            let got = report.scores[&metric].value;
            assert!((got - want).abs() < 1e-4, "{name} {}: {got}, not {want}", metric.name());
        }
    }
}
