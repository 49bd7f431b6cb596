// act4: four numbers as a dtype keeps them, the one rounding point of everything that writes activations or a cache.

// The 4 >> dtype words of four numbers, the first of the vector; as codes times `inv`, the reciprocal of their scale.
fn words4(dtype: u32, v: vec4<f32>, inv: f32) -> vec4<u32> {
  if (dtype == E4M3) {
    return vec4<u32>(e4m3x4_encode(v * inv), 0u, 0u, 0u);
  } else if (dtype == BF16) {
    return vec4<u32>(bf16x2_encode(v.xy), bf16x2_encode(v.zw), 0u, 0u);
  }
  return bitcast<vec4<u32>>(v);
}

// Stores four activations from column 4 group on of a row that begins with the word `first`.
fn store4(first: u32, group: u32, v: vec4<f32>, inv: f32) {
  let words = words4(OUT, v, inv);
  let count = 4u >> OUT;
  for (var i = 0u; i < count; i++) {
    out[first + count * group + i] = words[i];
  }
}
