// act: activations [m, cols] to write, the one rounding point of every op that does.

struct Act {
  void* data;    // [m, padded(cols)]
  float* scale;  // [m] where each row has one, amax / 448; else null
  float inv;     // the reciprocal of a static scale
  u32 dtype;
  u32 cols;
};

// amax / 448, the f32 epsilon where that is zero or subnormal.
DEVICE float token_scale(float amax) {
  float scale = amax / 448.0f;
  return scale < 1.17549435e-38f ? 1.1920929e-7f : scale;
}

// Stores a row whose four numbers from column 4 g on are value4(g), which may be called twice. All threads of the row's
// blocks call, gridDim.y of them: one, where the row has a scale of its own. `scratch` has 32 elements of shared memory.
template <class F> DEVICE void store_act(const Act& out, u32 row, float* scratch, F value4) {
  u32 groups = (out.cols + 3) / 4;
  auto columns = [&](u32 g) {
    Four v = value4(g);
#pragma unroll
    for (u32 i = 0; i < 4; i++) v.x[i] = 4 * g + i < out.cols ? v.x[i] : 0.0f;
    return v;
  };
  float inv = out.inv;
  if (out.scale) {
    float amax = 0.0f;
    for (u32 g = threadIdx.x; g < groups; g += blockDim.x) {
      Four v = columns(g);
#pragma unroll
      for (int i = 0; i < 4; i++) amax = fmaxf(amax, fabsf(v.x[i]));
    }
    float scale = token_scale(block_reduce<Max>(amax, scratch));
    if (threadIdx.x == 0) out.scale[row] = scale;
    inv = 1.0f / scale;
  }
  for (u32 g = blockIdx.y * blockDim.x + threadIdx.x; g < groups; g += gridDim.y * blockDim.x) {
    Four v = columns(g);
    if (out.dtype == E4M3) {
#pragma unroll
      for (int i = 0; i < 4; i++) v.x[i] *= inv;
    }
    store4(out.data, out.dtype, (size_t)row * padded(out.cols) + 4 * g, v);
  }
}
