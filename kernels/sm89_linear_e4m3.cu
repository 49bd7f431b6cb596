// sm89_linear_e4m3: as linear, for E4M3 operands, on tensor cores that multiply them. Reference: reference::linear
// grid (n / BN, m / BM); shared memory as linear_mma.cuh says.

struct E4m3 {
  static DEVICE_FUNCTION void add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_e4m3(d, a, b); }
};

LINEAR_MMA(sm89_linear_e4m3_64, E4m3, 64, 64, 32, 32)
LINEAR_MMA(sm89_linear_e4m3_128, E4m3, 128, 128, 64, 32)
