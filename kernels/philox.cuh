// philox: Philox4x32-10, as core/philox.rs has it.

struct Words { u32 w[4]; };

// Four random words of the counter (block, position, 0, 0) and a seed.
DEVICE Words philox(u32 block, u32 position, u32 seed_lo, u32 seed_hi) {
  Words c = {{block, position, 0, 0}};
#pragma unroll
  for (int i = 0; i < 10; i++) {
    u64 left = (u64)0xd2511f53u * c.w[0], right = (u64)0xcd9e8d57u * c.w[2];
    c = {{(u32)(right >> 32) ^ c.w[1] ^ seed_lo, (u32)right, (u32)(left >> 32) ^ c.w[3] ^ seed_hi, (u32)left}};
    seed_lo += 0x9e3779b9u;
    seed_hi += 0xbb67ae85u;
  }
  return c;
}

// The standard Gumbel number of a random word.
DEVICE float gumbel(u32 word) {
  float u = (float)(word >> 9 << 1 | 1) * 5.9604644775390625e-8f;
  return -ln_f32(-ln_f32(u));
}
