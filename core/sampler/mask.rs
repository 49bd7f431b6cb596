//! Which tokens may be chosen: a row of the mask of [`Op::Sample`](crate::op::Op::Sample).

/// A bit for every token of the vocabulary, set where it may be chosen: bit `id % 32` of word `id / 32`.
///
/// ```
/// use quaver_core::sampler::Mask;
/// let mut mask = Mask::all(100);
/// mask.forbid(70);
/// assert!(Mask::allows(mask.words(), 69) && !Mask::allows(mask.words(), 70));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask(Vec<u32>);

impl Mask {
    /// Words of a mask.
    pub const fn width(vocab: usize) -> usize {
        vocab.div_ceil(32)
    }

    /// All tokens.
    pub fn all(vocab: usize) -> Self {
        Mask(vec![u32::MAX; Self::width(vocab)])
    }

    /// Its words.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// May a token be chosen, by the words of a mask?
    pub fn allows(words: &[u32], id: u32) -> bool {
        words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 != 0)
    }

    /// Takes a token out; one outside of the vocabulary is not in it.
    pub fn forbid(&mut self, id: u32) {
        if let Some(word) = self.0.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }

    /// Takes out what `words`, those of another mask, do not allow.
    pub fn keep(&mut self, words: &[u32]) {
        for (word, kept) in self.0.iter_mut().zip(words.iter().copied().chain(std::iter::repeat(0))) {
            *word &= kept;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_bits_in_the_order_of_their_ids() {
        let mut mask = Mask::all(65);
        mask.forbid(0);
        mask.forbid(33);
        mask.forbid(1000);
        assert_eq!(mask.words(), [!1, !2, u32::MAX]);
        mask.keep(&[3, 6]);
        assert_eq!(mask.words(), [2, 4, 0]);
        let allowed: Vec<u32> = (0..200).filter(|id| Mask::allows(mask.words(), *id)).collect();
        assert_eq!(allowed, [1, 34]);
    }
}
