//! How fast a model runs, and how near that comes to what the machine can do. `quaver bench` is the caller.

mod case;
pub mod gemm;
mod history;
mod report;
pub mod serve;

use std::time::Instant;

use quaver_core::checkpoint::Checkpoint;
use quaver_core::engine::EngineOptions;
use quaver_core::plan::MemoryPlan;
use quaver_core::{Error, Result};

pub use self::case::Case;
use self::case::{Run, Runner};
pub use self::history::History;
use self::report::CaseRuns;
pub use self::report::{CaseReport, Figure, Machine, Memory, OpReport, Phase, Report, Spread, Subject};
use crate::{LlmOptions, model};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device and the model's options. Sequences and, where it is None, their length follow from the cases.
    pub llm: LlmOptions,
    /// The cases, in order.
    pub cases: Vec<Case>,
    /// Runs of each case, behind one that is not measured.
    pub repeat: usize,
    /// Run each case as often again with every op timed by itself.
    pub per_op: bool,
}

/// Measures a model's cases, and the machine before each run and behind the last one: what others do on it changes by
/// the second, so that medians are compared with medians. `on_progress` is told what comes next.
///
/// # Errors
/// Where a case does not fit the model's context or the KV cache; and all that a model can be refused for.
pub fn run(model: Option<&str>, options: &Options, mut on_progress: impl FnMut(&str)) -> Result<Report> {
    on_progress("reading the model");
    let checkpoint = Checkpoint::open(model::files(model, options.llm.offline)?)?;
    let engine = fit(&checkpoint, options)?;
    let plan = MemoryPlan::new(&checkpoint, &engine, None)?;
    check_cache(&plan, &engine, options)?;
    on_progress("loading the model");
    forget_peak_memory();
    let start = Instant::now();
    let mut runner = Runner::open(&checkpoint, &options.llm.device, &engine, false)?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let device = runner.device();
    let mut peak = peak_memory();
    let (mut machine, mut cases) = (Vec::new(), Vec::new());
    for case in &options.cases {
        on_progress(&format!("{case}: warming up"));
        runner.run(case)?;
        let run = |i| {
            on_progress(&format!("{case}: {} of {}", i + 1, options.repeat));
            machine.push(quaver_backends::peaks(&options.llm.device)?);
            // Without the buffers that the machine was measured with.
            forget_peak_memory();
            let run = runner.run(case);
            peak = peak.zip(peak_memory()).map(|(most, now)| most.max(now));
            run
        };
        let runs = (0..options.repeat).map(run).collect::<Result<Vec<Run>>>()?;
        cases.push(CaseRuns { case: *case, runs, timed: Vec::new() });
    }
    let device_memory = quaver_backends::memory_in_use(&options.llm.device)?;
    drop(runner);
    machine.push(quaver_backends::peaks(&options.llm.device)?);
    let machine = Machine::new(&machine);
    if options.per_op {
        let mut runner = Runner::open(&checkpoint, &options.llm.device, &engine, true)?;
        for case in &mut cases {
            on_progress(&format!("{}: op by op", case.case));
            runner.run(&case.case)?;
            case.timed = (0..options.repeat).map(|_| runner.run(&case.case)).collect::<Result<_>>()?;
        }
    }
    let memory = Memory { weights: plan.weights as u64, kv_cache: plan.kv_cache as u64, peak, device: device_memory };
    let cases = cases.into_iter().map(|case| case.report(&machine)).collect();
    Ok(Report {
        model: checkpoint.files().name(),
        scheme: report::scheme(&checkpoint, &engine, plan.kv_dtype),
        device,
        machine,
        load_ms,
        memory,
        cases,
    })
}

/// The engine's options for the largest case.
fn fit(checkpoint: &Checkpoint, options: &Options) -> Result<EngineOptions> {
    let engine = &options.llm.engine;
    let sequences = options.cases.iter().map(|case| case.batch).max().unwrap_or(1);
    let rows = engine.max_num_batched_tokens.max(sequences);
    let context = engine.max_model_len.unwrap_or(checkpoint.config().max_positions);
    let mut longest = 1;
    for case in &options.cases {
        // Steps are counted only where they are few.
        let alone = case.prompt_tokens + 1 + case.gen_tokens;
        let tokens = if alone > context { alone } else { case.tokens(rows) };
        if tokens > context {
            let why = format!(
                "with {} generated ones a sequence comes to {tokens}, the context holds {context}; \
                 lower --prompt-tokens or --gen-tokens",
                case.gen_tokens
            );
            return Err(Error::text(format!("prompts of {} tokens", case.prompt_tokens), why));
        }
        longest = longest.max(tokens);
    }
    let max_model_len = Some(engine.max_model_len.unwrap_or(longest));
    Ok(EngineOptions {
        max_model_len,
        max_num_seqs: sequences,
        max_num_batched_tokens: rows,
        // Every run reads the same prompts.
        prefix_caching: false,
        ..engine.clone()
    })
}

/// An error unless the KV cache holds all sequences of every case side by side.
fn check_cache(plan: &MemoryPlan, engine: &EngineOptions, options: &Options) -> Result<()> {
    for case in &options.cases {
        let tokens = case.tokens(engine.max_num_batched_tokens);
        let pages = case.batch * tokens.div_ceil(plan.sizes.page_tokens);
        if pages > plan.sizes.pages {
            return Err(Error::OutOfMemory {
                what: format!("the KV cache of {} sequences of {tokens} tokens", case.batch),
                need: (pages * plan.sizes.page_tokens * plan.kv_bytes_a_token()) as u64,
                have: engine.kv_cache_memory,
                remedy: "raise --kv-cache-memory or lower --batch",
            });
        }
    }
    Ok(())
}

/// Begins anew with what [`peak_memory`] gives, where the system can; where it cannot, that is too much.
fn forget_peak_memory() {
    // 5 resets VmHWM to what is held now (proc_pid_clear_refs(5)).
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        log::warn!("the peak memory includes what the machine was measured with: {error}");
    }
}

/// Bytes of memory that this process has held at most, pages of mapped files among them; None where the system does not
/// say.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
