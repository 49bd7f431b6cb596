// quantize: rounds or quantizes x[m, cols]. Reference: reference::quantize
// grid (m), a block a row.

KERNEL(256, 1) quantize(const u32* live, u32 axis, void* out, float* scale, float inv, u32 dtype, u32 cols,
                        const float* x) {
  SHARED(float, scratch, 32);
  dependency_wait();
  u32 row = blockIdx.x;
  if (row >= live[axis]) return;
  size_t first = (size_t)row * padded(cols);
  store_act({out, scale, inv, dtype, cols}, row, scratch, [&](u32 g) { return load4(x, F32, first + 4 * g); });
}
ENTRY(quantize)
