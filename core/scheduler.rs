//! Which rows go into the next step: continuous batching. Sequences that decode take part in every step, one row each;
//! what is left of the token budget goes to prompts, in chunks, and beside sequences that decode to no more of them than
//! keeps a step short.
//!
//! A sequence is admitted, in the order of arrival, when a slot and the pages of its prompt are free; further pages are
//! taken as they are needed. Where none is left, the sequence that came last gives up its place and its pages, and is
//! computed again later: the oldest always gets on, so all do. Whole pages that are computed already are found by the
//! hash of their prefix; a sequence whose next page is just being computed by another waits for that.
//!
//! A step may be planned before the one before it is done: its last token is then in place of what that will choose
//! ([`CHOSEN`]), and a page is kept for others only when its tokens are known.

use std::collections::VecDeque;

use crate::kv::{Pages, PrefixHash, PrefixHasher};
use crate::op::CHOSEN;

/// A sequence as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Prompt, then what was generated. The last one may stand for what a step under way will choose.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache, or will be when the steps under way are done.
    pub computed: usize,
    /// Tokens that it may come to have.
    pub limit: usize,
    /// Its row of the page table; None while it waits.
    pub slot: Option<u32>,
    /// Its pages, in order.
    pub pages: Vec<u32>,
    /// Begin with pages that are computed already. Not for a prompt whose tokens are scored: that takes their rows.
    pub reuse: bool,
    /// Of each whole page, as far as they are known.
    hashes: Vec<PrefixHash>,
    /// How many of its pages others can find.
    kept: usize,
    /// Its place in the order of arrival.
    arrival: u64,
}

impl Sequence {
    /// A waiting sequence with a prompt, which may grow to `limit` tokens.
    pub fn new(tokens: Vec<u32>, limit: usize, reuse: bool) -> Self {
        let (pages, hashes) = (Vec::new(), Vec::new());
        Sequence { tokens, computed: 0, limit, slot: None, pages, reuse, hashes, kept: 0, arrival: 0 }
    }

    /// The row of the page table of a sequence that is running.
    pub fn slot(&self) -> u32 {
        self.slot.expect("a sequence runs from its admission on")
    }

    /// Makes the hashes of the first `whole` pages known.
    fn hash(&mut self, hasher: Option<&PrefixHasher>, page_tokens: usize, whole: usize) {
        let Some(hasher) = hasher else { return };
        for tokens in self.tokens[..whole * page_tokens].chunks_exact(page_tokens).skip(self.hashes.len()) {
            self.hashes.push(hasher.next(self.hashes.last().copied(), tokens));
        }
    }

    /// Tokens to compute.
    fn left(&self) -> usize {
        match self.tokens.last() {
            // A step under way chooses the last token: nothing comes behind it.
            Some(token) if token & CHOSEN != 0 && self.tokens.len() >= self.limit => 0,
            _ => self.tokens.len() - self.computed,
        }
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

/// How much goes into a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Rows of a step.
    pub rows: usize,
    /// Rows of prompts in a step in which other sequences decode.
    pub beside: usize,
}

/// Sequences, by the order in which they came.
pub struct Scheduler<Id> {
    waiting: VecDeque<(Id, Sequence)>,
    running: Vec<(Id, Sequence)>,
    free_slots: Vec<u32>,
    pages: Pages,
    budget: Budget,
    /// None where whole pages are not kept for others.
    hasher: Option<PrefixHasher>,
    arrivals: u64,
    preemptions: u64,
}

impl<Id: Copy + PartialEq> Scheduler<Id> {
    /// A scheduler of `slots` sequences at a time over `pages`; `cache` keeps whole pages for sequences to come.
    pub fn new(slots: usize, pages: Pages, budget: Budget, cache: bool) -> Self {
        Scheduler {
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_slots: (0..slots as u32).rev().collect(),
            pages,
            budget,
            hasher: cache.then(PrefixHasher::default),
            arrivals: 0,
            preemptions: 0,
        }
    }

    /// Appends a sequence to the queue.
    pub fn submit(&mut self, id: Id, mut sequence: Sequence) {
        self.arrivals += 1;
        sequence.arrival = self.arrivals;
        sequence.reuse &= self.hasher.is_some();
        let whole = sequence.tokens.len() / self.pages.page_tokens();
        sequence.hash(self.hasher.as_ref(), self.pages.page_tokens(), whole);
        self.waiting.push_back((id, sequence));
    }

