//! The command line of Quaver.

fn main() {}
