//! Load on a server of OpenAI's API: many streamed completions at a rate, or so many at a time; when their tokens came.

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use quaver_core::philox::philox;
use quaver_core::{Error, Result};
use serde_json::{Value, json};

/// What to ask of a server.
#[derive(Clone, Debug)]
pub struct Load {
    /// Its address, such as `http://127.0.0.1:8000`.
    pub url: String,
    /// The model's name; None for the first that the server lists.
    pub model: Option<String>,
    /// The key that it wants.
    pub api_key: Option<String>,
    /// Requests in all.
    pub requests: usize,
    /// Requests at a time, at most.
    pub concurrency: usize,
    /// Requests a second, at random times; None for as many as `concurrency` allows.
    pub rate: Option<f64>,
    /// Words of a prompt; about as many tokens.
    pub prompt_words: usize,
    /// Tokens of an answer; it does not end before.
    pub max_tokens: usize,
    /// The prompts and times of a run.
    pub seed: u64,
}

/// Percentiles of some times, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// 90 of 100 are below it.
    pub p90: f64,
    /// 99 of 100 are below it.
    pub p99: f64,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The model's name.
    pub model: String,
    /// Requests that were answered to their end.
    pub answered: usize,
    /// Why others were not; the first of each kind.
    pub failures: Vec<String>,
    /// From the first request to the last token, in seconds.
    pub wall_s: f64,
    /// Tokens of all prompts that were answered.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub completion_tokens: u64,
    /// From a request to its first token.
    pub ttft_ms: Percentiles,
    /// Between two pieces of an answer.
    pub inter_token_ms: Percentiles,
    /// From a request to its last token.
    pub e2e_ms: Percentiles,
}

impl Outcome {
    /// Tokens of answers a second, over all of them.
    pub fn tokens_per_s(&self) -> f64 {
        self.completion_tokens as f64 / self.wall_s
    }
}

/// One answer.
struct Answer {
    ttft: Duration,
    between: Vec<Duration>,
    e2e: Duration,
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// Puts the load on the server; `on_answer` is told how many requests are over.
///
/// # Errors
/// Where the server cannot be asked for its model.
pub fn run(load: &Load, on_answer: impl Fn(usize) + Sync) -> Result<Outcome> {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let model = match &load.model {
        Some(model) => model.clone(),
        None => first_model(&agent, load)?,
    };
    let starts = starts(load);
    let (next, over) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let results = Mutex::new(Vec::new());
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..load.concurrency.min(load.requests) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(at) = starts.get(i) else { return };
                    thread::sleep(at.saturating_sub(start.elapsed()));
                    let result = ask(&agent, load, &model, i);
                    results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(result);
                    on_answer(over.fetch_add(1, Ordering::Relaxed) + 1);
                }
            });
        }
    });
    let wall_s = start.elapsed().as_secs_f64();
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(answer) => answers.push(answer),
            Err(why) if !failures.contains(&why) => failures.push(why),
            Err(_) => {}
        }
    }
    Ok(Outcome {
        model,
        answered: answers.len(),
        failures,
        wall_s,
        prompt_tokens: answers.iter().map(|answer| answer.prompt_tokens).sum(),
        completion_tokens: answers.iter().map(|answer| answer.completion_tokens).sum(),
        ttft_ms: percentiles(answers.iter().map(|answer| answer.ttft)),
        inter_token_ms: percentiles(answers.iter().flat_map(|answer| answer.between.iter().copied())),
        e2e_ms: percentiles(answers.iter().map(|answer| answer.e2e)),
    })
}

fn authorized<B>(load: &Load, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
    match &load.api_key {
        Some(key) => request.header("authorization", format!("Bearer {key}")),
        None => request,
    }
}

fn first_model(agent: &ureq::Agent, load: &Load) -> Result<String> {
    let failed = |why: String| Error::device(&load.url, format!("cannot be asked for its models: {why}"));
    let request = authorized(load, agent.get(format!("{}/v1/models", load.url)));
    let text = request.call().and_then(|mut response| response.body_mut().read_to_string());
    let text = text.map_err(|e| failed(e.to_string()))?;
    let models: Value = serde_json::from_str(&text).map_err(|e| failed(e.to_string()))?;
    let name = models["data"][0]["id"].as_str().ok_or_else(|| failed(text.clone()))?;
    Ok(name.to_owned())
}

