// gather: out[w, cols] = x[wanted[w], cols]. Reference: Op::Gather
// grid (w), a block a row.

KERNEL(256, 1) gather(const u32* live, const u32* wanted, const float* x, float* out, u32 cols) {
  dependency_wait();
  u32 row = blockIdx.x, stride = padded(cols);
  if (row >= live[1]) return;
  size_t from = (size_t)wanted[row] * stride;
  for (u32 g = threadIdx.x; g < (cols + 3) / 4; g += blockDim.x) {
    store4(out, F32, (size_t)row * stride + 4 * g, load4(x, F32, from + 4 * g));
  }
}
ENTRY(gather)
