//! Finds static scales: the source runs over samples, and observers take the largest magnitudes (llm-compressor's
//! `static_minmax` for inputs of linear layers, its moving average `minmax` for keys and values). The model runs as a
//! program like any other, on any backend, with an [`Op::AbsMax`] before each linear layer; keys and values are read from
//! their pages behind each sample, since their averages want every sample's extremes apart.

use std::collections::BTreeMap;
use std::num::NonZero;

use bytemuck::{cast_slice, cast_slice_mut};

use super::weights::Real;
use super::{HEAD, Quantizer};
use crate::batch::Batch;
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::llama::{KvCache, Llama, Profile, Sizes};
use crate::op::{Act, Backend, Buf, BufDesc, DType, Extent, Line, Op, Plan, Program};
use crate::sampler::RowParams;

/// Rows of a step.
const ROWS: usize = 512;

/// The same where the head is calibrated too, whose logits take memory for each.
const ROWS_WITH_HEAD: usize = 64;

const PAGE_TOKENS: usize = 16;

/// How far the average moves with each sample (llm-compressor's `averaging_constant`).
const MOVE: f64 = 0.01;

/// What the observers saw.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The largest magnitude of each input, by its `site`.
    pub inputs: BTreeMap<String, f32>,
    /// A pair a layer; empty where the recipe asks for none.
    pub kv: Vec<KvScales>,
    /// Tokens that were run.
    pub tokens: usize,
}

/// The scales of the keys and the values of one layer, in the dtype of its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvScales {
    /// The dtype that they are kept in.
    pub real: Real,
    /// Of the keys, after RoPE.
    pub k: f32,
    /// Of the values.
    pub v: f32,
}

/// The input that a linear layer reads: the module itself, or the part of the layer whose projections share one.
pub fn site(module: &str) -> &str {
    match module.rsplit_once('.') {
        Some((_, "o_proj" | "down_proj")) | None => module,
        Some((part, _)) => part,
    }
}

impl Quantizer<'_> {
    /// Runs the source over samples, one after another, in this order. Each is cut where the model's positions end. The
    /// averages of keys and values move once a batch of so many samples. `on_sample` is called behind each sample with
    /// the number of its tokens.
    pub fn calibrate(
        &self,
        backend: &mut dyn Backend,
        samples: &[Vec<u32>],
        batch: NonZero<usize>,
        mut on_sample: impl FnMut(usize),
    ) -> Result<Calibration> {
        let longest = samples.iter().map(Vec::len).max().unwrap_or(0);
        if samples.is_empty() || samples.iter().any(Vec::is_empty) {
            return Err(Error::text("calibration", "has no samples, or an empty one; give texts"));
        }
        let mut run = Run::new(self, backend, longest.min(self.source.config().max_positions))?;
        let reals = self.kv_dtypes()?;
        let mut averages: Vec<[Extremes; 2]> = Vec::new();
        let mut tokens = 0;
        for batch in samples.chunks(batch.get()) {
            let mut seen = vec![[Extremes::NONE; 2]; reals.len()];
            for sample in batch {
                let sample = &sample[..sample.len().min(run.llama.sizes.context)];
                run.forward(sample)?;
                for (layer, seen) in seen.iter_mut().enumerate() {
                    let kv = run.llama.kv[layer];
                    run.observe(kv.k, sample.len(), &mut seen[0])?;
                    run.observe(kv.v, sample.len(), &mut seen[1])?;
                }
                tokens += sample.len();
                on_sample(sample.len());
            }
            let seen = seen.into_iter().zip(&reals).map(|(seen, real)| seen.map(|seen| seen.round(*real)));
            averages = match averages.is_empty() {
                true => seen.collect(),
                false => averages
                    .into_iter()
                    .zip(seen)
                    .zip(&reals)
                    .map(|(([k, v], seen), real)| [k.follow(seen[0], *real), v.follow(seen[1], *real)])
                    .collect(),
            };
        }
        let kv =
            averages.into_iter().zip(reals).map(|([k, v], real)| KvScales { real, k: k.scale(real), v: v.scale(real) });
        Ok(Calibration { inputs: run.inputs()?, kv: kv.collect(), tokens })
    }

    /// Keys and values are computed in the dtype of the weights that they come from; none where the recipe asks for none.
    fn kv_dtypes(&self) -> Result<Vec<Real>> {
        let layers = if self.recipe.kv_cache { self.source.config().layers } else { 0 };
        let weight = |layer| self.source.tensor(&format!("model.layers.{layer}.self_attn.k_proj.weight"));
        (0..layers).map(|layer| Real::of(weight(layer)?)).collect()
    }
}

/// The smallest and the largest value, or their averages.
#[derive(Clone, Copy)]
struct Extremes {
    min: f32,
    max: f32,
}

impl Extremes {
    const NONE: Extremes = Extremes { min: f32::INFINITY, max: f32::NEG_INFINITY };

    fn round(self, real: Real) -> Self {
        Extremes { min: real.round(self.min), max: real.round(self.max) }
    }

