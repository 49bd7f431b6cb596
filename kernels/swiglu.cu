// swiglu: out[m, cols] = silu(gate) * up of gate_up[m, 2 cols]. Reference: reference::swiglu
// grid (m, blocks a row): see act.cuh.

KERNEL(256, 1) swiglu(const u32* live, u32 axis, void* out, float* scale, float inv, u32 dtype, u32 cols,
                      const void* gate_up, u32 in) {
  SHARED(float, scratch, 32);
  dependency_wait();
  u32 row = blockIdx.x;
  if (row >= live[axis]) return;
  size_t first = (size_t)row * padded(2 * cols);
  store_act({out, scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    Four v = load4(gate_up, in, first + 4 * g), up;
    if (cols % 4 == 0) {
      up = load4(gate_up, in, first + cols + 4 * g);
    } else {
      // Behind the last column stands padding, or the next row: it is dropped.
      for (u32 i = 0; i < 4; i++) up.x[i] = load1(gate_up, in, first + cols + min(4 * g + i, cols - 1));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) v.x[i] = silu(v.x[i]) * up.x[i];
    return v;
  });
}
ENTRY(swiglu)
