//! The fields that chat and text completions share, in the names of OpenAI's API and of vLLM's extensions. A field that
//! is absent or null takes the model's default; one that is unknown is ignored.

use std::collections::BTreeMap;

use quaver_core::sampler::SamplingParams;
use serde::Deserialize;
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use crate::text::StopStrings;

/// Choices of one prompt, at most; OpenAI's limit.
pub const MAX_N: usize = 128;

/// Stop strings of a request, and bytes of each, at most: each is held against each byte of the answer. OpenAI takes four.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1 << 10;

/// How to choose tokens, and when to stop.
#[derive(Debug, Default, Deserialize)]
pub struct Sampling {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    logit_bias: Option<BTreeMap<String, f32>>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    min_tokens: Option<usize>,
    ignore_eos: Option<bool>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    n: Option<usize>,
    best_of: Option<usize>,
    use_beam_search: Option<bool>,
    prompt_logprobs: Option<i64>,
    #[serde(flatten)]
    unsupported: Unsupported,
}

/// What vLLM knows and this server does not: asked for, it is refused, because an answer without it would be wrong.
#[derive(Debug, Default, Deserialize)]
struct Unsupported {
    bad_words: Option<Value>,
    allowed_token_ids: Option<Value>,
    truncate_prompt_tokens: Option<Value>,
    logits_processors: Option<Value>,
    return_token_ids: Option<Value>,
    return_tokens_as_token_ids: Option<Value>,
    prompt_embeds: Option<Value>,
}

impl Unsupported {
    fn check(&self) -> ApiResult<()> {
        refuse("bad_words", self.bad_words.as_ref())?;
        refuse("allowed_token_ids", self.allowed_token_ids.as_ref())?;
        refuse("truncate_prompt_tokens", self.truncate_prompt_tokens.as_ref())?;
        refuse("logits_processors", self.logits_processors.as_ref())?;
        refuse("return_token_ids", self.return_token_ids.as_ref())?;
        refuse("return_tokens_as_token_ids", self.return_tokens_as_token_ids.as_ref())?;
        refuse("prompt_embeds", self.prompt_embeds.as_ref())
    }
}

/// Refuses a field that asks for what there is not; null, false and an empty list ask for nothing.
pub fn refuse(name: &str, value: Option<&Value>) -> ApiResult<()> {
    let asks = match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if asks { Err(ApiError::invalid(name, format!("{name} is not supported; leave it out"))) } else { Ok(()) }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// How the tokens of an answer become its text.
#[derive(Clone, Debug)]
pub struct Writing {
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// The one that did is part of it.
    pub include_stop: bool,
    /// Special tokens are left out.
    pub skip_special: bool,
}

impl Sampling {
    /// The engine's parameters over the model's defaults; `logprobs` is spelt differently by each API.
    pub fn params(
        &self,
        defaults: SamplingParams,
        max_tokens: usize,
        logprobs: Option<usize>,
    ) -> ApiResult<SamplingParams> {
        self.unsupported.check()?;
        if self.use_beam_search == Some(true) {
            return Err(ApiError::invalid(
                "use_beam_search",
                "beam search is not supported; leave use_beam_search out",
            ));
        }
        let top_k = match self.top_k {
            None => defaults.top_k,
            // vLLM's word for all.
            Some(-1) => 0,
            Some(k) => u32::try_from(k)
                .map_err(|_| ApiError::invalid("top_k", format!("top_k is {k}; give 1 or more, or -1 for all")))?,
        };
        let prompt_logprobs =
            match self.prompt_logprobs {
                None => None,
                Some(n) => Some(usize::try_from(n).map_err(|_| {
                    ApiError::invalid("prompt_logprobs", format!("prompt_logprobs is {n}; give 0 to 20"))
                })?),
            };
        let mut logit_bias = BTreeMap::new();
        for (id, bias) in self.logit_bias.iter().flatten() {
            let id = id
                .parse()
                .map_err(|_| ApiError::invalid("logit_bias", format!("logit_bias: {id:?} is no token id")))?;
            if logit_bias.insert(id, *bias).is_some() {
                return Err(ApiError::invalid(
                    "logit_bias",
                    format!("logit_bias names token {id} twice; name it once"),
                ));
            }
        }
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k,
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed.map(|seed| seed as u64),
            logit_bias: logit_bias.into_iter().collect(),
            max_tokens: self.max_completion_tokens.or(self.max_tokens).unwrap_or(max_tokens),
            min_tokens: self.min_tokens.unwrap_or(0),
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logprobs,
            prompt_logprobs,
        };
        params.validate()?;
        Ok(params)
    }

    /// True where the request itself wants the prompt's scores; `echo` may want them too.
    pub fn asks_for_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// How many answers each prompt gets.
    pub fn n(&self) -> ApiResult<usize> {
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_N).contains(&n) {
            return Err(ApiError::invalid("n", format!("n is {n}; give 1 to {MAX_N}")));
        }
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::invalid("best_of", "best_of is not supported; ask for n answers and choose"));
        }
        Ok(n)
    }

    /// How tokens become text.
    pub fn writing(&self) -> ApiResult<Writing> {
        let stop = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        };
        if stop.len() > MAX_STOPS {
            return Err(ApiError::invalid(
                "stop",
                format!("{} stop strings are given, at most {MAX_STOPS} may be", stop.len()),
            ));
        }
        if let Some(long) = stop.iter().find(|stop| stop.len() > MAX_STOP_BYTES) {
            let why = format!("a stop string has {} bytes, at most {MAX_STOP_BYTES} may be", long.len());
            return Err(ApiError::invalid("stop", why));
        }
        StopStrings::new(&stop).map_err(|error| ApiError::invalid("stop", error.to_string()))?;
        Ok(Writing {
            stop,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special: self.skip_special_tokens.unwrap_or(true),
        })
    }
}

/// Whether and how an answer is streamed.
#[derive(Debug, Default, Deserialize)]
pub struct Streaming {
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

impl Streaming {
    /// True where the answer is streamed.
    pub fn is_on(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Where the tokens are reported: (in a last chunk, in every chunk).
    pub fn usage(&self) -> (bool, bool) {
        let Some(options) = &self.stream_options else { return (false, false) };
        let last = options.include_usage.unwrap_or(false);
        (last, last && options.continuous_usage_stats.unwrap_or(false))
    }
}

/// Refuses what a client may not bring, by name: a template runs on this machine.
pub fn refuse_template(template: Option<&Value>) -> ApiResult<()> {
    match template {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(ApiError::invalid(
            "chat_template",
            "chat_template is not supported in a request; the model's own is used",
        )),
    }
}
