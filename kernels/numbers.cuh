// numbers: the element types, as lower.rs numbers them, four elements at a time. Rows are padded with zeros to blocks of
// 16 elements, so that whole vectors can be read.

enum DType : u32 { F32 = 0, BF16 = 1, E4M3 = 2 };

struct Four { float x[4]; };

DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

#ifndef HAS_E4M3
// Two codes as f16, exact. A code is the upper byte of an f16, one exponent bit shorter and 2^8 too small; NaN would be 480
// (OCP "FN": no infinity, NaN is 0x7f and 0xff, largest 448).
DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  u32 spread = (pair & 0xffu) << 8 | (pair & 0xff00u) << 16;
  u32 y = f16x2_multiply((spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 1), 0x5c005c00u);
  if ((pair & 0x7fu) == 0x7fu) y |= 0x7e00u;
  if ((pair & 0x7f00u) == 0x7f00u) y |= 0x7e000000u;
  return y;
}
#endif

DEVICE Four e4m3_decode(u32 codes) {
  u32 low = e4m3x2_to_f16x2(codes & 0xffffu), high = e4m3x2_to_f16x2(codes >> 16);
  return {{f16_low(low), f16_high(low), f16_low(high), f16_high(high)}};
}

#ifndef HAS_E4M3
// The code nearest to x: ties to even, saturating to +-448, infinities too; NaN stays NaN.
DEVICE u32 e4m3_code(float x) {
  u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f | sign;
  u32 finite = min(magnitude, 0x43e00000u);
  // Below 2^-6 the codes count steps of 2^-9, which 2^14 leaves in the low bits of a sum.
  if (finite < 0x3c800000u) return (__float_as_uint(__uint_as_float(finite) + 16384.0f) - 0x46800000u) | sign;
  return ((finite + 0x7ffffu + (finite >> 20 & 1)) >> 20) - 960 | sign;
}

DEVICE u32 e4m3x2_encode(float low, float high) { return e4m3_code(low) | e4m3_code(high) << 8; }
#endif

DEVICE u32 e4m3_encode(const Four& x) { return e4m3x2_encode(x.x[0], x.x[1]) | e4m3x2_encode(x.x[2], x.x[3]) << 16; }

// Four elements from element `at`, a multiple of 4.
DEVICE Four load4(const void* from, u32 dtype, size_t at) {
  Four y;
  if (dtype == F32) {
    float4 v = *(const float4*)((const float*)from + at);
    y.x[0] = v.x, y.x[1] = v.y, y.x[2] = v.z, y.x[3] = v.w;
  } else if (dtype == BF16) {
    uint2 v = *(const uint2*)((const u16*)from + at);
    y.x[0] = bf16_low(v.x), y.x[1] = bf16_high(v.x), y.x[2] = bf16_low(v.y), y.x[3] = bf16_high(v.y);
  } else {
    y = e4m3_decode(*(const u32*)((const u8*)from + at));
  }
  return y;
}

DEVICE void store4(void* to, u32 dtype, size_t at, const Four& x) {
  if (dtype == F32) {
    *(float4*)((float*)to + at) = make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
  } else if (dtype == BF16) {
    *(uint2*)((u16*)to + at) = make_uint2(bf16x2_encode(x.x[0], x.x[1]), bf16x2_encode(x.x[2], x.x[3]));
  } else {
    *(u32*)((u8*)to + at) = e4m3_encode(x);
  }
}

// One element of f32 or bf16.
DEVICE float load1(const void* from, u32 dtype, size_t at) {
  return dtype == F32 ? ((const float*)from)[at] : bf16_low(((const u16*)from)[at]);
}

DEVICE void store1(void* to, u32 dtype, size_t at, float x) {
  if (dtype == F32) {
    ((float*)to)[at] = x;
  } else {
    ((u16*)to)[at] = (u16)bf16x2_encode(x, 0.0f);
  }
}

// One element of any type.
DEVICE void store_any1(void* to, u32 dtype, size_t at, float x) {
  if (dtype == E4M3) {
    ((u8*)to)[at] = (u8)e4m3x2_encode(x, 0.0f);
  } else {
    store1(to, dtype, at, x);
  }
}

// A number as a buffer of f32 or bf16 would have it.
DEVICE float rounded(u32 dtype, float x) { return dtype == F32 ? x : bf16_low(bf16x2_encode(x, 0.0f)); }

// Two elements of f32 or bf16 from element `at`, a multiple of 2.
DEVICE void store2(void* to, u32 dtype, size_t at, float low, float high) {
  if (dtype == F32) {
    *(float2*)((float*)to + at) = make_float2(low, high);
  } else {
    *(u32*)((u16*)to + at) = bf16x2_encode(low, high);
  }
}

// Elements from one row to the next.
DEVICE u32 padded(u32 cols) { return (cols + 15) / 16 * 16; }
