// linear_io: what the variants of linear share: parameters, bindings but for w, blocks of x, and a sum's way out.
// The binding of w holds `n` channels from `channel` on.

struct Params {
  n: u32,
  channel: u32,  // of the whole weight
  first: u32,  // column of out
  stride: u32,  // words a row of out
  x_scale: f32,
  base: u32,  // the first tile of rows of this dispatch
  begin: u32,  // its first workgroup of channels
  // Of the op that is folded in, where one is.
  inv: f32,  // the reciprocal of a static scale of out
  k_inv: f32,
  v_inv: f32,
  pages: u32,  // of a row of page_table
}

override AXIS: u32;  // which word of live counts the rows
override K: u32;
override X: u32;  // the dtype of x
override W: u32;  // the dtype of w
override OUT: u32;  // the dtype of out
override PER_TOKEN: bool;  // x has a scale a row
override ADD: bool;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;  // [m, stride]
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;  // [m, row_words(X, K) / 4]
@group(0) @binding(5) var<storage, read> w_scale: array<f32>;  // [all channels] where W is E4M3
@group(0) @binding(6) var<storage, read> x_scale: array<f32>;  // [m] where PER_TOKEN

// 16 elements of x; blocks count from its first row on.
fn x16(block: u32) -> mat4x4<f32> {
  let at = block * (4u >> X);
  if (X == E4M3) {
    return codes16(x[at]);
  } else if (X == BF16) {
    return bf16x16(x[at], x[at + 1u]);
  }
  return f32x16(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
}

// Channels before the first of a tile where two share a word of out: there a tile begins with a word.
fn shifted() -> u32 {
  return select(0u, p.first % 2u, OUT == BF16);
}

// The channel of a place in a tile, of those that there are.
fn channel_at(place: u32) -> u32 {
  return min(max(place, shifted()) - shifted(), p.n - 1u);
}

// Stores the sum of a place in a tile, where there is such a channel and row.
fn store_at(row: u32, place: u32, sum: f32) {
  let c = place - shifted();  // wraps below zero where the tile begins before the first channel
  if (row < live[AXIS] && c < p.n) {
    store(row, c, sum);
  }
}

// What a sum stands for.
fn scaled(row: u32, c: u32, sum: f32) -> f32 {
  var y = sum;
  if (PER_TOKEN) {
    y *= x_scale[row];
  } else if (X == E4M3) {
    y *= p.x_scale;
  }
  if (W == E4M3) {
    y *= w_scale[p.channel + c];
  }
  return y;
}

// Scales a sum and stores it. Channels that share a word are one thread's.
fn store(row: u32, c: u32, sum: f32) {
  let y = scaled(row, c, sum);
  let column = p.first + c;
  if (OUT == BF16) {
    let at = row * p.stride + column / 2u;
    let shift = 16u * (column % 2u);
    out[at] = (out[at] & ~(0xffffu << shift)) | (bf16_encode(y) << shift);
  } else {
    let at = row * p.stride + column;
    out[at] = bitcast<u32>(select(y, bitcast<f32>(out[at]) + y, ADD));
  }
}
