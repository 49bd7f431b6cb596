//! The devices that run Quaver's programs, and the choice among them.

pub mod cpu;

use self::cpu::isa::Isa;

use std::fmt;

use quaver_core::op::{Backend, DeviceInfo};
use quaver_core::reference::Reference;
use quaver_core::{Error, Result};

/// A backend by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// The best that this machine offers.
    #[default]
    Auto,
    /// All cores.
    Cpu,
    /// The specification: slow, and right by definition.
    Reference,
}

impl Kind {
    /// All of them, as they are listed to a user.
    pub const ALL: [Kind; 3] = [Kind::Auto, Kind::Cpu, Kind::Reference];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Auto => "auto",
            Kind::Cpu => "cpu",
            Kind::Reference => "reference",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which device to open.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Spec {
    /// The backend.
    pub kind: Kind,
    /// Its number among the devices of that backend, as [`devices`] counts them.
    pub device: usize,
    /// Threads of the cpu backend; None for one a core.
    pub threads: Option<usize>,
    /// Which of its kernels, where it has several for the same thing; None for the best. On the cpu: an instruction set.
    pub variant: Option<String>,
}

impl From<Kind> for Spec {
    fn from(kind: Kind) -> Self {
        Spec { kind, ..Spec::default() }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if self.device > 0 {
            write!(f, ":{}", self.device)?;
        }
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "-{variant}"))
    }
}

/// Opens a device. What was chosen, and why, is one line in the log.
pub fn open(spec: &Spec) -> Result<Box<dyn Backend>> {
    let kind = choose(spec)?;
    let backend: Box<dyn Backend> = match kind {
        Kind::Auto | Kind::Cpu => Box::new(cpu::open(spec.threads, spec.variant.as_deref())?),
        Kind::Reference if spec.variant.is_some() => {
            return Err(Error::device("reference", "it has no variants; leave --variant out"));
        }
        Kind::Reference => Box::new(Reference::open()),
    };
    let DeviceInfo { backend: name, name: device, driver, .. } = backend.describe();
    log::info!("backend {name}: {device} ({driver}), asked for {}", spec.kind);
    Ok(backend)
}

/// The backend that a spec comes to on this machine.
fn choose(spec: &Spec) -> Result<Kind> {
    let devices = devices();
    let kind = match (spec.kind, devices.first()) {
        (Kind::Auto, Some(best)) => best.kind,
        (kind, _) => kind,
    };
    let count = devices.iter().filter(|device| device.kind == kind).count();
    if spec.device >= count.max(1) {
        let why = format!("there is no device {}; this machine has {count} (see `quaver devices`)", spec.device);
        return Err(Error::device(kind.name(), why));
    }
    Ok(kind)
}

/// What a device can do at best, measured on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Threads of the processor that took part.
    pub threads: usize,
    /// Bytes a second that are read from memory.
    pub bandwidth: f64,
    /// Operations a second of the instruction that the device's kernels multiply FP8 with; a product that is added to a
    /// sum is two.
    pub flops: f64,
}

/// Measures what the device that [`open`] would open can do at best. Takes about a second and 512 MiB of memory.
pub fn peaks(spec: &Spec) -> Result<Peaks> {
    match choose(spec)? {
        Kind::Auto | Kind::Cpu => cpu::peaks(spec.threads, spec.variant.as_deref()),
        // One thread, and no instruction that not every machine has.
        Kind::Reference => cpu::peaks(Some(1), Some("portable")),
    }
}

/// A device of this machine.
#[derive(Clone, Debug)]
pub struct Device {
    /// The backend that opens it.
    pub kind: Kind,
    /// Its number among the devices of that backend.
    pub index: usize,
    /// What it is.
    pub info: DeviceInfo,
}

/// Every device that [`open`] can open, the one that `auto` takes first.
pub fn devices() -> Vec<Device> {
    vec![
        Device { kind: Kind::Cpu, index: 0, info: cpu::describe(cpu::default_threads(), Isa::all()[0]) },
        Device { kind: Kind::Reference, index: 0, info: Reference::open().describe() },
    ]
}

/// Every device with each variant of its kernels that it can run: what tests and parity runs go through.
pub fn variants() -> Vec<Spec> {
    let mut specs = Vec::new();
    for Device { kind, index: device, .. } in devices() {
        let names = match kind {
            Kind::Cpu => Isa::all().iter().map(|isa| Some(isa.name().to_owned())).collect(),
            Kind::Auto | Kind::Reference => vec![None],
        };
        specs.extend(names.into_iter().map(|variant| Spec { kind, device, threads: None, variant }));
    }
    specs
}

/// A backend that offers no device here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// Its name.
    pub backend: &'static str,
    /// Why.
    pub why: &'static str,
}

/// The backends that [`devices`] lists nothing of, and why.
pub fn unavailable() -> Vec<Unavailable> {
    ["cuda", "wgpu"].map(|backend| Unavailable { backend, why: "not in this build" }).into()
}
