//! The devices that run Quaver's programs, and the choice among them.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod fold;
mod layout;
mod peaks;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use self::peaks::Peaks;

use self::cpu::isa::Isa;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use quaver_core::op::{Backend, DeviceInfo};
use quaver_core::reference::Reference;
use quaver_core::reference::hugging_face::HuggingFace;
use quaver_core::{Error, Result};

/// A backend by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// The best that this machine offers.
    #[default]
    Auto,
    /// NVIDIA cards, with FP8 on their tensor cores.
    Cuda,
    /// The CUDA kernels on the CPU, compiled by its C++ compiler: slow, for tests of the kernels.
    CudaEmulated,
    /// Any GPU, or a software adapter, through WGSL.
    Wgpu,
    /// All cores.
    Cpu,
    /// The specification: slow, and right by definition.
    Reference,
}

impl Kind {
    /// All of them, as they are listed to a user.
    pub const ALL: [Kind; 6] = [Kind::Auto, Kind::Cuda, Kind::Wgpu, Kind::Cpu, Kind::Reference, Kind::CudaEmulated];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Auto => "auto",
            Kind::Cuda => "cuda",
            Kind::CudaEmulated => "cuda-emulated",
            Kind::Wgpu => "wgpu",
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
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Spec {
    /// The backend.
    pub kind: Kind,
    /// Its number among the devices of that backend, as [`devices`] counts them.
    pub device: usize,
    /// Threads of the cpu backend; None for one a core.
    pub threads: Option<usize>,
    /// Which of its kernels, where it has several for the same thing; None for the best. On the cpu: an instruction set.
    pub variant: Option<String>,
    /// Results do not depend on how rows are cut into steps: a GPU takes a context in one part, which is slower.
    pub deterministic: bool,
    /// The share of a card's memory that may be used; None for [`GPU_MEMORY_UTILIZATION`].
    pub gpu_memory_utilization: Option<f64>,
}

/// The share of a card's memory that is used where nothing else is said, as in vLLM.
pub const GPU_MEMORY_UTILIZATION: f64 = 0.9;

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

/// The variant of the reference that rounds to bf16 where Hugging Face does: for calibration, and no device of its own.
const HUGGING_FACE: &str = "hf-bf16";

/// Opens a device. What was chosen, and why, is one line in the log.
pub fn open(spec: &Spec) -> Result<Box<dyn Backend>> {
    let kind = choose(spec);
    let backend: Box<dyn Backend> = match kind {
        Kind::Cuda => open_cuda(spec)?,
        Kind::CudaEmulated => open_cuda_emulated(spec)?,
        Kind::Wgpu => open_wgpu(spec)?,
        Kind::Auto | Kind::Cpu => {
            within(spec, kind, 1)?;
            Box::new(cpu::open(spec.threads, spec.variant.as_deref())?)
        }
        Kind::Reference => {
            within(spec, kind, 1)?;
            match spec.variant.as_deref() {
                None => Box::new(Reference::open()),
                Some(HUGGING_FACE) => Box::new(HuggingFace::open()),
                Some(other) => {
                    let why = format!("it has no variant {other}; give {HUGGING_FACE}, or leave --variant out");
                    return Err(Error::device("reference", why));
                }
            }
        }
    };
    let DeviceInfo { backend: name, name: device, driver, .. } = backend.describe();
    let passed = if spec.kind == Kind::Auto { passed_over().join("; ") } else { String::new() };
    let passed = if passed.is_empty() { passed } else { format!("; passed over: {passed}") };
    log::info!("backend {name}: {device} ({driver}), asked for {}{passed}", spec.kind);
    Ok(backend)
}

/// What `auto` did not take, and why.
fn passed_over() -> Vec<String> {
    let devices = devices();
    let missing = unavailable().into_iter().map(|Unavailable { backend, why }| format!("{backend}: {why}"));
    let others = devices[1..].iter().filter(|device| device.kind != Kind::Reference).map(|device| {
        let why = if device.is_software { "a software adapter" } else { "the first is taken" };
        format!("{} {}: {why}", device.kind, device.info.name)
    });
    missing.chain(others).collect()
}

/// A turn on a device that serves one thread at a time; None where any number may open it at once. All OpenGL devices of
/// an adapter share one context, and wgpu panics where a thread waits for that longer than six seconds, which the
/// compilation of a shader may take. Who opens devices in several threads, as tests do, takes a turn before.
pub fn turn(spec: &Spec) -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    (choose(spec) == Kind::Wgpu && is_opengl(spec)).then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(feature = "wgpu")]
fn is_opengl(spec: &Spec) -> bool {
    find_adapter(spec).is_ok_and(|adapter| adapter.get_info().backend == ::wgpu::Backend::Gl)
}

#[cfg(not(feature = "wgpu"))]
fn is_opengl(_spec: &Spec) -> bool {
    false
}