    /// The averages, moved: each operation is rounded, as in the dtype itself.
    fn follow(self, seen: Extremes, real: Real) -> Self {
        let lerp =
            |old: f32, new: f32| real.round(real.round(old * (1.0 - MOVE) as f32) + real.round(new * MOVE as f32));
        Extremes { min: lerp(self.min, seen.min), max: lerp(self.max, seen.max) }
    }

    fn scale(self, real: Real) -> f32 {
        real.scale(self.min.abs().max(self.max.abs()))
    }
}

/// The source on a backend, with observers.
struct Run<'b> {
    backend: &'b mut dyn Backend,
    llama: Llama,
    plan: Plan,
    /// `[1, 1]` f32 each, by site.
    observers: BTreeMap<String, Buf>,
}

impl<'b> Run<'b> {
    fn new(quantizer: &Quantizer, backend: &'b mut dyn Backend, context: usize) -> Result<Self> {
        let with_head = quantizer.linears.contains_key(HEAD);
        let rows = context.min(if with_head { ROWS_WITH_HEAD } else { ROWS });
        let pages = context.div_ceil(PAGE_TOKENS);
        let wanted = if with_head { rows } else { 1 };
        let sizes = Sizes { rows, wanted, sequences: 1, context, pages, page_tokens: PAGE_TOKENS };
        let llama = Llama::load(quantizer.source, backend, Profile::Exact, KvCache::Auto, sizes)?;
        let table: Vec<u32> = (0..pages as u32).collect();
        backend.write(llama.inputs.rows.page_table, 0, cast_slice(&table))?;

        // llm-compressor calibrates in transformers, whose angles are f32: keys at large positions differ.
        let (dim, positions) = (llama.config.heads.dim, pages * PAGE_TOKENS);
        let table = llama.config.rope.table_of_transformers(dim, positions);
        let table = Bytes::from(cast_slice::<f32, u8>(&table).to_vec());
        let table = backend.load(&BufDesc::new("rope", DType::F32, Extent::Fixed(positions), dim), &[table])?;

        let base = llama.program(rows, if with_head { rows } else { 0 });
        let mut program = Program::new(base.rows, base.wanted, base.live);
        let mut observers = BTreeMap::new();
        for Line { label, mut op } in base.lines {
            if let Op::Linear { x: Act::Real(x), .. } = op {
                let desc = BufDesc::new(format!("{label}.amax"), DType::F32, Extent::Fixed(1), 1);
                let out = backend.alloc(&desc)?;
                backend.write(out, 0, &[0; 4])?;
                program.push(format!("{label}.amax"), Op::AbsMax { x, out });
                observers.insert(site(&label).to_owned(), out);
                // What comes behind the head's input is of no use.
                if label == HEAD {
                    break;
                }
            }
            if let Op::RopeAppend { rope, .. } = &mut op {
                *rope = table;
            }
            program.lines.push(Line { label, op });
        }
        let plan = backend.record(&program)?;
        Ok(Run { backend, llama, plan, observers })
    }

    /// Runs one sequence; its keys and values stay in the cache.
    fn forward(&mut self, ids: &[u32]) -> Result<()> {
        let rows = self.llama.sizes.rows;
        for (i, chunk) in ids.chunks(rows).enumerate() {
            let mut batch = Batch::default();
            let first = batch.push(0, i * rows, chunk);
            let wanted = if self.llama.sizes.wanted == rows { chunk.len() } else { 0 };
            (first..first + wanted).for_each(|row| batch.want(row, RowParams::score(0, 0, 0)));
            batch.write(&self.llama, self.backend)?;
            batch.write_wanted(&self.llama, self.backend, 0, wanted)?;
            self.backend.run(self.plan)?;
        }
        Ok(())
    }

    /// Widens `seen` by the first `tokens` keys or values.
    fn observe(&mut self, cache: Buf, tokens: usize, seen: &mut Extremes) -> Result<()> {
        let heads = self.llama.config.heads;
        let run = PAGE_TOKENS * heads.dim;
        let mut page = vec![0f32; heads.kv * run];
        for first in (0..tokens).step_by(PAGE_TOKENS) {
            let offset = first / PAGE_TOKENS * page.len() * size_of::<f32>();
            self.backend.read(cache, offset, cast_slice_mut(&mut page))?;
            let live = (tokens - first).min(PAGE_TOKENS) * heads.dim;
            for x in page.chunks_exact(run).flat_map(|head| &head[..live]) {
                finite(*x, "the KV cache")?;
                (seen.min, seen.max) = (seen.min.min(*x), seen.max.max(*x));
            }
        }
        Ok(())
    }

    /// What the observers hold.
    fn inputs(self) -> Result<BTreeMap<String, f32>> {
        let Run { backend, observers, .. } = self;
        let read = |(site, buf): (String, Buf)| {
            let mut amax = [0f32];
            backend.read(buf, 0, cast_slice_mut(&mut amax))?;
            finite(amax[0], &site)?;
            Ok((site, amax[0]))
        };
        observers.into_iter().map(read).collect()
    }
}

fn finite(x: f32, place: &str) -> Result<()> {
    if x.is_finite() {
        return Ok(());
    }
    Err(Error::text("calibration", format!("gave {x} in {place}: the model is damaged, or the device is")))
}
