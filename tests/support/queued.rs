//! A backend that passes for one with a queue of its own: the engine then prepares a step before the last one is settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quaver_core::Result;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Backend, Buf, BufDesc, DeviceInfo, Fetch, Op, Plan, Program};

pub struct Queued {
    inner: Box<dyn Backend>,
    /// Bytes that were copied to the host.
    pub taken: Arc<AtomicUsize>,
}

impl Queued {
    pub fn new(inner: Box<dyn Backend>) -> Self {
        Queued { inner, taken: Arc::default() }
    }
}

impl Backend for Queued {
    fn describe(&self) -> DeviceInfo {
        self.inner.describe()
    }

    fn supports(&self, op: &Op) -> Result<()> {
        self.inner.supports(op)
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.inner.alloc(desc)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.inner.load(desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.inner.write(dst, offset, bytes)
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        self.inner.record(program)
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        self.inner.run(plan)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        self.inner.fetch(src, offset, bytes)
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        self.taken.fetch_add(into.len(), Ordering::Relaxed);
        self.inner.take(fetch, into)
    }
}
