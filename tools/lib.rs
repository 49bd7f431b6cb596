//! Quaver in a process of your own: the model card's `LLM(...).generate(prompts, sampling_params)` in Rust.
//!
//! ```
//! use quaver::{Llm, SamplingParams};
//!
//! // `Llm::open("path/to/Llama-3.2-1B-Instruct-FP8")?` for a checkpoint on disk or, by its id, on the hub.
//! let mut llm = Llm::demo()?;
//! let params = SamplingParams { temperature: 0.6, top_p: 0.9, max_tokens: 24, seed: Some(1), ..Default::default() };
//! let prompts = ["It was a cold morning in", "The old house stood"];
//! let outputs = llm.generate(&prompts, &params)?;
//! assert_eq!(outputs.len(), 2);
//! # Ok::<(), quaver::Error>(())
//! ```

pub mod bench;
pub mod eval;
mod hub;
pub mod llm;
mod model;
mod model_card;
pub mod parity;
pub mod quantize;
pub mod samples;
pub mod server;
pub mod synth;
pub mod text;
pub mod text_model;

pub use llm::{Completion, Llm, LlmOptions, Progress, Request};
pub use model::files;
pub use quaver_backends as backends;
pub use quaver_core as core;
pub use quaver_core::sampler::SamplingParams;
pub use quaver_core::{Error, Result};
pub use text_model::{Prompt, TextModel};

/// The commit that this was built from: twelve digits, and `-dirty` where the sources differ from it; or `unknown`.
pub const COMMIT: &str = env!("QUAVER_COMMIT");
