//! The engine under load and under abuse. What a request is answered depends on the request alone, to the last bit; and
//! whatever ends a request gives back all that it held.

mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use quaver_backends::{Kind, Spec, open};
use quaver_core::batch::Batch;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::engine::{Engine, EngineOptions, FinishReason, Output, RequestId, Token};
use quaver_core::guide::Guide;
use quaver_core::llama::{KvCache, Profile};
use quaver_core::plan::MemoryPlan;
use quaver_core::sampler::{Mask, RowParams, Sampled, SamplingParams};
use quaver_core::service::Service;
use support::checkpoints;
use support::queued::Queued;
use support::runner::Runner;
use support::tiny::{CONTEXT, Inputs, Opened, Random, Tensor, Tiny, VOCAB};

/// More steps than any test here takes.
const MANY: usize = 10_000;

/// What a request brought.
#[derive(Debug, Default)]
struct Answer {
    /// Tokens of the prompt that were in the cache, once it began.
    cached: Option<usize>,
    scores: Vec<Token>,
    tokens: Vec<Token>,
    end: Option<Result<FinishReason, String>>,
}

impl Answer {
    fn take(&mut self, output: Output) {
        assert!(self.end.is_none(), "{output:?} behind the end");
        match output {
            Output::Begun { cached } => {
                assert!(self.cached.is_none() && self.scores.is_empty() && self.tokens.is_empty());
                self.cached = Some(cached);
            }
            Output::Prompt(scores) => self.scores.extend(scores),
            Output::Token(token) => self.tokens.push(token),
            Output::Finished(reason) => self.end = Some(Ok(reason)),
            Output::Failed(error) => self.end = Some(Err(error.to_string())),
        }
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    fn bits(&self) -> (Vec<Bits>, Vec<Bits>) {
        (bits(&self.scores), bits(&self.tokens))
    }
}

/// Tokens with the bits of their logprobs, which `==` would compare as numbers.
type Bits = (u32, u32, Vec<(u32, u32)>);

fn bits(tokens: &[Token]) -> Vec<Bits> {
    let bits = |t: &Token| (t.id, t.logprob.to_bits(), t.top.iter().map(|(id, p)| (*id, p.to_bits())).collect());
    tokens.iter().map(bits).collect()
}

fn engine_on(checkpoint: &Checkpoint, spec: &Spec, options: &EngineOptions) -> Engine {
    Engine::new(checkpoint, open(spec).unwrap(), options).unwrap()
}

/// The same, with the next step queued before the last one is settled.
fn queued(checkpoint: &Checkpoint, spec: &Spec, options: &EngineOptions) -> Engine {
    Engine::new(checkpoint, Box::new(Queued::new(open(spec).unwrap())), options).unwrap()
}

fn engine(checkpoint: &Checkpoint, options: &EngineOptions) -> Engine {
    engine_on(checkpoint, &cpu(), options)
}

fn cpu() -> Spec {
    Spec { kind: Kind::Cpu, threads: Some(2), ..Spec::default() }
}

/// One request at a time.
fn one() -> EngineOptions {
    EngineOptions { max_num_seqs: 1, ..EngineOptions::default() }
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, logprobs: Some(2), ..SamplingParams::default() }
}

/// Steps until all is answered.
fn finish(engine: &mut Engine) -> BTreeMap<RequestId, Answer> {
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    for step in 0.. {
        if engine.is_idle() {
            break;
        }
        assert!(step < MANY, "requests that wait for ever");
        for (id, output) in engine.step().unwrap() {
            answers.entry(id).or_default().take(output);
        }
    }
    assert_eq!(engine.pages().0, engine.pages().1, "an idle engine holds no page");
    answers
}

/// The answer to one request.
fn ask(engine: &mut Engine, prompt: &[u32], params: &SamplingParams) -> Answer {
    let id = engine.submit(prompt, params.clone()).unwrap();
    let mut answers = finish(engine);
    assert_eq!(answers.len(), 1);
    answers.remove(&id).unwrap()
}

fn tiny() -> Opened {
    Tiny::fp8(Inputs::Static).open()
}

// ---- neighbours, chunks, threads

#[derive(Clone, Debug)]
struct Asked {
    prompt: Vec<u32>,
    params: SamplingParams,
    /// The step before which it is submitted.
    at: usize,
    /// It is cancelled so many steps later.
    cancelled_after: Option<usize>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let sampling = (
        prop_oneof![Just(0f32), 0.3f32..1.5],
        prop_oneof![Just(1f32), 0.5f32..1.0],
        prop_oneof![Just(1f32), 1.1f32..2.0],
        prop_oneof![Just(0f32), -1f32..2.0],
        any::<u64>(),
    );
    let sizes = (1usize..60, 0usize..40, proptest::option::weighted(0.3, 0usize..3), 0usize..12);
    // Few texts, so that many begin alike.
    (0u64..3, sampling, sizes, proptest::option::weighted(0.2, 0usize..8)).prop_map(
        |(
            text,
            (temperature, top_p, repetition, frequency, seed),
            (length, max_tokens, prompt_logprobs, at),
            cancel,
        )| {
            // Some tokens are chosen on the host.
            let on_host = seed % 5 == 0;
            let params = SamplingParams {
                temperature,
                top_p,
                repetition_penalty: repetition,
                frequency_penalty: frequency,
                presence_penalty: frequency / 2.0,
                seed: Some(seed),
                max_tokens,
                min_tokens: if on_host { max_tokens / 2 } else { 0 },
                logit_bias: if on_host { vec![((seed % 7) as u32, 5.0)] } else { vec![] },
                logprobs: Some(2),
                prompt_logprobs,
                ..SamplingParams::default()
            };
            let mut prompt = Random(text).ids(length);
            if seed % 3 == 0 {
                *prompt.last_mut().unwrap() = (seed % VOCAB as u64) as u32;
            }
            Asked { prompt, params, at, cancelled_after: cancel }
        },
    )
}

