//! Pages of the KV cache. A page is blank, or in use by the sequences in whose page tables it stands, or idle: nobody
//! uses it, but it still holds the keys and values of a known prefix, under whose hash it can be found and taken again
//! without a copy. Only whole pages get a hash, and nobody writes to a whole page; so a page that several sequences use
//! is never written. Where blank pages run out, the page that has been idle longest is given away.
//!
//! The scheduler is the only caller; a request that does not fit is an ordinary `None`, a page that is released too
//! often is a bug and panics.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};

/// The hash of a prefix that ends with a page: 128 bits under keys of this process, so that nobody can make two prefixes
/// that share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefixHash([u64; 2]);

/// Hashes prefixes page by page.
#[derive(Debug, Default)]
pub struct PrefixHasher {
    keys: [RandomState; 2],
}

impl PrefixHasher {
    /// The hash of a page's tokens behind a prefix.
    pub fn next(&self, prefix: Option<PrefixHash>, tokens: &[u32]) -> PrefixHash {
        PrefixHash(std::array::from_fn(|i| self.keys[i].hash_one((prefix, tokens))))
    }
}

/// Which pages of the cache are in use. The pages themselves lie in the backend's [`Kv`](crate::op::Kv) buffers.
#[derive(Debug)]
pub struct Pages {
    /// Page tables that hold each page, `[pages]`.
    owners: Vec<u32>,
    /// What each page is found by, `[pages]`.
    hashes: Vec<Option<PrefixHash>>,
    by_hash: HashMap<PrefixHash, u32>,
    /// Pages without owner and hash, each once; the next to be given is the last.
    blank: Vec<u32>,
    /// Pages without owner, with a hash, by the time at which the last owner left.
    idle: BTreeMap<u64, u32>,
    /// That time, `[pages]`; of idle pages alone.
    since: Vec<u64>,
    clock: u64,
    page_tokens: usize,
}

impl Pages {
    /// `pages` blank pages of `page_tokens` tokens each.
    ///
    /// # Panics
    /// Where `page_tokens` is 0, or a page number does not fit a u32.
    pub fn new(pages: usize, page_tokens: usize) -> Self {
        assert!(page_tokens > 0, "a page holds at least one token");
        let count = u32::try_from(pages).expect("page numbers are u32");
        Pages {
            owners: vec![0; pages],
            hashes: vec![None; pages],
            by_hash: HashMap::new(),
            blank: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            since: vec![0; pages],
            clock: 0,
            page_tokens,
        }
    }

    /// `n` pages, each with one owner; or `None` and no page at all where fewer are free.
    #[must_use = "pages that are dropped without release are lost"]
    pub fn alloc(&mut self, n: usize) -> Option<Vec<u32>> {
        if n > self.free() {
            return None;
        }
        let mut pages = self.blank.split_off(self.blank.len() - n.min(self.blank.len()));
        pages.reverse();
        while pages.len() < n {
            let (_, page) = self.idle.pop_first()?;
            self.forget(page);
            pages.push(page);
        }
        for &page in &pages {
            debug_assert_eq!(self.owners[page as usize], 0, "page {page} was free and owned");
            self.owners[page as usize] = 1;
        }
        Some(pages)
    }

    /// The page that holds a prefix's last tokens, with one more owner.
    #[must_use = "a page that is dropped without release is lost"]
    pub fn take(&mut self, hash: PrefixHash) -> Option<u32> {
        let page = *self.by_hash.get(&hash)?;
        if self.owners[page as usize] == 0 {
            self.idle.remove(&self.since[page as usize]);
        }
        self.owners[page as usize] += 1;
        Some(page)
    }

    /// The page that [`take`](Self::take) would give, and whether it is free until then.
    pub fn find(&self, hash: PrefixHash) -> Option<(u32, bool)> {
        self.by_hash.get(&hash).map(|&page| (page, self.owners[page as usize] == 0))
    }

    /// Lets a page in use, which holds all of its tokens, be found; nothing where another page holds the same.
    pub fn keep(&mut self, page: u32, hash: PrefixHash) {
        debug_assert!(self.owners[page as usize] > 0, "page {page} is free and holds nothing");
        if self.hashes[page as usize].is_none() && !self.by_hash.contains_key(&hash) {
            self.by_hash.insert(hash, page);
            self.hashes[page as usize] = Some(hash);
        }
    }

    /// Lets a page be found no more.
    pub fn forget(&mut self, page: u32) {
        if let Some(hash) = self.hashes[page as usize].take() {
            self.by_hash.remove(&hash);
        }
    }

    /// Removes an owner; the last one frees the page.
    ///
    /// # Panics
    /// Where the page is free or unknown.
    pub fn release(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        assert!(*owners > 0, "page {page} is released more often than it was taken");
        *owners -= 1;
        if *owners > 0 {
            return;
        }
        if self.hashes[page as usize].is_some() {
            self.clock += 1;
            self.since[page as usize] = self.clock;
            self.idle.insert(self.clock, page);
        } else {
            self.blank.push(page);
        }
    }

