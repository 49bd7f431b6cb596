// abs_max: out = max(out, max |x|) of x[m, cols]. Reference: reference::abs_max
// grid (m), a block a row; numbers that are not negative order as their bits do.

KERNEL(256, 1) abs_max(const u32* live, u32 axis, const float* x, float* out, u32 cols) {
  SHARED(float, scratch, 32);
  dependency_wait();
  u32 row = blockIdx.x;
  if (row >= live[axis]) return;
  float most = 0.0f;
  for (u32 g = threadIdx.x; g < (cols + 3) / 4; g += blockDim.x) {
    Four v = load4(x, F32, (size_t)row * padded(cols) + 4 * g);
#pragma unroll
    for (u32 i = 0; i < 4; i++) most = 4 * g + i < cols ? fmaxf(most, fabsf(v.x[i])) : most;
  }
  most = block_reduce<Max>(most, scratch);
  if (threadIdx.x == 0) atomicMax((u32*)out, __float_as_uint(most));
}
ENTRY(abs_max)
