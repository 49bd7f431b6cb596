//! Compute pipelines: a shader with its constants, compiled once a device. The one file of this backend with unsafe code.

use std::borrow::Cow;
use std::collections::HashMap;

use ::wgpu::{
    BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry, BindingType, BufferBindingType, ComputePipeline,
    ComputePipelineDescriptor, PipelineCompilationOptions, PipelineLayoutDescriptor, ShaderModule,
    ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource, ShaderStages,
};
use quaver_core::Result;

use super::gpu::Gpu;
use super::kernel::Kernel;

/// A pipeline and what is bound to it.
#[derive(Clone)]
pub struct Pipeline {
    pub pipeline: ComputePipeline,
    pub layout: BindGroupLayout,
}

/// See the module.
#[derive(Default)]
pub struct Pipelines {
    modules: HashMap<&'static str, ShaderModule>,
    made: HashMap<Key, Pipeline>,
}

/// A shader and the bits of its constants.
type Key = (&'static str, Vec<(&'static str, u64)>);

impl Pipelines {
    /// The pipeline of a kernel.
    pub fn get(&mut self, gpu: &Gpu, kernel: &Kernel) -> Result<Pipeline> {
        let constants = kernel.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        let key = (kernel.shader, constants);
        if let Some(pipeline) = self.made.get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = self.make(gpu, kernel)?;
        self.made.insert(key, pipeline.clone());
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
            cache: None,
        });
        gpu.check()?;
        Ok(Pipeline { pipeline, layout })
    }
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
