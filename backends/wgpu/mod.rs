//! The wgpu backend: every op in WGSL, on Vulkan, Metal, DirectX 12 or OpenGL. FP8 is emulated: weights stay codes in
//! device memory and are decoded in registers.
//!
//! `record` lowers ops to kernels (`lower.rs`) and these to pipelines, bind groups and grids; `run` encodes them as one
//! compute pass and submits it, without waiting.

pub mod adapter;
mod gpu;
mod kernel;
mod layout;
mod lower;
mod memory;
mod pipelines;
mod tuning;

use ::wgpu::{
    Adapter, BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferSize,
    BufferUsages, ComputePassDescriptor, ComputePipeline, Features,
};
use bytemuck::cast_slice;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Backend, Buf, BufDesc, DeviceInfo, Op, Plan, Program, Step};
use quaver_core::{Error, Result};

use self::gpu::Gpu;
use self::kernel::{Binding, Kernel};
use self::memory::Memory;
use self::pipelines::Pipelines;
use self::tuning::Tuning;

/// The variants of the kernels that an adapter runs, the best first.
pub fn variants(_adapter: &Adapter) -> Vec<&'static str> {
    vec!["portable"]
}

/// Bytes between the uniforms of two kernels: WebGPU's largest `minUniformBufferOffsetAlignment`.
const UNIFORM: usize = 256;

/// A device that runs WGSL.
pub struct Wgpu {
    gpu: Gpu,
    tuning: Tuning,
    memory: Memory,
    pipelines: Pipelines,
    /// Shared by the plans that it was large enough for; the last one is the largest.
    scratch: Vec<Buffer>,
    /// Bound where a kernel has a buffer that it does not use: read, written.
    unused: [Buffer; 2],
    plans: Vec<Vec<Dispatch>>,
    steps: u64,
}

/// A kernel on the device.
struct Dispatch {
    pipeline: ComputePipeline,
    bindings: BindGroup,
    grid: [u32; 3],
}

impl Wgpu {
    /// Opens an adapter with a variant of the kernels by its name, the best where None.
    pub fn open(adapter: &Adapter, variant: Option<&str>) -> Result<Self> {
        let names = variants(adapter);
        if let Some(name) = variant.filter(|name| !names.contains(name)) {
            let why = format!("there is no variant {name}; this adapter runs {}", names.join(", "));
            return Err(Error::device(adapter::NAME, why));
        }
        let gpu = Gpu::open(adapter, Features::empty())?;
        let unused = || gpu.buffer("unused", 16, BufferUsages::STORAGE);
        let unused = [unused()?, unused()?];
        Ok(Wgpu {
            gpu,
            tuning: Tuning::SOFTWARE,
            memory: Memory::default(),
            pipelines: Pipelines::default(),
            scratch: Vec::new(),
            unused,
            plans: Vec::new(),
            steps: 0,
        })
    }

    /// A scratch buffer of at least so many bytes.
    fn scratch(&mut self, bytes: u64) -> Result<Buffer> {
        match self.scratch.last() {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ => {
                let buffer = self.gpu.buffer("scratch", bytes, BufferUsages::STORAGE)?;
                self.scratch.push(buffer.clone());
                Ok(buffer)
            }
        }
    }

    fn dispatch(&mut self, kernel: &Kernel, uniforms: &Buffer, offset: usize) -> Result<Dispatch> {
        let mut buffers = Vec::new();
        for &(binding, bound) in &kernel.bindings {
            let buffer = match bound {
                Binding::Read(buf, part) | Binding::Write(buf, part) => self.memory.part(buf, part).clone(),
                Binding::ReadScratch(bytes) | Binding::WriteScratch(bytes) => self.scratch(bytes)?,
                Binding::Unread => self.unused[0].clone(),
                Binding::Unwritten => self.unused[1].clone(),
            };
            buffers.push((binding, buffer));
        }
        let pipeline = self.pipelines.get(&self.gpu, kernel)?;
        let mut entries = Vec::new();
        if !kernel.params.is_empty() {
            let size = BufferSize::new(UNIFORM as u64);
            let binding = BufferBinding { buffer: uniforms, offset: offset as u64, size };
            entries.push(BindGroupEntry { binding: 0, resource: BindingResource::Buffer(binding) });
        }
        for (binding, buffer) in &buffers {
            entries.push(BindGroupEntry { binding: *binding, resource: buffer.as_entire_binding() });
        }
        let bindings = self.gpu.device.create_bind_group(&BindGroupDescriptor {
            label: Some(kernel.shader),
            layout: &pipeline.layout,
            entries: &entries,
        });
        self.gpu.check()?;
        Ok(Dispatch { pipeline: pipeline.pipeline, bindings, grid: kernel.grid })
    }
}

impl Backend for Wgpu {
    fn describe(&self) -> DeviceInfo {
        self.gpu.info.clone()
    }

    fn supports(&self, _op: &Op) -> Result<()> {
        Ok(())
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.memory.alloc(&self.gpu, desc, false)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.memory.load(&self.gpu, desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.memory.write(&mut self.gpu, dst, offset, bytes)
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        program.check(|buf| self.memory.layouts.find(buf).map(|layout| &layout.desc))?;
        let mut kernels = Vec::new();
        for (i, line) in program.lines.iter().enumerate() {
            let fail = |why| Error::Program { line: i, op: line.label.clone(), why };
            if let Some(&buf) = line.op.writes().iter().find(|&&buf| self.memory.is_constant(buf)) {
                return Err(fail(format!("{} is a constant", self.memory.layouts.desc(buf).name)));
            }
            let unsupported = |why| Error::Unsupported { backend: adapter::NAME.into(), op: line.label.clone(), why };
            let lowered = lower::lower(&line.op, program, &self.memory.layouts, &self.tuning);
            kernels.extend(lowered.map_err(unsupported)?);
        }
        let mut words = vec![0u32; kernels.len() * UNIFORM / 4];
        for (kernel, words) in kernels.iter().zip(words.chunks_exact_mut(UNIFORM / 4)) {
            words[..kernel.params.len()].copy_from_slice(&kernel.params);
        }
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = self.gpu.buffer("uniforms", 4 * words.len() as u64, usage)?;
        self.gpu.queue.write_buffer(&uniforms, 0, cast_slice(&words));
        let dispatches = kernels.iter().enumerate().map(|(i, kernel)| self.dispatch(kernel, &uniforms, i * UNIFORM));
        let plan = dispatches.collect::<Result<_>>()?;
        self.plans.push(plan);
        Ok(Plan(self.plans.len() as u32 - 1))
    }

    fn run(&mut self, plan: Plan) -> Result<Step> {
        let Some(dispatches) = self.plans.get(plan.0 as usize) else {
            return Err(self.gpu.error(format!("there is no plan {}", plan.0)));
        };
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
        for Dispatch { pipeline, bindings, grid: [x, y, z] } in dispatches {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, bindings, &[]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
        drop(pass);
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.check()?;
        self.steps += 1;
        Ok(Step(self.steps))
    }

    fn read(&mut self, _after: Step, src: Buf, offset: usize, into: &mut [u8]) -> Result<()> {
        self.memory.read(&mut self.gpu, src, offset, into)
    }
}
