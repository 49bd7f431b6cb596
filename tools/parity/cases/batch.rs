//! Ragged batches and paged caches, for `RopeAppend` and `Attend`.

use quaver_core::op::{Buf, DType, Heads, Kv, Rows, StaticScale};

use crate::parity::Rng;
use crate::parity::bound::decode;
use crate::parity::build::{Axis, Builder, encode};

/// A dtype of the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cache {
    F32,
    Bf16,
    Fp8,
}

impl Cache {
    pub const ALL: [Cache; 3] = [Cache::F32, Cache::Bf16, Cache::Fp8];

    /// As names of cases spell it.
    pub fn name(self) -> &'static str {
        match self {
            Cache::F32 => "f32",
            Cache::Bf16 => "bf16",
            Cache::Fp8 => "fp8",
        }
    }

    pub fn dtype(self) -> DType {
        match self {
            Cache::F32 => DType::F32,
            Cache::Bf16 => DType::Bf16,
            Cache::Fp8 => DType::E4m3,
        }
    }

    /// Scales of k and v; they differ, so that one is not taken for the other.
    pub fn scales(self) -> Option<(StaticScale, StaticScale)> {
        (self == Cache::Fp8).then_some((StaticScale::new(0.0123), StaticScale::new(0.0271)))
    }
}

/// Spans that nobody thought of: prefills and decode rows at any position below 300.
pub fn spans(rng: &mut Rng) -> Vec<(usize, usize)> {
    let rows = |rng: &mut Rng| if rng.below(2) == 0 { 1 } else { 1 + rng.below(50) };
    (0..1 + rng.below(6)).map(|_| (rng.below(250), rows(rng))).collect()
}

/// Head counts that nobody thought of.
pub fn heads(rng: &mut Rng) -> Heads {
    let (kv, group, dim) = (1 + rng.below(4), 1 + rng.below(5), 2 * (4 + rng.below(45)));
    Heads { q: kv * group, kv, dim }
}

/// Runs of rows of several sequences, and where their pages lie.
pub struct Batch {
    /// (first position, rows) of each.
    pub spans: Vec<(usize, usize)>,
    /// Each span's sequence: its row of the page table.
    pub seqs: Vec<usize>,
    /// `[sequences, pages]`; `u32::MAX` where a sequence has no page.
    pub page_table: Vec<u32>,
    /// Pages a row of the table.
    pub table_cols: usize,
    pub page_tokens: usize,
    /// Pages of the cache.
    pub pages: usize,
}

impl Batch {
    /// Gives each sequence its pages in random order: all up to its last position, or only those that the batch itself
    /// writes. Some pages belong to nobody.
    pub fn new(rng: &mut Rng, spans: &[(usize, usize)], page_tokens: usize, has_past: bool) -> Self {
        let first_page = |&(first, _): &(usize, usize)| if has_past { 0 } else { first / page_tokens };
        let end_page = |&(first, rows): &(usize, usize)| (first + rows).div_ceil(page_tokens);
        let needed: usize = spans.iter().map(|span| end_page(span) - first_page(span)).sum();
        let pages = needed + 3;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        rng.shuffle(&mut free);
        let sequences = spans.len() + 2;
        let mut seqs: Vec<usize> = (0..sequences).collect();
        rng.shuffle(&mut seqs);
        seqs.truncate(spans.len());
        let table_cols = spans.iter().map(end_page).max().unwrap_or(1);
        let mut page_table = vec![u32::MAX; sequences * table_cols];
        for (span, seq) in spans.iter().zip(&seqs) {
            for page in first_page(span)..end_page(span) {
                page_table[seq * table_cols + page] = free.pop().expect("counted");
            }
        }
        Batch { spans: spans.to_vec(), seqs, page_table, table_cols, page_tokens, pages }
    }

