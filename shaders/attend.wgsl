// attend: softmax(q k^T / sqrt(DIM)) v of each row over one of SPLITS parts of its context, causal, paged, grouped-query;
// attend_merge puts the parts together. Reference: reference::attend
// A tile is ROWS rows of one span. grid (tiles, kv heads, splits); a thread has one query head of one row, so that all
// threads of a workgroup read the same keys and values. DIM is at most 256.

struct Params {
  scale: f32,  // of k, over sqrt(DIM)
  pages: u32,  // of a row of page_table
}

override WG: u32;
override DIM: u32;
override GROUP: u32;  // query heads a kv head
override SPLITS: u32;
override IN: u32;  // the dtype of q
override KV: u32;  // the dtype of the cache

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> parts: array<f32>;  // [m, q heads, SPLITS, DIM + 2]: sums, largest score, norm
@group(0) @binding(3) var<storage, read> q: array<u32>;  // [m, row_words(IN, q heads DIM)]
@group(0) @binding(4) var<storage, read> k: array<u32>;  // [rows, row_words(KV, DIM)]
@group(0) @binding(5) var<storage, read> v: array<u32>;  // as k
@group(0) @binding(6) var<storage, read> page_table: array<u32>;  // [sequences, pages]
@group(0) @binding(7) var<storage, read> spans: array<vec4<u32>>;  // first row, rows, seq, first position

// Positions whose scores are taken before their values are summed.
const CHUNK = 16u;
// Below every score.
const NONE = -3e38;

fn k4(row: u32, g: u32) -> vec4<f32> {
  let at = row * row_words(KV, DIM);
  if (KV == E4M3) {
    return e4m3x4(k[at + g]);
  } else if (KV == BF16) {
    return vec4<f32>(bf16x2(k[at + 2u * g]), bf16x2(k[at + 2u * g + 1u]));
  }
  let i = at + 4u * g;
  return bitcast<vec4<f32>>(vec4<u32>(k[i], k[i + 1u], k[i + 2u], k[i + 3u]));
}

fn v4(row: u32, g: u32) -> vec4<f32> {
  let at = row * row_words(KV, DIM);
  if (KV == E4M3) {
    return e4m3x4(v[at + g]);
  } else if (KV == BF16) {
    return vec4<f32>(bf16x2(v[at + 2u * g]), bf16x2(v[at + 2u * g + 1u]));
  }
  let i = at + 4u * g;
  return bitcast<vec4<f32>>(vec4<u32>(v[i], v[i + 1u], v[i + 2u], v[i + 3u]));
}

fn query(row: u32, head: u32, d: u32) -> f32 {
  if (d >= DIM) {
    return 0.0;
  }
  let column = head * DIM + d;
  let first = row * row_words(IN, KV_HEADS * GROUP * DIM);
  if (IN == BF16) {
    return bf16x2(q[first + column / 2u])[column % 2u];
  }
  return bitcast<f32>(q[first + column]);
}

@compute @workgroup_size(WG)
fn attend(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  // The span that the tile lies in.
  let rows = WG / GROUP;
  var tile = workgroup.x;
  var s = 0u;
  loop {
    if (s >= live[2]) {
      return;
    }
    let tiles = (spans[s].y + rows - 1u) / rows;
    if (tile < tiles) {
      break;
    }
    tile -= tiles;
    s++;
  }
  let span = spans[s];
  let context = span.w + min((tile + 1u) * rows, span.y);
  let part = ((context + SPLITS - 1u) / SPLITS + CHUNK - 1u) / CHUNK * CHUNK;
  let begin = workgroup.z * part;
  let end = min(begin + part, context);

  let index = tile * rows + lid / GROUP;  // of the row in its span
  let is_row = index < span.y && lid < rows * GROUP;
  let row = span.x + min(index, span.y - 1u);
  let head = workgroup.y * GROUP + lid % GROUP;
  let own = span.w + index;
  // Rows of the cache are whole blocks of 16; where it has no element, neither has the query.
  let groups = (DIM + 15u) / 16u * 4u;
  var query4: array<vec4<f32>, 64>;
  var sums: array<vec4<f32>, 64>;
  for (var g = 0u; g < groups; g++) {
    let d = 4u * g;
    query4[g] = vec4<f32>(query(row, head, d), query(row, head, d + 1u), query(row, head, d + 2u), query(row, head, d + 3u));
    sums[g] = vec4<f32>(0.0);
  }
  var largest = NONE;
  var norm = 0.0;
  var scores: array<f32, CHUNK>;
  var slots: array<u32, CHUNK>;
  for (var first = begin; first < end; first += CHUNK) {
    var most = largest;
    for (var t = 0u; t < CHUNK; t++) {
      // Behind the end the last position stands in, and weighs nothing.
      let position = min(first + t, end - 1u);
      let slot = kv_row(page_table[span.z * p.pages + position / PAGE], workgroup.y, position);
      slots[t] = slot;
      var products = vec4<f32>(0.0);
      for (var g = 0u; g < groups; g += 4u) {
        for (var i = 0u; i < 4u; i++) {
          products += query4[g + i] * k4(slot, g + i);
        }
      }
      let score = ((products.x + products.y) + (products.z + products.w)) * p.scale;
      scores[t] = select(NONE, score, first + t <= min(own, end - 1u));
      most = max(most, scores[t]);
    }
    let correction = exp_f32(largest - most);
    largest = most;
    var weights = 0.0;
    for (var t = 0u; t < CHUNK; t++) {
      scores[t] = select(exp_f32(scores[t] - most), 0.0, scores[t] == NONE);
      weights += scores[t];
    }
    norm = norm * correction + weights;
    for (var g = 0u; g < groups; g++) {
      var values = vec4<f32>(0.0);
      for (var t = 0u; t < CHUNK; t += 4u) {
        for (var i = 0u; i < 4u; i++) {
          values += scores[t + i] * v4(slots[t + i], g);
        }
      }
      sums[g] = sums[g] * correction + values;
    }
  }
  if (!is_row) {
    return;
  }
  let at = ((row * KV_HEADS * GROUP + head) * SPLITS + workgroup.z) * (DIM + 2u);
  for (var d = 0u; d < DIM; d++) {
    parts[at + d] = sums[d / 4u][d % 4u];
  }
  parts[at + DIM] = largest;
  parts[at + DIM + 1u] = norm;
}
