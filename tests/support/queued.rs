//! A backend that passes for one with a queue of its own: the engine then prepares a step before the last one is settled.

use quaver_core::Result;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Backend, Buf, BufDesc, DeviceInfo, Fetch, Op, Plan, Program};

pub struct Queued(pub Box<dyn Backend>);

impl Backend for Queued {
    fn describe(&self) -> DeviceInfo {
        self.0.describe()
    }

    fn supports(&self, op: &Op) -> Result<()> {
        self.0.supports(op)
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.0.alloc(desc)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.0.load(desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.0.write(dst, offset, bytes)
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        self.0.record(program)
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        self.0.run(plan)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        self.0.fetch(src, offset, bytes)
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        self.0.take(fetch, into)
    }
}
