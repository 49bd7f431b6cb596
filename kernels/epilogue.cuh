// epilogue: from the sums of a Linear to its output: x activation scale x channel scale, then stored or added.

struct Epilogue {
  void* out;             // [m, stride]: f32 or bf16
  u32 dtype;
  u32 stride;
  u32 first;             // column of the first channel
  u32 add;               // to what is there: f32 only
  float x_scale;         // of all rows
  const float* x_scales; // [m], or null
  const float* w_scales; // [n], or null
};

DEVICE void finish(const Epilogue& e, u32 row, u32 channel, float sum) {
  float y = sum * (e.x_scales ? e.x_scales[row] : e.x_scale);
  if (e.w_scales) y *= e.w_scales[channel];
  size_t at = (size_t)row * e.stride + e.first + channel;
  if (e.add) y += ((const float*)e.out)[at];
  store1(e.out, e.dtype, at, y);
}

// The same of what a lane has of a tile of tensor cores: two neighbouring channels of each of EIGHTS times eight, the first
// of which is `channel`, of `row` and of the row 8 further on; `sum(half, eight, i)` is one of them. All that is read comes
// before what is written, as the compiler cannot know that these are apart.
template <u32 EIGHTS, class F>
DEVICE void finish_tile(const Epilogue& e, u32 m, u32 n, u32 row, u32 channel, F sum) {
  bool is_even = e.first % 2 == 0;
  float2 scales[EIGHTS];
#pragma unroll
  for (u32 j = 0; j < EIGHTS; j++) {
    u32 own = channel + 8 * j;
    scales[j] = make_float2(1.0f, 1.0f);
    if (!e.w_scales || own >= n) continue;
    if (own + 1 < n) scales[j] = *(const float2*)(e.w_scales + own);
    else scales[j].x = e.w_scales[own];
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 r = row + 8 * half;
    if (r >= m) continue;
    float x_scale = e.x_scales ? e.x_scales[r] : e.x_scale;
    size_t at = (size_t)r * e.stride + e.first + channel;
    float2 before[EIGHTS];
    if (e.add) {
#pragma unroll
      for (u32 j = 0; j < EIGHTS; j++) {
        u32 own = channel + 8 * j;
        const float* from = (const float*)e.out + at + 8 * j;
        before[j] = make_float2(0.0f, 0.0f);
        if (is_even && own + 1 < n) {
          before[j] = *(const float2*)from;
        } else {
          if (own < n) before[j].x = from[0];
          if (own + 1 < n) before[j].y = from[1];
        }
      }
    }
#pragma unroll
    for (u32 j = 0; j < EIGHTS; j++) {
      u32 own = channel + 8 * j;
      float low = sum(half, j, 0) * x_scale * scales[j].x, high = sum(half, j, 1) * x_scale * scales[j].y;
      if (e.add) low += before[j].x, high += before[j].y;
      if (is_even && own + 1 < n) {
        store2(e.out, e.dtype, at + 8 * j, low, high);
      } else {
        if (own < n) store1(e.out, e.dtype, at + 8 * j, low);
        if (own + 1 < n) store1(e.out, e.dtype, at + 8 * j + 1, high);
      }
    }
  }
}
