// attend_merge: the rows of attend from their parts, cols = q heads x dim. Reference: reference::attend
// parts: [m, q heads, splits, dim + PART_TAIL] f32: sums, largest score, norm, parts in use. grid (m), a block a row. Shared
// memory: [q heads, splits + 1] f32, what each part weighs, and the norm.

KERNEL(256, 1) attend_merge(const u32* live, u32 axis, void* out, float* out_scale, float inv, u32 dtype, u32 cols,
                            const float* parts, u32 dim, u32 splits, float v_scale) {
  LAUNCH_SHARED(shared);
  SHARED(float, scratch, 32);
  float* weights = (float*)shared;
  dependency_wait();
  u32 row = blockIdx.x, lane = threadIdx.x % 32, heads = cols / dim, stride = dim + PART_TAIL;
  if (row >= live[axis]) return;
  const float* of_row = parts + (size_t)row * heads * splits * stride;
  u32 count = __float_as_uint(of_row[dim + 2]);
  for (u32 head = threadIdx.x / 32; head < heads; head += blockDim.x / 32) {
    const float* own = of_row + (size_t)head * splits * stride + dim;
    float largest = NONE, norm = 0.0f;
    for (u32 s = lane; s < count; s += 32) largest = fmaxf(largest, own[s * stride]);
    largest = warp_reduce<Max>(largest);
    for (u32 s = lane; s < count; s += 32) {
      float weight = exp_f32(own[s * stride] - largest);
      weights[head * (splits + 1) + s] = weight;
      norm = fmaf(weight, own[s * stride + 1], norm);
    }
    norm = warp_reduce<Add>(norm);
    if (lane == 0) weights[head * (splits + 1) + splits] = norm;
  }
  __syncthreads();
  auto merged = [&](u32 column) {
    u32 head = column / dim;
    const float *own = of_row + (size_t)head * splits * stride + column % dim, *by = weights + head * (splits + 1);
    float sum = 0.0f;
    for (u32 s = 0; s < count; s++) sum = fmaf(by[s], own[s * stride], sum);
    return sum * v_scale / by[splits];
  };
  store_act({out, out_scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    Four v;
#pragma unroll
    for (u32 i = 0; i < 4; i++) v.x[i] = merged(min(4 * g + i, cols - 1));
    return v;
  });
}
ENTRY(attend_merge)
