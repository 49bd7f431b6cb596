//! Llama as a list of ops. The lines are built once, with the buffers that they name; programs of all sizes share them.

use super::config::LlamaConfig;
use super::weights::{EMBEDDING, HeadWeights, Input, LayerWeights, Projection, load_f32, load_matrix};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::op::{Act, Backend, Buf, BufDesc, Cols, DType, Extent, Kv, Line, Op, Program, Rows, Scale, StaticScale};
use crate::sampler::{Mask, RowParams, Sampled};

/// What everything that is not FP8 by the checkpoint is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Profile {
    /// f32: the profile of goldens and of parity.
    Exact,
    /// bf16 for q/k/v, gate/up, the KV cache and real inputs of a `Linear`; the residual stream stays f32.
    #[default]
    Fast,
}

impl Profile {
    /// The dtype of what the profile decides about.
    pub const fn dtype(self) -> DType {
        match self {
            Profile::Exact => DType::F32,
            Profile::Fast => DType::Bf16,
        }
    }
}

/// The element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvCache {
    /// FP8 where the checkpoint brings k and v scales, else what the profile says.
    #[default]
    Auto,
    /// FP8 always; with a scale of 1 where the checkpoint brings none.
    Fp8,
}

/// How large the buffers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of a step.
    pub rows: usize,
    /// Rows of a step whose logits are wanted; more are taken in several runs of the head.
    pub wanted: usize,
    /// Sequences that can be under way.
    pub sequences: usize,
    /// Positions of a sequence; its page table, and the rotary table, are rounded up to whole pages.
    pub context: usize,
    /// Pages of the KV cache, shared by all sequences.
    pub pages: usize,
    /// Tokens a page.
    pub page_tokens: usize,
}

impl Sizes {
    /// Pages that a sequence can have.
    pub const fn pages_a_sequence(&self) -> usize {
        self.context.div_ceil(self.page_tokens)
    }
}

/// The buffers that are written before a run.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[m, 1]` u32, as [`Op::Embed`] takes them.
    pub ids: Buf,
    /// Who each row is.
    pub rows: Rows,
    /// `[w, 1]` u32.
    pub wanted: Buf,
    /// `[w, 16]` u32: [`RowParams`].
    pub params: Buf,
    /// `[w, ceil(vocab / 32)]` u32: the words of [`Mask`]s, those of rows that have one.
    pub mask: Buf,
    /// `[sequences, vocab]` u32: token counts for the penalties.
    pub history: Buf,
    /// `[1, 3]` u32: rows, wanted rows and spans in use.
    pub live: Buf,
}

/// The buffers that can be read after a run.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// `[m, d]` f32: the residual stream, behind the last layer that ran.
    pub residual: Buf,
    /// `[w, vocab]` f32.
    pub logits: Buf,
    /// `[w, 44]` u32: [`Sampled`].
    pub sampled: Buf,
}

/// A Llama on one backend.
pub struct Llama {
    /// The checkpoint's.
    pub config: LlamaConfig,
    /// How large its buffers are.
    pub sizes: Sizes,
    /// What to write before a run.
    pub inputs: Inputs,
    /// What to read after it.
    pub outputs: Outputs,
    /// The caches, one a layer.
    pub kv: Vec<Kv>,
    embed: Line,
    layers: Vec<Vec<Line>>,
    head: Vec<Line>,
}

impl Llama {
    /// Loads the weights, allocates all buffers, and builds the lines. In this order, because the tensors bear out the
    /// sizes that the config claims, before memory is taken for them.
    pub fn load(
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        profile: Profile,
        kv_cache: KvCache,
        sizes: Sizes,
    ) -> Result<Self> {
        let config = checkpoint.config().clone();
        let table = load_matrix(checkpoint, backend, EMBEDDING, config.vocab, config.hidden)?;
        let weights = (0..config.layers).map(|layer| LayerWeights::load(checkpoint, backend, &config, layer));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let head = HeadWeights::load(checkpoint, backend, &config, table)?;
        let mut builder = Builder { checkpoint, backend, profile, sizes, scratch: Vec::new() };
        let inputs = builder.inputs(&config)?;
        let outputs = Outputs {
            residual: builder.rows("residual", DType::F32, config.hidden)?,
            logits: builder.wanted("logits", DType::F32, config.vocab)?,
            sampled: builder.wanted("sampled", DType::U32, size_of::<Sampled>() / 4)?,
        };
        let embed = Op::Embed { ids: inputs.ids, sampled: outputs.sampled, table, out: outputs.residual };
        let kv = (0..config.layers).map(|layer| builder.kv(&config, layer, kv_cache)).collect::<Result<Vec<_>>>()?;
        let context = sizes.pages_a_sequence() * sizes.page_tokens;
        let rope = config.rope.table(config.heads.dim, context);
        let rope = load_f32(builder.backend, "rope", context, config.heads.dim, &rope)?;
        let mut layers = Vec::new();
        for (layer, (weights, kv)) in weights.into_iter().zip(&kv).enumerate() {
            layers.push(builder.layer(&config, layer, weights, &inputs, outputs.residual, rope, *kv)?);
        }
        let head = builder.head(&config, head, &inputs, &outputs)?;
        let embed = Line { label: "model.embed_tokens".into(), op: embed };
        Ok(Llama { config, sizes, inputs, outputs, kv, embed, layers, head })
    }

