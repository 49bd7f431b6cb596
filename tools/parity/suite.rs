//! Which cases run on which devices: what `quaver parity` does.

use quaver_backends::Spec;
use quaver_core::Result;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::Profile;
use quaver_core::op::{Backend, DeviceInfo};

use super::model::Model;
use super::run::Ready;
use super::{Case, Gaps, Outcome, cases};

/// The profiles that the model runs in.
const PROFILES: [Profile; 2] = [Profile::Exact, Profile::Fast];

/// What to run.
pub struct Suite {
    seed: u64,
    cases: Vec<Case>,
    /// A model with the tokens that it reads.
    model: (Checkpoint, Vec<u32>),
    gaps: Gaps,
    filter: Vec<String>,
}

/// How one device went through the suite with one variant of its kernels.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// What was opened.
    pub spec: Spec,
    /// What that is.
    pub info: DeviceInfo,
    /// In the order of the suite.
    pub outcomes: Vec<Outcome>,
}

impl DeviceReport {
    /// For instance `wgpu-portable: llvmpipe (LLVM 15.0.6, 256 bits) (Vulkan, llvmpipe, Mesa 22.3.6)`.
    pub fn title(&self) -> String {
        title(&self.spec, &self.info)
    }

    /// Cases that passed.
    pub fn passed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.passed).count()
    }

    /// Cases that failed, known gaps aside.
    pub fn failed(&self) -> usize {
        self.outcomes.len() - self.passed() - self.known_gaps()
    }

    /// Cases that failed and are listed.
    pub fn known_gaps(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.known_gap.is_some()).count()
    }
}

/// How a device is called in lists of known gaps and in reports.
pub fn title(spec: &Spec, info: &DeviceInfo) -> String {
    format!("{spec}: {} ({})", info.name, info.driver)
}

/// What the list of devices says of one.
fn listed(spec: &Spec) -> DeviceInfo {
    let own = quaver_backends::devices().into_iter().find(|own| (own.kind, own.index) == (spec.kind, spec.device));
    own.map_or_else(|| DeviceInfo { backend: spec.kind.name(), ..DeviceInfo::default() }, |own| own.info)
}

impl Suite {
    /// Every case of a seed and a model in both profiles; of these, the ones whose device and name, written
    /// `wgpu-portable::linear::...`, hold one of `filter`, or all where that is empty.
    ///
    /// # Errors
    /// Where a gap names no case.
    pub fn new(seed: u64, model: (Checkpoint, Vec<u32>), gaps: Gaps, filter: Vec<String>) -> Result<Self> {
        let suite = Suite { seed, cases: cases(seed), model, gaps, filter };
        let names = suite.names();
        suite.gaps.check(names.iter().map(String::as_str))?;
        Ok(suite)
    }

    /// The names of all cases, whatever the filter says.
    pub fn names(&self) -> Vec<String> {
        let layers = self.model.0.config().layers;
        let model = PROFILES.into_iter().flat_map(|profile| Model::names(profile, layers));
        self.cases.iter().map(|case| case.name.clone()).chain(model).collect()
    }

    /// True where a case is to be run on a device.
    pub fn takes(&self, spec: &Spec, name: &str) -> bool {
        let full = format!("{spec}::{name}");
        self.filter.is_empty() || self.filter.iter().any(|part| full.contains(part))
    }

    /// Runs all of it, case by case on all devices; `on_progress` is told what comes next. A device that cannot be opened has
    /// one outcome that says why.
    ///
    /// # Errors
    /// Where the reference cannot run the model.
    pub fn run(&self, specs: &[Spec], mut on_progress: impl FnMut(&str)) -> Result<Vec<DeviceReport>> {
        let report = |spec: &Spec| {
            let (info, outcomes) = match quaver_backends::open(spec) {
                Ok(device) => (device.describe(), Vec::new()),
                Err(why) => (listed(spec), vec![Outcome::failed("open", "open", self.seed, why.to_string())]),
            };
            DeviceReport { spec: spec.clone(), info, outcomes }
        };
        let (mut reports, closed): (Vec<_>, Vec<_>) =
            specs.iter().map(report).partition(|report| report.outcomes.is_empty());
        let mut opened: Vec<Option<Box<dyn Backend>>> = reports.iter().map(|_| None).collect();
        for case in &self.cases {
            let takers = reports.iter_mut().zip(&mut opened);
            let mut takers: Vec<_> = takers.filter(|(report, _)| self.takes(&report.spec, &case.name)).collect();
            if takers.is_empty() {
                continue;
            }
            on_progress(&case.name);
            let ready = Ready::new(case)?;
            for (report, open) in &mut takers {
                // A GPU takes longer to open than to run a case.
                let cleared = open.take().and_then(|mut device| device.clear().then_some(device));
                let device = cleared.map_or_else(|| quaver_backends::open(&report.spec), Ok);
                let outcome = device.and_then(|mut device| {
                    let outcome = ready.run(&mut *device);
                    **open = Some(device).filter(|_| outcome.is_ok());
                    outcome
                });
                let failed =
                    |error: quaver_core::Error| Outcome::failed(&case.name, case.op, case.seed, error.to_string());
                self.add(report, outcome.unwrap_or_else(failed));
            }
        }
        drop(opened);
        self.run_model(&mut reports, on_progress)?;
        reports.extend(closed);
        Ok(reports)
    }

    fn run_model(&self, reports: &mut [DeviceReport], mut on_progress: impl FnMut(&str)) -> Result<()> {
        let mut model = None;
        for profile in PROFILES {
            let names = Model::names(profile, self.model.0.config().layers);
            for report in &mut *reports {
                let names: Vec<&String> = names.iter().filter(|name| self.takes(&report.spec, name)).collect();
                if names.is_empty() {
                    continue;
                }
                on_progress(&format!("the model in the {profile:?} profile on {}", report.spec));
                if model.is_none() {
                    model = Some(Model::new(self.model.0.clone(), self.model.1.clone())?);
                }
                let model = model.as_ref().expect("made above");
                let outcomes = quaver_backends::open(&report.spec)
                    .and_then(|mut device| model.run(profile, self.seed, &mut *device))
                    .unwrap_or_else(|error| {
                        let failed = |name: &&String| Outcome::failed(*name, "model", self.seed, error.to_string());
                        names.iter().map(failed).collect()
                    });
                let wanted = outcomes.into_iter().filter(|outcome| names.contains(&&outcome.name));
                wanted.for_each(|outcome| self.add(report, outcome));
            }
        }
        Ok(())
    }

    fn add(&self, report: &mut DeviceReport, outcome: Outcome) {
        let outcome = self.gaps.judge(&report.title(), outcome);
        report.outcomes.push(outcome);
    }
}
