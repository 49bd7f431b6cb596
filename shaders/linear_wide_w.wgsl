// linear_wide_w: weights 32 bytes at a time: a processor that poses as a GPU fetches them lane by lane, at a cost a fetch.
// Needs integers of 64 bits.

override STEP: u32;  // 2 where w is E4M3, as x is, in rows of an even number of blocks; 1 where w is bf16

@group(0) @binding(4) var<storage, read> w: array<vec4<u64>>;  // [n, row_words(W, K) / 8]

alias Ws = array<vec4<u64>, 8>;

fn read_w(ws: ptr<function, Ws>, j: u32, step: u32) {
  (*ws)[j] = w[step];
}

fn w4(ws: ptr<function, Ws>, j: u32, c: u32) -> vec4<f32> {
  if (W == BF16) {
    let four = (*ws)[j][c];
    return vec4<f32>(bf16x2(u32(four)), bf16x2(u32(four >> 32u)));
  }
  let codes = (*ws)[j][c / 2u];
  return e4m3x4_small(u32(select(codes, codes >> 32u, c % 2u == 1u)));
}