    /// True where nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences: (running, waiting).
    pub fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// How often a sequence had to give up its pages.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The pages; for figures.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// A sequence, running or waiting.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut Sequence> {
        let mut all = self.running.iter_mut().chain(&mut self.waiting);
        all.find(|(have, _)| *have == id).map(|(_, sequence)| sequence)
    }

    /// Removes a sequence, waiting or running, and frees what it held.
    pub fn remove(&mut self, id: Id) -> Option<Sequence> {
        if let Some(i) = self.waiting.iter().position(|(have, _)| *have == id) {
            return self.waiting.remove(i).map(|(_, sequence)| sequence);
        }
        let i = self.running.iter().position(|(have, _)| *have == id)?;
        let (_, mut sequence) = self.running.remove(i);
        self.free(&mut sequence);
        Some(sequence)
    }

    /// The same for a sequence whose pages nobody should find.
    pub fn discard(&mut self, id: Id) {
        for &page in self.running.iter().filter(|(have, _)| *have == id).flat_map(|(_, sequence)| &sequence.pages) {
            self.pages.forget(page);
        }
        self.remove(id);
    }

    fn free(&mut self, sequence: &mut Sequence) {
        self.free_slots.extend(sequence.slot.take());
        // The last page first: of a prefix that is kept, its end is to go first.
        for page in sequence.pages.drain(..).rev() {
            self.pages.release(page);
        }
    }

    /// Admits what can be admitted; gives the ids that were, whose [`Sequence::computed`] says how much was found.
    pub fn admit(&mut self) -> Vec<Id> {
        let mut admitted = Vec::new();
        let mut i = 0;
        while let Some((_, next)) = self.waiting.get(i) {
            let Some(&slot) = self.free_slots.last() else { break };
            let found = self.found(next);
            if self.is_being_computed(next, found.len()) {
                i += 1;
                continue;
            }
            let idle = found.iter().filter(|(_, idle)| *idle).count();
            let need = self.pages.pages_for(next.tokens.len()) - found.len();
            // A page for each running sequence that may grow is left, or the newcomer would soon have to go again.
            let has_all = |sequence: &Sequence| sequence.pages.len() >= self.pages.pages_for(sequence.limit);
            let growing = self.running.iter().filter(|(_, sequence)| !has_all(sequence)).count();
            if need + idle + growing > self.pages.free() {
                break;
            }
            let Some((id, mut sequence)) = self.waiting.remove(i) else { break };
            self.free_slots.pop();
            let taken = sequence.hashes[..found.len()].iter().map_while(|hash| self.pages.take(*hash));
            sequence.pages = taken.collect();
            sequence.pages.extend(self.pages.alloc(need).expect("that many are free"));
            sequence.computed = found.len() * self.pages.page_tokens();
            sequence.kept = found.len();
            sequence.slot = Some(slot);
            let at = self.running.partition_point(|(_, other)| other.arrival < sequence.arrival);
            self.running.insert(at, (id, sequence));
            admitted.push(id);
        }
        admitted
    }

    /// The leading pages of a waiting sequence that are computed already; never all of its tokens, because the last
    /// one's row gives the next token.
    fn found(&self, sequence: &Sequence) -> Vec<(u32, bool)> {
        self.reusable(sequence).iter().map_while(|hash| self.pages.find(*hash)).collect()
    }

