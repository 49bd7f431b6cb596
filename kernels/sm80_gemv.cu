// sm80_gemv: as linear, for up to 8 rows of operands of one type. Reference: reference::linear
// grid as gemv_mma.cuh says.

struct Stored {
  void* out;  // as in epilogue.cuh
  u32 dtype, stride, first, add;
  float residual;

  DEVICE_FUNCTION u32 channel(u32 i) const { return blockIdx.x * CHANNELS + i; }
  DEVICE_FUNCTION size_t at(u32 row, u32 i) const { return (size_t)row * stride + first + channel(i); }
  DEVICE_FUNCTION void begin(u32 row, u32 i, bool is_mine) {
    residual = is_mine && add ? ((const float*)out)[at(row, i)] : 0.0f;
  }
  DEVICE_FUNCTION void finish(u32 row, u32 i, bool is_mine, float y) const {
    if (is_mine) store1(out, dtype, at(row, i), add ? y + residual : y);
  }
};

#define GEMV(name, Product) \
  KERNEL(256, BLOCKS) name(OPERANDS, void* out, u32 out_type, u32 stride, u32 first, u32 add) { \
    gemv_mma<Product, DEEP>(TAKEN_OPERANDS, Stored{out, out_type, stride, first, add, 0.0f}); \
  } \
  ENTRY(name)

GEMV(sm80_gemv_bf16, Bf16)
GEMV(sm80_gemv_e4m3, E4m3)
