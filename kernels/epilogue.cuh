// epilogue: from the sum of a Linear to its output: x activation scale x channel scale, then stored or added.

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
