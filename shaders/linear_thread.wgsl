// linear_thread: linear by threads that need no others. A thread has a tile of TN channels x TM rows; neighbouring threads
// have neighbouring tiles and the same rows. Others say how weights are read: STEP blocks of 16 elements at a time, by
// read_w as Ws, whose values w4 gives four by four; which channels make a tile (channel_of); and where the sums of one of
// its rows go (finish).

override WG: u32;
override TM: u32;  // at most 8
override TN: u32;  // at most 8

// Blocks of 16 products whose sums are taken on their own before they are added to the others: four additions each, and
// about as many chunks, so that both sums are short.
fn chunk_of(blocks: u32) -> u32 {
  var count = 1u;
  for (; 4u * count * count < blocks; count *= 2u) {
  }
  return count;
}

// A step of each row of the tile as vectors: of a block one of E4M3, two of bf16, four of f32.
alias Xs = array<vec4<u32>, 32>;

// Elements 4 c .. 4 c + 3 of a row's step, codes small; of NaN codes any number.
fn x4(xs: ptr<function, Xs>, i: u32, c: u32) -> vec4<f32> {
  if (X == E4M3) {
    return e4m3x4_small((*xs)[STEP * i + c / 4u][c % 4u]);
  } else if (X == BF16) {
    return bf16_quarter((*xs)[2u * i + c / 2u], c);
  }
  return bitcast<vec4<f32>>((*xs)[4u * i + c]);
}

// Four of eight numbers: the first of them for even c.
fn bf16_quarter(eight: vec4<u32>, c: u32) -> vec4<f32> {
  let pair = select(eight.xy, eight.zw, c % 2u == 1u);
  return vec4<f32>(bf16x2(pair.x), bf16x2(pair.y));
}

// Adds four products a sum. Called for each four of a step with a constant: drivers unroll these short loops, and keep what
// they index in registers.
fn accumulate(xs: ptr<function, Xs>, ws: ptr<function, Ws>, c: u32, sums: ptr<function, array<f32, 64>>) {
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

// The upper bit of each byte that is a NaN code.
fn nan_bits(codes: vec4<u32>) -> vec4<u32> {
  return ((codes & vec4<u32>(0x7f7f7f7fu)) + vec4<u32>(0x01010101u)) & vec4<u32>(0x80808080u);
}

// Whether a row of codes has a NaN.
fn has_nan(first: u32, blocks: u32) -> bool {
  var seen = vec4<u32>();
  for (var block = 0u; block < blocks; block++) {
    seen |= nan_bits(x[first + block]);
  }
  return any(seen != vec4<u32>());
}

fn run_tile(workgroup: vec3<u32>, lid: u32) {
  let m = live[AXIS];
  let row = (p.base + workgroup.y) * TM;
  let tile = ((p.begin + workgroup.x) * WG + lid) * TN;
  if (row >= m || tile >= p.n + shifted()) {
    return;
  }
  let blocks = (K + 15u) / 16u;
  let steps = blocks / STEP;
  let vectors = STEP * (4u >> X);
  var x_rows: array<u32, 8>;
  for (var i = 0u; i < TM; i++) {
    x_rows[i] = min(row + i, m - 1u) * steps * vectors;
  }
  var w_rows: array<u32, 8>;
  for (var j = 0u; j < TN; j++) {
    w_rows[j] = channel_of(tile, j) * steps;
  }
  // A NaN among the codes of a row makes all of its sums NaN. Codes are decoded as if there were none, and the whole tile's
  // words are looked at for one: it leaves the upper bit of a byte.
  var seen = vec4<u32>();
  let length = max(chunk_of(blocks) / STEP, 1u);
  var sums: array<f32, 64>;
  var chunk: array<f32, 64>;
  for (var first = 0u; first < steps; first += length) {
    let end = min(first + length, steps);
    for (var step = first; step < end; step++) {
      var ws: Ws;
      for (var j = 0u; j < TN; j++) {
        read_w(&ws, j, w_rows[j] + step);
      }
      var xs: Xs;
      for (var i = 0u; i < TM; i++) {
        for (var v = 0u; v < vectors; v++) {
          let words = x[x_rows[i] + step * vectors + v];
          xs[i * vectors + v] = words;
          if (X == E4M3) {
            seen |= nan_bits(words);
          }
        }
      }
      accumulate(&xs, &ws, 0u, &chunk);
      accumulate(&xs, &ws, 1u, &chunk);
      accumulate(&xs, &ws, 2u, &chunk);
      accumulate(&xs, &ws, 3u, &chunk);
      if (STEP == 2u) {
        accumulate(&xs, &ws, 4u, &chunk);
        accumulate(&xs, &ws, 5u, &chunk);
        accumulate(&xs, &ws, 6u, &chunk);
        accumulate(&xs, &ws, 7u, &chunk);
      }
    }
    for (var i = 0u; i < TM * TN; i++) {
      sums[i] += chunk[i];
      chunk[i] = 0.0;
    }
  }
  let unit = select(1.0, e4m3_unit(), X == E4M3) * select(1.0, e4m3_unit(), W == E4M3);
  for (var i = 0u; i < TM; i++) {
    let is_nan = any(seen != vec4<u32>()) && has_nan(x_rows[i], blocks);
    for (var j = 0u; j < TN; j++) {
      let sum = sums[i * TN + j] * unit;
      sums[i * TN + j] = select(sum, bitcast<f32>(bitcast<u32>(sum) | 0x7fc00000u), is_nan);
    }
    if (row + i < m) {
      finish(row + i, tile, &sums, i * TN);
    }
  }
}