/// Greedy and seeded requests, with penalties and without, in any company, against each of them alone.
fn assert_independent(
    mut engine: Engine,
    kind: Kind,
    checkpoint: &Checkpoint,
    requests: &[Asked],
    options: &EngineOptions,
) -> Result<(), TestCaseError> {
    let mut ids: Vec<Option<RequestId>> = vec![None; requests.len()];
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    let mut step = 0;
    while !engine.is_idle() || ids.contains(&None) {
        for (id, request) in ids.iter_mut().zip(requests) {
            if request.at == step {
                *id = Some(engine.submit(&request.prompt, request.params.clone()).unwrap());
            }
            if let (Some(id), Some(after)) = (*id, request.cancelled_after)
                && request.at + after == step
            {
                engine.cancel(id);
            }
        }
        for (id, output) in engine.step().unwrap() {
            answers.entry(id).or_default().take(output);
        }
        step += 1;
        prop_assert!(step < MANY, "requests that wait for ever");
    }
    prop_assert_eq!(engine.pages().0, engine.pages().1);
    let mut alone = engine_on(
        checkpoint,
        &Spec { kind, threads: Some(1), ..Spec::default() },
        &EngineOptions { max_num_batched_tokens: 512, max_num_seqs: 1, prefix_caching: false, ..options.clone() },
    );
    for (id, request) in ids.iter().zip(requests) {
        let want = ask(&mut alone, &request.prompt, &request.params);
        let got = answers.remove(&id.unwrap()).unwrap_or_default();
        let ((scores, tokens), (want_scores, want_tokens)) = (got.bits(), want.bits());
        match request.cancelled_after {
            None => {
                prop_assert_eq!(scores, want_scores);
                prop_assert_eq!(tokens, want_tokens);
                prop_assert_eq!(got.end, want.end);
            }
            Some(_) => {
                prop_assert!(want_scores.starts_with(&scores) && want_tokens.starts_with(&tokens));
            }
        }
    }
    Ok(())
}

