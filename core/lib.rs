//! Quaver's runtime without a GPU: what a model and a backend say to each other ([`op`]), what each op computes
//! ([`reference`](mod@reference)), checkpoints, Llama, KV pages, the scheduler, the sampler, the engine, and the quantizer. It speaks
//! of token ids; text belongs to the root package.

pub mod batch;
pub mod bytes;
pub mod checkpoint;
pub mod cost;
pub mod e4m3;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod guide;
pub mod host;
pub mod kv;
pub mod llama;
pub mod meter;
pub mod op;
pub mod philox;
pub mod plan;
mod program;
pub mod quantize;
pub mod reference;
pub mod sampler;
pub mod scheduler;
pub mod service;

pub use error::{Error, Result};
