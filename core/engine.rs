//! The engine: requests in, tokens out. It owns a backend, a model on it, and the scheduler; each [`Engine::step`] runs
//! one program over every sequence under way. Text, streaming and HTTP are its callers' affair.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use bytemuck::{cast_slice, cast_slice_mut};

use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::kv::Pages;
use crate::llama::{KvCache, Llama, Profile, Sizes};
use crate::op::{Backend, DType, DeviceInfo, Plan};
use crate::sampler::{Count, RowParams, Sampled, SamplingParams};
use crate::scheduler::{Scheduler, Sequence, Share};

/// How an engine is laid out. The defaults serve a command line.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Which dtypes the program uses.
    pub profile: Profile,
    /// The element type of the KV cache.
    pub kv_cache: KvCache,
    /// Tokens that a sequence can have; None for what the model was made for. Fewer where the KV cache holds fewer.
    pub max_model_len: Option<usize>,
    /// Sequences that can be under way.
    pub max_num_seqs: usize,
    /// Rows of a step; never fewer than sequences, so that each of them can go on in every step.
    pub max_num_batched_tokens: usize,
    /// Bytes that the KV cache may take, at most; it takes no more than all sequences can fill.
    pub kv_cache_memory: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            profile: Profile::Fast,
            kv_cache: KvCache::Auto,
            max_model_len: None,
            max_num_seqs: 16,
            max_num_batched_tokens: 512,
            kv_cache_memory: 4 << 30,
        }
    }
}

/// Tokens a page of the KV cache: the granularity of sharing and of waste; vLLM's default as well.
pub const PAGE_TOKENS: usize = 16;

/// Rows that the head runs on at once: bounds the logits to 64 x vocabulary.
const MAX_WANTED: usize = 64;

/// Bounds of the options, many times what serving takes: buffers grow with either.
const MAX_NUM_SEQS: usize = 1 << 12;
const MAX_NUM_BATCHED_TOKENS: usize = 1 << 16;

/// A request of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A token with its log-probability under the model's raw distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, before temperature and filters.
    pub logprob: f32,
    /// The most probable tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

impl From<&Sampled> for Token {
    fn from(sampled: &Sampled) -> Self {
        Token { id: sampled.token, logprob: sampled.logprob, top: sampled.top().collect() }
    }
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token, or one of the request's stop tokens.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
}

/// What a step brought for a request.
#[derive(Debug)]
pub enum Output {
    /// Scores of the prompt's tokens, in order, from the second on; in pieces where the prompt is long.
    Prompt(Vec<Token>),
    /// The next token.
    Token(Token),
    /// The request is over; nothing follows.
    Finished(FinishReason),
    /// The request is over because it could not be computed; nothing follows.
    Failed(Error),
}

struct Request {
    params: SamplingParams,
    seed: u64,
    prompt: usize,
}

/// Why a row of a step is wanted.
enum Want {
    Score(RequestId),
    Choose(RequestId),
}

impl Want {
    fn id(&self) -> RequestId {
        match *self {
            Want::Score(id) | Want::Choose(id) => id,
        }
    }
}

/// See the module.
pub struct Engine {
    backend: Box<dyn Backend>,
    llama: Llama,
    eos: Vec<u32>,
    scheduler: Scheduler<RequestId>,
    requests: HashMap<RequestId, Request>,
    plans: HashMap<(usize, usize), Plan>,
    next_id: u64,
}

impl Engine {
    /// Loads a checkpoint onto a backend and records the largest program, so that what cannot run fails here.
    pub fn new(checkpoint: &Checkpoint, mut backend: Box<dyn Backend>, options: &EngineOptions) -> Result<Self> {
        let sizes = sizes(checkpoint, options)?;
        let llama = Llama::load(checkpoint, &mut *backend, options.profile, options.kv_cache, sizes)?;
        let pages = Pages::new(sizes.pages, PAGE_TOKENS);
        let mut engine = Engine {
            scheduler: Scheduler::new(sizes.sequences, pages, sizes.rows),
            eos: checkpoint.generation().eos.clone(),
            requests: HashMap::new(),
            plans: HashMap::new(),
            next_id: 0,
            backend,
            llama,
        };
        engine.plan(sizes.rows, sizes.wanted)?;
        Ok(engine)
    }

    /// What the engine runs on.
    pub fn device(&self) -> DeviceInfo {
        self.backend.describe()
    }

    /// Tokens that a sequence can have.
    pub fn max_model_len(&self) -> usize {
        self.llama.sizes.context
    }

    /// The pages of the KV cache: (free, all).
    pub fn pages(&self) -> (usize, usize) {
        (self.scheduler.pages().free(), self.scheduler.pages().total())
    }

