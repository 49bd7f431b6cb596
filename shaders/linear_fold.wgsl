// linear_fold: what the shaders share that fold an op into linear.

// Four sums from `at` on, of channels from c on, scaled, as a buffer of `dtype` between the two ops would have them.
fn between4(dtype: u32, row: u32, c: u32, sums: ptr<function, array<f32, 64>>, at: u32) -> vec4<f32> {
  return vec4<f32>(
    rounded(dtype, scaled(row, c, (*sums)[at])),
    rounded(dtype, scaled(row, c + 1u, (*sums)[at + 1u])),
    rounded(dtype, scaled(row, c + 2u, (*sums)[at + 2u])),
    rounded(dtype, scaled(row, c + 3u, (*sums)[at + 3u])),
  );
}
