// linear_w: weights as vectors of four words, and blocks of 16 elements of them.

@group(0) @binding(4) var<storage, read> w: array<vec4<u32>>;  // [n, row_words(W, K) / 4]

fn w16(block: u32) -> mat4x4<f32> {
  let at = block * (4u >> W);
  if (W == E4M3) {
    return codes16_finite(w[at]);
  } else if (W == BF16) {
    return bf16x16(w[at], w[at + 1u]);
  }
  return f32x16(w[at], w[at + 1u], w[at + 2u], w[at + 3u]);
}
