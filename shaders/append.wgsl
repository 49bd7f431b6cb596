// append: k and v to the pages of their sequences, and the tables that rotate k and q before. Parameters: k_inv, v_inv, and
// `pages`, those of a row of page_table.

override DIM: u32;
override Q_HEADS: u32;
override KV: u32;  // the dtype of the cache

@group(0) @binding(7) var<storage, read_write> k: array<u32>;  // [rows, row_words(KV, DIM)]
@group(0) @binding(8) var<storage, read_write> v: array<u32>;  // as k
@group(0) @binding(9) var<storage, read> rope: array<f32>;  // [positions, row_words(F32, DIM)]: cosines, then sines
@group(0) @binding(10) var<storage, read> seq: array<u32>;  // [m]
@group(0) @binding(11) var<storage, read> position: array<u32>;  // [m]
@group(0) @binding(12) var<storage, read> page_table: array<u32>;  // [sequences, pages]

// Four elements of a head of k, or of v where that is KV_HEADS or more, from 4 g on, at a position and its page.
fn append4(page: u32, at: u32, head: u32, g: u32, x: vec4<f32>) {
  let slot = kv_row(page, head % KV_HEADS, at) * row_words(KV, DIM);
  let is_k = head < KV_HEADS;
  let words = words4(KV, x, select(p.v_inv, p.k_inv, is_k));
  let count = 4u >> KV;
  for (var i = 0u; i < count; i++) {
    if (is_k) {
      k[slot + count * g + i] = words[i];
    } else {
      v[slot + count * g + i] = words[i];
    }
  }
}
