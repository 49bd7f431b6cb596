//! The Llama architecture: what `config.json` says of it, its rotary tables, its weights on a backend, and its program.

pub mod config;
mod program;
pub mod rope;
mod weights;

pub use config::LlamaConfig;
pub use program::{Inputs, KvCache, Llama, Outputs, Profile, Sizes};
pub use rope::{Rope, RopeScaling};
