// linear: out[m, first + n] (+)= x[m, K] . w[n, K]^T, decoded in registers, sums in f32. Reference: reference::linear
// A thread has a tile of TN channels x TM rows; neighbouring threads have neighbouring channels and the same rows.
// The binding of w holds `n` channels from `channel` on. grid (n / TN / WG, m / TM).

struct Params {
  n: u32,
  channel: u32,  // of the whole weight
  first: u32,  // column of out
  stride: u32,  // words a row of out
  x_scale: f32,
}

override WG: u32;
override TM: u32;  // at most 8
override TN: u32;  // at most 8
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
@group(0) @binding(4) var<storage, read> w: array<vec4<u32>>;  // [n, row_words(W, K) / 4]
@group(0) @binding(5) var<storage, read> w_scale: array<f32>;  // [all channels] where W is E4M3
@group(0) @binding(6) var<storage, read> x_scale: array<f32>;  // [m] where PER_TOKEN

// Blocks of 16 products whose sum is taken on its own.
const CHUNK = 32u;

// Blocks of 16 elements as vectors: one of E4M3, two of bf16, four of f32 for each row of the tile.
alias Blocks = array<vec4<u32>, 32>;

// Elements 4 c .. 4 c + 3 of a row's block.
fn x4(blocks: ptr<function, Blocks>, i: u32, c: u32) -> vec4<f32> {
  if (X == E4M3) {
    return e4m3x4((*blocks)[i][c]);
  } else if (X == BF16) {
    let v = (*blocks)[2u * i + c / 2u];
    let pair = select(v.xy, v.zw, c % 2u == 1u);
    return vec4<f32>(bf16x2(pair.x), bf16x2(pair.y));
  }
  return bitcast<vec4<f32>>((*blocks)[4u * i + c]);
}

fn w4(blocks: ptr<function, Blocks>, j: u32, c: u32) -> vec4<f32> {
  if (W == E4M3) {
    return e4m3x4_finite((*blocks)[j][c]);
  } else if (W == BF16) {
    let v = (*blocks)[2u * j + c / 2u];
    let pair = select(v.xy, v.zw, c % 2u == 1u);
    return vec4<f32>(bf16x2(pair.x), bf16x2(pair.y));
  }
  return bitcast<vec4<f32>>((*blocks)[4u * j + c]);
}

// Adds a quarter of a block's products. Called for each quarter with a constant: drivers unroll these short loops, and
// keep what they index in registers.
fn accumulate(xs: ptr<function, Blocks>, ws: ptr<function, Blocks>, c: u32, sums: ptr<function, array<f32, 64>>) {
  var channels: array<vec4<f32>, 8>;
  for (var j = 0u; j < TN; j++) {
    channels[j] = w4(ws, j, c);
  }
  for (var i = 0u; i < TM; i++) {
    let row = x4(xs, i, c);
    for (var j = 0u; j < TN; j++) {
      (*sums)[i * TN + j] += dot(row, channels[j]);
    }
  }
}

@compute @workgroup_size(WG)
fn linear(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = live[AXIS];
  let row = workgroup.y * TM;
  // Where two channels share a word of out, a tile begins with one.
  let shift = select(0u, p.first % 2u, OUT == BF16);
  let tile = (workgroup.x * WG + lid) * TN;
  if (row >= m || tile >= p.n + shift) {
    return;
  }
  let x_vectors = 4u >> X;  // of a block
  let w_vectors = 4u >> W;
  let blocks = (K + 15u) / 16u;
  var x_rows: array<u32, 8>;
  for (var i = 0u; i < TM; i++) {
    x_rows[i] = min(row + i, m - 1u) * blocks * x_vectors;
  }
  var w_rows: array<u32, 8>;
  for (var j = 0u; j < TN; j++) {
    w_rows[j] = min(max(tile + j, shift) - shift, p.n - 1u) * blocks * w_vectors;
  }
  var sums: array<f32, 64>;
  for (var first = 0u; first < blocks; first += CHUNK) {
    var chunk: array<f32, 64>;
    let end = min(first + CHUNK, blocks);
    for (var block = first; block < end; block++) {
      var ws: Blocks;
      for (var j = 0u; j < TN; j++) {
        for (var v = 0u; v < w_vectors; v++) {
          ws[j * w_vectors + v] = w[w_rows[j] + block * w_vectors + v];
        }
      }
      var xs: Blocks;
      for (var i = 0u; i < TM; i++) {
        for (var v = 0u; v < x_vectors; v++) {
          xs[i * x_vectors + v] = x[x_rows[i] + block * x_vectors + v];
        }
      }
      accumulate(&xs, &ws, 0u, &chunk);
      accumulate(&xs, &ws, 1u, &chunk);
      accumulate(&xs, &ws, 2u, &chunk);
      accumulate(&xs, &ws, 3u, &chunk);
    }
    for (var i = 0u; i < TM * TN; i++) {
      sums[i] += chunk[i];
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN; j++) {
      // Wraps below zero where the tile begins before the first channel.
      let c = tile + j - shift;
      if (row + i < m && c < p.n) {
        store(row + i, c, sums[i * TN + j]);
      }
    }
  }
}

// Scales a sum and stores it. Channels that share a word are one thread's.
fn store(row: u32, c: u32, sum: f32) {
  var y = sum;
  if (PER_TOKEN) {
    y *= x_scale[row];
  } else if (X == E4M3) {
    y *= p.x_scale;
  }
  if (W == E4M3) {
    y *= w_scale[p.channel + c];
  }
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
