//! A model on a backend, run without the engine: whole programs and single layers.

use bytemuck::{cast_slice, cast_slice_mut};
use quaver_backends::Spec;
use quaver_core::batch::Batch;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::llama::{KvCache, Llama, Profile, Sizes};
use quaver_core::op::{Backend, Buf, Heads, Program};
use quaver_core::sampler::RowParams;

pub struct Runner {
    pub backend: Box<dyn Backend>,
    pub llama: Llama,
}

const PAGE_TOKENS: usize = 16;

impl Runner {
    /// A model for one sequence of at most `context` tokens, all of them in one step.
    pub fn new(checkpoint: &Checkpoint, spec: &Spec, profile: Profile, context: usize) -> Self {
        Runner::with_cache(checkpoint, spec, profile, KvCache::Auto, context)
    }

    /// The same with a choice of the cache.
    pub fn with_cache(
        checkpoint: &Checkpoint,
        spec: &Spec,
        profile: Profile,
        kv_cache: KvCache,
        context: usize,
    ) -> Self {
        let mut backend = quaver_backends::open(spec).unwrap();
        let pages = context.div_ceil(PAGE_TOKENS);
        let sizes = Sizes { rows: context, wanted: context, sequences: 1, context, pages, page_tokens: PAGE_TOKENS };
        let llama = Llama::load(checkpoint, &mut *backend, profile, kv_cache, sizes).unwrap();
        // Pages in reverse, so that a position is not its own place.
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        backend.write(llama.inputs.rows.page_table, 0, cast_slice(&table)).unwrap();
        Runner { backend, llama }
    }

    /// Writes the inputs of a step over `ids` from position 0 on, with the last `wanted` rows wanted.
    pub fn write(&mut self, ids: &[u32], wanted: usize) {
        let mut batch = Batch::default();
        batch.push(0, 0, ids);
        for row in ids.len() - wanted..ids.len() {
            batch.want(row, RowParams::score(0, 0, 0));
        }
        batch.write(&self.llama, &mut *self.backend).unwrap();
        batch.write_wanted(&self.llama, &mut *self.backend, 0, wanted).unwrap();
    }

    /// Runs a program and reads `n` f32 values of a buffer.
    pub fn run(&mut self, program: &Program, from: Buf, n: usize) -> Vec<f32> {
        let plan = self.backend.record(program).unwrap();
        self.backend.run(plan).unwrap();
        let mut values = vec![0f32; n];
        self.backend.read(from, 0, cast_slice_mut(&mut values)).unwrap();
        values
    }

    /// The logits behind the last `wanted` of `ids`: `[wanted, vocab]`.
    pub fn logits(&mut self, ids: &[u32], wanted: usize) -> Vec<f32> {
        self.write(ids, wanted);
        let program = self.llama.program(ids.len(), wanted);
        self.run(&program, self.llama.outputs.logits, wanted * self.llama.config.vocab)
    }

    /// The residual stream behind one layer, from the one before it.
    pub fn layer(&mut self, layer: usize, ids: &[u32], residual: &[f32]) -> Vec<f32> {
        self.write(ids, 0);
        self.write_f32(self.llama.outputs.residual, residual);
        let program = self.llama.layer_program(layer, ids.len());
        self.run(&program, self.llama.outputs.residual, residual.len())
    }

    /// The position that a row of a KV buffer belongs to, pages being handed out in reverse.
    pub fn position_of(sizes: &Sizes, heads: Heads, kv_row: usize) -> usize {
        let (page, token) = (kv_row / (heads.kv * PAGE_TOKENS), kv_row % PAGE_TOKENS);
        (sizes.pages - 1 - page) * PAGE_TOKENS + token
    }

    pub fn write_f32(&mut self, to: Buf, values: &[f32]) {
        self.backend.write(to, 0, cast_slice(values)).unwrap();
    }
}
