//! What a benchmark found: medians, what was counted, and the floors that both are held against.

use std::path::Path;
use std::time::Duration;

use quaver_backends::Peaks;
use quaver_core::checkpoint::{Activations, Checkpoint, WeightStrategy};
use quaver_core::cost::Cost;
use quaver_core::engine::EngineOptions;
use quaver_core::llama::Profile;
use quaver_core::meter::OpTotal;
use quaver_core::op::{DType, DeviceInfo};

use super::case::{Case, Measured, Run};

/// A model on a machine.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its folder as it was given, its Hugging Face id, or `quaver-demo`.
    pub model: String,
    /// How its weights are kept, such as `fp8-channel`, and what differs from the usual profile, KV cache and rows of a
    /// step.
    pub scheme: String,
    /// What it ran on.
    pub device: DeviceInfo,
    /// What that can do at best.
    pub machine: Machine,
    /// Opening the device and loading the weights; their files were read just before.
    pub load_ms: f64,
    /// Bytes of memory.
    pub memory: Memory,
    /// In the order in which they were asked for.
    pub cases: Vec<CaseReport>,
}

/// What figures are of: rows of a file of figures with the same subject can be compared.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The processor, and how many threads of it took part.
    pub machine: String,
    /// What computed.
    pub device: DeviceInfo,
    /// The model without the folders above it, and how it is kept.
    pub model: String,
}

/// What a device can do, measured several times.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Threads of the processor that took part.
    pub threads: usize,
    /// Bytes a second; what counts is the median.
    pub bandwidth: Spread,
    /// Operations a second; what counts is the median.
    pub flops: Spread,
    /// Bytes a second that are read and written where memory is copied; None where that was not measured.
    pub copy: Option<Spread>,
}

impl Machine {
    /// Of at least one measurement.
    pub fn new(measured: &[Peaks]) -> Self {
        let copies: Vec<f64> = measured.iter().filter_map(|peaks| peaks.copy).collect();
        Machine {
            threads: measured[0].threads,
            copy: (!copies.is_empty()).then(|| Spread::new(copies)),
            bandwidth: Spread::new(measured.iter().map(|peaks| peaks.bandwidth)),
            flops: Spread::new(measured.iter().map(|peaks| peaks.flops)),
        }
    }
}

impl Machine {
    /// What it can do, in billions a second.
    pub(super) fn figures(&self) -> Vec<Figure> {
        let peak = |name, unit, Spread { median, min, max }: Spread| {
            let [median, min, max] = [median, min, max].map(|a_second| a_second / 1e9);
            let spread = Some(Spread { median, min, max });
            Figure { case: "machine".into(), name, unit, value: median, spread, phase: None }
        };
        let mut figures = vec![peak("bandwidth", "GB/s", self.bandwidth), peak("arithmetic", "GFLOP/s", self.flops)];
        figures.extend(self.copy.map(|copy| peak("copy", "GB/s", copy)));
        figures
    }
}

/// Bytes of memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// The weights with their scales.
    pub weights: u64,
    /// The KV cache, all of it.
    pub kv_cache: u64,
    /// What the process held at most until the end of the last case; None where the system does not say.
    pub peak: Option<u64>,
    /// Of the device, in use by all that run on it; None where it does not say.
    pub device: Option<u64>,
}

impl Memory {
    /// The peak over what the weights and the cache take.
    pub fn ratio(&self) -> Option<f64> {
        self.peak.map(|peak| peak as f64 / (self.weights + self.kv_cache) as f64)
    }
}

/// One case.
#[derive(Clone, Debug)]
pub struct CaseReport {
    /// What was run.
    pub case: Case,
    /// From the submission of all prompts to the last first token.
    pub prefill: Phase,
    /// The steps in which every sequence got a token.
    pub decode: Phase,
    /// From the submission to a sequence's first token.
    pub ttft_ms: Spread,
}

/// Prefill or decoding.
#[derive(Clone, Debug)]
pub struct Phase {
    /// Of a run.
    pub tokens: usize,
    /// Of a run.
    pub seconds: Spread,
    /// Tokens over seconds.
    pub tokens_per_s: Spread,
    /// What was counted in a run.
    pub cost: Cost,
    /// What the machine needs for that.
    pub floor: Floor,
    /// Op by op, the longest first, in runs of their own; empty unless asked for.
    pub ops: Vec<OpReport>,
}

