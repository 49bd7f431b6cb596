// linear_mma: out[m, first + n] (+)= x[m, k] . w[n, k]^T on the tensor cores of a warp. The includer says what FRAGMENT
// product a warp takes of 16 rows and 8 channels of 32 bytes each, and how many bytes of k that is a promotion apart.
//
// A block has BM rows x BN channels, a warp WM x WN of them. Both operands come in stages of 64 bytes a row, STAGES of them
// under way, and lie in shared memory 80 bytes apart, so that eight rows meet no bank twice. Tensor cores sum with fewer
// bits than f32, so that their sums are added to f32 ones every two stages: 128 codes, or 64 bf16.

#define STAGES 4
#define STAGE_BYTES 64
#define PITCH 80

// Brings 64 bytes of `rows` rows; zeros behind the last row and behind the last byte.
template <int ROWS, int THREADS>
DEVICE void bring(u32 to, const u8* from, u32 first, u32 rows, u32 row_bytes, u32 at) {
#pragma unroll
  for (u32 i = threadIdx.x; i < ROWS * 4; i += THREADS) {
    u32 row = i / 4, byte = i % 4 * 16;
    bool is_there = first + row < rows && at + byte < row_bytes;
    copy16_async(to + row * PITCH + byte, is_there ? from + (size_t)(first + row) * row_bytes + at + byte : from, is_there);
  }
}

template <class Product, int BM, int BN, int WM, int WN>
DEVICE void linear_mma(u32 m, const u8* x, const u8* w, u32 n, u32 row_bytes, const Epilogue& e) {
  LAUNCH_SHARED(shared);
  const int THREADS = BM / WM * (BN / WN) * 32, STAGE = (BM + BN) * PITCH;
  u32 row = blockIdx.y * BM, channel = blockIdx.x * BN;
  if (row >= m) return;
  u32 base = shared_address(shared), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 own_row = warp % (BM / WM) * WM, own_channel = warp / (BM / WM) * WN;
  // The lane's row of each four 8x8 matrices: of x rows 0-7, 8-15 and again 16 bytes on; of w rows 0-7, 16 bytes on, 8-15.
  u32 x_at = (own_row + lane % 16) * PITCH + lane / 16 * 16;
  u32 w_at = (BM + own_channel + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;
  float sums[WM / 16][WN / 8][4] = {}, part[WM / 16][WN / 8][4] = {};

  u32 stages = (row_bytes + STAGE_BYTES - 1) / STAGE_BYTES;
  auto fetch = [&](u32 s) {
    if (s < stages) {
      u32 to = base + s % STAGES * STAGE;
      bring<BM, THREADS>(to, x, row, m, row_bytes, s * STAGE_BYTES);
      bring<BN, THREADS>(to + BM * PITCH, w, channel, n, row_bytes, s * STAGE_BYTES);
    }
    copy_commit();
  };
  for (u32 s = 0; s < STAGES - 1; s++) fetch(s);
  for (u32 s = 0; s < stages; s++) {
    copy_wait<STAGES - 2>();
    // The stage is there for all, and nobody reads the one that is overwritten next.
    __syncthreads();
    fetch(s + STAGES - 1);
    u32 from = base + s % STAGES * STAGE;
#pragma unroll
    for (int half = 0; half < STAGE_BYTES; half += 32) {
      u32 xs[WM / 16][4], ws[WN / 8][2];
#pragma unroll
      for (int i = 0; i < WM / 16; i++) load_matrices(xs[i], from + x_at + i * 16 * PITCH + half);
#pragma unroll
      for (int j = 0; j < WN / 16; j++) {
        u32 four[4];
        load_matrices(four, from + w_at + j * 16 * PITCH + half);
        ws[2 * j][0] = four[0], ws[2 * j][1] = four[1], ws[2 * j + 1][0] = four[2], ws[2 * j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int j = 0; j < WN / 8; j++) Product::add(part[i][j], xs[i], ws[j]);
      }
    }
    if (s % 2 == 1 || s + 1 == stages) {
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int j = 0; j < WN / 8; j++) {
#pragma unroll
          for (int c = 0; c < 4; c++) sums[i][j][c] += part[i][j][c], part[i][j][c] = 0.0f;
        }
      }
    }
  }
  // Of 16 x 8 sums a lane has columns 2 (lane % 4) and the next, of rows lane / 4 and 8 further on.
#pragma unroll
  for (int i = 0; i < WM / 16; i++) {
    u32 first = row + own_row + i * 16 + lane / 4, own = channel + own_channel + lane % 4 * 2;
    finish_tile<WN / 8>(e, m, n, first, own, [&](u32 half, u32 j, u32 c) { return sums[i][j][2 * half + c]; });
  }
}

#define LINEAR_MMA(name, Product, BM, BN, WM, WN) \
  KERNEL(BM / WM * (BN / WN) * 32, 1) name(const u32* live, u32 axis, const u8* x, const u8* w, u32 n, u32 row_bytes, \
                                          void* out, u32 out_type, u32 stride, u32 first, u32 add, float x_scale, \
                                          const float* x_scales, const float* w_scales) { \
    dependency_wait(); \
    linear_mma<Product, BM, BN, WM, WN>(live[axis], x, w, n, row_bytes, \
                                        {out, out_type, stride, first, add, x_scale, x_scales, w_scales}); \
  } \
  ENTRY(name)