fn options() -> impl Strategy<Value = EngineOptions> {
    let profile = prop_oneof![Just(Profile::Fast), Just(Profile::Exact)];
    let kv_cache = prop_oneof![Just(KvCache::Auto), Just(KvCache::Fp8)];
    let rows = (prop_oneof![Just(1usize), Just(7), Just(512)], prop_oneof![Just(1usize), Just(usize::MAX)]);
    let pages = prop_oneof![Just(7u64), Just(12), Just(1000)];
    (profile, kv_cache, rows, 1usize..=8, pages, proptest::bool::weighted(0.8)).prop_map(
        |(
            profile,
            kv_cache,
            (max_num_batched_tokens, max_prompt_tokens_beside),
            max_num_seqs,
            pages,
            prefix_caching,
        )| {
            // Seven pages hold the longest request, or a few short ones.
            let page = 2 * 2 * 2 * 12 * 16 * if kv_cache == KvCache::Fp8 { 1 } else { profile.dtype().size() as u64 };
            let kv_cache_memory = pages * page;
            EngineOptions {
                profile,
                kv_cache,
                max_model_len: None,
                max_num_seqs,
                max_num_batched_tokens,
                max_prompt_tokens_beside,
                prefix_caching,
                kv_cache_memory,
                deterministic: false,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_request_does_not_depend_on_its_neighbours(
        requests in prop::collection::vec(asked(), 1..10),
        options in options(),
        threads in 1usize..=2,
        is_queued in any::<bool>(),
        inputs in prop_oneof![Just(Inputs::Static), Just(Inputs::Dynamic)],
    ) {
        let tiny = Tiny::fp8(inputs).open();
        let spec = Spec { threads: Some(threads), ..cpu() };
        let open = if is_queued { queued } else { engine_on };
        let engine = open(&tiny.checkpoint, &spec, &options);
        assert_independent(engine, Kind::Cpu, &tiny.checkpoint, &requests, &options)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_request_does_not_depend_on_its_neighbours_on_the_reference(
        requests in prop::collection::vec(asked(), 1..6),
        options in options(),
    ) {
        let tiny = tiny();
        let engine = engine_on(&tiny.checkpoint, &Kind::Reference.into(), &options);
        assert_independent(engine, Kind::Reference, &tiny.checkpoint, &requests, &options)?;
    }
}

/// Whether requests get the same bits one by one as side by side.
fn is_independent(spec: &Spec, deterministic: bool) -> bool {
    let options =
        EngineOptions { deterministic, max_num_batched_tokens: 16, max_num_seqs: 4, ..EngineOptions::default() };
    let tiny = Tiny::fp8(Inputs::Dynamic).open();
    let spec = Spec { deterministic, ..spec.clone() };
    let mut engine = engine_on(&tiny.checkpoint, &spec, &options);
    let request = |i: usize| {
        let prompt_logprobs = i.is_multiple_of(2).then_some(1);
        (Random(i as u64 % 2).ids(3 + 40 * i), SamplingParams { prompt_logprobs, ..greedy(2) })
    };
    let requests: Vec<_> = (0..4).map(request).collect();
    let alone: Vec<_> = requests.iter().map(|(prompt, params)| ask(&mut engine, prompt, params).bits()).collect();
    let ids: Vec<_> = requests.iter().map(|(prompt, params)| engine.submit(prompt, params.clone()).unwrap()).collect();
    let mut answers = finish(&mut engine);
    let together: Vec<_> = ids.iter().map(|id| answers.remove(id).unwrap().bits()).collect();
    together == alone
}

#[test]
fn a_request_does_not_depend_on_its_neighbours_on_a_gpu_where_that_is_asked_for() {
    let emulated = Spec::from(Kind::CudaEmulated);
    let specs = quaver_backends::variants();
    for spec in specs.iter().filter(|spec| spec.kind == Kind::Wgpu).chain([&emulated]) {
        assert!(is_independent(spec, true), "{spec}");
        // These kernels sum few rows in another order than many.
        if spec.variant.as_deref() == Some("subgroup") {
            assert!(!is_independent(spec, false), "{spec}: it need not be asked for");
        }
    }
}

#[test]
fn chunks_of_a_prompt_and_threads_do_not_change_a_bit_of_the_demo_model() {
    let checkpoint = checkpoints::open("tiny-llama-fp8-channel");
    let prompt: Vec<u32> = (0..70).map(|i| (i * 577 + 13) % 4080).collect();
    let params = SamplingParams { prompt_logprobs: Some(1), ..greedy(6) };
    let run = |rows, threads| {
        let options = EngineOptions { max_num_batched_tokens: rows, ..one() };
        let spec = Spec { threads: Some(threads), ..cpu() };
        ask(&mut engine_on(&checkpoint, &spec, &options), &prompt, &params).bits()
    };
    let want = run(512, 1);
    assert_eq!((want.0.len(), want.1.len()), (69, 6));
    for (rows, threads) in [(1, 1), (7, 2), (33, 2), (512, 2)] {
        assert!(run(rows, threads) == want, "chunks of {rows} on {threads} threads");
    }
}

#[test]
fn a_hundred_sequences_in_one_head_equal_each_alone() {
    let tiny = tiny();
    let prompts: Vec<Vec<u32>> = (0..100).map(|i| Random(i).ids(1 + i as usize % 7)).collect();
    let plan = |options: &EngineOptions| MemoryPlan::new(&tiny.checkpoint, options, None).unwrap();
    let options = EngineOptions { max_num_seqs: 100, ..EngineOptions::default() };
    assert_eq!((plan(&one()).sizes.wanted, plan(&options).sizes.wanted), (64, 100));
    let logits = 4 * VOCAB * (100 - 64);
    assert!(plan(&options).scratch > plan(&one()).scratch + logits, "the logits are counted");
    let mut engine = engine(&tiny.checkpoint, &options);
    let ids: Vec<_> = prompts.iter().map(|prompt| engine.submit(prompt, greedy(5)).unwrap()).collect();
    let mut answers = finish(&mut engine);
    let mut alone = engine_on(&tiny.checkpoint, &cpu(), &one());
    for (id, prompt) in ids.into_iter().zip(&prompts).step_by(9) {
        assert_eq!(answers.remove(&id).unwrap().bits(), ask(&mut alone, prompt, &greedy(5)).bits());
    }
}

#[test]
fn the_memory_plan_counts_what_a_device_takes_beside_the_buffers() {
    let tiny = tiny();
    let options = EngineOptions { max_num_batched_tokens: 64, max_num_seqs: 4, ..EngineOptions::default() };
    let cuda = open(&Spec { kind: Kind::CudaEmulated, ..Spec::default() }).unwrap();
    let plan = |device| MemoryPlan::new(&tiny.checkpoint, &options, device).unwrap();
    let (bare, whole) = (plan(None), plan(Some(&*cuda)));
    // Of what ops need one after the other, the most: what `Sample` drafts of each row whose logits are wanted.
    // Counters of blocks come on top, a word for each of 8 multiprocessors at most.
    let more = whole.scratch - bare.scratch - whole.sizes.wanted * 38968;
    assert!(more <= 4 * 8, "{more} bytes more");
    assert!(bare.fits(bare.total() as u64).is_ok());
    let error = whole.fits(bare.total() as u64).unwrap_err();
    assert!(error.to_string().contains(&format!("{} bytes", whole.total())), "{error}");
}

// ---- scores of the prompt

#[test]
fn scores_of_a_prompt_in_one_step_equal_those_one_by_one() {
    let tiny = tiny();
    let prompt = Random(3).ids(200);
    let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(2), ..SamplingParams::default() };
    let mut single = engine(&tiny.checkpoint, &one());
    let one_by_one: Vec<Token> =
        (2..=prompt.len()).map(|n| ask(&mut single, &prompt[..n], &params).scores.pop().unwrap()).collect();
    assert_eq!(one_by_one.iter().map(|token| token.id).collect::<Vec<_>>(), prompt[1..]);
    for rows in [512, 100, 65, 64, 1] {
        let options = EngineOptions { max_num_batched_tokens: rows, ..one() };
        let answer = ask(&mut engine(&tiny.checkpoint, &options), &prompt, &params);
        assert!(bits(&answer.scores) == bits(&one_by_one), "steps of {rows} rows");
        assert_eq!((answer.tokens.len(), answer.end), (0, Some(Ok(FinishReason::Length))));
    }
}

#[test]
fn scores_and_generation_together_equal_each_alone() {
    let tiny = tiny();
    let prompt = Random(4).ids(90);
    for rows in [512, 32] {
        let mut engine = engine(&tiny.checkpoint, &EngineOptions { max_num_batched_tokens: rows, ..one() });
        let both = ask(&mut engine, &prompt, &SamplingParams { prompt_logprobs: Some(3), ..greedy(10) });
        let scores = ask(&mut engine, &prompt, &SamplingParams { prompt_logprobs: Some(3), ..greedy(0) });
        let tokens = ask(&mut engine, &prompt, &greedy(10));
        assert_eq!((scores.tokens.len(), tokens.scores.len(), both.tokens.len()), (0, 0, 10));
        assert_eq!(both.bits(), (bits(&scores.scores), bits(&tokens.tokens)));
    }
}

#[test]
fn a_prompt_of_one_token_has_no_scores_and_no_tokens_where_none_are_asked_for() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    for prompt_logprobs in [None, Some(0), Some(20)] {
        let answer = ask(&mut engine, &[5], &SamplingParams { prompt_logprobs, ..greedy(0) });
        assert_eq!((answer.scores.len(), answer.tokens.len()), (0, 0));
        assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
    }
}

#[test]
fn alternatives_are_as_many_as_asked_for_and_scores_are_normalized() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let params = SamplingParams { logprobs: Some(20), prompt_logprobs: Some(0), ..greedy(3) };
    let answer = ask(&mut engine, &[5, 6, 7], &params);
    assert!(answer.scores.iter().all(|token| token.top.is_empty() && token.logprob < 0.0));
    for token in &answer.tokens {
        assert_eq!((token.top.len(), token.top[0]), (20, (token.id, token.logprob)));
        assert!(token.top.iter().map(|(_, logprob)| logprob.exp()).sum::<f32>() <= 1.0 + 1e-5);
    }
}

// ---- penalties

#[test]
fn a_slot_used_again_does_not_inherit_the_history() {
    let tiny = tiny();
    let strong =
        SamplingParams { repetition_penalty: 1.5, frequency_penalty: 1.0, presence_penalty: 1.0, ..greedy(40) };
    let prompts = [Random(1).ids(30), Random(2).ids(9)];
    let want: Vec<_> =
        prompts.iter().map(|prompt| ask(&mut engine(&tiny.checkpoint, &one()), prompt, &strong).bits()).collect();
    let mut used = engine(&tiny.checkpoint, &one());
    for (round, plain_between) in [(0, false), (1, true), (2, false)] {
        for (prompt, want) in prompts.iter().zip(&want) {
            if plain_between {
                ask(&mut used, &[1, 2, 3], &greedy(50));
            }
            assert!(ask(&mut used, prompt, &strong).bits() == *want, "round {round}");
        }
    }
    // Penalties do something: nothing above would show their absence.
    assert_ne!(ask(&mut used, &prompts[0], &greedy(40)).bits(), want[0]);
}

// ---- ends

#[test]
fn each_end_of_text_token_ends_an_answer_unless_it_is_ignored() {
    let mut model = Tiny::fp8(Inputs::Static);
    let prompt = Random(5).ids(12);
    let free = ask(&mut engine(&model.open().checkpoint, &one()), &prompt, &greedy(12)).ids();
    assert_eq!(free.len(), 12);
    let first = |id: u32| free.iter().position(|have| *have == id).unwrap();
    let never = (0..VOCAB as u32).find(|id| !free.contains(id)).unwrap();
    for &eos in &free[3..6] {
        // generation_config.json decides where it names tokens, else config.json.
        for (config, generation) in [
            (never.into(), serde_json::json!([never, eos])),
            (serde_json::json!([eos, never]), serde_json::Value::Null),
        ] {
            model.config["eos_token_id"] = config;
            model.generation["eos_token_id"] = generation;
            let opened = model.open();
            let mut engine = engine(&opened.checkpoint, &one());
            let answer = ask(&mut engine, &prompt, &greedy(12));
            assert_eq!((&answer.ids()[..], answer.end), (&free[..=first(eos)], Some(Ok(FinishReason::Stop))));
            let ignoring = SamplingParams { ignore_eos: true, ..greedy(12) };
            let answer = ask(&mut engine, &prompt, &ignoring);
            assert_eq!((answer.ids(), answer.end), (free.clone(), Some(Ok(FinishReason::Length))));
            // A request's own stop tokens hold all the same.
            let answer = ask(&mut engine, &prompt, &SamplingParams { stop_token_ids: vec![never, eos], ..ignoring });
            assert_eq!((&answer.ids()[..], answer.end), (&free[..=first(eos)], Some(Ok(FinishReason::Stop))));
        }
    }
}

#[test]
fn a_stop_token_as_the_last_one_allowed_is_a_stop() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let first = ask(&mut engine, &[9, 8], &greedy(1)).ids();
    let answer = ask(&mut engine, &[9, 8], &SamplingParams { stop_token_ids: first.clone(), ..greedy(1) });
    assert_eq!((answer.ids(), answer.end), (first, Some(Ok(FinishReason::Stop))));
}

