// math: exp and ln, the same bits on every device.

// e^x within two units in the last place; 0 below -87, as large as f32 holds above 88.7. (Cephes, expf.)
DEVICE float exp_f32(float x) {
  if (x < -87.0f) return 0.0f;
  float y = fminf(x, 88.7f);
  float n = floorf(fmaf(y, 1.44269504088896341f, 0.5f));
  float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, y));
  float a = fmaf(fmaf(fmaf(1.9875691500e-4f, r, 1.3981999507e-3f), r, 8.3334519073e-3f), r, 4.1665795894e-2f);
  float e = fmaf(fmaf(fmaf(a, r, 1.6666665459e-1f), r, 5.0000001201e-1f), r * r, r) + 1.0f;
  // In two factors, as n may be 128.
  int half = (int)n / 2;
  return e * __uint_as_float((u32)(half + 127) << 23) * __uint_as_float((u32)((int)n - half + 127) << 23);
}

// The natural logarithm of a positive normal number, within two units in the last place. (Cephes, logf.)
DEVICE float ln_f32(float x) {
  u32 bits = __float_as_uint(x);
  float e = (float)((int)(bits >> 23) - 126);
  float m = __uint_as_float((bits & 0x7fffffu) | 0x3f000000u);
  if (m < 0.70710678f) {
    e -= 1.0f;
    m += m;
  }
  float f = m - 1.0f, z = f * f;
  float a = fmaf(fmaf(fmaf(7.0376836292e-2f, f, -1.1514610310e-1f), f, 1.1676998740e-1f), f, -1.2420140846e-1f);
  float b = fmaf(fmaf(fmaf(a, f, 1.4249322787e-1f), f, -1.6668057665e-1f), f, 2.0000714765e-1f);
  float c = fmaf(fmaf(b, f, -2.4999993993e-1f), f, 3.3333331174e-1f) * f * z;
  return fmaf(0.693359375f, e, (fmaf(-2.12194440e-4f, e, c) - 0.5f * z) + f);
}

DEVICE float silu(float x) { return x / (1.0f + exp_f32(-x)); }
