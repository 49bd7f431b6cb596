//! The adapters of this machine, in the order in which they are numbered.

use std::sync::OnceLock;

use ::wgpu::{Adapter, Backend, Backends, DeviceType, Instance, InstanceDescriptor, Limits};
use quaver_core::op::DeviceInfo;

/// What the backend is called.
pub const NAME: &str = "wgpu";

/// Every adapter that runs all ops: discrete GPUs before integrated ones before software, and for each kind the system's
/// own interface before OpenGL. Looked for once a process.
pub fn all() -> &'static [Adapter] {
    &found().0
}

/// The other adapters of this machine, each with the reason why it is not among [`all`].
pub fn passed_over() -> &'static [String] {
    &found().1
}

fn found() -> &'static (Vec<Adapter>, Vec<String>) {
    static ADAPTERS: OnceLock<(Vec<Adapter>, Vec<String>)> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let instance = Instance::new(InstanceDescriptor::new_without_display_handle());
        let (mut adapters, mut reasons) = (Vec::new(), Vec::new());
        for adapter in pollster::block_on(instance.enumerate_adapters(Backends::all())) {
            match lack(&adapter.limits()) {
                None => adapters.push(adapter),
                Some(why) => {
                    let DeviceInfo { name, driver, .. } = describe(&adapter);
                    reasons.push(format!("{name} ({driver}) {why}"));
                }
            }
        }
        adapters.sort_by_key(|adapter| {
            let info = adapter.get_info();
            (rank(info.device_type), info.backend == Backend::Gl)
        });
        (adapters, reasons)
    })
}

/// Storage buffers that every adapter must bind: those of `rope_append`.
pub const MOST_BUFFERS: u32 = 9;

/// The same for adapters that run `linear_rope`.
pub const MOST_BUFFERS_WIDE: u32 = 12;

/// Threads of a workgroup that every adapter must run: those of `attend_tiled`.
const THREADS: u32 = 128;

/// What an adapter lacks to run all ops.
fn lack(limits: &Limits) -> Option<String> {
    let (buffers, threads) =
        (limits.max_storage_buffers_per_shader_stage, limits.max_compute_invocations_per_workgroup);
    if buffers < MOST_BUFFERS {
        return Some(format!("binds {buffers} storage buffers a shader, {MOST_BUFFERS} are needed"));
    }
    (threads < THREADS).then(|| format!("runs {threads} threads a workgroup, {THREADS} are needed"))
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// [`all`], which must not be empty: a test that goes through no adapter would pass.
    pub fn some() -> &'static [Adapter] {
        assert!(
            !all().is_empty(),
            "there is no adapter: check.sh installs a software one; not taken: {:?}",
            passed_over()
        );
        all()
    }

    #[test]
    fn an_adapter_that_cannot_run_all_ops_is_passed_over_with_the_reason() {
        let limits = some()[0].limits();
        assert_eq!(lack(&limits), None);
        let few = Limits { max_storage_buffers_per_shader_stage: 8, ..limits.clone() };
        assert_eq!(lack(&few).as_deref(), Some("binds 8 storage buffers a shader, 9 are needed"));
        let small = Limits { max_compute_invocations_per_workgroup: 64, ..limits };
        assert_eq!(lack(&small).as_deref(), Some("runs 64 threads a workgroup, 128 are needed"));
    }
}
