//! Quaver.

pub mod text;
