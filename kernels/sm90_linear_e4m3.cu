// sm90_linear_e4m3: as linear, for E4M3 operands, on Hopper's tensor cores. Reference: reference::linear
// grid and shared memory as linear_wgmma.cuh says.

struct E4m3 {
  template <int N> static DEVICE_FUNCTION void add(float (&d)[N], u64 a, u64 b, bool add) { wgmma_e4m3(d, a, b, add); }
};

LINEAR_WGMMA(sm90_linear_e4m3_64, E4m3, 64, 64, 2)
LINEAR_WGMMA(sm90_linear_e4m3_128, E4m3, 128, 128, 1)