#[test]
fn a_context_that_fills_up_ends_the_answer_at_its_last_token() {
    let tiny = tiny();
    for context in [CONTEXT, 37, 17, 16, 2] {
        let options = EngineOptions { max_model_len: Some(context), max_num_batched_tokens: 50, ..one() };
        let mut engine = engine(&tiny.checkpoint, &options);
        assert_eq!(engine.max_model_len(), context);
        for room in [1, 5, 16].into_iter().filter(|room| *room < context) {
            for max_tokens in [room, room + 1, 1000, usize::MAX] {
                let answer = ask(&mut engine, &Random(6).ids(context - room), &greedy(max_tokens));
                assert_eq!((answer.tokens.len(), answer.end), (room, Some(Ok(FinishReason::Length))));
            }
        }
        let answer = ask(&mut engine, &Random(6).ids(context), &greedy(0));
        assert_eq!((answer.tokens.len(), answer.end), (0, Some(Ok(FinishReason::Length))));
    }
}

// ---- pages and slots

#[test]
fn cancelling_frees_pages_and_slot_at_once_wherever_a_request_is() {
    let tiny = tiny();
    let options = EngineOptions { max_num_seqs: 1, max_num_batched_tokens: 10, ..EngineOptions::default() };
    let mut engine = engine(&tiny.checkpoint, &options);
    let (_, all) = engine.pages();
    let prompt = Random(7).ids(40);
    let want = ask(&mut engine, &prompt, &greedy(5)).bits();
    // 0 steps: admitted by none. 1 to 3: in its prompt. 4 and more: in its answer.
    for steps in 0..7 {
        let running = engine.submit(&prompt, greedy(20)).unwrap();
        let waiting = engine.submit(&prompt, greedy(20)).unwrap();
        let next = engine.submit(&prompt, greedy(5)).unwrap();
        for _ in 0..steps {
            engine.step().unwrap();
            // The prompt's pages; a further one is needed after 9 tokens.
            assert_eq!(engine.pages().0, all - 3);
        }
        engine.cancel(waiting);
        engine.cancel(running);
        assert_eq!(engine.pages(), (all, all), "behind {steps} steps");
        engine.cancel(running);
        let answers = finish(&mut engine);
        assert_eq!(answers.keys().collect::<Vec<_>>(), [&next]);
        assert_eq!(answers[&next].bits(), want);
    }
}

#[test]
fn a_cache_too_small_for_all_makes_them_wait_and_answers_each() {
    let tiny = tiny();
    let mut random = Random(8);
    let prompts: Vec<Vec<u32>> = (0..24).map(|i| random.ids(1 + i * 5 % 60)).collect();
    let mut alone = engine(&tiny.checkpoint, &one());
    let want: Vec<_> = prompts.iter().map(|prompt| ask(&mut alone, prompt, &greedy(12)).bits()).collect();
    // Five pages: two middling requests, or one of 72 tokens.
    let page = 2 * 2 * 2 * 12 * 2 * 16;
    let options = EngineOptions { kv_cache_memory: 5 * page + 1, ..EngineOptions::default() };
    let mut engine = engine(&tiny.checkpoint, &options);
    assert_eq!((engine.pages(), engine.max_model_len()), ((5, 5), 80));
    let ids: Vec<_> = prompts.iter().map(|prompt| engine.submit(prompt, greedy(12)).unwrap()).collect();
    let answers = finish(&mut engine);
    for (id, want) in ids.iter().zip(want) {
        assert_eq!((answers[id].bits(), answers[id].end.clone()), (want, Some(Ok(FinishReason::Length))));
    }
    assert!(engine.stats().preemptions > 0, "pages are taken as they are needed, and so run out");
    assert_eq!(
        engine.submit(&Random(9).ids(80), greedy(1)).unwrap_err().to_string(),
        "prompt has 80 tokens, the context holds 80 and needs room for an answer; shorten it, or raise --max-model-len or --kv-cache-memory"
    );
}

#[test]
fn prompts_that_begin_alike_share_pages_also_where_they_come_at_once() {
    let tiny = tiny();
    let prompt = Random(11).ids(100);
    let longer = [&prompt[..], &[1, 2, 3]].concat();
    let mut alone = engine(&tiny.checkpoint, &EngineOptions { prefix_caching: false, ..one() });
    let want = [&prompt, &longer].map(|prompt| ask(&mut alone, prompt, &greedy(8)));
    assert_eq!((want[0].cached, alone.stats().prefix_queries), (Some(0), 0));
    let mut engine = engine(&tiny.checkpoint, &EngineOptions::default());
    let asked = [(&prompt, 0), (&prompt, 0), (&longer, 1), (&prompt, 0)];
    let ids = asked.map(|(prompt, _)| engine.submit(prompt, greedy(8)).unwrap());
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    for step in 0.. {
        for (id, output) in engine.step().unwrap() {
            answers.entry(id).or_default().take(output);
        }
        if step == 1 {
            // Six whole pages together, and one for each.
            assert_eq!(engine.pages().1 - engine.pages().0, 6 + 4);
        }
        if engine.is_idle() {
            break;
        }
    }
    for ((id, (_, want_of)), cached) in ids.iter().zip(asked).zip([0, 96, 96, 96]) {
        assert_eq!((answers[id].bits(), answers[id].cached), (want[want_of].bits(), Some(cached)));
    }
    // What was generated is found as well: a conversation goes on where it was. The last token was never computed.
    let turn = [&prompt[..], &want[0].ids(), &[5, 6]].concat();
    assert_eq!(ask(&mut engine, &turn, &greedy(1)).cached, Some((100 + 7) / 16 * 16));
    let stats = engine.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (3 * 100 + 103 + 110, 3 * 96 + 96));
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
}

