//! A model on a device, without an engine: any part of its program can be run, and any buffer read and written.

use bytemuck::cast_slice;
use quaver_core::Result;
use quaver_core::batch::Batch;
use quaver_core::bytes::Bytes;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::{KvCache, Llama, Profile, Sizes};
use quaver_core::op::{Backend, Buf, BufDesc, DeviceInfo, Extent, Fetch, Line, Op, Plan, Program};
use quaver_core::sampler::RowParams;

const PAGE_TOKENS: usize = 16;

/// See the module.
pub struct Stage<'a> {
    device: Noting<'a>,
    /// The model.
    pub llama: Llama,
}

impl<'a> Stage<'a> {
    /// A model for one sequence of at most `tokens` tokens, all of them in one step and wanted; on a fresh device.
    pub fn new(
        checkpoint: &Checkpoint,
        device: &'a mut dyn Backend,
        profile: Profile,
        kv_cache: KvCache,
        tokens: usize,
    ) -> Result<Self> {
        let mut device = Noting { device, buffers: Vec::new() };
        let pages = tokens.div_ceil(PAGE_TOKENS);
        let (sequences, page_tokens) = (1, PAGE_TOKENS);
        let sizes = Sizes { rows: tokens, wanted: tokens, sequences, context: tokens, pages, page_tokens };
        let llama = Llama::load(checkpoint, &mut device, profile, kv_cache, sizes)?;
        // Pages in reverse, so that a position is not its own place.
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        device.write(llama.inputs.rows.page_table, 0, cast_slice(&table))?;
        Ok(Stage { device, llama })
    }

    /// The descriptions of all buffers, by their numbers.
    pub fn buffers(&self) -> &[BufDesc] {
        &self.device.buffers
    }

    /// Writes the inputs of a step over `ids` from `position` on, all rows wanted.
    pub fn write(&mut self, position: usize, ids: &[u32]) -> Result<()> {
        let mut batch = Batch::default();
        batch.push(0, position, ids);
        (0..ids.len()).for_each(|row| batch.want(row, RowParams::score(0, ids[row], 1)));
        batch.write(&self.llama, &mut self.device)?;
        batch.write_wanted(&self.llama, &mut self.device, 0, ids.len())
    }

    /// Records some lines of the model's program for `rows` rows, all wanted.
    pub fn record(&mut self, lines: &[Line], rows: usize) -> Result<Plan> {
        let live = self.llama.inputs.live;
        self.device.record(&Program { rows, wanted: rows, live, lines: lines.to_vec() })
    }

    /// Queues what was recorded.
    pub fn run(&mut self, plan: Plan) -> Result<()> {
        self.device.run(plan)
    }

    /// The bytes of a buffer after a step of `rows` rows: those rows, or all where its rows are not the step's.
    pub fn read(&mut self, buf: Buf, rows: usize) -> Result<Vec<u8>> {
        let desc = &self.device.buffers[buf.0 as usize];
        let rows = if matches!(desc.rows, Extent::Fixed(_)) { desc.rows.capacity() } else { rows };
        let mut bytes = vec![0; rows * desc.cols * desc.dtype.size()];
        self.device.read(buf, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// The same as f32 numbers, which the buffer must hold.
    pub fn read_f32(&mut self, buf: Buf, rows: usize) -> Result<Vec<f32>> {
        let bytes = self.read(buf, rows)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Overwrites the first bytes of a buffer.
    pub fn put(&mut self, buf: Buf, bytes: &[u8]) -> Result<()> {
        self.device.write(buf, 0, bytes)
    }
}

/// A backend around another that notes what buffers there are.
struct Noting<'a> {
    device: &'a mut dyn Backend,
    buffers: Vec<BufDesc>,
}

impl Backend for Noting<'_> {
    fn describe(&self) -> DeviceInfo {
        self.device.describe()
    }

    fn supports(&self, op: &Op) -> Result<()> {
        self.device.supports(op)
    }

    fn alloc(&mut self, desc: &BufDesc) -> Result<Buf> {
        self.buffers.push(desc.clone());
        self.device.alloc(desc)
    }

    fn load(&mut self, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        self.buffers.push(desc.clone());
        self.device.load(desc, parts)
    }

    fn write(&mut self, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        self.device.write(dst, offset, bytes)
    }

    fn record(&mut self, program: &Program) -> Result<Plan> {
        self.device.record(program)
    }

    fn run(&mut self, plan: Plan) -> Result<()> {
        self.device.run(plan)
    }

    fn fetch(&mut self, src: Buf, offset: usize, bytes: usize) -> Result<Fetch> {
        self.device.fetch(src, offset, bytes)
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        self.device.take(fetch, into)
    }
}
