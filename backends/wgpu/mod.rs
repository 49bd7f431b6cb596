//! The wgpu backend: every op in WGSL, on Vulkan, Metal, DirectX 12 or OpenGL. FP8 is emulated: weights stay codes in
//! device memory and are decoded in registers.
//!
//! `record` lowers ops to kernels (`lower.rs`) and these to pipelines, bind groups and grids; `run` encodes them as one
//! compute pass, or as several where they have very many operations, and submits it without waiting.

pub mod adapter;
mod cache;
mod gpu;
pub mod kernel;
mod lower;
mod memory;
pub mod peaks;
mod pipelines;
mod self_test;
#[cfg(test)]
mod tests;
pub mod tuning;

use ::wgpu::{
    Adapter, BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferSize,
    BufferUsages, ComputePassDescriptor, ComputePipeline, Features,
};
use bytemuck::cast_slice;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Backend, Buf, BufDesc, Copies, DeviceInfo, Fetch, Op, Plan, Program, TensorCores};
use quaver_core::{Error, Result};

use crate::layout::{self, Layout, Layouts};

use self::cache::Cache;
use self::gpu::Gpu;
use self::kernel::{Binding, Kernel};
pub use self::lower::e4m3_codes;
use self::memory::{Copy, Memory};
use self::pipelines::Pipelines;
use self::tuning::Tuning;

/// The variants of the kernels that an adapter runs, the best first.
pub fn variants(adapter: &Adapter) -> Vec<&'static str> {
    tuning::variants(adapter).iter().map(|variant| variant.name).collect()
}

/// The kernels that a program over these buffers is lowered to, without a device: for tests that look at shaders.
pub fn kernels(program: &Program, buffers: &[BufDesc], tuning: &Tuning) -> Result<Vec<Kernel>> {
    let mut layouts = Layouts::default();
    for desc in buffers {
        layouts.push(Layout::new(desc, MOST_BOUND.min(tuning.most_bound)));
    }
    program.check(|buf| layouts.find(buf).map(|layout| &layout.desc))?;
    lower::program(program, &layouts, tuning)
}

/// Bytes that every adapter can bind at once: WebGPU's `maxStorageBufferBindingSize`.
const MOST_BOUND: u64 = 128 << 20;

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
    plans: Vec<Recorded>,
    /// Copies to the host that were not taken yet.
    copies: Copies<Copy>,
}

/// A program on the device.
struct Recorded {
    dispatches: Vec<Dispatch>,
    live: Buf,
    /// Rows, wanted rows and spans, at most.
    most: [u32; 3],
}

/// A kernel on the device.
struct Dispatch {
    pipeline: ComputePipeline,
    bindings: BindGroup,
    grid: [u32; 3],
    ops: f64,
}

impl Wgpu {
    /// Opens an adapter with a variant of the kernels by its name, the best where None: that is not `matrix` where its
    /// products are not exact, which the log says.
    pub fn open(adapter: &Adapter, variant: Option<&str>) -> Result<Self> {
        let mut offered = tuning::variants(adapter).into_iter();
        let Some(chosen) = offered.find(|offered| variant.is_none_or(|name| name == offered.name)) else {
            let (name, names) = (variant.unwrap_or_default(), variants(adapter).join(", "));
            let why = format!("there is no variant {name}; this adapter runs {names}");
            return Err(Error::device(adapter::NAME, why));
        };
        let opened = Self::with(adapter, chosen.features, chosen.tuning.clone());
        if chosen.tuning.matrix_lanes.is_none() {
            return opened;
        }
        let why = match opened.and_then(|mut wgpu| Ok((wgpu.multiplies()?, wgpu))) {
            Ok((true, wgpu)) => return Ok(wgpu),
            Ok((false, _)) => "its products of matrices are not exact".to_owned(),
            Err(e) => e.to_string(),
        };
        if variant.is_some() {
            return Err(Error::device(adapter::NAME, format!("{why}; take --variant subgroup")));
        }
        log::warn!("{}: subgroup instead of {}: {why}", adapter.get_info().name, chosen.name);
        Self::open(adapter, Some("subgroup"))
    }

    /// Opens an adapter with any choice of kernels.
    fn with(adapter: &Adapter, features: Features, tuning: Tuning) -> Result<Self> {
        let optional = Features::PIPELINE_CACHE & adapter.features();
        let gpu = Gpu::open(adapter, features | optional)?;
        let pipelines = Pipelines::new(Cache::open(&gpu, &adapter.get_info()));
        let unused = || gpu.buffer("unused", 16, BufferUsages::STORAGE);
        let unused = [unused()?, unused()?];
        let mut wgpu = Wgpu {
            memory: Memory::new(&gpu, tuning.most_bound),
            gpu,
            tuning,
            pipelines,
            scratch: Vec::new(),
            unused,
            plans: Vec::new(),
            copies: Copies::default(),
        };
        if wgpu.tuning.fast_e4m3 && !wgpu.decodes_fast()? {
            wgpu.tuning.fast_e4m3 = false;
            log::warn!(
                "{}: decoding FP8 by integers, since this driver's f16 is not exact: slower",
                wgpu.gpu.info.name
            );
        }
        if wgpu.tuning.matrix_lanes.is_some() {
            // Sums of f16 products keep as many bits as those of bf16 ones (`kernels/emulator/emulator.cpp` has the source).
            let e4m3_rows = tuning::MATRIX_ROWS as usize;
            let cores = TensorCores { bf16_bits: TensorCores::ALL_BITS, e4m3_bits: 24, e4m3_rows };
            wgpu.gpu.info.tensor_cores = Some(cores);
        }
        Ok(wgpu)
    }

