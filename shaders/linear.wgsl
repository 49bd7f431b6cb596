// linear: out[m, first + n] (+)= x[m, K] . w[n, K]^T, decoded in registers, sums in f32. Reference: reference::linear
// A thread has a tile of TN channels x TM rows; neighbouring threads have neighbouring channels and the same rows: for
// processors that pose as GPUs, and adapters without subgroups. grid (n / TN / WG, m / TM).

// Blocks of 16 elements as vectors: one of E4M3, two of bf16, four of f32 for each row of the tile.
alias Blocks = array<vec4<u32>, 32>;

// Elements 4 c .. 4 c + 3 of a row's block, codes small; of NaN codes any number.
fn x4(blocks: ptr<function, Blocks>, i: u32, c: u32) -> vec4<f32> {
  if (X == E4M3) {
    return e4m3x4_small((*blocks)[i][c]);
  } else if (X == BF16) {
    let v = (*blocks)[2u * i + c / 2u];
    let pair = select(v.xy, v.zw, c % 2u == 1u);
    return vec4<f32>(bf16x2(pair.x), bf16x2(pair.y));
  }
  return bitcast<vec4<f32>>((*blocks)[4u * i + c]);
}

fn w4(blocks: ptr<function, Blocks>, j: u32, c: u32) -> vec4<f32> {
  if (W == E4M3) {
    return e4m3x4_small((*blocks)[j][c]);
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
  let row = (p.base + workgroup.y) * TM;
  let tile = ((p.begin + workgroup.x) * WG + lid) * TN;
  if (row >= m || tile >= p.n + shifted()) {
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
    w_rows[j] = channel_at(tile + j) * blocks * w_vectors;
  }
  var seen = vec4<u32>();
  let length = chunk_of(blocks);
  var sums: array<f32, 64>;
  var chunk: array<f32, 64>;
  for (var first = 0u; first < blocks; first += length) {
    let end = min(first + length, blocks);
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
        if (X == E4M3) {
          seen |= nan_bits(xs[i]);
        }
      }
      accumulate(&xs, &ws, 0u, &chunk);
      accumulate(&xs, &ws, 1u, &chunk);
      accumulate(&xs, &ws, 2u, &chunk);
      accumulate(&xs, &ws, 3u, &chunk);
    }
    for (var i = 0u; i < TM * TN; i++) {
      sums[i] += chunk[i];
      chunk[i] = 0.0;
    }
  }
  store_tile(row, tile, &x_rows, seen, &sums);
}
