//! The cases, a file an op.

mod attend;
mod batch;
mod elementwise;
mod linear;
mod pages;
mod quantize;
mod rope_append;
mod sample;

use std::sync::Arc;

use super::{Case, Problem, Rng};

/// Every case, made from one seed.
pub fn cases(seed: u64) -> Vec<Case> {
    let mut list = List { seed, cases: Vec::new() };
    quantize::add(&mut list);
    pages::add(&mut list);
    elementwise::add(&mut list);
    linear::add(&mut list);
    rope_append::add(&mut list);
    attend::add(&mut list);
    sample::add(&mut list);
    list.cases
}

/// Cases in the making.
struct List {
    seed: u64,
    cases: Vec<Case>,
}

impl List {
    fn add(
        &mut self,
        op: &'static str,
        variant: impl AsRef<str>,
        make: impl Fn(&mut Rng) -> Problem + Send + Sync + 'static,
    ) {
        let name = format!("{op}::{}", variant.as_ref());
        self.cases.push(Case { name, op, seed: self.seed, make: Arc::new(make) });
    }
}
