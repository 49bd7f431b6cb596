// linear: out[m, first + n] (+)= x[m, k] . w[n, k]^T of any element types, sums in f32: what no tensor core computes.
// Reference: reference::linear
// A block has 64 rows x 64 channels, a thread 4 x 4 of them. grid (n / 64, m / 64). `k` is padded.

#define STEP 16
#define TILE 64
// Products whose sum is taken on its own.
#define CHUNK 256

// Puts 64 rows of STEP elements where all can read them, transposed; zeros behind the last row.
DEVICE void stage(float (*tile)[TILE + 4], const void* from, u32 dtype, u32 first, u32 rows, u32 k, u32 at) {
  u32 row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
  Four v = {{0.0f, 0.0f, 0.0f, 0.0f}};
  if (first + row < rows) v = load4(from, dtype, (size_t)(first + row) * k + at + column);
#pragma unroll
  for (int i = 0; i < 4; i++) tile[column + i][row] = v.x[i];
}

KERNEL(256, 1) linear(const u32* live, u32 axis, const void* x, u32 x_type, const void* w, u32 w_type, u32 n, u32 k,
                      void* out, u32 out_type, u32 stride, u32 first, u32 add, float x_scale, const float* x_scales,
                      const float* w_scales) {
  dependency_wait();
  SHARED(float, staged, 2 * STEP * (TILE + 4));
  float(*xs)[TILE + 4] = (float(*)[TILE + 4])staged;
  float(*ws)[TILE + 4] = xs + STEP;
  u32 m = live[axis], row = blockIdx.y * TILE, channel = blockIdx.x * TILE;
  if (row >= m) return;
  u32 i0 = threadIdx.x / 16 * 4, j0 = threadIdx.x % 16 * 4;
  float sums[4][4] = {}, chunk[4][4] = {};
  for (u32 at = 0; at < k; at += STEP) {
    stage(xs, x, x_type, row, m, k, at);
    stage(ws, w, w_type, channel, n, k, at);
    __syncthreads();
#pragma unroll
    for (u32 c = 0; c < STEP; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) chunk[i][j] = fmaf(xs[c][i0 + i], ws[c][j0 + j], chunk[i][j]);
      }
    }
    __syncthreads();
    if ((at + STEP) % CHUNK == 0 || at + STEP == k) {
#pragma unroll
      for (int i = 0; i < 16; i++) {
        sums[i / 4][i % 4] += chunk[i / 4][i % 4];
        chunk[i / 4][i % 4] = 0.0f;
      }
    }
  }
  Epilogue e = {out, out_type, stride, first, add, x_scale, x_scales, w_scales};
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      if (row + i0 + i < m && channel + j0 + j < n) finish(e, row + i0 + i, channel + j0 + j, sums[i][j]);
    }
  }
}
ENTRY(linear)