#[test]
fn a_long_prompt_does_not_hold_up_who_decodes_nor_a_short_prompt() {
    let tiny = tiny();
    let options = EngineOptions {
        max_num_batched_tokens: 32,
        max_prompt_tokens_beside: 8,
        max_model_len: Some(CONTEXT),
        ..EngineOptions::default()
    };
    let mut engine = engine(&tiny.checkpoint, &options);
    let decoding = engine.submit(&[1, 2, 3], greedy(60)).unwrap();
    let tokens = |engine: &mut Engine, id| {
        let rows = engine.stats().rows;
        let outputs = engine.step().unwrap();
        let count = outputs.iter().filter(|(of, output)| *of == id && matches!(output, Output::Token(_))).count();
        (count, engine.stats().rows - rows)
    };
    assert_eq!(tokens(&mut engine, decoding), (1, 3));
    engine.submit(&Random(1).ids(200), greedy(1)).unwrap();
    let short = engine.submit(&Random(2).ids(4), greedy(20)).unwrap();
    // One row that decodes, half of the eight for the long prompt, and all of the short one.
    assert_eq!(tokens(&mut engine, decoding), (1, 9));
    assert_eq!(tokens(&mut engine, short), (1, 10));
    for _ in 0..20 {
        assert_eq!(tokens(&mut engine, decoding).0, 1);
    }
}

// ---- what the host chooses

#[test]
fn biases_move_the_choice_and_leave_log_probabilities_alone() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let free = ask(&mut engine, &[5, 6, 7], &SamplingParams { logprobs: Some(20), ..greedy(1) });
    let second = free.tokens[0].top[1];
    let banned = SamplingParams { logit_bias: vec![(free.tokens[0].id, -100.0)], ..greedy(1) };
    let answer = ask(&mut engine, &[5, 6, 7], &banned);
    assert_eq!((answer.tokens[0].id, answer.tokens[0].logprob, answer.tokens[0].rank), (second.0, second.1, 2));
    let nothing = SamplingParams { logit_bias: vec![(3, 0.0)], ..greedy(9) };
    assert_eq!(ask(&mut engine, &[5, 6, 7], &nothing).bits(), ask(&mut engine, &[5, 6, 7], &greedy(9)).bits());
}

#[test]
fn tokens_before_min_tokens_are_penalized_as_others() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let penalized = SamplingParams { repetition_penalty: 1.8, frequency_penalty: 1.5, ignore_eos: true, ..greedy(30) };
    let want = ask(&mut engine, &[5, 6, 7], &penalized);
    let free = ask(&mut engine, &[5, 6, 7], &SamplingParams { ignore_eos: true, ..greedy(30) });
    assert_ne!(want.ids(), free.ids(), "the penalties change nothing here");
    for min_tokens in [1, 4, 29] {
        let answer = ask(&mut engine, &[5, 6, 7], &SamplingParams { min_tokens, ..penalized.clone() });
        assert_eq!(answer.bits(), want.bits(), "the first {min_tokens} under a mask");
    }
}

#[test]
fn a_step_is_queued_before_the_last_one_is_settled_where_the_device_has_a_queue() {
    let tiny = tiny();
    let plain = SamplingParams { ignore_eos: true, ..greedy(3) };
    // A mask that does not depend on the tokens before is no reason to wait.
    let masked = SamplingParams { min_tokens: 3, stop_token_ids: vec![7], ..plain.clone() };
    for params in [plain, masked] {
        let want = ask(&mut engine(&tiny.checkpoint, &one()), &[5, 6, 7], &params);
        let mut engine = queued(&tiny.checkpoint, &cpu(), &one());
        let id = engine.submit(&[5, 6, 7], params).unwrap();
        let mut answer = Answer::default();
        // Steps that were queued, and tokens that are known, behind each call.
        let mut seen = Vec::new();
        while !engine.is_idle() {
            for (of, output) in engine.step().unwrap() {
                assert_eq!(of, id);
                answer.take(output);
            }
            seen.push((engine.stats().steps, answer.tokens.len()));
        }
        assert_eq!(seen, [(1, 0), (2, 1), (3, 2), (3, 3)], "and none is queued behind the last");
        assert_eq!(answer.bits(), want.bits());
    }
}

#[test]
fn no_end_comes_before_min_tokens() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let free = ask(&mut engine, &[5, 6, 7], &greedy(1)).ids();
    for min_tokens in 0..5 {
        let params = SamplingParams { stop_token_ids: (0..VOCAB as u32 / 2).collect(), min_tokens, ..greedy(200) };
        let answer = ask(&mut engine, &[5, 6, 7], &params);
        let ends = answer.ids().iter().position(|id| *id < VOCAB as u32 / 2);
        assert!(ends.is_none_or(|at| at >= min_tokens && at + 1 == answer.tokens.len()), "{:?}", answer.ids());
        assert!(answer.tokens.len() > min_tokens);
    }
    let stop = SamplingParams { stop_token_ids: free.clone(), min_tokens: 1, ..greedy(3) };
    assert_ne!(ask(&mut engine, &[5, 6, 7], &stop).ids()[0], free[0]);
}

/// Allows the tokens of a text, one after the other, and then nothing.
struct Spell(Vec<u32>);

impl Guide for Spell {
    fn mask(&mut self, mask: &mut Mask) -> quaver_core::Result<()> {
        let allowed = self.0.first().copied();
        (0..VOCAB as u32).filter(|id| Some(*id) != allowed).for_each(|id| mask.forbid(id));
        Ok(())
    }

