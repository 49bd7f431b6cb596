// peak_mma: products on the tensor cores of a warp that are added up, for a measurement of the card's arithmetic: of each
// warp `rounds` times eight. The includer says what a PRODUCT is. grid (any); out is written where sums are negative,
// which they are not: what nobody could read would not be computed.

#define PEAK_MMA(name, PRODUCT) \
  KERNEL(256, 2) name(u32 rounds, u32* out) { \
    dependency_wait(); \
    u32 a[4], b[2]; \
    for (u32 i = 0; i < 4; i++) a[i] = 0x38383838u + threadIdx.x % 8; \
    for (u32 i = 0; i < 2; i++) b[i] = 0x38383838u + threadIdx.x % 8; \
    float d[8][4] = {}; \
    for (u32 round = 0; round < rounds; round++) { \
      _Pragma("unroll") for (u32 i = 0; i < 8; i++) PRODUCT(d[i], a, b); \
    } \
    float least = 0.0f; \
    _Pragma("unroll") for (u32 i = 0; i < 8; i++) least = fminf(fminf(least, d[i][0] + d[i][1]), d[i][2] + d[i][3]); \
    if (least < 0.0f) *out = 1; \
  } \
  ENTRY(name)