    /// Sums over a context are taken in one part, however a prompt was cut into steps; but on software adapters contexts
    /// beyond what Mesa's loops allow stay in parts.
    #[must_use]
    pub fn deterministic(mut self) -> Self {
        self.tuning.most_splits = 1;
        self
    }

    /// Queues kernels, as one compute pass a submission.
    fn submit(&self, dispatches: &[Dispatch]) -> Result<()> {
        for dispatches in self.submissions(dispatches) {
            let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
            for Dispatch { pipeline, bindings, grid: [x, y, z], .. } in dispatches {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, bindings, &[]);
                pass.dispatch_workgroups(*x, *y, *z);
            }
            drop(pass);
            self.gpu.queue.submit([encoder.finish()]);
        }
        self.gpu.check()
    }

    /// Kernels in submissions of two dispatches' operations at most: drivers take a GPU for hung where a single one is not
    /// done after seconds.
    fn submissions<'a>(&self, dispatches: &'a [Dispatch]) -> impl Iterator<Item = &'a [Dispatch]> {
        let most = 2.0 * self.tuning.most_ops;
        let mut ops = dispatches.first().map_or(0.0, |dispatch| dispatch.ops);
        dispatches.chunk_by(move |_, next| {
            ops += next.ops;
            let fits = ops <= most;
            if !fits {
                ops = next.ops;
            }
            fits
        })
    }

    /// A scratch buffer of at least so many bytes.
    fn scratch(&mut self, bytes: u64) -> Result<Buffer> {
        match self.scratch.last() {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ if bytes > self.gpu.device.limits().max_storage_buffer_binding_size => {
                let most = self.gpu.device.limits().max_storage_buffer_binding_size;
                let why = format!("attention takes {bytes} bytes beside its buffers, the device binds {most}");
                Err(self.gpu.error(why + "; lower --max-num-batched-tokens or --max-model-len"))
            }
            _ => {
                let buffer = self.gpu.buffer("scratch", bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC)?;
                self.scratch.push(buffer.clone());
                Ok(buffer)
            }
        }
    }

    fn dispatch(&mut self, kernel: &Kernel, uniform: Option<BufferBinding>) -> Result<Dispatch> {
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
        if let Some(uniform) = uniform.filter(|_| !kernel.params.is_empty()) {
            entries.push(BindGroupEntry { binding: 0, resource: BindingResource::Buffer(uniform) });
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
        Ok(Dispatch { pipeline: pipeline.pipeline, bindings, grid: kernel.grid, ops: kernel.ops })
    }
}

impl Backend for Wgpu {
    fn describe(&self) -> DeviceInfo {
        self.gpu.info.clone()
    }

    fn clear(&mut self) -> bool {
        self.memory = Memory::new(&self.gpu, self.tuning.most_bound);
        self.scratch.clear();
        self.plans.clear();
        self.copies = Copies::default();
        // What failed may have left more behind.
        self.gpu.is_there().is_ok()
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
        for (i, line) in program.lines.iter().enumerate() {
            let fail = |why| Error::Program { line: i, op: line.label.clone(), why };
            if let Some(&buf) = line.op.writes().iter().find(|&&buf| self.memory.is_constant(buf)) {
                return Err(fail(format!("{} is a constant", self.memory.layouts.desc(buf).name)));
            }
        }
        let kernels = lower::program(program, &self.memory.layouts, &self.tuning)?;
        let mut words = vec![0u32; kernels.len() * UNIFORM / 4];
        for (kernel, words) in kernels.iter().zip(words.chunks_exact_mut(UNIFORM / 4)) {
            words[..kernel.params.len()].copy_from_slice(&kernel.params);
        }
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = self.gpu.buffer("uniforms", 4 * words.len() as u64, usage)?;
        self.gpu.queue.write_buffer(&uniforms, 0, cast_slice(&words));
        let dispatches = kernels.iter().enumerate().map(|(i, kernel)| {
            let (offset, size) = ((i * UNIFORM) as u64, BufferSize::new(UNIFORM as u64));
            self.dispatch(kernel, Some(BufferBinding { buffer: &uniforms, offset, size }))
        });
        let dispatches = dispatches.collect::<Result<_>>()?;
        let spans = program.lines.iter().filter_map(|line| match line.op {
            Op::Attend { rows, .. } => Some(self.memory.layouts.desc(rows.spans).rows.capacity() as u32),
            _ => None,
        });
        let most = [program.rows as u32, program.wanted as u32, spans.min().unwrap_or(u32::MAX)];
        self.pipelines.save();
        self.plans.push(Recorded { dispatches, live: program.live, most });
        Ok(Plan(self.plans.len() as u32 - 1))
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        self.gpu.is_there()?;
        let Some(Recorded { dispatches, live, most }) = self.plans.get(plan.0 as usize) else {
            return Err(self.gpu.error(format!("there is no plan {}", plan.0)));
        };
        let live = self.memory.live(*live);
        if live.iter().zip(most).any(|(live, most)| live > most) {
            let why = format!("a step of {live:?} rows, wanted ones and spans, in a program of {most:?}");
            return Err(self.gpu.error(why));
        }
        self.submit(dispatches)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        let copy = self.memory.fetch(&mut self.gpu, src, offset..offset + bytes)?;
        Ok(self.copies.keep(copy))
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        match self.copies.take(&fetch) {
            Some(copy) if copy.len() == into.len() => Memory::take(&mut self.gpu, copy, into),
            _ => Err(self.gpu.error(format!("there is no copy {} of {} bytes", fetch.0, into.len()))),
        }
    }
}
