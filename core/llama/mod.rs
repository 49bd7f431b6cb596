//! The Llama architecture: what `config.json` says of it, and its rotary tables.

pub mod config;
pub mod rope;

pub use config::LlamaConfig;
pub use rope::{Rope, RopeScaling};
