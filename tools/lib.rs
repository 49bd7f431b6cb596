//! Quaver's in-process API.

pub mod parity;
pub mod text;
