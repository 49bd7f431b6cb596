// sm80_linear: as linear, for operands of one type: bf16, or E4M3 that is decoded to it, exactly. Reference:
// reference::linear
// grid (n / BN, m / BM); shared memory as linear_mma.cuh says.

struct Bf16 {
  static DEVICE_FUNCTION void add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
};

// Two codes, the upper bytes of the halves of `pair`, as bf16: a code's exponent and mantissa four bits down are those of a
// bf16 that is 2^120 too small; NaN would be 480.
DEVICE u32 e4m3_to_bf16x2(u32 pair) {
  u32 bits = (pair & 0x80008000u) | ((pair & 0x7f007f00u) >> 4);
  u32 y = bf16x2_multiply(bits, 0x7b807b80u);
  u32 nan = 0;
  if ((pair & 0x7f000000u) == 0x7f000000u) nan |= 0x7fc00000u;
  if ((pair & 0x7f00u) == 0x7f00u) nan |= 0x7fc0u;
  return y | nan;
}

// Four consecutive codes of k make two pairs, the even and the odd ones: in x and in w alike, so that the same meet.
struct E4m3 {
  static DEVICE_FUNCTION void add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 low = a[2 * half], high = a[2 * half + 1], own = b[half];
      u32 as[4] = {e4m3_to_bf16x2(low << 8), e4m3_to_bf16x2(high << 8), e4m3_to_bf16x2(low), e4m3_to_bf16x2(high)};
      u32 bs[2] = {e4m3_to_bf16x2(own << 8), e4m3_to_bf16x2(own)};
      mma_bf16(d, as, bs);
    }
  }
};

LINEAR_MMA(sm80_linear_bf16_64, Bf16, 64, 64, 32, 32)
LINEAR_MMA(sm80_linear_bf16_128, Bf16, 128, 128, 64, 32)
LINEAR_MMA(sm80_linear_e4m3_64, E4m3, 64, 64, 32, 32)
LINEAR_MMA(sm80_linear_e4m3_128, E4m3, 128, 128, 64, 32)
