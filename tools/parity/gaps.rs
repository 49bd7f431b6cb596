//! Known gaps: cases that a device is known to fail. A listed case may fail; where it passes, the list is out of date,
//! and that is a failure too.

use quaver_core::{Error, Result};

use super::Outcome;

/// The gaps of this build; empty where everything passes.
const BUILT_IN: &str = include_str!("known_gaps.txt");

/// A list of gaps.
#[derive(Clone, Debug, Default)]
pub struct Gaps(Vec<Gap>);

#[derive(Clone, Debug)]
struct Gap {
    /// A part of [`DeviceReport::title`](super::DeviceReport::title).
    device: String,
    case: String,
    why: String,
}

impl Gaps {
    /// Those that this build was made with.
    pub fn built_in() -> Self {
        Gaps::parse("known_gaps.txt", BUILT_IN).expect("a test reads the list")
    }

    /// Reads a list: lines of `device | case | why`, where `device` is a part of its title. Empty lines, and what begins
    /// with #, are skipped.
    ///
    /// # Errors
    /// Names the line that is no such thing.
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim()));
        let gap = |(number, line): (usize, &str)| {
            let fields: Vec<&str> = line.splitn(3, '|').map(str::trim).collect();
            match fields[..] {
                [device, case, why] if !(device.is_empty() || case.is_empty() || why.is_empty()) => {
                    Ok(Gap { device: device.to_owned(), case: case.to_owned(), why: why.to_owned() })
                }
                _ => Err(Error::text(format!("{file} line {number}"), "must be: device | case | why it fails there")),
            }
        };
        let listed = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        listed.map(gap).collect::<Result<_>>().map(Gaps)
    }

    /// An error where a gap names no case.
    pub fn check<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        match self.0.iter().find(|gap| !names.clone().any(|name| name == gap.case)) {
            Some(gap) => Err(Error::text(&gap.case, "is a known gap, but no case; mend the list (see --list)")),
            None => Ok(()),
        }
    }

    /// What an outcome on a device comes to.
    pub fn judge(&self, device: &str, mut outcome: Outcome) -> Outcome {
        let gap = self.0.iter().find(|gap| gap.case == outcome.name && device.contains(&gap.device));
        match gap {
            Some(gap) if outcome.passed => {
                outcome.passed = false;
                outcome.detail = format!("passes, but is listed as a known gap ({}): take it off the list", gap.why);
            }
            Some(gap) => outcome.known_gap = Some(gap.why.clone()),
            None => {}
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(passed: bool) -> Outcome {
        let mut outcome = Outcome::failed("linear::m1", "linear", 7, "wrong");
        outcome.passed = passed;
        outcome
    }

    #[test]
    fn the_built_in_list_is_sound() {
        let names: Vec<String> = crate::parity::cases(1).into_iter().map(|case| case.name).collect();
        Gaps::built_in().check(names.iter().map(String::as_str)).unwrap();
    }

    #[test]
    fn a_listed_case_may_fail_and_must_not_pass() {
        let gaps = Gaps::parse("gaps", "# none else\n\n wgpu | linear::m1 | flushes | subnormals\n").unwrap();
        let failed = gaps.judge("wgpu-portable, a GPU", outcome(false));
        assert_eq!((failed.passed, failed.known_gap.as_deref()), (false, Some("flushes | subnormals")));
        let passed = gaps.judge("wgpu-portable, a GPU", outcome(true));
        assert_eq!((passed.passed, passed.known_gap), (false, None));
        assert!(passed.detail.contains("take it off the list"), "{}", passed.detail);
        // Of another device it says nothing.
        assert!(gaps.judge("cpu-avx2", outcome(true)).passed);
        assert_eq!(gaps.judge("cpu-avx2", outcome(false)).known_gap, None);
    }

    #[test]
    fn a_line_without_a_reason_or_a_case_that_is_none_is_refused() {
        let error = Gaps::parse("gaps", "# fine\nwgpu | linear::m1").unwrap_err().to_string();
        assert_eq!(error, "gaps line 2: must be: device | case | why it fails there");
        let gaps = Gaps::parse("gaps", "wgpu | linear::m0 | slow").unwrap();
        assert!(gaps.check(["linear::m1"].into_iter()).is_err());
    }
}
