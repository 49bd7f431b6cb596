//! What a model takes of a device's memory, found without one: the model is built as the engine builds it, on a backend
//! that only counts what it is asked for. `quaver inspect` calls it, and the engine where a device has little memory.

use crate::bytes::Bytes;
use crate::checkpoint::Checkpoint;
use crate::engine::{EngineOptions, sizes};
use crate::error::{Error, Result};
use crate::llama::{Llama, Sizes};
use crate::op::{Backend, Buf, BufDesc, DType, DeviceInfo, Fetch, Op, Plan, Program, Weight};

/// What a model with some options takes of a device's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Rows, sequences, context and pages.
    pub sizes: Sizes,
    /// Bytes of the weights with their scales, as they are kept on the device.
    pub weights: usize,
    /// Bytes of the rotary table.
    pub rotary: usize,
    /// Bytes of the KV cache.
    pub kv_cache: usize,
    /// What the KV cache is kept in.
    pub kv_dtype: DType,
    /// Bytes of everything else: inputs, activations, logits, and what a device adds.
    pub scratch: usize,
    /// True where the head has a weight of its own, false where it is the embedding.
    pub own_head: bool,
}

impl MemoryPlan {
    /// Plans what [`Engine::new`](crate::engine::Engine::new) would allocate, on this device where there is one: what its
    /// programs take besides their buffers counts. Reads every weight, because that is where a damaged one shows, and keeps
    /// none.
    ///
    /// # Errors
    /// Whatever `Engine::new` would refuse before it runs a program.
    pub fn new(checkpoint: &Checkpoint, options: &EngineOptions, device: Option<&dyn Backend>) -> Result<Self> {
        let sizes = sizes(checkpoint, options)?;
        let mut counter = Counter::default();
        let llama = Llama::load(checkpoint, &mut counter, options.profile, options.kv_cache, sizes)?;
        let (mut rotary, mut table, mut head) = (0, None, None);
        let program = llama.program(sizes.rows, sizes.wanted);
        for line in &program.lines {
            match line.op {
                Op::RopeAppend { rope, .. } => rotary = counter.bytes(rope),
                Op::Embed { table: embedding, .. } => table = Some(Weight::Real(embedding)),
                // The last one stands.
                Op::Linear { w, .. } => head = Some(w),
                _ => {}
            }
        }
        let kv_cache = llama.kv.iter().map(|kv| counter.bytes(kv.k) + counter.bytes(kv.v)).sum();
        let (loaded, allocated) = counter.sums();
        let buffers: Vec<_> = counter.buffers.iter().map(|(desc, _)| desc.clone()).collect();
        let beside = device.map_or(Ok(0), |device| device.scratch(&program, &buffers))? as usize;
        Ok(MemoryPlan {
            sizes,
            weights: loaded - rotary,
            rotary,
            kv_cache,
            kv_dtype: llama.kv.first().map_or(options.profile.dtype(), |kv| counter.buffers[kv.k.0 as usize].0.dtype),
            scratch: allocated - kv_cache + beside,
            own_head: head != table,
        })
    }

    /// Tokens that the KV cache holds, of all sequences together.
    pub fn kv_tokens(&self) -> usize {
        self.sizes.pages * self.sizes.page_tokens
    }

    /// Bytes that one token takes in the KV cache, over all layers.
    pub fn kv_bytes_a_token(&self) -> usize {
        self.kv_cache / self.kv_tokens().max(1)
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.rotary + self.kv_cache + self.scratch
    }

    /// Err([`OutOfMemory`](Error::OutOfMemory)) with the numbers where a device has fewer bytes than this takes.
    pub fn fits(&self, have: u64) -> Result<()> {
        let need = self.total() as u64;
        if need <= have {
            return Ok(());
        }
        let MemoryPlan { weights, rotary, kv_cache, scratch, .. } = self;
        let what = format!(
            "the model ({weights} bytes of weights, {kv_cache} of KV cache, {} of activations and tables)",
            rotary + scratch
        );
        let remedy =
            "lower --kv-cache-memory or --max-model-len, raise --gpu-memory-utilization, or take another device";
        Err(Error::OutOfMemory { what, need, have, remedy })
    }
}

/// A backend that allocates nothing and runs nothing.
#[derive(Default)]
struct Counter {
    /// Descriptions, and whether it was loaded.
    buffers: Vec<(BufDesc, bool)>,
}

impl Counter {
    fn push(&mut self, desc: &BufDesc, loaded: bool) -> Buf {
        self.buffers.push((desc.clone(), loaded));
        Buf(self.buffers.len() as u32 - 1)
    }

    fn bytes(&self, buf: Buf) -> usize {
        self.buffers[buf.0 as usize].0.bytes()
    }

    /// Bytes that were loaded, and bytes that were allocated.
    fn sums(&self) -> (usize, usize) {
        let sum = |loaded| self.buffers.iter().filter(|buffer| buffer.1 == loaded).map(|(desc, _)| desc.bytes()).sum();
        (sum(true), sum(false))
    }

    fn refuse<T>() -> Result<T> {
        Err(Error::device("memory plan", "only counts; open a device to run"))
    }
}

impl Backend for Counter {
    fn describe(&self) -> DeviceInfo {
        let name = "counts, and runs nothing".to_owned();
        DeviceInfo { backend: "plan", name, ..DeviceInfo::default() }
    }

    fn supports(&self, _: &Op) -> Result<()> {
        Self::refuse()
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        Ok(self.push(desc, false))
    }

    fn load(&mut self, desc: &BufDesc, _: &[Bytes]) -> Result<Buf> {
        Ok(self.push(desc, true))
    }

    fn write(&mut self, _: Buf, _: usize, _: &[u8]) -> Result<()> {
        Self::refuse()
    }

    fn record(&mut self, _: &Program) -> Result<Plan> {
        Self::refuse()
    }

    fn run(&mut self, _: Plan) -> Result<()> {
        Self::refuse()
    }

    fn fetch(&mut self, _: Buf, _: usize, _: usize) -> Result<Fetch> {
        Self::refuse()
    }

    fn take(&mut self, _: Fetch, _: &mut [u8]) -> Result<()> {
        Self::refuse()
    }
}