/// What the runs of an op took in one phase, those of all layers together.
#[derive(Clone, Debug)]
pub struct OpReport {
    /// Op and place, such as `linear mlp.down_proj`.
    pub place: String,
    /// Of all of them in a run: the median of the runs.
    pub seconds: f64,
    /// What was counted in them.
    pub cost: Cost,
    /// What the machine needs for that.
    pub floor: Floor,
}

/// Seconds that the machine needs at least.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    /// For the bytes, at its bandwidth.
    pub bytes: f64,
    /// For the operations, at its rate.
    pub flops: f64,
}

impl Floor {
    pub(super) fn new(cost: Cost, machine: &Machine) -> Self {
        Floor { bytes: cost.bytes as f64 / machine.bandwidth.median, flops: cost.flops as f64 / machine.flops.median }
    }

    /// The greater of the two.
    pub fn seconds(&self) -> f64 {
        self.bytes.max(self.flops)
    }
}

/// Of several runs.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(super) fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (n, last) = (values.len(), values.len() - 1);
        Spread { median: (values[last / 2] + values[n / 2]) / 2.0, min: values[0], max: values[last] }
    }
}

/// What the runs of a case took, before it is known what the machine can do.
pub struct CaseRuns {
    pub case: Case,
    /// At least one.
    pub runs: Vec<Run>,
    /// The runs whose ops were timed.
    pub timed: Vec<Run>,
}

impl CaseRuns {
    pub fn report(self, machine: &Machine) -> CaseReport {
        let phase = |of: fn(&Run) -> &Measured| {
            let runs: Vec<&Measured> = self.runs.iter().map(of).collect();
            // Every run has the same tokens, and so the same cost.
            let (tokens, cost) = (runs[0].tokens, runs[0].totals.cost);
            let seconds = Spread::new(runs.iter().map(|run| run.time.as_secs_f64()));
            let tokens_per_s = Spread::new(runs.iter().map(|run| tokens as f64 / run.time.as_secs_f64()));
            let ops = ops(&self.timed.iter().map(of).collect::<Vec<_>>(), machine);
            Phase { tokens, seconds, tokens_per_s, cost, floor: Floor::new(cost, machine), ops }
        };
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        CaseReport {
            case: self.case,
            prefill: phase(|run| &run.prefill),
            decode: phase(|run| &run.decode),
            ttft_ms: Spread::new(self.runs.iter().flat_map(|run| &run.first_tokens).map(ms)),
        }
    }
}

fn ops(runs: &[&Measured], machine: &Machine) -> Vec<OpReport> {
    let Some(first) = runs.first() else { return Vec::new() };
    let report = |(place, total): (&String, &OpTotal)| OpReport {
        place: place.clone(),
        // Every run has the same ops.
        seconds: Spread::new(runs.iter().map(|run| run.totals.ops[place].time.as_secs_f64())).median,
        cost: total.cost,
        floor: Floor::new(total.cost, machine),
    };
    let mut ops: Vec<OpReport> = first.totals.ops.iter().map(report).collect();
    ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    ops
}

impl Phase {
    /// The floor over the median time: 1 would be all that the machine can do.
    pub fn share_of_floor(&self) -> f64 {
        self.floor.seconds() / self.seconds.median
    }

    /// Bytes a second over the bandwidth.
    pub fn share_of_bandwidth(&self) -> f64 {
        self.floor.bytes / self.seconds.median
    }

    /// Operations a second over the rate.
    pub fn share_of_arithmetic(&self) -> f64 {
        self.floor.flops / self.seconds.median
    }

    /// Bytes over tokens.
    pub fn bytes_per_token(&self) -> f64 {
        self.cost.bytes as f64 / self.tokens as f64
    }
}

/// A number of a report, as it is kept and compared.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What was run, such as `decode b1 p128 g64`; `machine` and `model` where it is of no case.
    pub case: String,
    /// Its name.
    pub name: &'static str,
    /// What it is counted in.
    pub unit: &'static str,
    /// The number: a median where there were several runs.
    pub value: f64,
    /// Of the runs, where there were several.
    pub spread: Option<Spread>,
    /// The phase whose speed it is.
    pub phase: Option<Phase>,
}

