//! What a run found, for programs and for bug reports.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{BisectedLine, DeviceReport, Outcome};

/// `{"seed", "version", "commit", "devices": [{"backend", "adapter", "driver", "variant", "cases": [{"name", "op", "seed",
/// "error", "bound", "passed", "us", "detail", "known_gap"}], "passed", "failed", "known_gaps"}]}`. An error is null where
/// it is infinite: the case did not run, or gave no numbers.
pub fn json(seed: u64, reports: &[DeviceReport]) -> Value {
    let case = |outcome: &Outcome| {
        json!({
            "name": outcome.name, "op": outcome.op, "seed": outcome.seed, "error": outcome.error, "bound": outcome.bound,
            "passed": outcome.passed, "us": outcome.us, "ties": outcome.ties, "detail": outcome.detail,
            "known_gap": outcome.known_gap,
        })
    };
    let device = |report: &DeviceReport| {
        json!({
            "backend": report.info.backend, "adapter": report.info.name, "driver": report.info.driver,
            "variant": report.spec.variant, "device": report.spec.device,
            "cases": report.outcomes.iter().map(case).collect::<Value>(),
            "passed": report.passed(), "failed": report.failed(), "known_gaps": report.known_gaps(),
        })
    };
    json!({
        "seed": seed, "version": env!("CARGO_PKG_VERSION"), "commit": crate::COMMIT,
        "devices": reports.iter().map(device).collect::<Value>(),
    })
}

/// `{"device", "first", "lines": [{"label", "op", "error", "bound", "passed", "drift", "detail"}]}`; `first` is the label of
/// the first line that is wrong, or null.
pub fn bisection_json(title: &str, lines: &[BisectedLine]) -> Value {
    let line = |line: &BisectedLine| {
        json!({
            "label": line.label, "op": line.op, "error": line.error, "bound": line.bound, "passed": line.passed(),
            "drift": line.drift, "detail": line.detail,
        })
    };
    let first = lines.iter().find(|line| !line.passed()).map(|line| &line.label);
    json!({"device": title, "first": first, "lines": lines.iter().map(line).collect::<Value>()})
}

/// A report to attach to a bug report: a summary, what failed, and every case folded away.
pub fn markdown(seed: u64, reports: &[DeviceReport]) -> String {
    let mut text = String::new();
    write_markdown(&mut text, seed, reports).expect("a string takes everything");
    text
}

fn write_markdown(out: &mut String, seed: u64, reports: &[DeviceReport]) -> std::fmt::Result {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), crate::COMMIT);
    writeln!(out, "# Parity of Quaver {version} ({commit})\n")?;
    writeln!(
        out,
        "{}, {}; replay with `quaver parity --seed {seed}`.\n",
        std::env::consts::OS,
        std::env::consts::ARCH
    )?;
    writeln!(out, "| backend | variant | adapter | driver | passed | failed | known gaps |")?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for report in reports {
        let (info, variant) = (&report.info, report.spec.variant.as_deref().unwrap_or("-"));
        let cells = [info.backend, variant, &info.name, &info.driver].map(escape).join(" | ");
        writeln!(out, "| {cells} | {} | {} | {} |", report.passed(), report.failed(), report.known_gaps())?;
    }
    for report in reports {
        writeln!(out, "\n## {}\n", escape(&report.title()))?;
        let faulty = || report.outcomes.iter().filter(|outcome| !outcome.passed);
        for outcome in faulty() {
            let gap = outcome.known_gap.as_ref().map(|why| format!(" (known gap: {why})")).unwrap_or_default();
            writeln!(out, "- `{}`{}: {}", outcome.name, escape(&gap), escape(&outcome.detail))?;
        }
        if faulty().next().is_some() {
            writeln!(out)?;
        }
        writeln!(out, "<details><summary>{} cases</summary>\n", report.outcomes.len())?;
        writeln!(out, "| case | seed | error | bound | | us |\n|---|---|---|---|---|---|")?;
        for outcome in &report.outcomes {
            let Outcome { name, seed, error, bound, us, .. } = outcome;
            writeln!(out, "| {name} | {seed} | {error:.3e} | {bound:.3e} | {} | {us:.0} |", outcome.status())?;
        }
        writeln!(out, "\n</details>")?;
    }
    Ok(())
}

/// Text that means nothing to Markdown's tables and to HTML.
fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

impl Outcome {
    /// In a word.
    pub fn status(&self) -> &'static str {
        match (self.passed, &self.known_gap) {
            (true, _) => "passed",
            (false, None) => "FAILED",
            (false, Some(_)) => "known gap",
        }
    }
}
