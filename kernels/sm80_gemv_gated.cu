// sm80_gemv_gated: sm80_gemv and the swiglu behind it: out[m, n / 2] = silu(gate) * up, where w has the channels of gate, then as
// many of up, and a block 8 of each. Reference: reference::linear, reference::swiglu
// grid as gemv_mma.cuh says; n / 2 a multiple of 8.

struct Gated {
  void* out;    // [m, padded(n / 2)]
  u32 dtype;
  float inv;    // the reciprocal of a static scale
  u32 between;  // the dtype that gate and up are rounded to
  u32 cols;

  DEVICE_FUNCTION u32 channel(u32 i) const { return i / 8 * cols + blockIdx.x * 8 + i % 8; }
  DEVICE_FUNCTION void begin(u32, u32, bool) {}
  DEVICE_FUNCTION void finish(u32 row, u32 i, bool is_mine, float y) const {
    float gate = rounded(between, y), up = __shfl_xor_sync(0xffffffffu, gate, 8);
    if (!is_mine || i >= 8) return;
    float x = silu(gate) * up;
    store_any1(out, dtype, (size_t)row * padded(cols) + channel(i), dtype == E4M3 ? x * inv : x);
  }
};

#define GEMV_GATED(name, Product) \
  KERNEL(256, BLOCKS) name(OPERANDS, void* out, u32 out_type, float inv, u32 between) { \
    gemv_mma<Product, DEEP>(TAKEN_OPERANDS, Gated{out, out_type, inv, between, n / 2}); \
  } \
  ENTRY(name)

GEMV_GATED(sm80_gemv_gated_bf16, Bf16)
GEMV_GATED(sm80_gemv_gated_e4m3, E4m3)
