// sm90_linear_bf16: as linear, for bf16 operands, on Hopper's tensor cores. Reference: reference::linear
// grid and shared memory as linear_wgmma.cuh says.

struct Bf16 {
  template <int N> static DEVICE_FUNCTION void add(float (&d)[N], u64 a, u64 b, bool add) { wgmma_bf16(d, a, b, add); }
};

LINEAR_WGMMA(sm90_linear_bf16_64, Bf16, 64, 64, 2)
LINEAR_WGMMA(sm90_linear_bf16_128, Bf16, 128, 128, 1)
