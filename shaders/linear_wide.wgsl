// linear_wide: linear for codes of both operands, few rows and K a multiple of 32, which reads weights 32 bytes at a time:
// a processor that poses as a GPU fetches them lane by lane, at a cost a fetch. Needs integers of 64 bits.
// Reference: reference::linear
// A thread has a tile of TN channels x TM rows, as in linear. grid (n / TN / WG, m / TM).

@group(0) @binding(4) var<storage, read> w: array<vec4<u64>>;  // [n, K / 32]

// A pair of blocks of each of at most two rows, and of each channel.
alias Xs = array<vec4<u32>, 4>;
alias Ws = array<vec4<u64>, 8>;

// Adds an eighth of a pair's products. Called for each eighth with a constant, as in linear.
fn accumulate(xs: ptr<function, Xs>, ws: ptr<function, Ws>, c: u32, sums: ptr<function, array<f32, 64>>) {
  var channels: array<vec4<f32>, 8>;
  for (var j = 0u; j < TN; j++) {
    let codes = (*ws)[j][c / 2u];
    channels[j] = e4m3x4_small(u32(select(codes, codes >> 32u, c % 2u == 1u)));
  }
  for (var i = 0u; i < TM; i++) {
    let row = e4m3x4_small((*xs)[2u * i + c / 4u][c % 4u]);
    for (var j = 0u; j < TN; j++) {
      (*sums)[i * TN + j] += dot(row, channels[j]);
    }
  }
}

@compute @workgroup_size(WG)
fn linear_wide(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = live[AXIS];
  let row = (p.base + workgroup.y) * TM;
  let tile = ((p.begin + workgroup.x) * WG + lid) * TN;
  if (row >= m || tile >= p.n + shifted()) {
    return;
  }
  let pairs = K / 32u;
  var x_rows: array<u32, 8>;
  for (var i = 0u; i < TM; i++) {
    x_rows[i] = min(row + i, m - 1u) * 2u * pairs;
  }
  var w_rows: array<u32, 8>;
  for (var j = 0u; j < TN; j++) {
    w_rows[j] = channel_at(tile + j) * pairs;
  }
  var seen = vec4<u32>();
  let length = max(chunk_of(2u * pairs) / 2u, 1u);
  var sums: array<f32, 64>;
  var chunk: array<f32, 64>;
  for (var first = 0u; first < pairs; first += length) {
    let end = min(first + length, pairs);
    for (var pair = first; pair < end; pair++) {
      var ws: Ws;
      for (var j = 0u; j < TN; j++) {
        ws[j] = w[w_rows[j] + pair];
      }
      var xs: Xs;
      for (var i = 0u; i < TM; i++) {
        for (var v = 0u; v < 2u; v++) {
          xs[2u * i + v] = x[x_rows[i] + 2u * pair + v];
          seen |= nan_bits(xs[2u * i + v]);
        }
      }
      accumulate(&xs, &ws, 0u, &chunk);
      accumulate(&xs, &ws, 1u, &chunk);
      accumulate(&xs, &ws, 2u, &chunk);
      accumulate(&xs, &ws, 3u, &chunk);
      accumulate(&xs, &ws, 4u, &chunk);
      accumulate(&xs, &ws, 5u, &chunk);
      accumulate(&xs, &ws, 6u, &chunk);
      accumulate(&xs, &ws, 7u, &chunk);
    }
    for (var i = 0u; i < TM * TN; i++) {
      sums[i] += chunk[i];
      chunk[i] = 0.0;
    }
  }
  store_tile(row, tile, &x_rows, seen, &sums);
}