impl Report {
    /// All figures, in the order in which they are shown.
    pub fn figures(&self) -> Vec<Figure> {
        let plain = |case: &str, name, unit, value| Figure {
            case: case.to_owned(),
            name,
            unit,
            value,
            spread: None,
            phase: None,
        };
        let mut figures = self.machine.figures();
        figures.extend([
            plain("model", "load", "ms", self.load_ms),
            plain("model", "weights", "bytes", self.memory.weights as f64),
            plain("model", "kv_cache", "bytes", self.memory.kv_cache as f64),
        ]);
        figures.extend(self.memory.peak.map(|peak| plain("model", "peak_memory", "bytes", peak as f64)));
        figures.extend(self.memory.device.map(|bytes| plain("model", "device_memory", "bytes", bytes as f64)));
        for CaseReport { case, prefill, decode, ttft_ms } in &self.cases {
            let speed = |name: &str, phase: &Phase| Figure {
                spread: Some(phase.tokens_per_s),
                phase: Some(phase.clone()),
                ..plain(name, "speed", "tokens/s", phase.tokens_per_s.median)
            };
            let (first, then) = (format!("prefill {case}"), format!("decode {case} g{}", case.gen_tokens));
            figures.push(speed(&first, prefill));
            figures.push(Figure { spread: Some(*ttft_ms), ..plain(&first, "first_token", "ms", ttft_ms.median) });
            figures.push(speed(&then, decode));
            figures.push(plain(&then, "read", "bytes/token", decode.bytes_per_token()));
        }
        figures
    }

    /// What the figures are of.
    pub fn subject(&self) -> Subject {
        let machine = quaver_backends::cpu::name(self.machine.threads);
        Subject { machine, device: self.device.clone(), model: self.short_model() }
    }

    /// The model without the folders above it, and how it is kept.
    fn short_model(&self) -> String {
        let path = Path::new(&self.model);
        let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        format!("{} {}", name.unwrap_or_else(|| self.model.clone()), self.scheme)
    }
}

/// How a model is kept: `fp8`, `fp8-channel`, `fp8-dynamic` as `quaver synth` names them, or the dtype of its tensors;
/// behind it a profile, a KV cache and rows of a step other than the usual ones.
pub fn scheme(checkpoint: &Checkpoint, engine: &EngineOptions, kv: DType) -> String {
    let linear = checkpoint.quantization().and_then(|q| q.targets().find_map(|(_, scheme)| scheme));
    let mut name = match linear.map(|linear| (linear.weights, linear.activations)) {
        None => checkpoint.tensors().next().map(|tensor| tensor.dtype.to_string().to_lowercase()).unwrap_or_default(),
        Some((WeightStrategy::Tensor, Activations::Static)) => "fp8".into(),
        Some((WeightStrategy::Channel, Activations::Static)) => "fp8-channel".into(),
        Some((WeightStrategy::Channel, Activations::Dynamic)) => "fp8-dynamic".into(),
        Some((WeightStrategy::Tensor, Activations::Dynamic)) => "fp8-tensor-dynamic".into(),
        Some((WeightStrategy::Tensor, Activations::None)) => "fp8-tensor-weights".into(),
        Some((WeightStrategy::Channel, Activations::None)) => "fp8-channel-weights".into(),
    };
    if engine.profile == Profile::Exact {
        name += " exact";
    }
    if kv == DType::E4m3 {
        name += " kv-fp8";
    }
    if engine.max_num_batched_tokens != EngineOptions::default().max_num_batched_tokens {
        name += &format!(" r{}", engine.max_num_batched_tokens);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_run_or_the_mean_of_the_middle_two() {
        let of = |values: &[f64]| {
            let Spread { median, min, max } = Spread::new(values.iter().copied());
            [median, min, max]
        };
        assert_eq!(of(&[7.0]), [7.0; 3]);
        assert_eq!(of(&[9.0, 1.0, 2.0]), [2.0, 1.0, 9.0]);
        assert_eq!(of(&[4.0, 1.0, 2.0, 9.0]), [3.0, 1.0, 9.0]);
    }

    #[test]
    fn a_floor_is_whichever_of_memory_and_arithmetic_takes_longer() {
        let peaks = |bandwidth, flops| Peaks { threads: 1, bandwidth, flops, copy: None };
        let machine = Machine::new(&[peaks(12.0, 90.0), peaks(9.0, 100.0), peaks(10.0, 110.0)]);
        assert_eq!(Floor::new(Cost { bytes: 20, flops: 100 }, &machine).seconds(), 2.0);
        assert_eq!(Floor::new(Cost { bytes: 20, flops: 300 }, &machine).seconds(), 3.0);
    }
}
