//! Figures in Prometheus' text format, under vLLM's names, so that what scrapes vLLM reads them as they are. What vLLM
//! has no name for begins with `quaver:`.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quaver_core::engine::Stats;

/// vLLM's bounds of its histograms, so that dashboards may add them up.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// At a stop string or token, or an end-of-text token.
    Stop,
    /// At as many tokens as were asked for.
    Length,
    /// The client went away.
    Abort,
    /// It failed.
    Error,
}

/// A count of observations below each of some bounds.
pub struct Histogram {
    name: &'static str,
    help: &'static str,
    bounds: &'static [f64],
    /// Those above the bound before and not above this one; the last has no bound.
    counts: Vec<AtomicU64>,
    /// In millionths: seconds or tokens.
    sum: AtomicU64,
}

impl Histogram {
    fn new(name: &'static str, help: &'static str, bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { name, help, bounds, counts, sum: AtomicU64::new(0) }
    }

    /// Adds a time.
    pub fn observe(&self, time: Duration) {
        self.add(time.as_secs_f64());
    }

    /// Adds a number.
    pub fn observe_count(&self, count: usize) {
        self.add(count as f64);
    }

    fn add(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut Exposition) {
        self.write_as(self.name, out);
    }

    fn write_as(&self, name: &str, out: &mut Exposition) {
        out.head(name, self.help, "histogram");
        let mut below = 0;
        let bounds = self.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (count, bound) in self.counts.iter().zip(bounds) {
            below += count.load(Ordering::Relaxed);
            out.sample(&format!("{name}_bucket"), &format!(",le=\"{bound}\""), below as f64);
        }
        out.sample(&format!("{name}_sum"), "", self.sum.load(Ordering::Relaxed) as f64 / 1e6);
        out.sample(&format!("{name}_count"), "", below as f64);
    }
}

macro_rules! histograms {
    ($($field:ident: $name:literal, $bounds:ident, $help:literal;)*) => {
        /// All that is counted outside of the engine.
        pub struct Metrics {
            endings: [AtomicU64; 4],
            $(#[doc = $help] pub $field: Histogram,)*
        }

        impl Metrics {
            /// Nothing counted.
            pub fn new() -> Self {
                Metrics {
                    endings: Default::default(),
                    $($field: Histogram::new(concat!("vllm:", $name), $help, $bounds),)*
                }
            }

            fn histograms(&self) -> impl Iterator<Item = &Histogram> {
                [$(&self.$field),*].into_iter()
            }
        }
    };
}

histograms! {
    time_to_first_token: "time_to_first_token_seconds", FIRST_TOKEN, "Time to first token in seconds.";
    inter_token_latency: "inter_token_latency_seconds", PER_TOKEN, "Time between two tokens of an answer in seconds.";
    request_time_per_output_token: "request_time_per_output_token_seconds", PER_TOKEN,
        "Mean time of a token behind the first, an answer, in seconds.";
    e2e_request_latency: "e2e_request_latency_seconds", REQUEST, "Time of a request in seconds.";
    request_queue_time: "request_queue_time_seconds", REQUEST, "Time that a request waited in seconds.";
    request_inference_time: "request_inference_time_seconds", REQUEST, "Time that a request ran in seconds.";
    request_prefill_time: "request_prefill_time_seconds", REQUEST, "Time that its prompt took in seconds.";
    request_decode_time: "request_decode_time_seconds", REQUEST, "Time that its answer took in seconds.";
    request_prompt_tokens: "request_prompt_tokens", TOKENS, "Tokens of a prompt.";
    request_generation_tokens: "request_generation_tokens", TOKENS, "Tokens of an answer.";
    request_params_n: "request_params_n", CHOICES, "The parameter n of a request.";
    request_params_max_tokens: "request_params_max_tokens", TOKENS, "The parameter max_tokens of a request.";
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Counts the end of an answer.
    pub fn ended(&self, ending: Ending) {
        self.endings[ending as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self, model: &str, stats: &Stats, page_tokens: usize) -> String {
        let mut out = Exposition::new(model);
        let share = stats.pages_used as f64 / stats.pages.max(1) as f64;
        out.one("vllm:num_requests_running", "Sequences that run.", "gauge", stats.running as f64);
        out.one("vllm:num_requests_waiting", "Sequences that wait.", "gauge", stats.waiting as f64);
        out.one("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 for all.", "gauge", share);
        out.one("vllm:gpu_cache_usage_perc", "The same under its older name.", "gauge", share);
        out.one("quaver:kv_pages_used", "Pages of the KV cache that sequences hold.", "gauge", stats.pages_used as f64);
        let help = "Tokens of prompts that were looked for in the cache.";
        out.one("vllm:prefix_cache_queries_total", help, "counter", stats.prefix_queries as f64);
        out.one("vllm:prefix_cache_hits_total", "Those that were there.", "counter", stats.prefix_hits as f64);
        let help = "Sequences that gave up their pages, to be computed again.";
        out.one("vllm:num_preemptions_total", help, "counter", stats.preemptions as f64);
        out.one("vllm:prompt_tokens_total", "Tokens of prompts.", "counter", stats.prompt_tokens as f64);
        out.one("vllm:generation_tokens_total", "Tokens of answers.", "counter", stats.generation_tokens as f64);
        out.one("quaver:steps_total", "Steps of the engine.", "counter", stats.steps as f64);
        out.one("quaver:rows_total", "Rows of all steps.", "counter", stats.rows as f64);
        out.head("vllm:request_success_total", "Answers by how they ended.", "counter");
        for (reason, count) in ["stop", "length", "abort", "error"].iter().zip(&self.endings) {
            let label = format!(",finished_reason=\"{reason}\"");
            out.sample("vllm:request_success_total", &label, count.load(Ordering::Relaxed) as f64);
        }
        out.head("vllm:cache_config_info", "How the KV cache is laid out.", "gauge");
        let label = format!(",block_size=\"{page_tokens}\",num_gpu_blocks=\"{}\"", stats.pages);
        out.sample("vllm:cache_config_info", &label, 1.0);
        self.histograms().for_each(|histogram| histogram.write(&mut out));
        // vLLM's older name.
        self.inter_token_latency.write_as("vllm:time_per_output_token_seconds", &mut out);
        out.text
    }
}

/// The text under way.
struct Exposition {
    text: String,
    /// `model_name="...",engine="0"`.
    model: String,
}

impl Exposition {
    fn new(model: &str) -> Self {
        let model = model.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
        Exposition { text: String::new(), model: format!("model_name=\"{model}\",engine=\"0\"") }
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.text, "{name}{{{}{labels}}} {value}", self.model);
    }

    fn one(&mut self, name: &str, help: &str, kind: &str, value: f64) {
        self.head(name, help, kind);
        self.sample(name, "", value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_has_its_engine_and_a_time_per_token_both_its_names() {
        let metrics = Metrics::new();
        metrics.inter_token_latency.observe(Duration::from_millis(20));
        let text = metrics.render("a\"b", &Stats::default(), 16);
        let mut series = text.lines().filter(|line| !line.starts_with('#'));
        assert!(series.all(|line| line.contains(r#"{model_name="a\"b",engine="0""#)), "{text}");
        for name in ["inter_token_latency", "time_per_output_token"] {
            assert!(
                text.contains(&format!(r#"vllm:{name}_seconds_bucket{{model_name="a\"b",engine="0",le="0.025"}} 1"#))
            );
        }
    }
}
