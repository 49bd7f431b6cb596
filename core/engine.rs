//! The engine: requests in, tokens out. It owns a backend, a model on it, and the scheduler; each [`Engine::step`] runs
//! one program over every sequence under way. Text, streaming and HTTP are its callers' affair.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::batch::Batch;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::guide::Guide;
use crate::kv::Pages;
use crate::llama::{KvCache, Llama, Profile, Sizes};
use crate::op::{Backend, CHOSEN, DType, DeviceInfo, Fetch, Plan};
use crate::plan::MemoryPlan;
use crate::sampler::{Count, Mask, NO_TOKEN, RowParams, Sampled, Sampler, SamplingParams};
use crate::scheduler::{Budget, Scheduler, Sequence, Share};

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
    /// Rows of prompts in a step in which other sequences decode: how long these may be held up. A
    /// server bounds it; what has no streams loses speed by it.
    pub max_prompt_tokens_beside: usize,
    /// Keep whole pages for requests that begin alike.
    pub prefix_caching: bool,
    /// Bytes that the KV cache may take, at most; it takes no more than all sequences can fill.
    pub kv_cache_memory: u64,
    /// Run every step with the largest program, so that a backend whose kernels depend on a program's size gives a
    /// request the same bits whatever runs beside it. The reference and the cpu do so anyway.
    pub deterministic: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            profile: Profile::Fast,
            kv_cache: KvCache::Auto,
            max_model_len: None,
            max_num_seqs: 16,
            max_num_batched_tokens: 512,
            max_prompt_tokens_beside: usize::MAX,
            prefix_caching: true,
            kv_cache_memory: 4 << 30,
            deterministic: false,
        }
    }
}

/// Tokens a page of the KV cache: the granularity of sharing and of waste; vLLM's default as well.
pub const PAGE_TOKENS: usize = 16;

/// Rows that the head runs on at once, at least and at most: as many as there can be sequences, so that a step reads its
/// weight once.
const LEAST_WANTED: usize = 64;
const MOST_WANTED: usize = 256;
/// Bytes of the logits of more than [`LEAST_WANTED`] rows, at most: what every adapter binds at once (WebGPU,
/// `maxStorageBufferBindingSize`). 256 rows of Llama 3's vocabulary take 131 MB.
const MOST_LOGITS: usize = 128 << 20;

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
    /// Its place among all tokens by probability; 1 is the likeliest.
    pub rank: u32,
    /// The most probable tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

impl From<&Sampled> for Token {
    fn from(sampled: &Sampled) -> Self {
        Token { id: sampled.token, logprob: sampled.logprob, rank: sampled.rank, top: sampled.top().collect() }
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
    /// The request has begun; so many of the prompt's tokens were in the cache. Once a request.
    Begun {
        /// Tokens that need not be computed.
        cached: usize,
    },
    /// Scores of the prompt's tokens, in order, from the second on; in pieces where the prompt is long.
    Prompt(Vec<Token>),
    /// The next token.
    Token(Token),
    /// The request is over; nothing follows.
    Finished(FinishReason),
    /// The request is over because it could not be computed; nothing follows.
    Failed(Error),
}

/// What an engine has done since it was opened, and what it is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait for a place.
    pub waiting: usize,
    /// Pages of the KV cache that sequences hold.
    pub pages_used: usize,
    /// All pages of the KV cache.
    pub pages: usize,
    /// How often a sequence had to give up its pages, to be computed again.
    pub preemptions: u64,
    /// Tokens of prompts that the cache was asked for.
    pub prefix_queries: u64,
    /// How many of them it held.
    pub prefix_hits: u64,
    /// Tokens of prompts that were read, those from the cache included.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub generation_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Rows of all steps.
    pub rows: u64,
}

struct Request {
    params: SamplingParams,
    seed: u64,
    prompt: usize,
    /// [`Output::Begun`] was given.
    begun: bool,
    /// Tokens of the prompt whose scores were given, and the first, which has none.
    scored: usize,
    guide: Option<Box<dyn Guide>>,
}

