//! The adapters of this machine, in the order in which they are numbered.

use std::sync::OnceLock;

use ::wgpu::{Adapter, Backend, Backends, DeviceType, Instance, InstanceDescriptor};
use quaver_core::op::DeviceInfo;

/// What the backend is called.
pub const NAME: &str = "wgpu";

/// Every adapter that can run compute shaders: discrete GPUs before integrated ones before software, and for each kind
/// the system's own interface before OpenGL. Looked for once a process.
pub fn all() -> &'static [Adapter] {
    static ADAPTERS: OnceLock<Vec<Adapter>> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let instance = Instance::new(InstanceDescriptor::new_without_display_handle());
        let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::all()));
        adapters.retain(|adapter| adapter.limits().max_compute_invocations_per_workgroup >= 64);
        adapters.sort_by_key(|adapter| {
            let info = adapter.get_info();
            (rank(info.device_type), info.backend == Backend::Gl)
        });
        adapters
    })
}

/// The smaller, the better.
const fn rank(kind: DeviceType) -> u32 {
    match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

/// True where the adapter is a GPU, and not a processor that poses as one.
pub fn is_hardware(adapter: &Adapter) -> bool {
    adapter.get_info().device_type != DeviceType::Cpu
}

/// What an adapter is.
pub fn describe(adapter: &Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    let interface = match info.backend {
        Backend::Vulkan => "Vulkan",
        Backend::Metal => "Metal",
        Backend::Dx12 => "DirectX 12",
        Backend::Gl => "OpenGL",
        Backend::BrowserWebGpu => "WebGPU",
        Backend::Noop => "no interface",
    };
    let parts = [interface, &info.driver, &info.driver_info];
    let driver = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
    DeviceInfo { backend: NAME, name: info.name, driver, ..DeviceInfo::default() }
}
