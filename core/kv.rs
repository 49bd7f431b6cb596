//! Pages of the KV cache. A page is free, or has one owner, or is shared read-only by several: its reference count is
//! the number of page tables that it stands in. The scheduler is the only caller; a request that does not fit is an
//! ordinary `None`, a page that is released too often is a bug and panics.

/// Which pages of the cache are in use. The pages themselves lie in the backend's [`Kv`](crate::op::Kv) buffers.
#[derive(Debug)]
pub struct Pages {
    /// Page tables that hold each page, `[pages]`; 0 is free.
    owners: Vec<u32>,
    /// The pages whose count is 0, each once; the next to be given is the last.
    free: Vec<u32>,
    page_tokens: usize,
}

impl Pages {
    /// `pages` free pages of `page_tokens` tokens each.
    ///
    /// # Panics
    /// Where `page_tokens` is 0, or a page number does not fit a u32.
    pub fn new(pages: usize, page_tokens: usize) -> Self {
        assert!(page_tokens > 0, "a page holds at least one token");
        let count = u32::try_from(pages).expect("page numbers are u32");
        Pages { owners: vec![0; pages], free: (0..count).rev().collect(), page_tokens }
    }

    /// `n` pages, each with one owner; or `None` and no page at all where fewer are free.
    #[must_use = "pages that are dropped without release are lost"]
    pub fn alloc(&mut self, n: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(n)?;
        let mut pages = self.free.split_off(rest);
        pages.reverse();
        for &page in &pages {
            debug_assert_eq!(self.owners[page as usize], 0, "page {page} was free and owned");
            self.owners[page as usize] = 1;
        }
        Some(pages)
    }

    /// Adds an owner to a page in use. From here on nobody may write to it: see [`is_shared`](Self::is_shared).
    ///
    /// # Panics
    /// Where the page is free or unknown.
    pub fn share(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        assert!(*owners > 0, "page {page} is free and cannot be shared");
        *owners += 1;
    }

    /// Removes an owner; the last one frees the page.
    ///
    /// # Panics
    /// Where the page is free or unknown.
    pub fn release(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        assert!(*owners > 0, "page {page} is released more often than it was taken");
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
            debug_assert!(self.free.len() <= self.owners.len());
        }
    }

    /// True for a page of several owners: whoever wants to append to it copies it first
    /// ([`Op::CopyPages`](crate::op::Op::CopyPages)).
    pub fn is_shared(&self, page: u32) -> bool {
        self.owners[page as usize] > 1
    }

    /// Pages that can be given.
    pub fn free(&self) -> usize {
        self.free.len()
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

    #[test]
    fn a_shared_page_is_free_only_after_its_last_release() {
        let mut pages = Pages::new(1, 16);
        let page = pages.alloc(1).unwrap()[0];
        assert!(!pages.is_shared(page));
        pages.share(page);
        assert!(pages.is_shared(page));
        pages.release(page);
        assert_eq!((pages.free(), pages.is_shared(page)), (0, false));
        pages.release(page);
        assert_eq!(pages.free(), 1);
    }

    #[test]
    #[should_panic(expected = "page 0 is released more often than it was taken")]
    fn a_second_release_is_a_bug() {
        let mut pages = Pages::new(1, 16);
        let page = pages.alloc(1).unwrap()[0];
        pages.release(page);
        pages.release(page);
    }

    #[test]
    #[should_panic(expected = "page 1 is free and cannot be shared")]
    fn a_free_page_cannot_be_shared() {
        Pages::new(2, 16).share(1);
    }

    #[derive(Clone, Debug)]
    enum Action {
        Alloc(usize),
        Share(usize),
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
                    any::<usize>().prop_map(Action::Share),
                    any::<usize>().prop_map(Action::Release),
                ],
                0..200,
            ),
        ) {
            let mut pages = Pages::new(total, 16);
            let mut owned: Vec<u32> = Vec::new();
            let used = |owned: &[u32]| owned.iter().collect::<std::collections::BTreeSet<_>>().len();
            for action in actions {
                match action {
                    Action::Alloc(n) => match pages.alloc(n) {
                        Some(given) => {
                            prop_assert_eq!(given.len(), n);
                            for page in given {
                                prop_assert!((page as usize) < total && !owned.contains(&page), "page {} given twice", page);
                                owned.push(page);
                            }
                        }
                        None => prop_assert!(total - used(&owned) < n),
                    },
                    Action::Share(i) if !owned.is_empty() => {
                        let page = owned[i % owned.len()];
                        pages.share(page);
                        owned.push(page);
                    }
                    Action::Release(i) if !owned.is_empty() => pages.release(owned.swap_remove(i % owned.len())),
                    _ => {}
                }
                prop_assert_eq!(pages.free(), total - used(&owned));
                for &page in &owned {
                    prop_assert_eq!(pages.is_shared(page), owned.iter().filter(|&&p| p == page).count() > 1);
                }
            }
            owned.drain(..).for_each(|page| pages.release(page));
            prop_assert_eq!(pages.alloc(total).map(|all| all.len()), Some(total));
        }
    }
}
