// rms_norm: out[m, cols] = x / sqrt(mean(x^2) + eps) * gamma[cols]. Reference: reference::rms_norm
// grid (m), a block a row; squares are exact in f64 and so is, nearly, their sum. A thread keeps the first four columns that it
// has, which are all of them where the row is not longer than the block.

KERNEL(1024, 1) rms_norm(const u32* live, u32 axis, void* out, float* scale, float inv, u32 dtype, u32 cols,
                         const float* x, const float* gamma, float eps) {
  SHARED(float, scratch, 32);
  SHARED(double, sums, 32);
  u32 row = blockIdx.x, groups = (cols + 3) / 4;
  size_t first = (size_t)row * padded(cols);
  Four own = {}, by = {};
  // Nobody's output.
  if (threadIdx.x < groups) by = load4(gamma, F32, 4 * threadIdx.x);
  dependency_wait();
  if (row >= live[axis]) return;
  double sum = 0.0;
  auto add = [&](u32 g, const Four& v) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) sum += 4 * g + i < cols ? (double)v.x[i] * (double)v.x[i] : 0.0;
  };
  if (threadIdx.x < groups) own = load4(x, F32, first + 4 * threadIdx.x), add(threadIdx.x, own);
  for (u32 g = threadIdx.x + blockDim.x; g < groups; g += blockDim.x) add(g, load4(x, F32, first + 4 * g));
  float inverse = (float)(1.0 / sqrt(block_reduce<Add>(sum, sums) / cols + (double)eps));
  store_act({out, scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    Four v = g == threadIdx.x ? own : load4(x, F32, first + 4 * g);
    Four factor = g == threadIdx.x ? by : load4(gamma, F32, 4 * g);
#pragma unroll
    for (int i = 0; i < 4; i++) v.x[i] = v.x[i] * inverse * factor.x[i];
    return v;
  });
}
ENTRY(rms_norm)
