//! Load on a server of OpenAI's API: many streamed completions at a rate, or so many at a time; when their tokens came.
//! At a rate the clock of a request runs from when it was due, whatever the server does: one that is slow cannot make its
//! clients ask less.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
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
    /// Requests at a time, at most; None for as many as are due.
    pub concurrency: Option<usize>,
    /// Requests a second, at random times; None for the next one as soon as one is over.
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
    /// Tokens of all prompts that were answered; None where the server does not tell.
    pub prompt_tokens: Option<u64>,
    /// Tokens of all answers: what the server tells, or where it does not, the pieces that came.
    pub completion_tokens: u64,
    /// Whether the server told them for every answer.
    pub counted: bool,
    /// From when a request was due to its first token.
    pub ttft_ms: Percentiles,
    /// Between two tokens of an answer, over all of them. Those that came in one piece share the time since the last.
    pub inter_token_ms: Percentiles,
    /// The mean time between two tokens of an answer, over the answers.
    pub per_token_ms: Percentiles,
    /// From when a request was due to its last token.
    pub e2e_ms: Percentiles,
    /// Tokens of the prompt a second to the first token, the median of the answers; None where the server does not tell.
    pub prefill_tokens_per_s: Option<f64>,
}

impl Outcome {
    /// Tokens of answers a second, over all of them.
    pub fn tokens_per_s(&self) -> f64 {
        self.completion_tokens as f64 / self.wall_s
    }

    /// Tokens a second behind the first one of an answer, the median of the answers.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        (self.per_token_ms.p50 > 0.0).then(|| 1e3 / self.per_token_ms.p50)
    }
}

/// One answer.
struct Answer {
    ttft: Duration,
    /// Between two tokens.
    between: Vec<Duration>,
    e2e: Duration,
    prompt_tokens: Option<u64>,
    completion_tokens: u64,
    counted: bool,
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
    let (turns, over, results) = (Turns::new(load.concurrency), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let start = Instant::now();
    thread::scope(|scope| {
        for (i, at) in starts(load).into_iter().enumerate() {
            thread::sleep(at.saturating_sub(start.elapsed()));
            turns.take();
            // At a rate the time that it waited for its turn is its own.
            let due = if load.rate.is_some() { start + at } else { Instant::now() };
            let (agent, model, turns, over, results, on_answer) = (&agent, &model, &turns, &over, &results, &on_answer);
            scope.spawn(move || {
                let result = ask(agent, load, model, i, due);
                turns.give_back();
                results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                on_answer(over.fetch_add(1, Ordering::Relaxed) + 1);
            });
        }
    });
    let wall_s = start.elapsed().as_secs_f64();
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(answer) => answers.push(answer),
            Err(why) if !failures.contains(&why) => failures.push(why),
            Err(_) => {}
        }
    }
    Ok(outcome(model, &answers, failures, wall_s))
}

fn outcome(model: String, answers: &[Answer], failures: Vec<String>, wall_s: f64) -> Outcome {
    let prefill = |answer: &Answer| Some(answer.prompt_tokens? as f64 / answer.ttft.as_secs_f64());
    let mut prefill: Vec<f64> = answers.iter().filter_map(prefill).collect();
    prefill.sort_by(f64::total_cmp);
    let per_token = |answer: &Answer| answer.between.iter().sum::<Duration>().checked_div(answer.between.len() as u32);
    Outcome {
        model,
        answered: answers.len(),
        failures,
        wall_s,
        prompt_tokens: answers.iter().map(|answer| answer.prompt_tokens).sum(),
        completion_tokens: answers.iter().map(|answer| answer.completion_tokens).sum(),
        counted: answers.iter().all(|answer| answer.counted),
        ttft_ms: percentiles(answers.iter().map(|answer| answer.ttft)),
        inter_token_ms: percentiles(answers.iter().flat_map(|answer| answer.between.iter().copied())),
        per_token_ms: percentiles(answers.iter().filter_map(per_token)),
        e2e_ms: percentiles(answers.iter().map(|answer| answer.e2e)),
        prefill_tokens_per_s: prefill.get(prefill.len() / 2).copied(),
    }
}

/// Turns of requests, as many as may be under way.
struct Turns {
    left: Mutex<usize>,
    freed: Condvar,
}

impl Turns {
    fn new(most: Option<usize>) -> Self {
        Turns { left: Mutex::new(most.unwrap_or(usize::MAX)), freed: Condvar::new() }
    }

