// sm80_gemv: as linear, for up to 8 rows of operands of one type, bf16 or E4M3: weights stream through registers once, 16 bytes
// a load, and meet all rows on tensor cores, so that the work a byte does not grow with the rows. Codes become f16, which
// holds them exactly. Reference: reference::linear
// A block has 16 channels, its warps take turns of DEEP loads along k, and their sums meet in shared memory. grid (n / 16).
// A lane holds the same bytes of k of two channels and of a row: which of them meet in one product is not the order of k, but
// the same in w and in x.

#define CHANNELS 16
#define ROWS 8
#define WARPS 8
// 16-byte loads of each channel that a lane has under way.
#define DEEP 4
// Bytes of a channel that a warp reads at a time.
#define STEP 64
// The same of all warps in a turn.
#define ROUND (WARPS * DEEP * STEP)

struct Bf16 {
  static DEVICE_FUNCTION void add(float (&d)[4], const u32 (&low)[4], const u32 (&high)[4], const u32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const u32 a[4] = {low[i], high[i], low[i + 1], high[i + 1]}, b[2] = {x[i], x[i + 1]};
      mma_bf16(d, a, b);
    }
  }
};

struct E4m3 {
  static DEVICE_FUNCTION void add(float (&d)[4], const u32 (&low)[4], const u32 (&high)[4], const u32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 a[4] = {e4m3x2_to_f16x2(low[i] & 0xffffu), e4m3x2_to_f16x2(high[i] & 0xffffu),
                        e4m3x2_to_f16x2(low[i] >> 16), e4m3x2_to_f16x2(high[i] >> 16)};
      const u32 b[2] = {e4m3x2_to_f16x2(x[i] & 0xffffu), e4m3x2_to_f16x2(x[i] >> 16)};
      mma_f16(d, a, b);
    }
  }
};

// 16 bytes of a row, or zeros.
DEVICE void take(u32 (&words)[4], uint4 v) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }

template <class Product>
DEVICE void gemv_mma(const u32* live, u32 axis, const u8* x, const u8* w, u32 n, u32 row_bytes, const Epilogue& e) {
  SHARED(float, parts, WARPS * ROWS * CHANNELS);
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = blockIdx.x * CHANNELS, own = lane / 4;
  u32 at = warp * DEEP * STEP + lane % 4 * 16;
  int left = (int)(row_bytes - at);
  const u8 *low_from = w + (size_t)(channel + own) * row_bytes + at, *high_from = low_from + (size_t)8 * row_bytes;
  const u8* x_from = x + (size_t)own * row_bytes + at;
  bool is_low = channel + own < n, is_high = channel + own + 8 < n;
  u32 low[DEEP][4], high[DEEP][4];
  auto fetch = [&](u32 i, u32 on) {
    bool is_there = (int)(i * STEP + on) < left;
    take(low[i], is_low && is_there ? stream16(low_from + i * STEP + on) : make_uint4(0, 0, 0, 0));
    take(high[i], is_high && is_there ? stream16(high_from + i * STEP + on) : make_uint4(0, 0, 0, 0));
  };
  // Weights and their scales are nobody's output: they are on their way before the kernel before is done.
#pragma unroll
  for (u32 i = 0; i < DEEP; i++) fetch(i, 0);
  u32 row = threadIdx.x / CHANNELS, c = channel + threadIdx.x % CHANNELS;
  float w_scale = e.w_scales && c < n ? e.w_scales[c] : 1.0f;
  dependency_wait();
  u32 m = live[axis];
  bool is_mine = row < min(m, (u32)ROWS) && c < n;
  float x_scale = is_mine && e.x_scales ? e.x_scales[row] : e.x_scale;
  float residual = is_mine && e.add ? ((const float*)e.out)[(size_t)row * e.stride + e.first + c] : 0.0f;

  float sums[4] = {};
  for (u32 first = warp * DEEP * STEP; first < row_bytes; first += ROUND) {
    float part[4] = {};
#pragma unroll
    for (u32 i = 0; i < DEEP; i++) {
      u32 xs[4];
      bool is_there = own < m && (int)(i * STEP) < left;
      take(xs, is_there ? *(const uint4*)(x_from + i * STEP) : make_uint4(0, 0, 0, 0));
      Product::add(part, low[i], high[i], xs);
      // The place that a product has freed is filled anew at once.
      fetch(i, ROUND);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += part[i];
    left -= ROUND, low_from += ROUND, high_from += ROUND, x_from += ROUND;
  }
  // Of 16 x 8 sums a lane has rows 2 (lane % 4) and the next, of channels lane / 4 and 8 further on.
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    parts[(warp * ROWS + lane % 4 * 2 + i % 2) * CHANNELS + own + i / 2 * 8] = sums[i];
  }
  __syncthreads();
  if (!is_mine) return;
  float sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < WARPS; i++) sum += parts[i * ROWS * CHANNELS + threadIdx.x];
  float y = sum * x_scale * w_scale;
  store1(e.out, e.dtype, (size_t)row * e.stride + e.first + c, e.add ? y + residual : y);
}

#define GEMV_MMA(name, Product) \
  KERNEL(256, 2) name(const u32* live, u32 axis, const u8* x, const u8* w, u32 n, u32 row_bytes, void* out, \
                      u32 out_type, u32 stride, u32 first, u32 add, float x_scale, const float* x_scales, \
                      const float* w_scales) { \
    gemv_mma<Product>(live, axis, x, w, n, row_bytes, \
                      {out, out_type, stride, first, add, x_scale, x_scales, w_scales}); \
  } \
  ENTRY(name)

GEMV_MMA(sm80_gemv_bf16, Bf16)
GEMV_MMA(sm80_gemv_e4m3, E4m3)
