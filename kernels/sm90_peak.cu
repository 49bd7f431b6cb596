// sm90_peak: the peak of E4M3 products on the tensor cores of a warpgroup, as sm90_linear_e4m3 has them: `rounds` times eight
// of 64 x 128 x 32. A block is one warpgroup; it asks for 24 KiB of shared memory. grid (any); out as in peak_mma.cuh.

KERNEL(128, 2) sm90_peak(u32 rounds, u32* out) {
  dependency_wait();
  LAUNCH_SHARED(shared);
  u32* codes = (u32*)shared;
  for (u32 i = threadIdx.x; i < (64 + 128) * 128 / 4; i += 128) codes[i] = 0x38383838u;
  barrier_init_done();
  __syncthreads();
  u32 base = shared_address(shared);
  u64 x = matrix_descriptor(base), w = matrix_descriptor(base + 64 * 128);
  float d[64] = {};
  for (u32 round = 0; round < rounds; round++) {
    wgmma_begin();
#pragma unroll
    for (u32 i = 0; i < 8; i++) wgmma_e4m3(d, x + 2 * (i % 4), w + 2 * (i % 4), true);
    wgmma_commit();
    wgmma_wait<0>();
  }
  float least = 0.0f;
#pragma unroll
  for (u32 i = 0; i < 64; i++) least = fminf(least, d[i]);
  if (least < 0.0f) *out = 1;
}
ENTRY(sm90_peak)
