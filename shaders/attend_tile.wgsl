// attend_tile: what the variants of attend share: parameters, bindings, and which rows and positions a workgroup takes.

struct Params {
  scale: f32,  // of k, over sqrt(DIM)
  pages: u32,  // of a row of page_table
  splits: u32,
  base: u32,  // the first tile of this dispatch
  begin: u32,  // its first kv head
  // Where WHOLE:
  v_scale: f32,
  inv: f32,  // the reciprocal of a static scale of out
  stride: u32,  // words a row of out
}

override WG: u32;
override DIM: u32;
override GROUP: u32;  // query heads a kv head
override IN: u32;  // the dtype of q
override KV: u32;  // the dtype of the cache
override WHOLE: bool;  // rows are written at once: contexts are one part, DIM a multiple of 16, no scale a row's own
override OUT: u32;  // the dtype of what is written then

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> parts: array<f32>;  // [m, q heads, splits, DIM + 2]: sums, largest score, norm
@group(0) @binding(3) var<storage, read> q: array<u32>;  // [m, row_words(IN, q heads DIM)]
@group(0) @binding(4) var<storage, read> k: array<vec4<u32>>;  // [rows, row_words(KV, DIM) / 4]
@group(0) @binding(5) var<storage, read> v: array<vec4<u32>>;  // as k
@group(0) @binding(6) var<storage, read> page_table: array<u32>;  // [sequences, pages]
@group(0) @binding(7) var<storage, read> spans: array<vec4<u32>>;  // first row, rows, seq, first position
@group(0) @binding(8) var<storage, read_write> out: array<u32>;  // [m, row_words(OUT, q heads DIM)] where WHOLE

// Positions whose scores are taken before their values are summed; parts are whole chunks.
const CHUNK = 16u;
// Positions whose sums are taken on their own, so that sums in f32 stay short.
const SECTION = 256u;
// Below every score.
const NONE = -3e38;

// Some rows of one span, and the part of their context that a workgroup goes through.
struct Tile {
  is_any: bool,
  span: vec4<u32>,
  index: u32,  // of the first row in the span
  begin: u32,
  end: u32,
}

// The tile of a workgroup, `rows` rows long.
fn find_tile(workgroup: vec3<u32>, rows: u32) -> Tile {
  var tile = p.base + workgroup.x;
  var s = 0u;
  loop {
    if (s >= live[2]) {
      return Tile(false, vec4<u32>(0u), 0u, 0u, 0u);
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
  let part = ((context + p.splits - 1u) / p.splits + CHUNK - 1u) / CHUNK * CHUNK;
  let begin = workgroup.z * part;
  return Tile(true, span, tile * rows, begin, min(begin + part, context));
}

// Whether the chunk at `first` is the last of a section of a tile's part.
fn ends_section(first: u32, tile: Tile) -> bool {
  let next = first + CHUNK;
  return next >= tile.end || (next - tile.begin) % SECTION == 0u;
}

// Where a row's part of a head lies in parts.
fn part_at(row: u32, head: u32, split: u32) -> u32 {
  return ((row * KV_HEADS * GROUP + head) * p.splits + split) * (DIM + 2u);
}

// Stores four elements of a row's head, from d on, of which these are the sums: where WHOLE.
fn store_whole(row: u32, head: u32, d: u32, sums: vec4<f32>, norm: f32) {
  store4(row * p.stride, (head * DIM + d) / 4u, sums * p.v_scale / norm, p.inv);
}

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
