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
@group(0) @binding(4) var<storage, read> k: array<vec4<u32>>;  // [rows, row_words(KV, DIM) / 4]
@group(0) @binding(5) var<storage, read> v: array<vec4<u32>>;  // as k
@group(0) @binding(6) var<storage, read> page_table: array<u32>;  // [sequences, pages]
@group(0) @binding(7) var<storage, read> spans: array<vec4<u32>>;  // first row, rows, seq, first position

// Positions whose scores are taken before their values are summed.
const CHUNK = 16u;
// Below every score.
const NONE = -3e38;

// 16 elements of a row of the cache.
fn k16(row: u32, block: u32) -> mat4x4<f32> {
  let at = (row * ((DIM + 15u) / 16u) + block) * (4u >> KV);
  if (KV == E4M3) {
    return codes16(k[at]);
  } else if (KV == BF16) {
    return bf16x16(k[at], k[at + 1u]);
  }
  return f32x16(k[at], k[at + 1u], k[at + 2u], k[at + 3u]);
}

fn v16(row: u32, block: u32) -> mat4x4<f32> {
  let at = (row * ((DIM + 15u) / 16u) + block) * (4u >> KV);
  if (KV == E4M3) {
    return codes16(v[at]);
  } else if (KV == BF16) {
    return bf16x16(v[at], v[at + 1u]);
  }
  return f32x16(v[at], v[at + 1u], v[at + 2u], v[at + 3u]);
}

fn codes16(a: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(e4m3x4(a.x), e4m3x4(a.y), e4m3x4(a.z), e4m3x4(a.w));
}

fn bf16x16(a: vec4<u32>, b: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(
    vec4<f32>(bf16x2(a.x), bf16x2(a.y)),
    vec4<f32>(bf16x2(a.z), bf16x2(a.w)),
    vec4<f32>(bf16x2(b.x), bf16x2(b.y)),
    vec4<f32>(bf16x2(b.z), bf16x2(b.w)),
  );
}

fn f32x16(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b), bitcast<vec4<f32>>(c), bitcast<vec4<f32>>(d));
}

fn product(a: mat4x4<f32>, b: mat4x4<f32>) -> f32 {
  return (dot(a[0], b[0]) + dot(a[1], b[1])) + (dot(a[2], b[2]) + dot(a[3], b[3]));
}

// Four elements of a query, zeros behind its end.
fn query4(row: u32, head: u32, d: u32) -> vec4<f32> {
  let first = row * row_words(IN, KV_HEADS * GROUP * DIM);
  var x = vec4<f32>(0.0);
  for (var i = 0u; i < 4u; i++) {
    let column = head * DIM + d + i;
    if (d + i >= DIM) {
      continue;
    }
    if (IN == BF16) {
      x[i] = bf16x2(q[first + column / 2u])[column % 2u];
    } else {
      x[i] = bitcast<f32>(q[first + column]);
    }
  }
  return x;
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
  if (index >= span.y || lid >= rows * GROUP) {
    return;
  }
  let row = span.x + index;
  let head = workgroup.y * GROUP + lid % GROUP;
  let own = span.w + index;
  let blocks = (DIM + 15u) / 16u;
  var queries: array<mat4x4<f32>, 16>;
  var sums: array<mat4x4<f32>, 16>;
  for (var b = 0u; b < blocks; b++) {
    let d = 16u * b;
    queries[b] = mat4x4<f32>(
      query4(row, head, d), query4(row, head, d + 4u), query4(row, head, d + 8u), query4(row, head, d + 12u));
  }
  var largest = NONE;
  var norm = 0.0;
  var scores: array<vec4<f32>, 4>;
  var slots: array<vec4<u32>, 4>;
  for (var first = begin; first < end; first += CHUNK) {
    var most = vec4<f32>(largest);
    for (var t = 0u; t < 4u; t++) {
      // Behind the end the last position stands in, and weighs nothing.
      let place = vec4<u32>(first + 4u * t) + vec4<u32>(0u, 1u, 2u, 3u);
      let at = min(place, vec4<u32>(end - 1u));
      let pages = span.z * p.pages;
      slots[t] = vec4<u32>(
        kv_row(page_table[pages + at.x / PAGE], workgroup.y, at.x),
        kv_row(page_table[pages + at.y / PAGE], workgroup.y, at.y),
        kv_row(page_table[pages + at.z / PAGE], workgroup.y, at.z),
        kv_row(page_table[pages + at.w / PAGE], workgroup.y, at.w),
      );
      var score = vec4<f32>(0.0);
      for (var b = 0u; b < blocks; b++) {
        let own = queries[b];
        score += vec4<f32>(
          product(own, k16(slots[t].x, b)),
          product(own, k16(slots[t].y, b)),
          product(own, k16(slots[t].z, b)),
          product(own, k16(slots[t].w, b)),
        );
      }
      scores[t] = select(vec4<f32>(NONE), score * p.scale, place <= vec4<u32>(min(own, end - 1u)));
      most = max(most, scores[t]);
    }
    let top = max(max(most.x, most.y), max(most.z, most.w));
    let correction = exp_f32(largest - top);
    largest = top;
    var weights = vec4<f32>(0.0);
    for (var t = 0u; t < 4u; t++) {
      let s = scores[t] - vec4<f32>(top);
      let weight = vec4<f32>(exp_f32(s.x), exp_f32(s.y), exp_f32(s.z), exp_f32(s.w));
      scores[t] = select(weight, vec4<f32>(0.0), scores[t] == vec4<f32>(NONE));
      weights += scores[t];
    }
    norm = norm * correction + ((weights.x + weights.y) + (weights.z + weights.w));
    for (var b = 0u; b < blocks; b++) {
      var values = mat4x4<f32>();
      for (var t = 0u; t < 4u; t++) {
        let near = v16(slots[t].x, b) * scores[t].x + v16(slots[t].y, b) * scores[t].y;
        values += near + (v16(slots[t].z, b) * scores[t].z + v16(slots[t].w, b) * scores[t].w);
      }
      sums[b] = sums[b] * correction + values;
    }
  }
  let at = ((row * KV_HEADS * GROUP + head) * SPLITS + workgroup.z) * (DIM + 2u);
  for (var d = 0u; d < DIM; d++) {
    parts[at + d] = sums[d / 16u][d / 4u % 4u][d % 4u];
  }
  parts[at + DIM] = largest;
  parts[at + DIM + 1u] = norm;
}
