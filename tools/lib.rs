//! Quaver.