    /// Takes a request: the prompt's token ids, and how to go on from there.
    pub fn submit(&mut self, prompt: &[u32], params: SamplingParams) -> Result<RequestId> {
        params.validate()?;
        let (vocab, context) = (self.llama.config.vocab, self.llama.sizes.context);
        if prompt.is_empty() {
            return Err(Error::PromptEmpty);
        }
        if let Some(&id) = prompt.iter().chain(&params.stop_token_ids).find(|&&id| id as usize >= vocab) {
            return Err(Error::TokenOutOfRange { id, vocab });
        }
        // A prompt that leaves no room for a token is as useless as one that does not fit, unless none is asked for.
        let least = prompt.len() + params.max_tokens.min(1);
        if least > context {
            return Err(Error::PromptTooLong { got: prompt.len(), max: context });
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let limit = prompt.len().saturating_add(params.max_tokens).min(context);
        self.scheduler.submit(id, Sequence::new(prompt.to_vec(), limit));
        let seed = params.seed.unwrap_or_else(random_seed);
        self.requests.insert(id, Request { params, seed, prompt: prompt.len() });
        Ok(id)
    }

    /// Ends a request early and frees its pages.
    pub fn cancel(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        self.requests.remove(&id);
    }

    /// True where no request is under way.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Runs one step, and gives what it brought, in the order of the sequences.
    pub fn step(&mut self) -> Result<Vec<(RequestId, Output)>> {
        for id in self.scheduler.admit() {
            self.place(id)?;
        }
        let shares = self.scheduler.plan();
        if shares.is_empty() {
            return Ok(Vec::new());
        }
        let mut batch = Batch::default();
        let mut wants = Vec::new();
        for share in &shares {
            let (sequence, request) = running(&mut self.scheduler, &self.requests, share.id);
            let slot = sequence.slot();
            let (first, end) = (sequence.computed, sequence.computed + share.rows);
            let row = batch.push(slot, first, &sequence.tokens[first..end]);
            if let Some(top_n) = request.params.prompt_logprobs {
                for position in first..end.min(request.prompt - 1) {
                    let params = RowParams::score(slot, sequence.tokens[position + 1], top_n as u32);
                    batch.want(row + position - first, params);
                    wants.push(Want::Score(share.id));
                }
            }
            if end == sequence.tokens.len() && end < sequence.limit {
                batch.want(row + share.rows - 1, request.params.row(slot, end as u32, request.seed));
                wants.push(Want::Choose(share.id));
            }
        }
        let sampled = self.run(&batch)?;
        Ok(self.settle(&shares, &wants, &sampled))
    }

    /// Writes an admitted sequence's row of the page table and, where penalties need it, of the history.
    fn place(&mut self, id: RequestId) -> Result<()> {
        let (sequence, request) = running(&mut self.scheduler, &self.requests, id);
        let slot = sequence.slot() as usize;
        let inputs = &self.llama.inputs;
        let width = self.llama.sizes.pages_a_sequence() * 4;
        self.backend.write(inputs.rows.page_table, slot * width, cast_slice(&sequence.pages))?;
        if request.params.penalizes() {
            let mut history = vec![0; self.llama.config.vocab];
            Count::fill(&mut history, &sequence.tokens, &[]);
            self.backend.write(inputs.history, slot * history.len() * 4, cast_slice(&history))?;
        }
        Ok(())
    }

    /// Runs a batch, the head as often as the wanted rows need it.
    fn run(&mut self, batch: &Batch) -> Result<Vec<Sampled>> {
        batch.write(&self.llama, &mut *self.backend)?;
        let mut sampled = vec![Sampled::NONE; batch.wanted()];
        let (mut first, mut rows) = (0, batch.rows());
        loop {
            let count = (batch.wanted() - first).min(self.llama.sizes.wanted);
            let plan = self.plan(rows, count)?;
            batch.write_wanted(&self.llama, &mut *self.backend, first, count)?;
            let step = self.backend.run(plan)?;
            let into = cast_slice_mut(&mut sampled[first..first + count]);
            self.backend.read(step, self.llama.outputs.sampled, 0, into)?;
            (first, rows) = (first + count, 0);
            if first == batch.wanted() {
                return Ok(sampled);
            }
        }
    }

    /// The plan of a program for at least `rows` rows (0: the head alone) and `wanted` wanted ones. Sizes are rounded up
    /// to powers of two, so that there are few.
    fn plan(&mut self, rows: usize, wanted: usize) -> Result<Plan> {
        let Sizes { rows: max_rows, wanted: max_wanted, .. } = self.llama.sizes;
        let bucket = |n: usize, max: usize| if n == 0 { 0 } else { n.next_power_of_two().min(max) };
        let (rows, wanted) = (bucket(rows, max_rows), bucket(wanted, max_wanted));
        if let Some(plan) = self.plans.get(&(rows, wanted)) {
            return Ok(*plan);
        }
        let program = match rows {
            0 => self.llama.head_program(wanted),
            _ => self.llama.program(rows, wanted),
        };
        let plan = self.backend.record(&program)?;
        log::debug!("recorded {} ops for {rows} rows and {wanted} wanted ones", program.lines.len());
        self.plans.insert((rows, wanted), plan);
        Ok(plan)
    }

    /// Books what a step computed, and says what it brought.
    fn settle(&mut self, shares: &[Share<RequestId>], wants: &[Want], sampled: &[Sampled]) -> Vec<(RequestId, Output)> {
        let mut results = wants.iter().zip(sampled).peekable();
        let mut outputs = Vec::new();
        for share in shares {
            let (sequence, request) = running(&mut self.scheduler, &self.requests, share.id);
            sequence.computed += share.rows;
            let (mut scores, mut chosen, mut damaged) = (Vec::new(), None, false);
            while let Some((want, sampled)) = results.next_if(|(want, _)| want.id() == share.id) {
                damaged |= sampled.rank == 0 || sampled.bad_logits > 0;
                match want {
                    Want::Score(_) => scores.push(Token::from(sampled)),
                    Want::Choose(_) => chosen = Some(Token::from(sampled)),
                }
            }
            let mut end = None;
            if damaged {
                let why = "the logits are not finite: the checkpoint is damaged, or the device is";
                end = Some(Output::Failed(Error::device(self.backend.describe().backend, why)));
                (scores, chosen) = (Vec::new(), None);
            }
            if !scores.is_empty() {
                outputs.push((share.id, Output::Prompt(scores)));
            }
            if let Some(token) = chosen {
                let params = &request.params;
                let eos = !params.ignore_eos && self.eos.contains(&token.id);
                if eos || params.stop_token_ids.contains(&token.id) {
                    end = Some(Output::Finished(FinishReason::Stop));
                }
                sequence.tokens.push(token.id);
                outputs.push((share.id, Output::Token(token)));
            }
            if end.is_none() && sequence.computed.max(sequence.tokens.len()) >= sequence.limit {
                let prompt_done = sequence.computed >= request.prompt;
                end = prompt_done.then_some(Output::Finished(FinishReason::Length));
            }
            if let Some(end) = end {
                outputs.push((share.id, end));
                self.cancel(share.id);
            }
        }
        outputs
    }
}

/// A running sequence and its request; neither is without the other.
fn running<'a>(
    scheduler: &'a mut Scheduler<RequestId>,
    requests: &'a HashMap<RequestId, Request>,
    id: RequestId,
) -> (&'a mut Sequence, &'a Request) {
    let sequence = scheduler.get_mut(id).expect("what the scheduler plans or admits is running");
    (sequence, requests.get(&id).expect("a request is forgotten when its sequence is removed"))
}

