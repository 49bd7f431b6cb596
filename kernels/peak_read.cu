// peak_read: reads x[count] once, for a measurement of the card's bandwidth; out is written where anything is not zero.
// grid (any): neighbouring threads read side by side, four vectors at a time.

KERNEL(256, 4) peak_read(const uint4* x, u32 count, u32* out) {
  dependency_wait();
  u32 step = gridDim.x * 256, all = 0;
  for (u32 i = blockIdx.x * 256 + threadIdx.x; i < count; i += 4 * step) {
    uint4 v[4] = {};
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      if (i + j * step < count) v[j] = stream16(x + i + j * step);
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) all |= v[j].x | v[j].y | v[j].z | v[j].w;
  }
  if (all != 0) *out = all;
}
ENTRY(peak_read)