impl Request {
    /// The tokens that may come behind `generated` ones, where not all may.
    fn mask(&mut self, generated: usize, vocab: usize, eos: &[u32]) -> Result<Option<Mask>> {
        let is_early = generated < self.params.min_tokens;
        if self.guide.is_none() && !is_early {
            return Ok(None);
        }
        let mut mask = Mask::all(vocab);
        if let Some(guide) = &mut self.guide {
            guide.mask(&mut mask)?;
        }
        if is_early {
            let eos = if self.params.ignore_eos { &[][..] } else { eos };
            eos.iter().chain(&self.params.stop_token_ids).for_each(|id| mask.forbid(*id));
        }
        Ok(Some(mask))
    }

    /// Asks for the token behind a row, in the row's parameters; or only for logits, where the device cannot choose.
    fn ask(&mut self, batch: &mut Batch, row: usize, params: RowParams, vocab: usize, eos: &[u32]) -> What {
        // Whatever token the device scores where it does not choose.
        let score = RowParams::score(params.seq, 0, 0);
        match self.mask(params.position as usize - self.prompt, vocab, eos) {
            Err(error) => {
                batch.want(row, score);
                What::Refuse(error)
            }
            Ok(mask) if !self.params.logit_bias.is_empty() => {
                batch.want(row, score);
                What::ChooseOnHost(mask)
            }
            Ok(Some(mask)) => {
                batch.want_masked(row, params, mask);
                What::ChooseMasked { is_guided: self.guide.is_some() }
            }
            Ok(None) => {
                batch.want(row, params);
                What::Choose
            }
        }
    }

    /// What ends the request behind a token, where something does.
    fn end_behind(&mut self, token: u32, eos: &[u32]) -> Option<Output> {
        let is_eos = !self.params.ignore_eos && eos.contains(&token);
        if is_eos || self.params.stop_token_ids.contains(&token) {
            return Some(Output::Finished(FinishReason::Stop));
        }
        match self.guide.as_mut()?.advance(token) {
            Ok(ControlFlow::Continue(())) => None,
            Ok(ControlFlow::Break(())) => Some(Output::Finished(FinishReason::Stop)),
            Err(error) => Some(Output::Failed(error)),
        }
    }
}

/// What a request may ask for, whatever else is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Tokens that a sequence can have.
    pub context: usize,
}

impl Limits {
    /// Checks a request, as [`Engine::submit`] does.
    ///
    /// # Errors
    /// Where the prompt is empty or too long, a token id is none of the vocabulary, or a parameter means nothing.
    pub fn check(&self, prompt: &[u32], params: &SamplingParams) -> Result<()> {
        params.validate()?;
        if prompt.is_empty() {
            return Err(Error::PromptEmpty);
        }
        let ids = prompt.iter().chain(&params.stop_token_ids).chain(params.logit_bias.iter().map(|(id, _)| id));
        if let Some(&id) = ids.into_iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::TokenOutOfRange { id, vocab: self.vocab });
        }
        // A prompt that leaves no room for a token is as useless as one that does not fit, unless none is asked for.
        let least = prompt.len() + params.max_tokens.min(1);
        if least > self.context {
            return Err(Error::PromptTooLong { got: prompt.len(), max: self.context });
        }
        Ok(())
    }
}

/// Why a row of a step is wanted.
struct Want {
    id: RequestId,
    /// Where the token that it scores or chooses stands in its sequence.
    position: usize,
    what: What,
}

enum What {
    Score,
    Choose,
    /// Among the tokens that a mask allows. That of a guide is known only when the token before is.
    ChooseMasked {
        is_guided: bool,
    },
    /// The device knows no biases. Where there is a mask, among the tokens that it allows.
    ChooseOnHost(Option<Mask>),
    /// Nothing: the request's guide fails.
    Refuse(Error),
}

/// A step that is queued.
struct UnderWay {
    /// Whose rows it has, and how many of their tokens are computed when it is done.
    ends: Vec<(RequestId, usize)>,
    wants: Vec<Want>,
    heads: Vec<Head>,
}

/// Copies of what a run of the head gives.
struct Head {
    /// Rows whose logits are wanted.
    count: usize,
    /// [`Sampled`] of each, or of one where there is none, so that every step can be waited for.
    sampled: Fetch,
    /// Logits of the rows whose tokens are chosen on the host, in their order.
    logits: Vec<Fetch>,
}

