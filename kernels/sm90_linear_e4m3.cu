// sm90_linear_e4m3: as linear, for E4M3 operands, on the tensor cores of a warpgroup. Reference: reference::linear
// A block has ROWS rows x 128 channels: one warp brings 128 codes of each at a time, STAGES of them under way; a warpgroup
// for each 64 rows multiplies. Its tensor cores sum with fewer bits than f32 has, so that each stage's sums are added to f32
// ones (DeepGEMM, "two-level accumulation"). grid (n / 128, m / ROWS).

#define CHANNELS 128
#define DEPTH 128
#define STAGES 4

template <int ROWS>
DEVICE void wgmma_linear(u32 m, const TensorMap& x, const TensorMap& w, u32 n, u32 k, const Epilogue& e) {
  LAUNCH_SHARED(shared);
  SHARED(u64, full, STAGES);
  SHARED(u64, empty, STAGES);
  const u32 GROUPS = ROWS / 64, X = ROWS * DEPTH, W = CHANNELS * DEPTH;
  u32 row = blockIdx.y * ROWS, channel = blockIdx.x * CHANNELS;
  if (row >= m) return;
  u32 base = shared_address(shared), group = threadIdx.x / 128, stages = (k + DEPTH - 1) / DEPTH;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], GROUPS * 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (group == GROUPS) {
    registers_give<40>();
    if (threadIdx.x % 128 == 0) {
      for (u32 s = 0; s < stages; s++) {
        u32 slot = s % STAGES, to = base + slot * (X + W);
        barrier_wait(&empty[slot], s / STAGES % 2 ^ 1);
        barrier_arrive_expecting(&full[slot], X + W);
        copy_box_async(to, &x, &full[slot], s * DEPTH, row);
        copy_box_async(to + X, &w, &full[slot], s * DEPTH, channel);
      }
    }
    return;
  }
  registers_take<232>();
  float sums[64] = {}, part[64];
  for (u32 s = 0; s < stages; s++) {
    u32 slot = s % STAGES, from = base + slot * (X + W);
    barrier_wait(&full[slot], s / STAGES % 2);
    u64 xs = matrix_descriptor(from + group * 64 * DEPTH), ws = matrix_descriptor(from + X);
    wgmma_begin();
#pragma unroll
    for (u32 i = 0; i < DEPTH / 32; i++) wgmma_e4m3(part, xs + 2 * i, ws + 2 * i, i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(&empty[slot]);
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] += part[i];
  }
  // Of a warp's 16 x 128 sums a lane has columns 2 (lane % 4) and the next of each eight, of rows lane / 4 and 8 further on.
  u32 lane = threadIdx.x % 32, first = row + group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (u32 i = 0; i < 64; i++) {
    u32 r = first + i / 2 % 2 * 8, own = channel + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r < m && own < n) finish(e, r, own, sums[i]);
  }
}

#define LINEAR_WGMMA(name, ROWS) \
  KERNEL(ROWS * 2 + 128, 1) name(const u32* live, u32 axis, TENSOR_MAP(x), TENSOR_MAP(w), u32 n, u32 k, void* out, \
                                u32 out_type, u32 stride, u32 first, u32 add, float x_scale, const float* x_scales, \
                                const float* w_scales) { \
    dependency_wait(); \
    wgmma_linear<ROWS>(live[axis], x, w, n, k, {out, out_type, stride, first, add, x_scale, x_scales, w_scales}); \
  } \
  ENTRY(name)

LINEAR_WGMMA(sm90_linear_e4m3_64, 64)
LINEAR_WGMMA(sm90_linear_e4m3_128, 128)