    fn reusable<'a>(&self, sequence: &'a Sequence) -> &'a [PrefixHash] {
        let most = (sequence.tokens.len() - 1) / self.pages.page_tokens();
        if sequence.reuse { &sequence.hashes[..most.min(sequence.hashes.len())] } else { &[] }
    }

    /// True where a running sequence is about to compute the page behind those that were found.
    fn is_being_computed(&self, sequence: &Sequence, found: usize) -> bool {
        let Some(hash) = self.reusable(sequence).get(found) else { return false };
        self.running.iter().any(|(_, other)| other.hashes.get(found) == Some(hash) && other.kept <= found)
    }

    /// Takes the pages that the next step needs, from the sequences that came last where none is free. Gives the
    /// sequences that grew, by one page each.
    pub fn grow(&mut self) -> Vec<Id> {
        let mut grown = Vec::new();
        let mut i = 0;
        while i < self.running.len() {
            let (id, sequence) = &mut self.running[i];
            if sequence.left() == 0 || self.pages.pages_for(sequence.tokens.len()) <= sequence.pages.len() {
                i += 1;
                continue;
            }
            if let Some(page) = self.pages.alloc(1) {
                sequence.pages.extend(page);
                grown.push(*id);
                i += 1;
            } else {
                self.preempt();
            }
        }
        grown.retain(|id| self.running.iter().any(|(have, _)| have == id));
        grown
    }

    /// The sequence that came last goes back to the queue.
    fn preempt(&mut self) {
        let Some((id, mut sequence)) = self.running.pop() else { return };
        self.free(&mut sequence);
        (sequence.computed, sequence.kept) = (0, 0);
        self.preemptions += 1;
        let at = self.waiting.partition_point(|(_, other)| other.arrival < sequence.arrival);
        self.waiting.insert(at, (id, sequence));
    }

    /// The next step's shares: every sequence that only decodes; then prompts. The oldest prompt gets half of what is
    /// left at least, so that it is never held up, the others by how little they still need, so that a short prompt does
    /// not wait for a long one.
    pub fn plan(&self) -> Vec<Share<Id>> {
        let decoding = self.running.iter().filter(|(_, sequence)| sequence.left() == 1);
        let mut shares: Vec<_> = decoding.take(self.budget.rows).map(|(id, _)| Share { id: *id, rows: 1 }).collect();
        let mut budget = self.budget.rows - shares.len();
        if !shares.is_empty() {
            budget = budget.min(self.budget.beside);
        }
        let mut prompts: Vec<_> = self.running.iter().filter(|(_, sequence)| sequence.left() > 1).collect();
        let oldest = prompts.first().map(|(_, sequence)| sequence.arrival);
        let half = prompts.first().map_or(0, |(_, sequence)| sequence.left().min(budget.div_ceil(2)));
        let mut rest = budget - half;
        prompts.sort_by_key(|(_, sequence)| sequence.left());
        for (id, sequence) in prompts {
            let reserved = if Some(sequence.arrival) == oldest { half } else { 0 };
            let more = (sequence.left() - reserved).min(rest);
            rest -= more;
            if reserved + more > 0 {
                shares.push(Share { id: *id, rows: reserved + more });
            }
        }
        shares
    }

    /// Books that a sequence's tokens were computed up to `end`: its whole pages are kept for others.
    pub fn keep(&mut self, id: Id, end: usize) {
        let Some((_, sequence)) = self.running.iter_mut().find(|(have, _)| *have == id) else { return };
        let page = self.pages.page_tokens();
        let whole = end / page;
        sequence.hash(self.hasher.as_ref(), page, whole);
        // Without a hasher there are no hashes.
        for (&page, &hash) in sequence.pages.iter().zip(&sequence.hashes).take(whole).skip(sequence.kept) {
            self.pages.keep(page, hash);
        }
        sequence.kept = sequence.kept.max(whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler(slots: usize, pages: usize, rows: usize) -> Scheduler<u32> {
        Scheduler::new(slots, Pages::new(pages, 16), Budget { rows, beside: rows }, true)
    }

    /// A prompt that shares nothing with the prompts of other ids.
    fn sequence(id: u32, tokens: usize) -> Sequence {
        Sequence::new((0..tokens as u32).map(|i| id * 1000 + i).collect(), tokens + 100, true)
    }

    /// Computes everything that is planned, and lets each sequence that got to its end grow by a token.
    fn step(s: &mut Scheduler<u32>) -> Vec<Share<u32>> {
        s.admit();
        s.grow();
        let shares = s.plan();
        for share in &shares {
            let sequence = s.get_mut(share.id).unwrap();
            sequence.computed += share.rows;
            let end = sequence.computed;
            if sequence.left() == 0 {
                sequence.tokens.push(7);
            }
            s.keep(share.id, end);
        }
        shares
    }

    #[test]
    fn a_sequence_waits_until_the_pages_of_its_prompt_are_free() {
        let mut s = scheduler(4, 4, 64);
        s.submit(1, sequence(1, 40));
        s.submit(2, sequence(2, 10));
        s.submit(3, sequence(3, 10));
        // Three pages, and one is left for it to grow.
        assert_eq!(s.admit(), [1]);
        s.remove(1);
        assert_eq!(s.admit(), [2, 3]);
        s.remove(2);
        s.remove(3);
        assert!(s.is_idle());
        assert_eq!(s.pages().free(), 4);
        // Those that have all pages they may come to need leave none free.
        for id in 4..8 {
            s.submit(id, Sequence { limit: 16, ..sequence(id, 10) });
        }
        assert_eq!(s.admit(), [4, 5, 6, 7]);
    }

    #[test]
    fn who_came_last_makes_room_and_comes_back() {
        let mut s = scheduler(4, 4, 64);
        s.submit(1, sequence(1, 16));
        s.submit(2, sequence(2, 15));
        let mut seen = [0; 3];
        for _ in 0..40 {
            for share in step(&mut s) {
                seen[share.id as usize] += share.rows;
            }
        }
        // The first never had to go: 16 tokens of a prompt, then one in each further step.
        assert_eq!(seen[1], 16 + 39);
        assert!(s.preemptions() > 0 && seen[2] > 15);
        s.remove(1);
        assert_eq!(s.admit(), [2]);
        s.remove(2);
        assert_eq!(s.pages().free(), 4);
    }

    #[test]
    fn decoding_rows_come_before_prompts_and_prompts_are_cut_to_the_budget() {
        let mut s = scheduler(4, 64, 32);
        s.budget.beside = 6;
        s.submit(1, sequence(1, 100));
        s.submit(2, sequence(2, 8));
        s.admit();
        // Half for the oldest, and the short one need not wait for it.
        assert_eq!(s.plan(), [Share { id: 2, rows: 8 }, Share { id: 1, rows: 24 }]);
        s.get_mut(1).unwrap().computed = 99;
        assert_eq!(s.plan(), [Share { id: 1, rows: 1 }, Share { id: 2, rows: 6 }]);
    }

    #[test]
    fn whole_pages_are_shared_by_those_who_come_later_and_waited_for_by_those_who_come_at_once() {
        let mut s = scheduler(4, 64, 20);
        for id in 1..=3 {
            s.submit(id, sequence(1, 40));
        }
        s.submit(4, sequence(4, 5));
        // The second and third wait for the first one's pages, the fourth for nothing.
        assert_eq!(s.admit(), [1, 4]);
        step(&mut s);
        assert!(s.admit().is_empty(), "the second page is not there yet");
        step(&mut s);
        step(&mut s);
        let pages = [1, 2, 3].map(|id| s.get_mut(id).unwrap().pages.clone());
        assert!(pages[0][..2] == pages[1][..2] && pages[0][..2] == pages[2][..2]);
        assert!(pages[0][2] != pages[1][2] && pages[1][2] != pages[2][2], "the last page is not whole");
        [1, 2, 3, 4].iter().for_each(|id| drop(s.remove(*id)));
        assert_eq!(s.pages().free(), 64);
        // A prompt of whole pages alone still computes its last one: somebody has to give the next token.
        s.submit(5, sequence(1, 32));
        s.admit();
        assert_eq!(s.get_mut(5).unwrap().computed, 16);
    }

    #[test]
    fn a_scored_prompt_begins_at_its_first_token_and_a_discarded_one_is_not_found() {
        let mut s = scheduler(4, 64, 64);
        s.submit(1, sequence(1, 40));
        step(&mut s);
        s.submit(2, Sequence { reuse: false, ..sequence(1, 40) });
        s.admit();
        assert_eq!(s.get_mut(2).unwrap().computed, 0);
        s.discard(1);
        s.remove(2);
        s.submit(3, sequence(1, 40));
        s.admit();
        assert_eq!(s.get_mut(3).unwrap().computed, 0);
    }

    #[test]
    fn slots_are_not_shared() {
        let mut s = scheduler(2, 64, 32);
        for id in 0..3 {
            s.submit(id, sequence(id, 4));
        }
        assert_eq!(s.admit(), [0, 1]);
        let slots = [0, 1].map(|id| s.get_mut(id).unwrap().slot);
        assert_ne!(slots[0], slots[1]);
        s.remove(0);
        assert_eq!(s.admit(), [2]);
    }
}
