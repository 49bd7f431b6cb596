//! Every parity case on every device of this machine and with all its kernels, `cpu-avx2::linear::fp8_static_m17_n48_k2048` and so on.
//! `QUAVER_PARITY_SEED=7 cargo test --test parity` draws other numbers;
//! `QUAVER_PARITY_VERBOSE=1` prints how near each case came to its bound.

use libtest_mimic::{Arguments, Failed, Trial};
use quaver::parity::{self, DEFAULT_SEED};
use quaver_backends::{Kind, Spec, open, variants};

fn main() {
    let seed = match std::env::var("QUAVER_PARITY_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("QUAVER_PARITY_SEED is {text}; it must be a whole number")),
        Err(_) => DEFAULT_SEED,
    };
    let cases = parity::cases(seed);
    let mut trials = Vec::new();
    for spec in variants().into_iter().filter(|spec| spec.kind != Kind::Reference) {
        for case in cases.clone() {
            let spec = spec.clone();
            trials.push(Trial::test(format!("{spec}::{}", case.name), move || trial(&spec, &case)));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(spec: &Spec, case: &parity::Case) -> Result<(), Failed> {
    let again = format!("replay with QUAVER_PARITY_SEED={}", case.seed);
    let outcome = open(spec).and_then(|mut device| parity::run(case, device.as_mut()));
    let outcome = outcome.map_err(|error| format!("{error}; {again}"))?;
    if std::env::var_os("QUAVER_PARITY_VERBOSE").is_some() {
        println!("{}: {} ({:.0} us)", outcome.name, outcome.detail, outcome.us);
    }
    if !outcome.passed {
        let (error, bound, detail) = (outcome.error, outcome.bound, outcome.detail);
        return Err(format!("error {error:.3e}, bound {bound:.3e}: {detail}; {again}").into());
    }
    Ok(())
}
