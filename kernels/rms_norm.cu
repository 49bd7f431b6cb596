// rms_norm: out[m, cols] = x / sqrt(mean(x^2) + eps) * gamma[cols]. Reference: reference::rms_norm
// grid (m), a block a row; squares are exact in f64 and so is, nearly, their sum.

KERNEL(256, 1) rms_norm(const u32* live, u32 axis, void* out, float* scale, float inv, u32 dtype, u32 cols,
                        const float* x, const float* gamma, float eps) {
  SHARED(float, scratch, 32);
  SHARED(double, sums, 32);
  dependency_wait();
  u32 row = blockIdx.x;
  if (row >= live[axis]) return;
  size_t first = (size_t)row * padded(cols);
  double sum = 0.0;
  for (u32 g = threadIdx.x; g < (cols + 3) / 4; g += blockDim.x) {
    Four v = load4(x, F32, first + 4 * g);
#pragma unroll
    for (u32 i = 0; i < 4; i++) sum += 4 * g + i < cols ? (double)v.x[i] * (double)v.x[i] : 0.0;
  }
  float inverse = (float)(1.0 / sqrt(block_reduce<Add>(sum, sums) / cols + (double)eps));
  store_act({out, scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    Four v = load4(x, F32, first + 4 * g), by = load4(gamma, F32, 4 * g);
#pragma unroll
    for (int i = 0; i < 4; i++) v.x[i] = v.x[i] * inverse * by.x[i];
    return v;
  });
}
ENTRY(rms_norm)