    fn advance(&mut self, token: u32) -> quaver_core::Result<ControlFlow<()>> {
        assert_eq!(self.0.remove(0), token);
        Ok(if self.0 == [0] { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }
}

/// Allows every third token, those that follow on the last one, and fails behind so many.
struct Thirds {
    next: u32,
    left: usize,
}

impl Guide for Thirds {
    fn mask(&mut self, mask: &mut Mask) -> quaver_core::Result<()> {
        if self.left == 0 {
            return Err(quaver_core::Error::text("guide", "it has failed"));
        }
        (0..VOCAB as u32).filter(|id| id % 3 != self.next).for_each(|id| mask.forbid(id));
        Ok(())
    }

    fn advance(&mut self, token: u32) -> quaver_core::Result<ControlFlow<()>> {
        assert_eq!(token % 3, self.next);
        (self.next, self.left) = ((self.next + token) % 3, self.left - 1);
        Ok(ControlFlow::Continue(()))
    }
}

/// A third of the vocabulary by turns, for so many tokens.
fn thirds(left: usize) -> Option<Box<dyn Guide>> {
    Some(Box::new(Thirds { next: 1, left }))
}

#[test]
fn guided_requests_beside_others_get_what_each_gets_alone_on_every_backend() {
    let tiny = Tiny::fp8(Inputs::Dynamic).open();
    let options = EngineOptions {
        deterministic: true,
        max_num_batched_tokens: 16,
        max_num_seqs: 4,
        profile: Profile::Exact,
        ..EngineOptions::default()
    };
    let sampled = SamplingParams { temperature: 1.3, top_p: 0.9, seed: Some(3), ignore_eos: true, ..greedy(6) };
    let penalized = SamplingParams { frequency_penalty: 1.5, repetition_penalty: 1.2, top_k: 20, ..sampled.clone() };
    let biased = SamplingParams { logit_bias: vec![(7, 3.0), (9, -100.0)], ..sampled.clone() };
    let early = SamplingParams { min_tokens: 3, stop_token_ids: (100..VOCAB as u32).collect(), ..greedy(6) };
    let requests = [
        (greedy(6), true),
        (greedy(6), false),
        (sampled.clone(), true),
        (sampled, false),
        (penalized.clone(), true),
        (penalized, false),
        (biased.clone(), true),
        (biased, false),
        (early.clone(), true),
        (early, false),
    ];
    let prompt = |i: usize| Random(i as u64 / 2).ids(3 + 5 * i);
    let submit = |engine: &mut Engine, i: usize| {
        let (params, is_guided) = requests[i].clone();
        engine.submit_guided(&prompt(i), params, if is_guided { thirds(6) } else { None }).unwrap()
    };
    let mut want: Option<Vec<Vec<u32>>> = None;
    let specs = quaver_backends::variants();
    let [reference, emulated] = [Kind::Reference, Kind::CudaEmulated].map(Spec::from);
    let others = specs.iter().filter(|spec| spec.kind != Kind::Reference && spec.device == 0);
    for spec in [&reference].into_iter().chain(others).chain([&emulated]) {
        let spec = Spec { deterministic: true, ..spec.clone() };
        let mut engine = queued(&tiny.checkpoint, &spec, &options);
        let alone: Vec<_> = (0..requests.len())
            .map(|i| {
                let id = submit(&mut engine, i);
                finish(&mut engine).remove(&id).unwrap()
            })
            .collect();
        let ids: Vec<_> = (0..requests.len()).map(|i| submit(&mut engine, i)).collect();
        let mut together = finish(&mut engine);
        for (i, (id, alone)) in ids.into_iter().zip(&alone).enumerate() {
            assert_eq!(together.remove(&id).unwrap().bits(), alone.bits(), "{spec}: request {i}");
        }
        let tokens: Vec<_> = alone.iter().map(Answer::ids).collect();
        assert_eq!(want.get_or_insert_with(|| tokens.clone()), &tokens, "{spec}");
    }
    let want = want.unwrap();
    assert!((0..requests.len()).step_by(2).all(|i| want[i] != want[i + 1]), "guides change nothing: {want:?}");
}

#[test]
fn only_biases_bring_logits_to_the_host() {
    let tiny = tiny();
    let taken = |params: &SamplingParams, guide| {
        let backend = Queued::new(open(&cpu()).unwrap());
        let bytes = backend.taken.clone();
        let mut engine = Engine::new(&tiny.checkpoint, Box::new(backend), &one()).unwrap();
        engine.submit_guided(&[5, 6, 7], params.clone(), guide).unwrap();
        finish(&mut engine);
        bytes.load(Ordering::Relaxed)
    };
    let plain = SamplingParams { ignore_eos: true, ..greedy(5) };
    let without = taken(&plain, None);
    assert_eq!(without, 5 * size_of::<Sampled>());
    assert_eq!(taken(&plain, thirds(9)), without);
    let early = SamplingParams { min_tokens: 5, stop_token_ids: vec![7], ..plain.clone() };
    assert_eq!(taken(&early, None), without);
    let biased = SamplingParams { logit_bias: vec![(7, 1.0)], ..plain };
    assert_eq!(taken(&biased, None), without + 5 * 4 * VOCAB);
}

#[test]
fn a_guide_that_fails_fails_its_request_alone() {
    let tiny = tiny();
    for open in [engine_on, queued] {
        let mut engine = open(&tiny.checkpoint, &cpu(), &EngineOptions::default());
        let want = ask(&mut engine, &[9; 20], &greedy(20)).bits();
        let failing =
            engine.submit_guided(&[5; 30], SamplingParams { ignore_eos: true, ..greedy(9) }, thirds(3)).unwrap();
        let free = engine.submit(&[9; 20], greedy(20)).unwrap();
        let mut answers = finish(&mut engine);
        let failed = &answers[&failing];
        assert_eq!((failed.tokens.len(), failed.end.clone()), (3, Some(Err("guide: it has failed".to_owned()))));
        assert_eq!(answers.remove(&free).unwrap().bits(), want);
    }
}

#[test]
fn a_guide_decides_what_may_come_and_when_it_is_over() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &EngineOptions::default());
    let want = ask(&mut engine, &[9; 20], &greedy(20)).bits();
    let spelt = engine.submit_guided(&[5; 30], greedy(9), Some(Box::new(Spell(vec![7, 70, 7, 0])))).unwrap();
    let stuck = engine.submit_guided(&[5; 30], greedy(9), Some(Box::new(Spell(vec![3, 4])))).unwrap();
    let free = engine.submit(&[9; 20], greedy(20)).unwrap();
    let mut answers = finish(&mut engine);
    assert_eq!((answers[&spelt].ids(), answers[&spelt].end.clone()), (vec![7, 70, 7], Some(Ok(FinishReason::Stop))));
    let why = "structured output: no token may come next; change the grammar or min_tokens";
    assert_eq!((answers[&stuck].ids(), answers[&stuck].end.clone()), (vec![3, 4], Some(Err(why.to_owned()))));
    assert_eq!(answers.remove(&free).unwrap().bits(), want);
}