impl UnderWay {
    /// True where the next step can be queued before this one is done: it finds what was chosen on the device.
    fn can_be_followed(&self) -> bool {
        let is_ready =
            |want: &Want| matches!(want.what, What::Score | What::Choose | What::ChooseMasked { is_guided: false });
        self.heads.len() == 1 && self.wants.iter().all(is_ready)
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
    sampler: Sampler,
    next_id: u64,
    stats: Stats,
    /// The step that is queued and not settled.
    under_way: Option<UnderWay>,
    memory: (u64, u64),
    deterministic: bool,
}

impl Engine {
    /// Loads a checkpoint onto a backend and records the largest program, so that what cannot run fails here.
    pub fn new(checkpoint: &Checkpoint, mut backend: Box<dyn Backend>, options: &EngineOptions) -> Result<Self> {
        let sizes = sizes(checkpoint, options)?;
        if let Some(have) = backend.budget() {
            MemoryPlan::new(checkpoint, options, Some(&*backend))?.fits(have)?;
        }
        let llama = Llama::load(checkpoint, &mut *backend, options.profile, options.kv_cache, sizes)?;
        let pages = Pages::new(sizes.pages, PAGE_TOKENS);
        let weights = checkpoint.tensors().map(|tensor| tensor.data.len() as u64).sum();
        let kv_cache = sizes.pages as u64 * page_bytes(checkpoint, options)? as u64;
        let budget = Budget { rows: sizes.rows, beside: options.max_prompt_tokens_beside };
        let mut engine = Engine {
            scheduler: Scheduler::new(sizes.sequences, pages, budget, options.prefix_caching),
            eos: checkpoint.generation().eos.clone(),
            requests: HashMap::new(),
            plans: HashMap::new(),
            sampler: Sampler::new(),
            next_id: 0,
            stats: Stats::default(),
            under_way: None,
            memory: (weights, kv_cache),
            deterministic: options.deterministic,
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

    /// What the engine is doing, and has done.
    pub fn stats(&self) -> Stats {
        let (running, waiting) = self.scheduler.counts();
        let (free, pages) = self.pages();
        let preemptions = self.scheduler.preemptions();
        Stats { running, waiting, pages, pages_used: pages - free, preemptions, ..self.stats }
    }

    /// What the model takes of memory beside its activations: (weights, KV cache), in bytes.
    pub fn memory(&self) -> (u64, u64) {
        self.memory
    }

    /// What a request may ask for.
    pub fn limits(&self) -> Limits {
        Limits { vocab: self.llama.config.vocab, context: self.llama.sizes.context }
    }

    /// Takes a request: the prompt's token ids, and how to go on from there.
    pub fn submit(&mut self, prompt: &[u32], params: SamplingParams) -> Result<RequestId> {
        self.submit_guided(prompt, params, None)
    }

    /// The same, with a guide that says which tokens may come next.
    pub fn submit_guided(
        &mut self,
        prompt: &[u32],
        params: SamplingParams,
        guide: Option<Box<dyn Guide>>,
    ) -> Result<RequestId> {
        self.limits().check(prompt, &params)?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let limit = prompt.len().saturating_add(params.max_tokens).min(self.llama.sizes.context);
        self.scheduler.submit(id, Sequence::new(prompt.to_vec(), limit, params.prompt_logprobs.is_none()));
        let seed = params.seed.unwrap_or_else(random_seed);
        let request = Request { params, seed, prompt: prompt.len(), begun: false, scored: 1, guide };
        self.requests.insert(id, request);
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

    /// Queues a step, and gives what one brought, in the order of the sequences: the same one; or, on a device with a
    /// queue of its own, the one before it, so that the device need not wait for the host.
    pub fn step(&mut self) -> Result<Vec<(RequestId, Output)>> {
        let mut outputs = Vec::new();
        let last = self.under_way.take();
        let next = self.queue(&mut outputs);
        if let Some(last) = last {
            self.settle(last, &mut outputs)?;
        }
        match next? {
            Some(next) if self.backend.is_asynchronous() && next.can_be_followed() => self.under_way = Some(next),
            Some(next) => self.settle(next, &mut outputs)?,
            None => (),
        }
        Ok(outputs)
    }

    /// Queues the next step, where there is one.
    fn queue(&mut self, outputs: &mut Vec<(RequestId, Output)>) -> Result<Option<UnderWay>> {
        for id in self.scheduler.admit() {
            outputs.extend(self.place(id)?.map(|output| (id, output)));
        }
        for id in self.scheduler.grow() {
            self.write_last_page(id)?;
        }
        let shares = self.scheduler.plan();
        if shares.is_empty() {
            return Ok(None);
        }
        let mut batch = Batch::default();
        let (mut ends, mut wants) = (Vec::new(), Vec::new());
        for Share { id, rows } in shares {
            let (sequence, request) = known(&mut self.scheduler, &mut self.requests, id);
            let slot = sequence.slot();
            let (first, end) = (sequence.computed, sequence.computed + rows);
            let row = batch.push(slot, first, &sequence.tokens[first..end]);
            sequence.computed = end;
            ends.push((id, end));
            if let Some(top_n) = request.params.prompt_logprobs {
                for position in first.max(request.scored - 1) + 1..end.min(request.prompt - 1) + 1 {
                    let params = RowParams::score(slot, sequence.tokens[position], top_n as u32);
                    batch.want(row + position - 1 - first, params);
                    wants.push(Want { id, position, what: What::Score });
                }
            }
            if end == sequence.tokens.len() && end < sequence.limit {
                sequence.tokens.push(CHOSEN | wants.len() as u32);
                let params = request.params.row(slot, end as u32, request.seed);
                let what = request.ask(&mut batch, row + rows - 1, params, self.llama.config.vocab, &self.eos);
                wants.push(Want { id, position: end, what });
            }
        }
        let heads = self.run(&batch, &wants)?;
        self.stats.steps += 1;
        self.stats.rows += batch.rows() as u64;
        Ok(Some(UnderWay { ends, wants, heads }))
    }

    /// Writes an admitted sequence's row of the page table and, where penalties need it, of the history. Gives what
    /// there is to tell where it was admitted for the first time.
    fn place(&mut self, id: RequestId) -> Result<Option<Output>> {
        self.write_history(id)?;
        let (sequence, request) = known(&mut self.scheduler, &mut self.requests, id);
        let width = self.llama.sizes.pages_a_sequence() * 4;
        let at = sequence.slot() as usize * width;
        self.backend.write(self.llama.inputs.rows.page_table, at, cast_slice(&sequence.pages))?;
        if std::mem::replace(&mut request.begun, true) {
            return Ok(None);
        }
        let cached = sequence.computed;
        if sequence.reuse {
            self.stats.prefix_queries += request.prompt as u64;
            self.stats.prefix_hits += cached as u64;
        }
        self.stats.prompt_tokens += request.prompt as u64;
        Ok(Some(Output::Begun { cached }))
    }

    /// Writes a sequence's row of the history where penalties need it: from here on the device counts.
    fn write_history(&mut self, id: RequestId) -> Result<()> {
        let (sequence, request) = known(&mut self.scheduler, &mut self.requests, id);
        if !request.params.penalizes() {
            return Ok(());
        }
        let mut history = vec![0; self.llama.config.vocab];
        let (prompt, output) = sequence.tokens.split_at(request.prompt);
        Count::fill(&mut history, prompt, output);
        let at = sequence.slot() as usize * history.len() * 4;
        self.backend.write(self.llama.inputs.history, at, cast_slice(&history))
    }

    /// Writes the page that a sequence grew by.
    fn write_last_page(&mut self, id: RequestId) -> Result<()> {
        let (sequence, _) = known(&mut self.scheduler, &mut self.requests, id);
        let last = sequence.pages.len() - 1;
        let at = sequence.slot() as usize * self.llama.sizes.pages_a_sequence() + last;
        self.backend.write(self.llama.inputs.rows.page_table, at * 4, cast_slice(&sequence.pages[last..]))
    }

    /// Queues a batch, the head as often as the wanted rows need it, and copies of what these runs give.
    fn run(&mut self, batch: &Batch, wants: &[Want]) -> Result<Vec<Head>> {
        batch.write(&self.llama, &mut *self.backend)?;
        let mut heads = Vec::new();
        let (mut rows, mut first) = (batch.rows(), 0);
        loop {
            let count = (wants.len() - first).min(self.llama.sizes.wanted);
            let plan = self.plan(rows, count)?;
            batch.write_wanted(&self.llama, &mut *self.backend, first, count)?;
            self.backend.run(plan)?;
            let sampled = self.backend.fetch(self.llama.outputs.sampled, 0, count.max(1) * size_of::<Sampled>())?;
            let mut logits = Vec::new();
            let width = self.llama.config.vocab * 4;
            for (row, want) in wants[first..first + count].iter().enumerate() {
                if matches!(want.what, What::ChooseOnHost(_)) {
                    logits.push(self.backend.fetch(self.llama.outputs.logits, row * width, width)?);
                }
            }
            heads.push(Head { count, sampled, logits });
            (rows, first) = (0, first + count);
            if first == wants.len() {
                return Ok(heads);
            }
        }
    }

    /// Waits for what a step gives. What is to be chosen on the host is chosen there.
    fn results(&mut self, wants: &[Want], heads: Vec<Head>) -> Result<Vec<Sampled>> {
        let mut results = Vec::with_capacity(wants.len());
        for Head { count, sampled, logits } in heads {
            let mut rows = vec![Sampled::NONE; count.max(1)];
            self.backend.take(sampled, cast_slice_mut(&mut rows))?;
            let mut logits = logits.into_iter();
            for sampled in rows.into_iter().take(count) {
                let want = &wants[results.len()];
                results.push(match &want.what {
                    What::ChooseOnHost(mask) => {
                        let mut row = vec![0f32; self.llama.config.vocab];
                        self.backend.take(logits.next().expect("a copy for each"), cast_slice_mut(&mut row))?;
                        // A request that failed in the step before has nothing to choose.
                        match self.requests.contains_key(&want.id) {
                            true => self.choose(want, mask.as_ref(), &row),
                            false => sampled,
                        }
                    }
                    _ => sampled,
                });
            }
        }
        Ok(results)
    }

    /// Chooses a request's next token from its logits, `[vocab]`, with its biases. Log-probabilities are those of the
    /// logits as they are, here as on a device.
    fn choose(&mut self, want: &Want, mask: Option<&Mask>, logits: &[f32]) -> Sampled {
        let (sequence, request) = known(&mut self.scheduler, &mut self.requests, want.id);
        let (slot, params) = (sequence.slot(), &request.params);
        let (prompt, output) = sequence.tokens[..want.position].split_at(request.prompt);
        let mut biased = logits.to_vec();
        for &(id, bias) in &params.logit_bias {
            biased[id as usize] += bias;
        }
        let mut history = vec![0; logits.len()];
        if params.penalizes() {
            Count::fill(&mut history, prompt, output);
        }
        let row = RowParams { masked: mask.is_some().into(), ..params.row(slot, want.position as u32, request.seed) };
        let mask = mask.map_or(&[][..], Mask::words);
        let chosen = self.sampler.sample(&biased, &row, mask, &mut history);
        if chosen.token == NO_TOKEN {
            return chosen;
        }
        self.sampler.sample(logits, &RowParams::score(slot, chosen.token, row.top_n), &[], &mut [])
    }

    /// The plan of a program for at least `rows` rows (0: the head alone) and `wanted` wanted ones. Sizes are rounded up
    /// to powers of two, so that there are few, or to the largest, so that there is one.
    fn plan(&mut self, rows: usize, wanted: usize) -> Result<Plan> {
        let Sizes { rows: max_rows, wanted: max_wanted, .. } = self.llama.sizes;
        let least = |max: usize| if self.deterministic { max } else { 1 };
        let bucket = |n: usize, max: usize| if n == 0 { 0 } else { n.max(least(max)).next_power_of_two().min(max) };
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

    /// Waits for a step, and books what it computed. A request that is over, and whose row it computed in vain, is known
    /// no more.
    fn settle(&mut self, step: UnderWay, outputs: &mut Vec<(RequestId, Output)>) -> Result<()> {
        let UnderWay { ends, wants, heads } = step;
        let results = self.results(&wants, heads)?;
        let mut results = wants.into_iter().zip(results).peekable();
        for (id, end) in ends {
            let own: Vec<_> = std::iter::from_fn(|| results.next_if(|(want, _)| want.id == id)).collect();
            if !self.requests.contains_key(&id) {
                continue;
            }
            self.scheduler.keep(id, end);
            let over = self.book(id, end, own, outputs)?;
            if let Some(over) = over {
                match over {
                    // Nobody should find its pages.
                    Output::Failed(_) => self.scheduler.discard(id),
                    _ => drop(self.scheduler.remove(id)),
                }
                self.requests.remove(&id);
                outputs.push((id, over));
            }
        }
        Ok(())
    }

    /// Books what a step brought for one request; gives what ends it, where something does.
    fn book(
        &mut self,
        id: RequestId,
        end: usize,
        results: Vec<(Want, Sampled)>,
        outputs: &mut Vec<(RequestId, Output)>,
    ) -> Result<Option<Output>> {
        let (sequence, request) = known(&mut self.scheduler, &mut self.requests, id);
        let (mut scores, mut chosen) = (Vec::new(), None);
        for (want, sampled) in results {
            match want.what {
                What::Refuse(error) => return Ok(Some(Output::Failed(error))),
                What::ChooseMasked { .. } | What::ChooseOnHost(Some(_))
                    if sampled.token == NO_TOKEN && sampled.bad_logits == 0 =>
                {
                    let why = "no token may come next; change the grammar or min_tokens";
                    return Ok(Some(Output::Failed(Error::text("structured output", why))));
                }
                _ if sampled.rank == 0 || sampled.bad_logits > 0 => {
                    let why = "the logits are not finite: the checkpoint is damaged, or the device is";
                    return Ok(Some(Output::Failed(Error::device(self.backend.describe().backend, why))));
                }
                What::Score => scores.push(Token::from(&sampled)),
                _ => {
                    sequence.tokens[want.position] = sampled.token;
                    chosen = Some(Token::from(&sampled));
                }
            }
        }
        if !scores.is_empty() {
            request.scored += scores.len();
            outputs.push((id, Output::Prompt(scores)));
        }
        let mut tokens = end;
        if let Some(token) = chosen {
            self.stats.generation_tokens += 1;
            tokens += 1;
            let over = request.end_behind(token.id, &self.eos);
            outputs.push((id, Output::Token(token)));
            if over.is_some() {
                return Ok(over);
            }
        }
        let is_over = end >= request.prompt && tokens >= sequence.limit;
        Ok(is_over.then_some(Output::Finished(FinishReason::Length)))
    }
}

/// A sequence and its request; neither is without the other.
fn known<'a>(
    scheduler: &'a mut Scheduler<RequestId>,
    requests: &'a mut HashMap<RequestId, Request>,
    id: RequestId,
) -> (&'a mut Sequence, &'a mut Request) {
    let sequence = scheduler.get_mut(id).expect("a sequence is removed with its request");
    (sequence, requests.get_mut(&id).expect("a request is forgotten when its sequence is removed"))
}

/// Tokens that a prompt and its answer can have together in an engine of these options.
pub fn context(checkpoint: &Checkpoint, options: &EngineOptions) -> Result<usize> {
    Ok(sizes(checkpoint, options)?.context)
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
    bounded("--max-prompt-tokens-beside", options.max_prompt_tokens_beside, usize::MAX, "at least 1")?;

    let page_bytes = page_bytes(checkpoint, options)?;
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
    let wanted = wanted_rows(sequences, config.vocab).min(rows);
    Ok(Sizes { rows, wanted, sequences, context, pages, page_tokens: PAGE_TOKENS })
}

/// Rows that the head runs on at once.
fn wanted_rows(sequences: usize, vocab: usize) -> usize {
    let most = (MOST_LOGITS / (4 * vocab)).clamp(LEAST_WANTED, MOST_WANTED);
    sequences.clamp(LEAST_WANTED, most)
}

/// Bytes of a page of the KV cache, over all layers.
fn page_bytes(checkpoint: &Checkpoint, options: &EngineOptions) -> Result<usize> {
    let config = checkpoint.config();
    let fp8 = options.kv_cache == KvCache::Fp8 || checkpoint.kv_scales(0)?.is_some();
    let dtype = if fp8 { DType::E4m3 } else { options.profile.dtype() };
    Ok(2 * config.layers * config.heads.kv * config.heads.dim * dtype.size() * PAGE_TOKENS)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_runs_once_a_step_where_its_logits_fit() {
        for (sequences, vocab, rows) in [
            (1, 128_256, 64),
            (100, 128_256, 100),
            (256, 128_256, 256),
            (4096, 256, 256),
            (256, 262_144, 128),
            (256, 1 << 20, 64),
        ] {
            assert_eq!(wanted_rows(sequences, vocab), rows, "{sequences} sequences, {vocab} tokens");
        }
    }
}
