//! Which rows go into the next step: continuous batching. Sequences under way take part in every step, one row each
//! once their prompt is computed; what is left of the token budget goes to prompts, oldest first, in chunks. A sequence
//! is admitted when a slot and all the pages that it can come to need are free, so that none has to be stopped later.

use std::collections::VecDeque;

use crate::kv::Pages;

/// A sequence as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Tokens that it may come to have.
    pub limit: usize,
    /// Its row of the page table; None while it waits.
    pub slot: Option<u32>,
    /// Its pages, in order.
    pub pages: Vec<u32>,
}

impl Sequence {
    /// A waiting sequence with a prompt, which may grow to `limit` tokens.
    pub fn new(tokens: Vec<u32>, limit: usize) -> Self {
        Sequence { tokens, computed: 0, limit, slot: None, pages: Vec::new() }
    }

    /// The row of the page table of a sequence that is running.
    pub fn slot(&self) -> u32 {
        self.slot.expect("a sequence runs from its admission on")
    }
}

/// A share of the next step: `rows` tokens of one sequence, from its first that is not computed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share<Id> {
    /// Whose.
    pub id: Id,
    /// How many.
    pub rows: usize,
}

/// Sequences, by the order in which they came.
pub struct Scheduler<Id> {
    waiting: VecDeque<(Id, Sequence)>,
    running: Vec<(Id, Sequence)>,
    free_slots: Vec<u32>,
    pages: Pages,
    budget: usize,
}

impl<Id: Copy + PartialEq> Scheduler<Id> {
    /// A scheduler of `slots` sequences at a time over `pages`, with steps of at most `budget` rows.
    pub fn new(slots: usize, pages: Pages, budget: usize) -> Self {
        let free_slots = (0..slots as u32).rev().collect();
        Scheduler { waiting: VecDeque::new(), running: Vec::new(), free_slots, pages, budget }
    }

    /// Appends a sequence to the queue.
    pub fn submit(&mut self, id: Id, sequence: Sequence) {
        self.waiting.push_back((id, sequence));
    }

    /// True where nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// The pages; for figures.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// A running sequence.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|(have, _)| *have == id).map(|(_, sequence)| sequence)
    }

    /// Removes a sequence, waiting or running, and frees what it held.
    pub fn remove(&mut self, id: Id) -> Option<Sequence> {
        if let Some(i) = self.waiting.iter().position(|(have, _)| *have == id) {
            return self.waiting.remove(i).map(|(_, sequence)| sequence);
        }
        let i = self.running.iter().position(|(have, _)| *have == id)?;
        let (_, mut sequence) = self.running.remove(i);
        self.free_slots.extend(sequence.slot.take());
        for page in sequence.pages.drain(..) {
            self.pages.release(page);
        }
        Some(sequence)
    }

    /// Admits what can be admitted; gives the ids that were.
    pub fn admit(&mut self) -> Vec<Id> {
        let mut admitted = Vec::new();
        while let Some((_, next)) = self.waiting.front() {
            let need = self.pages.pages_for(next.limit);
            let Some(&slot) = self.free_slots.last() else { break };
            let Some(pages) = self.pages.alloc(need) else { break };
            let Some((id, mut sequence)) = self.waiting.pop_front() else { break };
            self.free_slots.pop();
            sequence.slot = Some(slot);
            sequence.pages = pages;
            self.running.push((id, sequence));
            admitted.push(id);
        }
        admitted
    }

    /// The next step's shares: every sequence that only decodes, then prompts in the order in which they came.
    pub fn plan(&self) -> Vec<Share<Id>> {
        let mut budget = self.budget;
        let mut shares = Vec::new();
        for decoding in [true, false] {
            for (id, sequence) in &self.running {
                let left = sequence.tokens.len() - sequence.computed;
                let rows = left.min(budget);
                if (left == 1) == decoding && rows > 0 {
                    shares.push(Share { id: *id, rows });
                    budget -= rows;
                }
            }
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler(slots: usize, pages: usize, budget: usize) -> Scheduler<u32> {
        Scheduler::new(slots, Pages::new(pages, 16), budget)
    }

    #[test]
    fn a_sequence_waits_until_its_pages_are_free() {
        let mut s = scheduler(4, 4, 64);
        s.submit(1, Sequence::new(vec![0; 40], 48));
        s.submit(2, Sequence::new(vec![0; 10], 32));
        assert_eq!(s.admit(), [1]);
        assert!(s.admit().is_empty());
        s.remove(1);
        assert_eq!(s.admit(), [2]);
        s.remove(2);
        assert!(s.is_idle());
        assert_eq!(s.pages().free(), 4);
    }

    #[test]
    fn decoding_rows_come_before_prompts_and_prompts_are_cut_to_the_budget() {
        let mut s = scheduler(4, 64, 32);
        s.submit(1, Sequence::new(vec![0; 100], 120));
        s.submit(2, Sequence::new(vec![0; 8], 16));
        s.admit();
        assert_eq!(s.plan(), [Share { id: 1, rows: 32 }]);
        s.get_mut(1).unwrap().computed = 99;
        assert_eq!(s.plan(), [Share { id: 1, rows: 1 }, Share { id: 2, rows: 8 }]);
    }

    #[test]
    fn slots_are_not_shared() {
        let mut s = scheduler(2, 64, 32);
        for id in 0..3 {
            s.submit(id, Sequence::new(vec![0; 4], 8));
        }
        assert_eq!(s.admit(), [0, 1]);
        let slots = [0, 1].map(|id| s.get_mut(id).unwrap().slot);
        assert_ne!(slots[0], slots[1]);
        s.remove(0);
        assert_eq!(s.admit(), [2]);
    }
}