/// Buffer sizes for a checkpoint: what the options allow, and no more than the KV cache can serve.
pub(crate) fn sizes(checkpoint: &Checkpoint, options: &EngineOptions) -> Result<Sizes> {
    let config = checkpoint.config();
    let wanted = options.max_model_len.unwrap_or(config.max_positions);
    if wanted == 0 || wanted > config.max_positions {
        let why = format!("the model is made for {0} tokens; give 1 to {0}", config.max_positions);
        return Err(Error::text(format!("--max-model-len {wanted}"), why));
    }
    let EngineOptions { max_num_seqs: sequences, max_num_batched_tokens: rows, .. } = *options;
    bounded("--max-num-seqs", sequences, MAX_NUM_SEQS, "at least 1 and at most 4096")?;
    bounded("--max-num-batched-tokens", rows, MAX_NUM_BATCHED_TOKENS, "at least 1 and at most 65536")?;

    let fp8 = options.kv_cache == KvCache::Fp8 || checkpoint.kv_scales(0)?.is_some();
    let dtype = if fp8 { DType::E4m3 } else { options.profile.dtype() };
    let page_bytes = 2 * config.layers * config.heads.kv * config.heads.dim * dtype.size() * PAGE_TOKENS;
    // Page numbers are u32.
    let pages = (options.kv_cache_memory / page_bytes as u64).min(u64::from(u32::MAX)) as usize;
    let pages = pages.min(sequences * wanted.div_ceil(PAGE_TOKENS));
    if pages == 0 {
        return Err(Error::OutOfMemory {
            what: "one page of the KV cache".into(),
            need: page_bytes as u64,
            have: options.kv_cache_memory,
            remedy: "raise --kv-cache-memory",
        });
    }
    let tokens = pages * PAGE_TOKENS;
    let context = wanted.min(tokens);
    if context < wanted && options.max_model_len.is_some() {
        return Err(Error::OutOfMemory {
            what: format!("the KV cache of {wanted} tokens"),
            need: wanted.div_ceil(PAGE_TOKENS) as u64 * page_bytes as u64,
            have: options.kv_cache_memory,
            remedy: "raise --kv-cache-memory or lower --max-model-len",
        });
    }
    if context < wanted {
        log::info!("the KV cache holds {context} tokens, fewer than the model's {wanted}; --kv-cache-memory sets it");
    }
    let sequences = sequences.min(pages);
    let rows = rows.max(sequences).min(tokens);
    Ok(Sizes { rows, wanted: MAX_WANTED.min(rows), sequences, context, pages, page_tokens: PAGE_TOKENS })
}

/// An error unless an option lies from 1 to `most`.
fn bounded(name: &'static str, value: usize, most: usize, allowed: &'static str) -> Result<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::Sampling { name, value: value.to_string(), allowed })
}

/// A seed where the user gave none: the standard library's per-process random keys.
fn random_seed() -> u64 {
    RandomState::new().hash_one(0)
}