/// The backend that a spec comes to on this machine. What it names is not looked for.
fn choose(spec: &Spec) -> Kind {
    match spec.kind {
        Kind::Auto => devices()[0].kind,
        kind => kind,
    }
}

/// Fails where there is no such device.
fn within(spec: &Spec, kind: Kind, count: usize) -> Result<()> {
    if spec.device < count {
        return Ok(());
    }
    let why = format!("there is no device {}; this machine has {count} (see `quaver devices`)", spec.device);
    Err(Error::device(kind.name(), why))
}

#[cfg(feature = "wgpu")]
fn find_adapter(spec: &Spec) -> Result<&'static ::wgpu::Adapter> {
    let adapters = wgpu::adapter::all();
    if adapters.is_empty() {
        return Err(Error::device("wgpu", NO_ADAPTER));
    }
    within(spec, Kind::Wgpu, adapters.len())?;
    Ok(&adapters[spec.device])
}

#[cfg(feature = "wgpu")]
fn open_wgpu(spec: &Spec) -> Result<Box<dyn Backend>> {
    let wgpu = wgpu::Wgpu::open(find_adapter(spec)?, spec.variant.as_deref())?;
    Ok(Box::new(if spec.deterministic { wgpu.deterministic() } else { wgpu }))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu(_spec: &Spec) -> Result<Box<dyn Backend>> {
    Err(Error::device("wgpu", NOT_BUILT))
}

/// The number and the properties of a card, and the share of its memory that may be used.
#[cfg(feature = "cuda")]
fn find_card(spec: &Spec) -> Result<(usize, cuda::Properties, f64)> {
    let mut cards = cuda::card::all().map_err(|why| Error::device("cuda", why))?;
    within(spec, Kind::Cuda, cards.len())?;
    let (card, properties) = cards.swap_remove(spec.device);
    Ok((card, properties, spec.gpu_memory_utilization.unwrap_or(GPU_MEMORY_UTILIZATION)))
}

#[cfg(feature = "cuda")]
fn open_cuda(spec: &Spec) -> Result<Box<dyn Backend>> {
    let (card, properties, share) = find_card(spec)?;
    let cuda = cuda::Cuda::open(card, &properties, spec.variant.as_deref(), share)?;
    Ok(Box::new(if spec.deterministic { cuda.deterministic() } else { cuda }))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_spec: &Spec) -> Result<Box<dyn Backend>> {
    Err(Error::device("cuda", NOT_BUILT))
}

#[cfg(feature = "cuda")]
fn cuda_peaks(spec: &Spec) -> Result<Peaks> {
    let (card, properties, share) = find_card(spec)?;
    cuda::peaks::measure(card, &properties, spec.variant.as_deref(), share)
}

#[cfg(feature = "cuda")]
fn cuda_memory_in_use(spec: &Spec) -> Result<u64> {
    cuda::card::memory_in_use(find_card(spec)?.0)
}

#[cfg(not(feature = "cuda"))]
fn cuda_memory_in_use(_spec: &Spec) -> Result<u64> {
    Err(Error::device("cuda", NOT_BUILT))
}

#[cfg(not(feature = "cuda"))]
fn cuda_peaks(_spec: &Spec) -> Result<Peaks> {
    Err(Error::device("cuda", NOT_BUILT))
}

#[cfg(feature = "cuda")]
fn open_cuda_emulated(spec: &Spec) -> Result<Box<dyn Backend>> {
    within(spec, Kind::CudaEmulated, cuda::SCHEDULES)?;
    let variant = cuda::Variant::parse("cuda-emulated", spec.variant.as_deref())?;
    let cuda = cuda::Cuda::emulated(variant, spec.device)?;
    Ok(Box::new(if spec.deterministic { cuda.deterministic() } else { cuda }))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda_emulated(_spec: &Spec) -> Result<Box<dyn Backend>> {
    Err(Error::device("cuda-emulated", NOT_BUILT))
}

/// A software adapter can do what the processor can.
#[cfg(feature = "wgpu")]
fn wgpu_peaks(spec: &Spec) -> Result<Peaks> {
    let adapter = find_adapter(spec)?;
    if wgpu::adapter::is_hardware(adapter) {
        return wgpu::peaks::measure(adapter, spec.variant.as_deref());
    }
    cpu::peaks(spec.threads, None)
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_peaks(_spec: &Spec) -> Result<Peaks> {
    Err(Error::device("wgpu", NOT_BUILT))
}

/// Measures what the device that [`open`] would open can do at best. Takes about a second, and 512 MiB of memory, of a
/// card 1 GiB.
pub fn peaks(spec: &Spec) -> Result<Peaks> {
    match choose(spec) {
        Kind::Cuda => cuda_peaks(spec),
        Kind::CudaEmulated => Err(Error::device("cuda-emulated", "its speed says nothing; take another --backend")),
        Kind::Wgpu => wgpu_peaks(spec),
        Kind::Auto | Kind::Cpu => cpu::peaks(spec.threads, spec.variant.as_deref()),
        // One thread, and no instruction that not every machine has.
        Kind::Reference => cpu::peaks(Some(1), Some("portable")),
    }
}

/// Bytes of a card's memory that are in use, by all that run on it; None where a device does not say.
pub fn memory_in_use(spec: &Spec) -> Result<Option<u64>> {
    match choose(spec) {
        Kind::Cuda => cuda_memory_in_use(spec).map(Some),
        _ => Ok(None),
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
    /// The variants of its kernels, the one that is taken first; empty where there is no choice.
    pub variants: Vec<&'static str>,
    /// True for a processor that poses as a GPU.
    pub is_software: bool,
}

/// Every device that [`open`] can open, the one that `auto` takes first: NVIDIA cards, other GPUs, the cpu, software
/// adapters. The emulator is for tests, and none of them.
pub fn devices() -> Vec<Device> {
    let (software, gpus): (Vec<_>, Vec<_>) = wgpu_devices().into_iter().partition(|device| device.is_software);
    let mut devices: Vec<_> = cuda_devices().into_iter().chain(gpus).collect();
    let info = cpu::describe(cpu::default_threads(), Isa::all()[0]);
    let names = Isa::all().iter().map(|isa| isa.name()).collect();
    devices.push(Device { kind: Kind::Cpu, index: 0, info, variants: names, is_software: false });
    devices.extend(software);
    let info = Reference::open().describe();
    devices.push(Device { kind: Kind::Reference, index: 0, info, variants: Vec::new(), is_software: false });
    devices
}

/// The cards that the cuda backend runs on.
#[cfg(feature = "cuda")]
fn cuda_devices() -> Vec<Device> {
    let device = |(index, (_, properties)): (usize, &(usize, cuda::Properties))| {
        let variants = cuda::card::variants(properties).into_iter().map(cuda::Variant::name).collect();
        Device { kind: Kind::Cuda, index, info: cuda::card::describe(properties), variants, is_software: false }
    };
    cuda::card::all().unwrap_or_default().iter().enumerate().map(device).collect()
}

#[cfg(not(feature = "cuda"))]
fn cuda_devices() -> Vec<Device> {
    Vec::new()
}

/// The adapters.
#[cfg(feature = "wgpu")]
fn wgpu_devices() -> Vec<Device> {
    let device = |(index, adapter): (usize, &::wgpu::Adapter)| {
        let (info, variants) = (wgpu::adapter::describe(adapter), wgpu::variants(adapter));
        Device { kind: Kind::Wgpu, index, info, variants, is_software: !wgpu::adapter::is_hardware(adapter) }
    };
    wgpu::adapter::all().iter().enumerate().map(device).collect()
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_devices() -> Vec<Device> {
    Vec::new()
}

/// Every device with each variant of its kernels that it can run: what tests and parity runs go through.
pub fn variants() -> Vec<Spec> {
    let mut specs = Vec::new();
    for Device { kind, index: device, variants, .. } in devices() {
        let names = variants.iter().map(|name| Some((*name).to_owned()));
        let names: Vec<_> = if variants.is_empty() { vec![None] } else { names.collect() };
        specs.extend(names.into_iter().map(|variant| Spec { kind, device, variant, ..Spec::default() }));
    }
    specs
}

/// A backend that offers no device here, or not all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// Its name.
    pub backend: &'static str,
    /// Why, and what to do; with the name of the adapter that is not listed, where it is one.
    pub why: String,
}

#[cfg(not(all(feature = "cuda", feature = "wgpu")))]
const NOT_BUILT: &str = "not in this build";

#[cfg(feature = "wgpu")]
const NO_ADAPTER: &str = "there is no adapter; install a GPU driver with Vulkan, or the software one (Debian, Ubuntu: \
                          mesa-vulkan-drivers libvulkan1)";

/// The backends that [`devices`] lists nothing of, and the adapters that it leaves out, and why.
pub fn unavailable() -> Vec<Unavailable> {
    let mut missing = Vec::new();
    #[cfg(feature = "cuda")]
    missing.extend(cuda::card::all().err().map(|why| Unavailable { backend: "cuda", why }));
    #[cfg(not(feature = "cuda"))]
    missing.push(Unavailable { backend: "cuda", why: NOT_BUILT.into() });
    #[cfg(feature = "wgpu")]
    if wgpu::adapter::all().is_empty() {
        missing.push(Unavailable { backend: "wgpu", why: NO_ADAPTER.into() });
    }
    #[cfg(feature = "wgpu")]
    missing.extend(wgpu::adapter::passed_over().iter().map(|why| Unavailable { backend: "wgpu", why: why.clone() }));
    #[cfg(not(feature = "wgpu"))]
    missing.push(Unavailable { backend: "wgpu", why: NOT_BUILT.into() });
    missing
}
