//! Every parity case on every device of this machine and with all its kernels, `cpu-avx2::linear::fp8_static_m17_n48_k2048`
//! and so on, and the demo model end to end. A missing adapter is a failure: nothing is skipped in silence.
//! `QUAVER_PARITY_SEED=7 cargo test --test parity` draws other numbers and shapes;
//! `QUAVER_PARITY_VERBOSE=1` prints how near each case came to its bound.

mod support;

use std::sync::{Arc, LazyLock, OnceLock};

use libtest_mimic::{Arguments, Failed, Trial};
use quaver::parity::{self, Case, DEFAULT_SEED, Gaps, Model, Outcome, Ready};
use quaver_backends::{Kind, Spec, open, turn, variants};
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::Profile;

static GAPS: LazyLock<Gaps> = LazyLock::new(Gaps::built_in);

fn main() {
    let seed = match std::env::var("QUAVER_PARITY_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("QUAVER_PARITY_SEED is {text}; it must be a whole number")),
        Err(_) => DEFAULT_SEED,
    };
    let specs: Vec<Spec> = variants().into_iter().filter(|spec| spec.kind != Kind::Reference).collect();
    let emulated: Vec<Spec> = emulated().collect();
    let mut trials = vec![Trial::test("adapters_are_there", support::adapters_are_there)];
    // Case by case: what the reference gives is kept until the last device has been held against it.
    for (i, case) in parity::cases(seed).into_iter().enumerate() {
        let ready = Arc::new(OnceLock::new());
        for spec in specs.iter().chain(&emulated) {
            // The emulated variants differ in one op.
            if spec.kind == Kind::CudaEmulated && *spec != emulated[0] && case.op != "linear" {
                continue;
            }
            // Of several adapters, one takes all cases; Mesa's OpenGL compiles each `linear` for 8 seconds, and the others run
            // the same kernels, so that they take every fourth of these. `--include-ignored` runs the rest.
            let is_exact = spec.variant.as_deref() == Some("portable-exact");
            let is_rest = spec.kind == Kind::Wgpu && spec.device > 0 && case.op == "linear" && i % 4 != 0;
            // Only what decodes weights differs from `portable`.
            if is_exact && (case.op != "linear" || spec.device > 0) {
                continue;
            }
            let (name, spec, case, ready) =
                (format!("{spec}::{}", case.name), spec.clone(), case.clone(), ready.clone());
            trials.push(Trial::test(name, move || trial(&spec, &case, &ready)).with_ignored_flag(is_rest));
        }
    }
    let model = Arc::new(OnceLock::new());
    for profile in [Profile::Exact, Profile::Fast] {
        for spec in &specs {
            let (spec, model) = (spec.clone(), model.clone());
            let name = format!("{spec}::model::{profile:?}").to_lowercase();
            trials.push(Trial::test(name, move || model_trial(&spec, profile, seed, &model)));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The CUDA kernels on the CPU: each variant under a schedule that runs threads at random and waits with asynchronous
/// work. `tests/kernels.rs` goes through the others.
fn emulated() -> impl Iterator<Item = Spec> {
    let variants = quaver_backends::cuda::Variant::ALL.map(|variant| Some(variant.name().to_owned()));
    variants.into_iter().map(|variant| Spec { kind: Kind::CudaEmulated, device: 9, variant, ..Spec::default() })
}

fn trial(spec: &Spec, case: &Case, ready: &OnceLock<Ready>) -> Result<(), Failed> {
    let ready = ready.get_or_init(|| Ready::new(case).expect("the reference runs every case"));
    let _turn = turn(spec);
    let mut device = open(spec)?;
    let title = parity::title(spec, &device.describe());
    let outcome =
        ready.run(&mut *device).unwrap_or_else(|e| Outcome::failed(&case.name, case.op, case.seed, e.to_string()));
    judge(&title, outcome)
}

fn model_trial(spec: &Spec, profile: Profile, seed: u64, model: &OnceLock<Model>) -> Result<(), Failed> {
    let model = model.get_or_init(|| {
        let files = quaver::files(None, true).unwrap();
        let ids = Model::text(&files.require("tokenizer.json").unwrap()).unwrap();
        Model::new(Checkpoint::open(files).unwrap(), ids).unwrap()
    });
    let _turn = turn(spec);
    let mut device = open(spec)?;
    let title = parity::title(spec, &device.describe());
    model.run(profile, seed, &mut *device)?.into_iter().try_for_each(|outcome| judge(&title, outcome))
}

fn judge(title: &str, outcome: Outcome) -> Result<(), Failed> {
    let Outcome { name, error, bound, detail, seed, passed, known_gap, us, .. } = GAPS.judge(title, outcome);
    if std::env::var_os("QUAVER_PARITY_VERBOSE").is_some() {
        println!("{name}: {detail} ({us:.0} us)");
    }
    if !passed && known_gap.is_none() {
        let again = format!("replay with QUAVER_PARITY_SEED={seed}");
        return Err(format!("{name}: error {error:.3e}, bound {bound:.3e}: {detail}; {again}").into());
    }
    Ok(())
}
