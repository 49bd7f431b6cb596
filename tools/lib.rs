//! Quaver.

pub mod parity;