/// A number from 0 up to 1 of a request's own.
fn unit(load: &Load, request: usize, i: usize) -> f64 {
    let words = philox([request as u32, i as u32, 0, 0], [load.seed as u32, (load.seed >> 32) as u32]);
    f64::from(words[0]) / (f64::from(u32::MAX) + 1.0)
}

/// When each request begins: the times between are exponentially distributed, as those of many independent clients are.
fn starts(load: &Load) -> Vec<Duration> {
    let mut at = 0.0;
    let between = |i| load.rate.map_or(0.0, |rate| -(1.0 - unit(load, i, usize::MAX)).ln() / rate);
    (0..load.requests)
        .map(|i| {
            at += between(i);
            Duration::from_secs_f64(at)
        })
        .collect()
}

/// Common words, each a token of most vocabularies.
const WORDS: [&str; 16] = [
    "the", "house", "water", "time", "people", "small", "great", "light", "world", "long", "hand", "old", "day",
    "night", "open", "city",
];

fn prompt(load: &Load, request: usize) -> String {
    let word = |i| WORDS[(unit(load, request, i) * WORDS.len() as f64) as usize];
    (0..load.prompt_words).map(word).collect::<Vec<_>>().join(" ")
}

fn ask(agent: &ureq::Agent, load: &Load, model: &str, i: usize) -> Result<Answer, String> {
    let body = json!({
        "model": model, "prompt": prompt(load, i), "max_tokens": load.max_tokens, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "temperature": 0
    });
    let request = agent.post(format!("{}/v1/completions", load.url)).header("content-type", "application/json");
    let start = Instant::now();
    let mut response = authorized(load, request).send(body.to_string()).map_err(|e| e.to_string())?;
    if response.status() != 200 {
        let text = response.body_mut().read_to_string().unwrap_or_default();
        return Err(format!("status {}: {text}", response.status()));
    }
    let (mut first, mut last, mut between, mut usage) = (None, start, Vec::new(), Value::Null);
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line.map_err(|e| e.to_string())?;
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
        let chunk: Value = serde_json::from_str(data).map_err(|e| e.to_string())?;
        if chunk["error"].is_object() {
            return Err(chunk["error"]["message"].to_string());
        }
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
        if chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
            let now = Instant::now();
            match first {
                None => first = Some(now),
                Some(_) => between.push(now - last),
            }
            last = now;
        }
    }
    let ttft = first.ok_or("the answer has no text")? - start;
    let count = |key: &str| usage[key].as_u64().ok_or_else(|| format!("the answer does not tell its {key}"));
    let (prompt_tokens, completion_tokens) = (count("prompt_tokens")?, count("completion_tokens")?);
    Ok(Answer { ttft, between, e2e: last - start, prompt_tokens, completion_tokens })
}

fn percentiles(times: impl Iterator<Item = Duration>) -> Percentiles {
    let mut ms: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
    if ms.is_empty() {
        return Percentiles::default();
    }
    ms.sort_by(f64::total_cmp);
    // The nearest rank.
    let at = |share: f64| ms[((ms.len() as f64 * share).ceil() as usize).clamp(1, ms.len()) - 1];
    Percentiles { mean: ms.iter().sum::<f64>() / ms.len() as f64, p50: at(0.5), p90: at(0.9), p99: at(0.99) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times = (1..=200).rev().map(Duration::from_millis);
        assert_eq!(percentiles(times), Percentiles { mean: 100.5, p50: 100.0, p90: 180.0, p99: 198.0 });
        assert_eq!(percentiles(std::iter::empty()), Percentiles::default());
    }

    #[test]
    fn a_rate_is_kept_on_average_and_a_seed_gives_the_same_run_again() {
        let load = |rate, seed| Load {
            url: String::new(),
            model: None,
            api_key: None,
            requests: 4000,
            concurrency: 1,
            rate,
            prompt_words: 20,
            max_tokens: 1,
            seed,
        };
        let last = starts(&load(Some(50.0), 7))[3999].as_secs_f64();
        assert!((last - 80.0).abs() < 8.0, "{last}");
        assert_eq!(starts(&load(None, 7))[3999], Duration::ZERO);
        assert_eq!(prompt(&load(None, 7), 3), prompt(&load(None, 7), 3));
        assert_ne!(prompt(&load(None, 7), 3), prompt(&load(None, 7), 4));
        assert_ne!(prompt(&load(None, 7), 3), prompt(&load(None, 8), 3));
    }
}
