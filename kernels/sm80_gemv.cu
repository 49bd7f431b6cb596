// sm80_gemv: as linear, for up to 8 rows of operands of one type. Reference: reference::linear
// grid as gemv_mma.cuh says.

struct Stored {
  u32 first_channel;
  Epilogue e;
  float residual;

  DEVICE_FUNCTION u32 channel(u32 i) const { return first_channel + i; }
  DEVICE_FUNCTION size_t at(u32 row, u32 i) const { return (size_t)row * e.stride + e.first + channel(i); }
  DEVICE_FUNCTION void begin(u32 row, u32 i, bool is_mine) {
    residual = is_mine && e.add ? ((const float*)e.out)[at(row, i)] : 0.0f;
  }
  DEVICE_FUNCTION void finish(u32 row, u32 i, bool is_mine, float y) const {
    if (is_mine) store1(e.out, e.dtype, at(row, i), e.add ? y + residual : y);
  }
};

#define GEMV(name, Product) \
  KERNEL(256, BLOCKS) name(OPERANDS, void* out, u32 out_type, u32 stride, u32 first, u32 add) { \
    Epilogue e = {out, out_type, stride, first, add, x_scale, x_scales, w_scales}; \
    gemv_mma<Product, DEEP>(TAKEN_OPERANDS, Stored{blockIdx.x * CHANNELS, e, 0.0f}); \
  } \
  ENTRY(name)

GEMV(sm80_gemv_bf16, Bf16)
GEMV(sm80_gemv_e4m3, E4m3)
