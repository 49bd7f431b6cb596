//! The cases, a file an op, or for ops that may run as one: shapes that are chosen, and shapes that are drawn from the seed.

mod attend;
mod batch;
mod elementwise;
mod folded;
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
    folded::add(&mut list);
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

/// Drawn shapes of each op.
const DRAWN: usize = 3;

impl List {
    /// Adds cases whose shapes are drawn: `draw` gives a shape's name and what makes its problem. Names begin with
    /// `drawn_0`, `drawn_1` and so on, whatever the seed.
    fn drawn<F>(&mut self, op: &'static str, draw: impl Fn(&mut Rng) -> (String, F))
    where
        F: Fn(&mut Rng) -> Problem + Send + Sync + 'static,
    {
        for i in 0..DRAWN {
            let (shape, make) = draw(&mut Rng::named(self.seed, &format!("{op} drawn_{i}")));
            self.add(op, format!("drawn_{i}_{shape}"), make);
        }
    }

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
