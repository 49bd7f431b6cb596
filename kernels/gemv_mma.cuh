// gemv_mma: the sums of a Linear of up to 8 rows of operands of one type, bf16 or E4M3: weights stream through registers once,
// 16 bytes a load, and meet all rows on tensor cores, so that the work a byte does not grow with the rows. Codes become f16,
// which holds them exactly. The includer says what an OUTPUT does with them:
//   channel(i)                    the channel that is the block's i-th of 16
//   begin(row, i, is_mine)        reads what finish needs
//   finish(row, i, is_mine, y)    y is the scaled sum, if it is this thread's; all threads of the warp call
//
// A block's warps take turns of DEEP loads along k, and their sums meet in shared memory. grid (n / 16). A lane holds the same
// bytes of k of two channels and of a row: which of them meet in one product is not the order of k, but the same in w and x.

#define CHANNELS 16
#define ROWS 8
#define WARPS 8
// 16-byte loads of each channel that a lane makes in a turn.
#define DEEP 4
// Bytes of a channel that a warp reads at a time.
#define STEP 64
// The same of all warps in a turn.
#define ROUND (WARPS * DEEP * STEP)
// Blocks a multiprocessor. Where codes are decoded by hand, two would not have the registers.
#ifdef HAS_E4M3
#define BLOCKS 2
#else
#define BLOCKS 1
#endif

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

struct Operands {
  const u32* live;
  u32 axis;
  const u8 *x, *w;
  u32 n, row_bytes;
  float x_scale;          // of all rows
  const float* x_scales;  // [m], or null
  const float* w_scales;  // [n], or null
};

// AHEAD of these loads are under way at a time.
template <class Product, u32 AHEAD, class Output>
DEVICE void gemv_mma(const Operands& o, Output out) {
  SHARED(float, parts, WARPS * ROWS * CHANNELS);
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane / 4;
  u32 at = warp * DEEP * STEP + lane % 4 * 16;
  int left = (int)(o.row_bytes - at);
  u32 low_channel = out.channel(own), high_channel = out.channel(own + 8);
  const u8* low_from = o.w + (size_t)low_channel * o.row_bytes + at;
  const u8* high_from = o.w + (size_t)high_channel * o.row_bytes + at;
  const u8* x_from = o.x + (size_t)own * o.row_bytes + at;
  bool is_low = low_channel < o.n, is_high = high_channel < o.n;
  u32 low[AHEAD][4], high[AHEAD][4];
  auto fetch = [&](u32 load) {
    u32 slot = load % AHEAD, on = load / DEEP * ROUND + load % DEEP * STEP;
    bool is_there = (int)on < left;
    take(low[slot], is_low && is_there ? stream16(low_from + on) : make_uint4(0, 0, 0, 0));
    take(high[slot], is_high && is_there ? stream16(high_from + on) : make_uint4(0, 0, 0, 0));
  };
  // Weights and their scales are nobody's output: they are on their way before the kernel before is done.
#pragma unroll
  for (u32 i = 0; i < AHEAD; i++) fetch(i);
  u32 row = threadIdx.x / CHANNELS, i = threadIdx.x % CHANNELS, c = out.channel(i);
  float w_scale = o.w_scales && c < o.n ? o.w_scales[c] : 1.0f;
  dependency_wait();
  u32 m = o.live[o.axis];
  bool is_mine = row < min(m, (u32)ROWS) && c < o.n;
  float x_scale = is_mine && o.x_scales ? o.x_scales[row] : o.x_scale;
  out.begin(row, i, is_mine);

  float sums[4] = {};
#pragma unroll 1
  for (u32 first = warp * DEEP * STEP; first < o.row_bytes; first += ROUND) {
    float part[4] = {};
#pragma unroll
    for (u32 i = 0; i < DEEP; i++) {
      u32 xs[4];
      bool is_there = own < m && (int)(i * STEP) < left;
      take(xs, is_there ? *(const uint4*)(x_from + i * STEP) : make_uint4(0, 0, 0, 0));
      Product::add(part, low[i % AHEAD], high[i % AHEAD], xs);
      // The place that a product has freed is filled anew at once.
      fetch(i + AHEAD);
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
  if (row >= ROWS) return;
  float sum = 0.0f;
#pragma unroll
  for (u32 of = 0; of < WARPS; of++) sum += parts[of * ROWS * CHANNELS + threadIdx.x];
  out.finish(row, i, is_mine, sum * x_scale * w_scale);
}

// The arguments that all entry points begin with, and what they are to gemv_mma.
#define OPERANDS \
  const u32 *live, u32 axis, const u8 *x, const u8 *w, u32 n, u32 row_bytes, float x_scale, const float *x_scales, \
      const float *w_scales
#define TAKEN_OPERANDS {live, axis, x, w, n, row_bytes, x_scale, x_scales, w_scales}
