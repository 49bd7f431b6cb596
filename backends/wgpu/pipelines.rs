//! Compute pipelines: a shader with its constants, compiled once a device. The one file of this backend with unsafe code.

use std::borrow::Cow;
use std::collections::HashMap;

use ::wgpu::{
    BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry, BindingType, BufferBindingType, ComputePipeline,
    ComputePipelineDescriptor, ExperimentalFeatures, Features, PipelineCache, PipelineCacheDescriptor,
    PipelineCompilationOptions, PipelineLayoutDescriptor, ShaderModule, ShaderModuleDescriptor, ShaderRuntimeChecks,
    ShaderSource, ShaderStages,
};
use quaver_core::Result;

use super::cache::Cache;
use super::gpu::Gpu;
use super::kernel::Kernel;

/// A pipeline and what is bound to it.
#[derive(Clone)]
pub struct Pipeline {
    pub pipeline: ComputePipeline,
    pub layout: BindGroupLayout,
}

/// See the module.
pub struct Pipelines {
    modules: HashMap<&'static str, ShaderModule>,
    made: HashMap<Key, Pipeline>,
    cache: Option<Cache>,
    /// Pipelines that the cache on disk may lack.
    unsaved: usize,
}

/// A shader and the bits of its constants.
type Key = (&'static str, Vec<(&'static str, u64)>);

impl Pipelines {
    /// None made yet.
    pub fn new(cache: Option<Cache>) -> Self {
        Pipelines { modules: HashMap::new(), made: HashMap::new(), cache, unsaved: 0 }
    }

    /// Keeps what was compiled since the last call on disk, where the driver allows.
    pub fn save(&mut self) {
        if let Some(cache) = self.cache.as_ref().filter(|_| self.unsaved > 0) {
            cache.save();
        }
        self.unsaved = 0;
    }

    /// The pipeline of a kernel.
    pub fn get(&mut self, gpu: &Gpu, kernel: &Kernel) -> Result<Pipeline> {
        let constants = kernel.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        let key = (kernel.shader, constants);
        if let Some(pipeline) = self.made.get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = self.make(gpu, kernel)?;
        self.made.insert(key, pipeline.clone());
        self.unsaved += 1;
        Ok(pipeline)
    }

    fn make(&mut self, gpu: &Gpu, kernel: &Kernel) -> Result<Pipeline> {
        let label = Some(kernel.shader);
        let entry = |binding, ty| BindGroupLayoutEntry {
            binding,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = Vec::new();
        if !kernel.params.is_empty() {
            entries.push(entry(0, BufferBindingType::Uniform));
        }
        entries.extend(
            kernel.bindings.iter().map(|(binding, buffer)| {
                entry(*binding, BufferBindingType::Storage { read_only: !buffer.is_written() })
            }),
        );
        let layout = gpu.device.create_bind_group_layout(&BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = gpu.device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let module = match self.modules.get(kernel.shader) {
            Some(module) => module,
            None => self.modules.entry(kernel.shader).or_insert(module(gpu, kernel.shader)?),
        };
        let pipeline = gpu.device.create_compute_pipeline(&ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module,
            entry_point: Some(kernel.shader),
            compilation_options: PipelineCompilationOptions {
                constants: &kernel.constants,
                zero_initialize_workgroup_memory: false,
            },
            cache: self.cache.as_ref().map(|cache| &cache.pipelines),
        });
        gpu.check()?;
        Ok(Pipeline { pipeline, layout })
    }
}

/// Leave to use what wgpu still calls experimental among features that an adapter offers.
#[allow(unsafe_code)]
pub fn experimental(features: Features) -> ExperimentalFeatures {
    if !features.intersects(Features::all_experimental_mask()) {
        return ExperimentalFeatures::disabled();
    }
    // SAFETY: the caller takes on that such features may be unsound. Only cooperative matrices are ever asked for, and
    // `linear_matrix.wgsl` loads and stores them within arrays of a constant size, at offsets that are constant too.
    unsafe { ExperimentalFeatures::enabled() }
}

/// A cache of pipelines, with what `Cache` kept of it.
#[allow(unsafe_code)]
pub fn pipeline_cache(gpu: &Gpu, data: Option<&[u8]>) -> Result<PipelineCache> {
    let descriptor = PipelineCacheDescriptor { label: Some("quaver"), data, fallback: true };
    // SAFETY: the data must come from `PipelineCache::get_data`. It is read from a file of the user's own that nothing
    // but `Cache::save` writes, whole; wgpu holds its header (adapter, driver, length) against the device's, and a driver
    // has to check the rest.
    let cache = unsafe { gpu.device.create_pipeline_cache(&descriptor) };
    gpu.check()?;
    Ok(cache)
}

/// Compiles a shader of ours.
#[allow(unsafe_code)]
fn module(gpu: &Gpu, name: &'static str) -> Result<ShaderModule> {
    let shader = quaver_shaders::find(name).ok_or_else(|| gpu.error(format!("there is no shader {name}")))?;
    let descriptor =
        ShaderModuleDescriptor { label: Some(name), source: ShaderSource::Wgsl(Cow::Borrowed(shader.source)) };
    let checks = ShaderRuntimeChecks { force_loop_bounding: false, ..ShaderRuntimeChecks::checked() };
    // SAFETY: what is left out is the bounding of loops, which must end by themselves. The shaders are this crate's own;
    // each of their loops counts up or down to a bound that it does not change, or halves an interval.
    let module = unsafe { gpu.device.create_shader_module_trusted(descriptor, checks) };
    gpu.check()?;
    Ok(module)
}
