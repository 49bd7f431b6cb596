// attend_merge: the rows of attend from their parts, cols = q heads x dim. Reference: reference::attend
// parts: [m, q heads, splits, dim + 2] f32: sums, largest score, norm. grid (m), a block a row.

KERNEL(256, 1) attend_merge(const u32* live, u32 axis, void* out, float* out_scale, float inv, u32 dtype, u32 cols,
                            const float* parts, u32 dim, u32 splits, float v_scale) {
  SHARED(float, scratch, 32);
  u32 row = blockIdx.x;
  if (row >= live[axis]) return;
  auto merged = [&](u32 column) {
    const float* own = parts + (size_t)(row * (cols / dim) + column / dim) * splits * (dim + 2);
    u32 d = column % dim;
    float largest = own[dim];
    for (u32 s = 1; s < splits; s++) largest = fmaxf(largest, own[s * (dim + 2) + dim]);
    float sum = 0.0f, norm = 0.0f;
    for (u32 s = 0; s < splits; s++, own += dim + 2) {
      float weight = exp_f32(own[dim] - largest);
      sum = fmaf(weight, own[d], sum);
      norm = fmaf(weight, own[dim + 1], norm);
    }
    return sum * v_scale / norm;
  };
  store_act({out, out_scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    Four v;
#pragma unroll
    for (u32 i = 0; i < 4; i++) v.x[i] = merged(min(4 * g + i, cols - 1));
    return v;
  });
}
ENTRY(attend_merge)