// ---- the engine in a thread

#[test]
fn a_service_answers_who_waits_refuses_who_is_too_many_and_frees_what_is_dropped() {
    let tiny = tiny();
    let mut alone = engine(&tiny.checkpoint, &one());
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| Random(i).ids(10 + 9 * i as usize)).collect();
    let want: Vec<_> = prompts.iter().map(|prompt| ask(&mut alone, prompt, &greedy(12)).bits()).collect();
    let options = EngineOptions { max_num_seqs: 3, ..EngineOptions::default() };
    let service = Service::start(engine(&tiny.checkpoint, &options), 7);
    let submit = |prompt: &[u32], params: SamplingParams, wait: Option<std::sync::mpsc::Receiver<()>>| {
        let (sink, outputs) = std::sync::mpsc::channel();
        let send = move |output| {
            // Holds the engine up, so that nothing is over before everything is asked.
            if let Some(wait) = &wait {
                let _ = wait.recv();
            }
            let _ = sink.send(output);
        };
        let ticket = service.submit(&mut service.reserve(1)?, prompt.to_vec(), params, None, Box::new(send));
        ticket.map(|ticket| (ticket, outputs))
    };
    let empty = submit(&[], greedy(1), None).err().unwrap().to_string();
    assert_eq!((empty.as_str(), service.under_way()), ("the prompt is empty; give at least one token", 0));
    // Without end, until its ticket is dropped.
    let (go, wait) = std::sync::mpsc::channel();
    let endless = SamplingParams { ignore_eos: true, ..greedy(usize::MAX) };
    let (ticket, outputs) = submit(&[1, 2], endless, Some(wait)).unwrap();
    let asked: Vec<_> = prompts.iter().map(|prompt| submit(prompt, greedy(12), None).unwrap()).collect();
    let refused = submit(&prompts[0], greedy(12), None).err().unwrap().to_string();
    assert_eq!(refused, "7 requests are under way, and no more may wait; try again later, or raise --max-queue");
    // Several places are taken together or not at all, and what was not filled is free again.
    assert!(service.reserve(2).is_err() && service.under_way() == 7);
    drop(go);
    assert!(matches!(outputs.recv().unwrap(), Output::Begun { cached: 0 }));
    drop(ticket);
    for ((_ticket, outputs), want) in asked.iter().zip(want) {
        let mut answer = Answer::default();
        outputs.iter().for_each(|output| answer.take(output));
        assert_eq!((answer.bits(), answer.end), (want, Some(Ok(FinishReason::Length))));
    }
    // The endless one was cancelled: its channel ends, and nothing is held.
    outputs.iter().for_each(drop);
    assert_eq!((service.under_way(), service.is_well()), (0, true));
    let places = service.reserve(7).unwrap();
    assert!(service.under_way() == 7 && service.reserve(1).is_err());
    drop(places);
    assert_eq!(service.under_way(), 0);
    let stats = service.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
}

// ---- refusals

#[test]
fn a_request_that_means_nothing_is_refused_and_leaves_nothing_behind() {
    let tiny = tiny();
    let mut engine = engine(&tiny.checkpoint, &one());
    let high = VOCAB as u32;
    let too_long = |got| {
        format!(
            "prompt has {got} tokens, the context holds 256 and needs room for an answer; shorten it, or raise --max-model-len or --kv-cache-memory"
        )
    };
    let range = "token id 96 is out of range: the vocabulary has 96 entries";
    for (prompt, params, message) in [
        (vec![], greedy(4), "the prompt is empty; give at least one token".to_owned()),
        (vec![1, high, 2], greedy(4), range.to_owned()),
        (vec![1], SamplingParams { stop_token_ids: vec![high], ..greedy(4) }, range.to_owned()),
        (vec![u32::MAX], greedy(4), "token id 4294967295 is out of range: the vocabulary has 96 entries".to_owned()),
        (vec![1; 256], greedy(1), too_long(256)),
        (vec![1; 257], greedy(0), too_long(257)),
        (vec![1; 100_000], greedy(usize::MAX), too_long(100_000)),
        (
            vec![1],
            SamplingParams { temperature: f32::NAN, ..greedy(4) },
            "temperature is NaN; it must be between 0 (greedy) and 100".to_owned(),
        ),
        (
            vec![1],
            SamplingParams { prompt_logprobs: Some(21), ..greedy(4) },
            "prompt_logprobs is 21; it must be at most 20 alternatives".to_owned(),
        ),
    ] {
        assert_eq!(engine.submit(&prompt, params).unwrap_err().to_string(), message);
        assert!(engine.is_idle() && engine.step().unwrap().is_empty());
    }
    assert_eq!(ask(&mut engine, &[1; 255], &greedy(4)).tokens.len(), 1);
}

#[test]
fn absurd_options_are_errors() {
    let tiny = tiny();
    let open = |change: &dyn Fn(&mut EngineOptions)| {
        let mut options = EngineOptions::default();
        change(&mut options);
        Engine::new(&tiny.checkpoint, open(&cpu()).unwrap(), &options).map(|mut engine| {
            assert_eq!(ask(&mut engine, &[1, 2, 3], &greedy(4)).tokens.len(), 4);
            engine
        })
    };
    let refusal = |change: &dyn Fn(&mut EngineOptions)| open(change).err().unwrap().to_string();
    let len = |n: usize| format!("--max-model-len {n}: the model is made for {CONTEXT} tokens; give 1 to {CONTEXT}");
    for n in [0, CONTEXT + 1, usize::MAX] {
        assert_eq!(refusal(&|o| o.max_model_len = Some(n)), len(n));
    }
    for n in [0, 4097, usize::MAX] {
        let message = format!("--max-num-seqs is {n}; it must be at least 1 and at most 4096");
        assert_eq!(refusal(&|o| o.max_num_seqs = n), message);
    }
    for n in [0, 65_537, usize::MAX] {
        let message = format!("--max-num-batched-tokens is {n}; it must be at least 1 and at most 65536");
        assert_eq!(refusal(&|o| o.max_num_batched_tokens = n), message);
    }
    for n in [0, 3071] {
        let message = format!("one page of the KV cache needs 3072 bytes, {n} are available; raise --kv-cache-memory");
        assert_eq!(refusal(&|o| o.kv_cache_memory = n), message);
    }
    // The largest that are allowed take no more than the cache can serve.
    let engine = open(&|o| (o.max_num_seqs, o.max_num_batched_tokens) = (4096, 65_536)).unwrap();
    assert_eq!(engine.pages().1, 4096 * CONTEXT / 16);
    let engine = open(&|o| (o.max_num_seqs, o.kv_cache_memory) = (4096, 3072)).unwrap();
    assert_eq!((engine.pages().1, engine.max_model_len()), (1, 16));
    let engine = open(&|o| o.kv_cache_memory = u64::MAX).unwrap();
    assert_eq!(engine.pages().1, 16 * CONTEXT / 16);
}

