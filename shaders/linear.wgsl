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
@group(0) @binding(3) var<storage, read> x: array<u32>;  // [m, row_words(X, K)]
@group(0) @binding(4) var<storage, read> w: array<u32>;  // [n, row_words(W, K)]
@group(0) @binding(5) var<storage, read> w_scale: array<f32>;  // [all channels] where W is E4M3
@group(0) @binding(6) var<storage, read> x_scale: array<f32>;  // [m] where PER_TOKEN

// Groups of four products whose sum is taken on its own.
const CHUNK = 64u;

fn x4(row: u32, g: u32) -> vec4<f32> {
  let at = row * row_words(X, K);
  if (X == E4M3) {
    return e4m3x4(x[at + g]);
  } else if (X == BF16) {
    return vec4<f32>(bf16x2(x[at + 2u * g]), bf16x2(x[at + 2u * g + 1u]));
  }
  let i = at + 4u * g;
  return bitcast<vec4<f32>>(vec4<u32>(x[i], x[i + 1u], x[i + 2u], x[i + 3u]));
}

fn w4(row: u32, g: u32) -> vec4<f32> {
  let at = row * row_words(W, K);
  if (W == E4M3) {
    return e4m3x4_finite(w[at + g]);
  } else if (W == BF16) {
    return vec4<f32>(bf16x2(w[at + 2u * g]), bf16x2(w[at + 2u * g + 1u]));
  }
  let i = at + 4u * g;
  return bitcast<vec4<f32>>(vec4<u32>(w[i], w[i + 1u], w[i + 2u], w[i + 3u]));
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
  var sums: array<f32, 64>;
  for (var i = 0u; i < TM * TN; i++) {
    sums[i] = 0.0;
  }
  let groups = (K + 3u) / 4u;
  for (var first = 0u; first < groups; first += CHUNK) {
    var chunk: array<f32, 64>;
    for (var i = 0u; i < TM * TN; i++) {
      chunk[i] = 0.0;
    }
    let end = min(first + CHUNK, groups);
    for (var g = first; g < end; g++) {
      var xs: array<vec4<f32>, 8>;
      for (var i = 0u; i < TM; i++) {
        xs[i] = x4(min(row + i, m - 1u), g);
      }
      for (var j = 0u; j < TN; j++) {
        let ws = w4(min(max(tile + j, shift) - shift, p.n - 1u), g);
        for (var i = 0u; i < TM; i++) {
          chunk[i * TN + j] += dot(xs[i], ws);
        }
      }
    }
    for (var i = 0u; i < TM * TN; i++) {
      sums[i] += chunk[i];
    }
  }
  for (var i = 0u; i < TM; i++) {
    if (row + i >= m) {
      break;
    }
    for (var j = 0u; j < TN; j++) {
      let c = tile + j - shift;
      if (c < p.n) {
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
