// dtype: how elements are packed into words. Rows of matrices are padded with zeros to
// whole blocks of 16 elements.

const F32 = 0u;
const BF16 = 1u;
const E4M3 = 2u;

// Words a row of `cols` elements.
fn row_words(dtype: u32, cols: u32) -> u32 {
  return (cols + 15u) / 16u * (16u >> dtype);
}

// The two bf16 elements of a word.
fn bf16x2(w: u32) -> vec2<f32> {
  return bitcast<vec2<f32>>(vec2<u32>(w << 16u, w & 0xffff0000u));
}

// The bf16 bits nearest to x, ties to even; NaN stays NaN.
fn bf16_encode(x: f32) -> u32 {
  let u = bitcast<u32>(x);
  let rounded = (u + 0x7fffu + ((u >> 16u) & 1u)) >> 16u;
  return select(rounded, (u >> 16u) | 0x40u, (u & 0x7fffffffu) > 0x7f800000u);
}

// Two numbers as a word of bf16.
fn bf16x2_encode(x: vec2<f32>) -> u32 {
  return bf16_encode(x.x) | (bf16_encode(x.y) << 16u);
}

// x as a dtype of reals keeps it.
fn rounded(dtype: u32, x: f32) -> f32 {
  return select(x, bitcast<f32>(bf16_encode(x) << 16u), dtype == BF16);
}
