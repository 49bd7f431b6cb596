//! What answers: a loaded model, its engine in a thread, and its names.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::ParserFactory;
use quaver_core::engine::{Engine, PAGE_TOKENS};
use quaver_core::op::DeviceInfo;
use quaver_core::service::Service;

use super::app::unix_time;
use super::error::{ApiError, ApiResult};
use super::metrics::Metrics;
use super::structure::parser_factory;
use crate::text_model::TextModel;
use crate::{Error, Llm, LlmOptions, Result};

/// See the module.
pub struct Model {
    /// Its engine.
    pub service: Service,
    /// Its text.
    pub text: TextModel,
    /// What it runs on.
    pub device: DeviceInfo,
    /// What clients may call it; the first is what it calls itself.
    pub names: Vec<String>,
    /// What is counted.
    pub metrics: Metrics,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// The vocabulary as grammars want it, once one came.
    parsers: Mutex<Option<Arc<ParserFactory>>>,
    /// Contents of `tokenizer_config.json`, for clients that tokenize themselves.
    pub tokenizer_config: serde_json::Value,
}

impl Model {
    /// Loads a model. `names` are what clients may call it; none for its own name. At most `most` requests may be under
    /// way.
    pub fn load(model: Option<&str>, options: &LlmOptions, names: &[String], most: usize) -> Result<Self> {
        let files = crate::files(model, options.offline)?;
        let tokenizer_config = match files.get("tokenizer_config.json")? {
            Some(json) => serde_json::from_slice(&json).unwrap_or_default(),
            None => serde_json::Value::Null,
        };
        let llm = Llm::with_options(model, options)?;
        let device = llm.device();
        let (engine, text) = llm.into_parts();
        let names = if names.is_empty() { vec![text.name().to_owned()] } else { names.to_vec() };
        check_memory(&engine, &device)?;
        let (weights, kv_cache) = engine.memory();
        log::info!(
            "{} on {}: {} MiB of weights, {} MiB of KV cache for {} tokens, contexts of {} tokens, {} sequences at a time",
            names[0],
            device.name,
            weights >> 20,
            kv_cache >> 20,
            engine.pages().1 * PAGE_TOKENS,
            engine.max_model_len(),
            options.engine.max_num_seqs
        );
        let service = Service::start(engine, most);
        Ok(Model {
            service,
            text,
            device,
            names,
            metrics: Metrics::new(),
            created: unix_time(),
            parsers: Mutex::default(),
            tokenizer_config,
        })
    }

    /// What compiles grammars; made when it is needed first, which takes a moment.
    pub fn parsers(&self) -> Result<Arc<ParserFactory>> {
        let mut parsers = self.parsers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parsers) = &*parsers {
            return Ok(Arc::clone(parsers));
        }
        Ok(Arc::clone(parsers.insert(Arc::new(parser_factory(self)?))))
    }

    /// Refuses a model that a client names and that this is not.
    pub fn check_name(&self, name: Option<&str>) -> ApiResult<()> {
        match name {
            Some(name) if !self.names.iter().any(|have| have == name) => Err(ApiError::no_model(name)),
            _ => Ok(()),
        }
    }
}

/// An error where the weights and the KV cache, filled, are more than the device has: memory that is promised and not
/// there would end the server in the middle of its work.
fn check_memory(engine: &Engine, device: &DeviceInfo) -> Result<()> {
    let (weights, kv_cache) = engine.memory();
    match device.memory {
        Some(have) if weights + kv_cache > have => Err(Error::OutOfMemory {
            what: format!("{} MiB of weights and {} MiB of KV cache", weights >> 20, kv_cache >> 20),
            need: weights + kv_cache,
            have,
            remedy: "lower --kv-cache-memory, --max-model-len or --max-num-seqs",
        }),
        _ => Ok(()),
    }
}