    /// Waits until there is one.
    fn take(&self) {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *self.freed.wait_while(left, |left| *left == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
    }

    fn give_back(&self) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.freed.notify_one();
    }
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

fn ask(agent: &ureq::Agent, load: &Load, model: &str, i: usize, due: Instant) -> Result<Answer, String> {
    let body = json!({
        "model": model, "prompt": prompt(load, i), "max_tokens": load.max_tokens, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "temperature": 0
    });
    let request = agent.post(format!("{}/v1/completions", load.url)).header("content-type", "application/json");
    let mut response = authorized(load, request).send(body.to_string()).map_err(|e| e.to_string())?;
    if response.status() != 200 {
        let text = response.body_mut().read_to_string().unwrap_or_default();
        return Err(format!("status {}: {text}", response.status()));
    }
    let mut pieces = Pieces::default();
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line.map_err(|e| e.to_string())?;
        let Some(data) = line.strip_prefix("data:").map(str::trim).filter(|data| *data != "[DONE]") else { continue };
        pieces.take(&serde_json::from_str(data).map_err(|e| e.to_string())?, Instant::now())?;
    }
    pieces.answer(due)
}

/// The pieces of an answer as they come.
#[derive(Default)]
struct Pieces {
    /// When each came, and how many tokens there were by then, where the server told.
    came: Vec<(Instant, Option<u64>)>,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

impl Pieces {
    fn take(&mut self, chunk: &Value, now: Instant) -> Result<(), String> {
        if chunk["error"].is_object() {
            return Err(chunk["error"]["message"].to_string());
        }
        let count = |key: &str| chunk["usage"][key].as_u64();
        let so_far = count("completion_tokens");
        self.prompt_tokens = count("prompt_tokens").or(self.prompt_tokens);
        self.completion_tokens = so_far.or(self.completion_tokens);
        if chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
            self.came.push((now, so_far));
        }
        Ok(())
    }

    fn answer(self, due: Instant) -> Result<Answer, String> {
        let (Some(&(first, _)), Some(&(last, _))) = (self.came.first(), self.came.last()) else {
            return Err("the answer has no text".into());
        };
        let completion_tokens = self.completion_tokens.unwrap_or(self.came.len() as u64);
        Ok(Answer {
            ttft: first - due,
            between: self.between(completion_tokens),
            e2e: last - due,
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            counted: self.completion_tokens.is_some(),
        })
    }

    /// The times between tokens: those of one piece share the time since the piece before it. Where the server told the
    /// sum alone, every piece has as many of it.
    fn between(&self, completion_tokens: u64) -> Vec<Duration> {
        let gaps = self.came.len().saturating_sub(1);
        let gap = |i: usize| self.came[i + 1].0 - self.came[i].0;
        let told = |i: usize| Some(self.came[i + 1].1?.saturating_sub(self.came[i].1?).max(1));
        let told: Option<Vec<u64>> = (0..gaps).map(told).collect();
        match told {
            Some(tokens) => {
                let shared = |(i, n): (usize, u64)| std::iter::repeat_n(gap(i).div_f64(n as f64), n as usize);
                tokens.into_iter().enumerate().flat_map(shared).collect()
            }
            None => {
                let each = completion_tokens.saturating_sub(1).max(1) as f64 / gaps.max(1) as f64;
                (0..gaps).map(|i| gap(i).div_f64(each)).collect()
            }
        }
    }
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
    fn tokens_of_one_piece_share_its_time_and_a_server_that_tells_nothing_is_counted_by_pieces() {
        let due = Instant::now();
        let after = |ms| Duration::from_millis(ms);
        let answer = |chunks: &[(u64, &str, Option<u64>)]| {
            let mut pieces = Pieces::default();
            for (ms, text, tokens) in chunks {
                let usage = tokens.map(|n| json!({"prompt_tokens": 7, "completion_tokens": n}));
                let chunk = json!({"choices": [{"text": text}], "usage": usage});
                pieces.take(&chunk, due + after(*ms)).unwrap();
            }
            pieces.answer(due).unwrap()
        };
        // Told with every piece: the second has three tokens.
        let told = answer(&[(50, "a", Some(1)), (80, "bcd", Some(4)), (90, "e", Some(5))]);
        assert_eq!(told.between, [10, 10, 10, 10].map(after));
        assert_eq!(
            (told.ttft, told.e2e, told.prompt_tokens, told.completion_tokens),
            (after(50), after(90), Some(7), 5)
        );
        // Told at the end: two pieces behind the first have four tokens.
        let last = answer(&[(50, "a", None), (70, "b", None), (90, "c", None), (91, "", Some(5))]);
        assert_eq!((last.between, last.completion_tokens, last.counted), ([10, 10].map(after).to_vec(), 5, true));
        // Not told at all.
        let none = answer(&[(50, "a", None), (70, "b", None)]);
        assert_eq!((none.between, none.prompt_tokens), (vec![after(20)], None));
        assert_eq!((none.completion_tokens, none.counted), (2, false));
    }

    #[test]
    fn a_rate_is_kept_on_average_and_a_seed_gives_the_same_run_again() {
        let load = |rate, seed| Load {
            url: String::new(),
            model: None,
            api_key: None,
            requests: 4000,
            concurrency: Some(1),
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