    /// Gives a span the first pages of another: a prefix that both have.
    pub fn share(&mut self, from: usize, to: usize, pages: usize) {
        let [from, to] = [from, to].map(|span| self.seqs[span] * self.table_cols);
        self.page_table.copy_within(from..from + pages, to);
    }

    pub fn rows(&self) -> usize {
        self.spans.iter().map(|span| span.1).sum()
    }

    /// Row by row: (sequence, position).
    pub fn each_row(&self) -> impl Iterator<Item = (usize, usize)> {
        let spans = self.spans.iter().zip(&self.seqs);
        spans.flat_map(|(&(first, rows), &seq)| (first..first + rows).map(move |position| (seq, position)))
    }

    /// The row of the cache that holds a position.
    pub fn slot(&self, seq: usize, position: usize, kv_heads: usize, head: usize) -> usize {
        let page = self.page_table[seq * self.table_cols + position / self.page_tokens] as usize;
        (page * kv_heads + head) * self.page_tokens + position % self.page_tokens
    }

    /// A builder of this size.
    pub fn builder(&self) -> Builder {
        Builder::new(self.rows(), 0, self.spans.len())
    }

    /// A builder of this size without padding.
    pub fn tight_builder(&self) -> Builder {
        Builder::tight(self.rows(), 0, self.spans.len())
    }

    /// The inputs that say who each row is.
    pub fn inputs(&self, b: &mut Builder) -> Rows {
        let (seqs, positions): (Vec<u32>, Vec<u32>) = self.each_row().map(|(s, p)| (s as u32, p as u32)).unzip();
        let (mut spans, mut row) = (Vec::new(), 0);
        for (&(first, rows), &seq) in self.spans.iter().zip(&self.seqs) {
            spans.extend([row, rows, seq, first].map(|n| n as u32));
            row += rows;
        }
        let sequences = self.page_table.len() / self.table_cols;
        Rows {
            seq: b.input_u32("seq", Axis::Rows, 1, &seqs),
            position: b.input_u32("position", Axis::Rows, 1, &positions),
            page_table: b.input_u32("page_table", Axis::Fixed(sequences), self.table_cols, &self.page_table),
            spans: b.input_u32("spans", Axis::Fixed(sequences), 4, &spans),
        }
    }

    /// Rows of a cache buffer.
    pub fn cache_rows(&self, heads: Heads) -> usize {
        self.pages * heads.kv * self.page_tokens
    }

    /// A cache that holds random keys and values at every position up to each sequence's last, and poison elsewhere;
    /// with the real values of k and v.
    pub fn filled_cache(&self, rng: &mut Rng, b: &mut Builder, heads: Heads, cache: Cache) -> (Kv, [Vec<f32>; 2]) {
        let rows = self.cache_rows(heads);
        let size = heads.dim * cache.dtype().size();
        let scales = cache.scales();
        let sides = [("k", scales.map(|s| s.0)), ("v", scales.map(|s| s.1))].map(|(name, scale)| {
            let mut bytes = vec![0xff; rows * size];
            for (&(first, count), &seq) in self.spans.iter().zip(&self.seqs) {
                for (position, head) in (0..first + count).flat_map(|p| (0..heads.kv).map(move |head| (p, head))) {
                    let slot = self.slot(seq, position, heads.kv, head);
                    let mut values = rng.normals(heads.dim, 1.0);
                    values.iter_mut().for_each(|x| *x *= scale.map_or(1.0, |s| s.inv));
                    bytes[slot * size..][..size].copy_from_slice(&encode(cache.dtype(), &values));
                }
            }
            let codes = decode(cache.dtype(), &bytes);
            (b.input(name, cache.dtype(), Axis::Fixed(rows), heads.dim, bytes), codes)
        });
        let [(k, k_values), (v, v_values)] = sides;
        (self.kv(k, v, cache), [k_values, v_values])
    }

    pub fn kv(&self, k: Buf, v: Buf, cache: Cache) -> Kv {
        Kv { k, v, page_tokens: self.page_tokens, scales: cache.scales() }
    }
}
