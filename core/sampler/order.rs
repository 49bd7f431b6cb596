//! The one order of a row's tokens: by descending value, the lower id first on ties. A token's [`Key`] packs both, so
//! that comparing, selecting and sorting are integer work, and every filter keeps a prefix of the keys.

/// Ascending keys are descending values, then ascending ids.
pub(super) type Key = u64;

/// The key of a finite value. +0 and -0 are equal, as they are in every comparison of floats.
#[inline]
pub(super) fn key(value: f32, id: u32) -> Key {
    let bits = (value + 0.0).to_bits();
    // Larger values get smaller words: flip what a positive float keeps ascending, keep what a negative one descends.
    let word = if bits >> 31 == 0 { !bits & 0x7fff_ffff } else { bits };
    u64::from(word) << 32 | u64::from(id)
}

/// The token of a key.
#[inline]
pub(super) fn id(key: Key) -> u32 {
    key as u32
}

/// The value of a key.
#[inline]
pub(super) fn value(key: Key) -> f32 {
    let word = (key >> 32) as u32;
    f32::from_bits(if word >> 31 == 0 { !word & 0x7fff_ffff } else { word })
}

/// The finite values of a row, with their ids.
pub(super) fn finite(values: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    values.iter().enumerate().filter(|(_, value)| value.is_finite()).map(|(id, &value)| (id as u32, value))
}

/// The first `top.len()` keys of a row in order; entries that are left over are `Key::MAX`.
pub(super) fn first_keys(values: &[f32], top: &mut [Key]) {
    top.fill(Key::MAX);
    for (id, value) in finite(values) {
        let new = key(value, id);
        if top.last().is_some_and(|&last| new < last) {
            let place = top.partition_point(|&old| old < new);
            top[place..].rotate_right(1);
            top[place] = new;
        }
    }
}

/// Keeps the first `k` keys, in any order.
pub(super) fn keep_top_k(keys: &mut Vec<Key>, k: usize) {
    if k < keys.len() {
        keys.select_nth_unstable(k);
        keys.truncate(k);
    }
}

/// Buckets that [`keep_top_p`] cuts the order into, where there are more than [`FEW`] keys: 32 an octave of values.
const BUCKETS: usize = 1 << 14;

/// Keys that are sorted in less time than buckets take.
const FEW: usize = 256;

/// Keeps, in any order, the shortest prefix of the ordered keys whose weights reach `top_p` of the weights of all, at
/// least one key. Sums buckets of neighbours first, and sorts only the one that the prefix ends in; of few keys all are in
/// one bucket.
pub(super) fn keep_top_p(keys: &mut Vec<Key>, top_p: f32, weight: impl Fn(f32) -> f32) {
    let buckets = if keys.len() > FEW { BUCKETS } else { 1 };
    let bucket = |key: Key| (((key >> 32) * buckets as u64) >> 32) as usize;
    let weight = |key: Key| f64::from(weight(value(key)));
    let mut masses = vec![0.0; buckets];
    keys.iter().for_each(|&key| masses[bucket(key)] += weight(key));
    let wanted = f64::from(top_p) * masses.iter().sum::<f64>();
    let (mut end, mut before) = (0, 0.0);
    while end + 1 < buckets && before + masses[end] < wanted {
        before += masses[end];
        end += 1;
    }
    let mut edge: Vec<Key> = keys.iter().copied().filter(|&key| bucket(key) == end).collect();
    edge.sort_unstable();
    let last = edge.iter().position(|&key| {
        before += weight(key);
        before >= wanted
    });
    // Where rounding leaves the sum a little short, all of the bucket stays.
    if let Some(&last) = last.map_or(edge.last(), |last| edge.get(last)) {
        keys.retain(|&key| key <= last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_order_by_descending_value_then_ascending_id(a: f32, b: f32, i: u32, j: u32) {
            prop_assume!(a.is_finite() && b.is_finite());
            let expected = b.partial_cmp(&a).unwrap().then(i.cmp(&j));
            prop_assert_eq!(key(a, i).cmp(&key(b, j)), expected);
            prop_assert_eq!((value(key(a, i)), id(key(a, i))), (a, i));
        }
    }

    #[test]
    fn zeros_of_both_signs_tie() {
        assert!(key(-0.0, 1) < key(0.0, 2) && key(0.0, 1) < key(-0.0, 2));
    }

    /// These weights and their sums are exact, so that the boundary is too.
    #[test]
    fn top_p_ends_with_the_token_that_reaches_it_and_not_before() {
        let kept = |weights: &[f32], top_p: f32| {
            let mut keys: Vec<Key> = (0..).zip(weights).map(|(id, &w)| key(w, id)).collect();
            keep_top_p(&mut keys, top_p, |weight| weight);
            keys.into_iter().map(id).collect::<Vec<_>>()
        };
        let weights = [0.125, 0.5, 0.125, 0.25];
        assert_eq!(kept(&weights, 0.5), [1]);
        assert_eq!(kept(&weights, 0.5f32.next_up()), [1, 3]);
        assert_eq!(kept(&weights, 0.75), [1, 3]);
        assert_eq!(kept(&weights, 0.875), [0, 1, 3]);
        assert_eq!(kept(&weights, 0.875f32.next_up()), [0, 1, 2, 3]);
        assert_eq!(kept(&[1.0; 1024], 0.5), (0..512).collect::<Vec<_>>(), "all of them in one bucket");
        assert_eq!(kept(&[1.0; 1024], 0.5f32.next_up()).len(), 513);
        // Over many buckets: one key an octave, half of them above 1.
        let octaves: Vec<f32> = (0..1024).map(|i| 2f32.powi(i % 64 - 32)).collect();
        let largest = |i: &u32| i % 64 == 63;
        assert_eq!(kept(&octaves, 0.5), (0..1024).filter(largest).collect::<Vec<_>>());
    }
}
