//! What the integration tests share: the fixture checkpoints, Hugging Face's goldens, and a model to run them on.
#![allow(dead_code, reason = "every test file uses its own part")]

pub mod checkpoints;
pub mod goldens;
pub mod mutate;
pub mod queued;
pub mod runner;
pub mod ties;
pub mod tiny;