#[test]
fn a_cache_larger_than_memory_is_an_error() {
    // Heads so wide that no address space holds the pages.
    let mut model = Tiny::new();
    model.config["head_dim"] = 4096.into();
    model.config["max_position_embeddings"] = (1 << 24).into();
    for (module, heads) in [("q", 4), ("k", 2), ("v", 2)] {
        let shape = [heads * 4096, 32];
        model.change(&format!("{module}_proj.weight"), |_| zeros(&shape));
    }
    model.change("o_proj.weight", |_| zeros(&[32, 4 * 4096]));
    let options = EngineOptions { max_num_seqs: 4096, kv_cache_memory: u64::MAX, ..EngineOptions::default() };
    let opened = model.open();
    let result = Engine::new(&opened.checkpoint, open(&cpu()).unwrap(), &options);
    assert_eq!(
        result.err().unwrap().to_string(),
        "cpu: there is no memory for the 1125899906580480 bytes of model.layers.0.k_cache; lower --max-model-len, \
         --max-num-seqs, --max-num-batched-tokens or --kv-cache-memory"
    );
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::new(safetensors::Dtype::BF16, shape, &vec![0.0; shape.iter().product()])
}

#[test]
fn logits_that_are_not_finite_fail_their_request_alone() {
    // The embedding of one token overflows.
    let mut model = Tiny::new();
    let head = model.tensors["model.embed_tokens.weight"].clone();
    model.tensors.insert("lm_head.weight".into(), head);
    model.change("embed_tokens.weight", |table| {
        let mut values = table.values();
        let hidden = table.shape[1];
        values[7 * hidden..8 * hidden].fill(f32::NAN);
        Tensor::new(table.dtype, &table.shape, &values)
    });
    let opened = model.open();
    let why = "cpu: the logits are not finite: the checkpoint is damaged, or the device is";
    let mut engine = engine(&opened.checkpoint, &EngineOptions::default());
    let want = ask(&mut engine, &[1, 2, 3], &greedy(3)).bits();
    let scored = SamplingParams { prompt_logprobs: Some(1), ..greedy(0) };
    let bad = engine.submit(&[7, 2, 3], greedy(3)).unwrap();
    let good = engine.submit(&[1, 2, 3], greedy(3)).unwrap();
    let bad_scores = engine.submit(&[7, 2, 3], scored.clone()).unwrap();
    let answers = finish(&mut engine);
    assert_eq!(answers[&good].bits(), want);
    for id in [bad, bad_scores] {
        let answer = &answers[&id];
        assert_eq!((answer.scores.len(), answer.tokens.len()), (0, 0));
        assert_eq!(answer.end, Some(Err(why.to_owned())));
    }
    // The pages that it used hold NaN: whoever has them next must not see it.
    for _ in 0..3 {
        assert_eq!(ask(&mut engine, &[1, 2, 3], &greedy(3)).bits(), want);
    }
    // The step behind the one that fails, in which the host would choose, is queued already.
    let options = EngineOptions { max_num_batched_tokens: 16, max_num_seqs: 1, ..EngineOptions::default() };
    let mut engine = queued(&opened.checkpoint, &cpu(), &options);
    let params = SamplingParams { logit_bias: vec![(9, 1.0)], prompt_logprobs: Some(1), ..greedy(3) };
    let prompt = [[7; 16].as_slice(), &[1; 4]].concat();
    assert_eq!(ask(&mut engine, &prompt, &params).end, Some(Err(why.to_owned())));
    assert_eq!(ask(&mut engine, &[1, 2, 3], &greedy(3)).bits(), want);
}

#[test]
fn a_batch_that_does_not_fit_the_model_is_refused() {
    let tiny = tiny();
    let mut runner = Runner::new(&tiny.checkpoint, &Kind::Cpu.into(), Profile::Exact, 32);
    let row = RowParams::score(0, 0, 0);
    let mut refusal = |fill: &dyn Fn(&mut Batch), wanted: (usize, usize)| {
        let mut batch = Batch::default();
        fill(&mut batch);
        let (llama, backend) = (&runner.llama, &mut *runner.backend);
        let written = batch.write(llama, backend).and_then(|()| batch.write_wanted(llama, backend, wanted.0, wanted.1));
        written.map_err(|e| e.to_string())
    };
    let fits = |batch: &mut Batch| {
        batch.push(0, 0, &[1; 32]);
        (0..32).for_each(|i| batch.want(i, row));
    };
    assert_eq!(refusal(&fits, (0, 32)), Ok(()));
    let push = |batch: &mut Batch, seq: u32, position: usize, ids: &[u32]| {
        batch.push(seq, position, ids);
    };
    let why = |why: &str| Err(format!("program line 0 (batch): {why}"));
    assert_eq!(refusal(&fits, (1, 32)), why("33 wanted rows do not fit 32"));
    assert_eq!(refusal(&fits, (usize::MAX, 1)), why("18446744073709551615 wanted rows do not fit 32"));
    assert_eq!(refusal(&|b| push(b, 0, 0, &[1; 33]), (0, 0)), why("33 rows do not fit 32"));
    assert_eq!(refusal(&|b| push(b, 1, 0, &[1]), (0, 0)), why("2 sequences do not fit 1"));
    assert_eq!(refusal(&|b| (0..2).for_each(|i| push(b, 0, i, &[1])), (0, 0)), why("2 runs of rows do not fit 1"));
    let far = |b: &mut Batch| {
        b.push(0, 0, &[1]);
        b.want(1, row);
    };
    assert_eq!(refusal(&far, (0, 1)), why("2 rows up to the last wanted one do not fit 1"));
    let stranger = |b: &mut Batch| {
        b.push(0, 0, &[1]);
        b.want(0, RowParams::score(9, 0, 0));
    };
    assert_eq!(refusal(&stranger, (0, 1)), why("10 sequences do not fit 1"));
    assert_eq!(
        refusal(&|b| push(b, 0, 32, &[1]), (0, 0)),
        Err("prompt has 33 tokens, the context holds 32 and needs room for an answer; shorten it, or raise --max-model-len or --kv-cache-memory".into())
    );
    assert_eq!(
        refusal(&|b| push(b, 0, 0, &[96]), (0, 0)),
        Err("token id 96 is out of range: the vocabulary has 96 entries".into())
    );
}
