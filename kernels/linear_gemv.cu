// linear_gemv: as linear, for few rows of operands that sm80_gemv does not take: weights stream through registers once, 16 bytes a load and DEEP loads a lane in
// flight. Reference: reference::linear
// A warp has a channel and ROWS rows, a block 8 channels. grid (n / 8, m / ROWS). `k` is padded.

#define DEEP 4

// 16 bytes of a weight, and the elements of x that they meet.
template <u32 TYPE> struct Piece;
template <> struct Piece<F32> { static const u32 SIZE = 4; };
template <> struct Piece<BF16> { static const u32 SIZE = 8; };
template <> struct Piece<E4M3> { static const u32 SIZE = 16; };

template <u32 TYPE> DEVICE void decode(uint4 v, float (&y)[Piece<TYPE>::SIZE]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (TYPE == F32) {
      y[i] = __uint_as_float(words[i]);
    } else if (TYPE == BF16) {
      y[2 * i] = bf16_low(words[i]), y[2 * i + 1] = bf16_high(words[i]);
    } else {
      Four four = e4m3_decode(words[i]);
#pragma unroll
      for (int j = 0; j < 4; j++) y[4 * i + j] = four.x[j];
    }
  }
}

template <u32 X, u32 W, int ROWS>
DEVICE void gemv(u32 m, const void* x, const void* w, u32 n, u32 k, const Epilogue& e) {
  const u32 SIZE = Piece<W>::SIZE, STRIDE = 32 * SIZE;
  u32 row = blockIdx.y * ROWS, channel = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= m || channel >= n) return;
  const u8* from = (const u8*)w + (size_t)channel * (k / SIZE * 16);
  float sums[ROWS] = {};
  for (u32 first = lane * SIZE; first < k; first += DEEP * STRIDE) {
    uint4 pieces[DEEP];
#pragma unroll
    for (u32 i = 0; i < DEEP; i++) {
      u32 at = first + i * STRIDE;
      pieces[i] = at < k ? stream16(from + at / SIZE * 16) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (u32 i = 0; i < DEEP; i++) {
      u32 at = first + i * STRIDE;
      if (at >= k) break;
      float ws[SIZE];
      decode<W>(pieces[i], ws);
#pragma unroll
      for (u32 r = 0; r < ROWS; r++) {
        if (row + r >= m) break;
#pragma unroll
        for (u32 c = 0; c < SIZE; c += 4) {
          Four xs = load4(x, X, (size_t)(row + r) * k + at + c);
#pragma unroll
          for (int j = 0; j < 4; j++) sums[r] = fmaf(xs.x[j], ws[c + j], sums[r]);
        }
      }
    }
  }
#pragma unroll
  for (u32 r = 0; r < ROWS; r++) {
    float sum = warp_reduce<Add>(sums[r]);
    if (lane == 0 && row + r < m) finish(e, row + r, channel, sum);
  }
}

#define GEMV(name, X, W, ROWS) \
  KERNEL(256, 2) name(const u32* live, u32 axis, const void* x, const void* w, u32 n, u32 k, void* out, u32 out_type, \
                      u32 stride, u32 first, u32 add, float x_scale, const float* x_scales, const float* w_scales) { \
    dependency_wait(); \
    gemv<X, W, ROWS>(live[axis], x, w, n, k, {out, out_type, stride, first, add, x_scale, x_scales, w_scales}); \
  } \
  ENTRY(name)
#define GEMVS(x, X, w, W) \
  GEMV(linear_gemv_##x##_##w##_1, X, W, 1) \
  GEMV(linear_gemv_##x##_##w##_2, X, W, 2) \
  GEMV(linear_gemv_##x##_##w##_4, X, W, 4) \
  GEMV(linear_gemv_##x##_##w##_8, X, W, 8)

GEMVS(f32, F32, f32, F32)
GEMVS(f32, F32, bf16, BF16)
GEMVS(f32, F32, e4m3, E4M3)
GEMVS(bf16, BF16, f32, F32)
GEMVS(bf16, BF16, e4m3, E4M3)
GEMVS(e4m3, E4M3, f32, F32)
GEMVS(e4m3, E4M3, bf16, BF16)