    /// Pages that can be given: blank and idle ones.
    pub fn free(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Pages in all.
    pub fn total(&self) -> usize {
        self.owners.len()
    }

    /// Tokens a page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages that a sequence of `tokens` tokens needs.
    ///
    /// ```
    /// let pages = quaver_core::kv::Pages::new(8, 16);
    /// assert_eq!([0, 1, 16, 17].map(|tokens| pages.pages_for(tokens)), [0, 1, 1, 2]);
    /// ```
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn alloc_gives_all_or_nothing() {
        let mut pages = Pages::new(3, 16);
        assert_eq!(pages.alloc(4), None);
        assert_eq!(pages.free(), 3);
        assert_eq!(pages.alloc(3), Some(vec![0, 1, 2]));
        assert_eq!(pages.alloc(1), None);
        assert_eq!(pages.alloc(0), Some(vec![]));
    }

    fn hash(n: u64) -> PrefixHash {
        PrefixHash([n, 0])
    }

    #[test]
    fn a_page_of_several_owners_is_free_only_after_its_last_release() {
        let mut pages = Pages::new(1, 16);
        let page = pages.alloc(1).unwrap()[0];
        pages.keep(page, hash(1));
        assert_eq!((pages.find(hash(1)), pages.take(hash(1))), (Some((page, false)), Some(page)));
        pages.release(page);
        assert_eq!(pages.free(), 0);
        pages.release(page);
        assert_eq!((pages.free(), pages.find(hash(1))), (1, Some((page, true))));
    }

    #[test]
    fn idle_pages_are_given_last_and_the_longest_idle_first() {
        let mut pages = Pages::new(4, 16);
        let held = pages.alloc(3).unwrap();
        for (&page, n) in held.iter().zip(0..) {
            pages.keep(page, hash(n));
        }
        for i in [1, 2, 0] {
            pages.release(held[i]);
        }
        // The second is used again, and so is the last to go.
        let again = pages.take(hash(1)).unwrap();
        pages.release(again);
        assert_eq!(pages.alloc(4), Some(vec![3, held[2], held[0], held[1]]));
        assert_eq!([0, 1, 2].map(|n| pages.take(hash(n))), [None; 3]);
    }

    #[test]
    fn of_two_pages_that_hold_the_same_one_is_found_and_a_forgotten_one_is_not() {
        let mut pages = Pages::new(2, 16);
        let held = pages.alloc(2).unwrap();
        pages.keep(held[0], hash(1));
        pages.keep(held[1], hash(1));
        held.iter().for_each(|&page| pages.release(page));
        assert_eq!(pages.find(hash(1)), Some((held[0], true)));
        let page = pages.take(hash(1)).unwrap();
        pages.forget(page);
        pages.release(page);
        assert_eq!((pages.find(hash(1)), pages.free()), (None, 2));
    }

    #[test]
    fn a_hash_depends_on_every_token_before_it() {
        let hasher = PrefixHasher::default();
        let first = hasher.next(None, &[1, 2]);
        let same = hasher.next(None, &[1, 2]);
        assert_eq!(hasher.next(Some(first), &[3]), hasher.next(Some(same), &[3]));
        let others = [hasher.next(None, &[3]), hasher.next(Some(hasher.next(None, &[1, 4])), &[3])];
        assert!(!others.contains(&hasher.next(Some(first), &[3])));
        assert_ne!(first, PrefixHasher::default().next(None, &[1, 2]), "keys are a process's own");
    }

    #[test]
    #[should_panic(expected = "page 0 is released more often than it was taken")]
    fn a_second_release_is_a_bug() {
        let mut pages = Pages::new(1, 16);
        let page = pages.alloc(1).unwrap()[0];
        pages.release(page);
        pages.release(page);
    }

    #[derive(Clone, Debug)]
    enum Action {
        Alloc(usize),
        Keep(usize, u64),
        Take(u64),
        Release(usize),
    }

    proptest! {
        /// The model is a list with one entry for each owner of each page.
        #[test]
        fn no_page_is_lost_and_none_is_given_twice(
            total in 0usize..20,
            actions in prop::collection::vec(
                prop_oneof![
                    (0usize..8).prop_map(Action::Alloc),
                    (any::<usize>(), 0u64..12).prop_map(|(i, n)| Action::Keep(i, n)),
                    (0u64..12).prop_map(Action::Take),
                    any::<usize>().prop_map(Action::Release),
                ],
                0..200,
            ),
        ) {
            let mut pages = Pages::new(total, 16);
            let mut owned: Vec<u32> = Vec::new();
            // What each page holds, as long as nobody else was given it.
            let mut kept: HashMap<u64, u32> = HashMap::new();
            let used = |owned: &[u32]| owned.iter().collect::<std::collections::BTreeSet<_>>().len();
            for action in actions {
                match action {
                    Action::Alloc(n) => match pages.alloc(n) {
                        Some(given) => {
                            prop_assert_eq!(given.len(), n);
                            for page in given {
                                prop_assert!((page as usize) < total && !owned.contains(&page), "page {} given twice", page);
                                kept.retain(|_, held| *held != page);
                                owned.push(page);
                            }
                        }
                        None => prop_assert!(total - used(&owned) < n),
                    },
                    Action::Keep(i, n) if !owned.is_empty() => {
                        let page = owned[i % owned.len()];
                        pages.keep(page, hash(n));
                        if !kept.contains_key(&n) && !kept.values().any(|held| *held == page) {
                            kept.insert(n, page);
                        }
                    }
                    Action::Take(n) => {
                        let page = pages.take(hash(n));
                        prop_assert_eq!(page, kept.get(&n).copied());
                        owned.extend(page);
                    }
                    Action::Release(i) if !owned.is_empty() => pages.release(owned.swap_remove(i % owned.len())),
                    _ => {}
                }
                prop_assert_eq!(pages.free(), total - used(&owned));
            }
            owned.drain(..).for_each(|page| pages.release(page));
            prop_assert_eq!(pages.alloc(total).map(|all| all.len()), Some(total));
        }
    }
}