    /// A whole step of at most `rows` rows, with the head for at most `wanted` of them; without it where that is 0.
    pub fn program(&self, rows: usize, wanted: usize) -> Program {
        let body = std::iter::once(&self.embed).chain(self.layers.iter().flatten());
        let head = if wanted > 0 { &self.head[..] } else { &[] };
        Program { rows, wanted, live: self.inputs.live, lines: body.chain(head).cloned().collect() }
    }

    /// The head alone, over rows that an earlier program left in the residual stream.
    pub fn head_program(&self, wanted: usize) -> Program {
        let rows = self.sizes.rows;
        Program { rows, wanted, live: self.inputs.live, lines: self.head.clone() }
    }

    /// One layer alone, on what the residual stream holds: for tests and bisections.
    pub fn layer_program(&self, layer: usize, rows: usize) -> Program {
        Program { rows, wanted: 0, live: self.inputs.live, lines: self.layers[layer].clone() }
    }
}

/// Makes buffers and lines; scratch of the same name, type and width is shared by all layers.
struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    backend: &'a mut dyn Backend,
    profile: Profile,
    sizes: Sizes,
    scratch: Vec<(BufDesc, Buf)>,
}

impl Builder<'_> {
    fn scratch(&mut self, name: &str, dtype: DType, rows: Extent, cols: usize) -> Result<Buf> {
        let desc = BufDesc::new(name, dtype, rows, cols);
        if let Some((_, buf)) = self.scratch.iter().find(|(have, _)| *have == desc) {
            return Ok(*buf);
        }
        let buf = self.backend.alloc(&desc)?;
        self.scratch.push((desc, buf));
        Ok(buf)
    }

    fn rows(&mut self, name: &str, dtype: DType, cols: usize) -> Result<Buf> {
        self.scratch(name, dtype, Extent::Rows(self.sizes.rows), cols)
    }

    fn wanted(&mut self, name: &str, dtype: DType, cols: usize) -> Result<Buf> {
        self.scratch(name, dtype, Extent::Wanted(self.sizes.wanted), cols)
    }

    fn inputs(&mut self, config: &LlamaConfig) -> Result<Inputs> {
        let sequences = Extent::Fixed(self.sizes.sequences);
        Ok(Inputs {
            ids: self.rows("ids", DType::U32, 1)?,
            rows: Rows {
                seq: self.rows("seq", DType::U32, 1)?,
                position: self.rows("position", DType::U32, 1)?,
                page_table: self.scratch("page_table", DType::U32, sequences, self.sizes.pages_a_sequence())?,
                spans: self.scratch("spans", DType::U32, sequences, 4)?,
            },
            wanted: self.wanted("wanted", DType::U32, 1)?,
            params: self.wanted("params", DType::U32, size_of::<RowParams>() / 4)?,
            mask: self.wanted("mask", DType::U32, Mask::width(config.vocab))?,
            history: self.scratch("history", DType::U32, sequences, config.vocab)?,
            live: self.scratch("live", DType::U32, Extent::Fixed(1), 3)?,
        })
    }

    fn kv(&mut self, config: &LlamaConfig, layer: usize, kv_cache: KvCache) -> Result<Kv> {
        let scales = self.checkpoint.kv_scales(layer)?;
        let scales = match kv_cache {
            KvCache::Auto => scales,
            KvCache::Fp8 => scales.or(Some((1.0, 1.0))),
        };
        let dtype = if scales.is_some() { DType::E4m3 } else { self.profile.dtype() };
        let rows = Extent::Fixed(self.sizes.pages * config.heads.kv * self.sizes.page_tokens);
        let mut cache = |name| self.backend.alloc(&BufDesc::new(name, dtype, rows, config.heads.dim));
        Ok(Kv {
            k: cache(format!("model.layers.{layer}.k_cache"))?,
            v: cache(format!("model.layers.{layer}.v_cache"))?,
            page_tokens: self.sizes.page_tokens,
            scales: scales.map(|(k, v)| (StaticScale::new(k), StaticScale::new(v))),
        })
    }

    /// An activation buffer `[m, width]` of the format that a projection wants.
    fn act(&mut self, name: &str, rows: Extent, width: usize, input: Input) -> Result<Act> {
        let codes = format!("{name}_codes");
        Ok(match input {
            Input::Real => Act::Real(self.scratch(&format!("{name}_real"), self.profile.dtype(), rows, width)?),
            Input::Static(scale) => {
                Act::Fp8 { codes: self.scratch(&codes, DType::E4m3, rows, width)?, scale: Scale::Static(scale) }
            }
            Input::PerToken => Act::Fp8 {
                codes: self.scratch(&codes, DType::E4m3, rows, width)?,
                scale: Scale::PerToken(self.scratch(&format!("{name}_scale"), DType::F32, rows, 1)?),
            },
        })
    }

    /// The lines of an op that writes activations, and of the projections that read them. Where all of these want one
    /// format, the op writes it; else it writes f32, and every format is quantized from there.
    fn feed(&mut self, source: Source, op: impl Fn(Act) -> Op, sinks: Vec<Projection>, out: Buf) -> Result<Vec<Line>> {
        let Source { label, name, rows, width, add } = source;
        let mut formats: Vec<(Input, Act)> = Vec::new();
        for sink in &sinks {
            if !formats.iter().any(|(input, _)| *input == sink.input) {
                let act = self.act(&format!("{name}{}", formats.len()), rows, width, sink.input)?;
                formats.push((sink.input, act));
            }
        }
        let mut lines = Vec::new();
        if let [(_, act)] = formats[..] {
            lines.push(Line { label, op: op(act) });
        } else {
            let x = self.scratch(name, DType::F32, rows, width)?;
            lines.push(Line { label: label.clone(), op: op(Act::Real(x)) });
            let quantize = |(_, act): &(Input, Act)| Line { label: label.clone(), op: Op::Quantize { x, out: *act } };
            lines.extend(formats.iter().map(quantize));
        }
        for Projection { label, weight, input, first } in sinks {
            let Some((_, x)) = formats.iter().find(|(format, _)| *format == input) else { continue };
            let op = Op::Linear { x: *x, w: weight, out: Cols { buf: out, first }, add };
            lines.push(Line { label, op });
        }
        Ok(lines)
    }

    #[allow(clippy::too_many_arguments)]
    fn layer(
        &mut self,
        config: &LlamaConfig,
        layer: usize,
        weights: LayerWeights,
        inputs: &Inputs,
        residual: Buf,
        rope: Buf,
        kv: Kv,
    ) -> Result<Vec<Line>> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (d, f, heads, eps) = (config.hidden, config.intermediate, config.heads, config.rms_eps);
        let (q_width, kv_width) = (heads.q * heads.dim, heads.kv * heads.dim);
        let (rows, dtype) = (Extent::Rows(self.sizes.rows), self.profile.dtype());

        let qkv = self.rows("qkv", dtype, q_width + 2 * kv_width)?;
        let norm = |out| Op::RmsNorm { x: residual, gamma: weights.input_norm, eps, out };
        let source = Source { label: name("input_layernorm"), name: "normed", rows, width: d, add: false };
        let mut lines = self.feed(source, norm, weights.qkv, qkv)?;

        let q = self.rows("q", dtype, q_width)?;
        let op = Op::RopeAppend { qkv, rope, rows: inputs.rows, heads, q, kv };
        lines.push(Line { label: name("self_attn.rope"), op });

        let attend = |out| Op::Attend { q, rows: inputs.rows, heads, kv, out };
        let source = Source { label: name("self_attn"), name: "attended", rows, width: q_width, add: true };
        lines.extend(self.feed(source, attend, weights.o, residual)?);

        let gate_up = self.rows("gate_up", dtype, 2 * f)?;
        let norm = |out| Op::RmsNorm { x: residual, gamma: weights.post_norm, eps, out };
        let source = Source { label: name("post_attention_layernorm"), name: "normed", rows, width: d, add: false };
        lines.extend(self.feed(source, norm, weights.gate_up, gate_up)?);

        let swiglu = |out| Op::SwiGlu { gate_up, out };
        let source = Source { label: name("mlp.act_fn"), name: "gated", rows, width: f, add: true };
        lines.extend(self.feed(source, swiglu, weights.down, residual)?);
        Ok(lines)
    }

    fn head(
        &mut self,
        config: &LlamaConfig,
        weights: HeadWeights,
        inputs: &Inputs,
        outputs: &Outputs,
    ) -> Result<Vec<Line>> {
        let (d, rows) = (config.hidden, Extent::Wanted(self.sizes.wanted));
        let x = self.wanted("gathered", DType::F32, d)?;
        let op = Op::Gather { x: outputs.residual, wanted: inputs.wanted, out: x };
        let mut lines = vec![Line { label: "wanted".into(), op }];
        let norm = |out| Op::RmsNorm { x, gamma: weights.norm, eps: config.rms_eps, out };
        let source = Source { label: "model.norm".into(), name: "head_in", rows, width: d, add: false };
        lines.extend(self.feed(source, norm, weights.head, outputs.logits)?);
        let Inputs { params, mask, history, .. } = *inputs;
        let op = Op::Sample { logits: outputs.logits, params, mask, history, out: outputs.sampled };
        lines.push(Line { label: "sample".into(), op });
        Ok(lines)
    }
}

/// What feeds some projections.
struct Source<'a> {
    /// The op's label.
    label: String,
    /// What its activations are called; shared by all layers.
    name: &'a str,
    rows: Extent,
    width: usize,
    /// The projections add to the residual stream.
    add: bool,
}
