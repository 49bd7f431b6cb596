// e4m3: FP8 codes, four a word, the first in the lowest byte (OCP "FN": no infinity, NaN is 0x7f and 0xff, largest 448).

// Decode by way of f16, where the adapter was seen to convert all codes exactly; else by integers.
override FAST_E4M3: bool;

// The values of four codes, all 256 exact.
fn e4m3x4(w: u32) -> vec4<f32> {
  if (FAST_E4M3) {
    let v = e4m3x4_finite(w);
    let nan = bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) | vec4<u32>(0x7fc00000u));
    return select(v, nan, abs(v) == vec4<f32>(480.0));
  }
  return e4m3x4_exact(w);
}

// The same where no code is NaN: weights are refused at load else.
fn e4m3x4_finite(w: u32) -> vec4<f32> {
  return e4m3x4_small(w) * e4m3_unit();
}

// The same by a power of two too small, for sums that are multiplied by e4m3_unit() at their end.
fn e4m3x4_small(w: u32) -> vec4<f32> {
  if (FAST_E4M3) {
    return e4m3x4_f16(w);
  }
  return e4m3x4_exact(w);
}

fn e4m3_unit() -> f32 {
  return select(1.0, 256.0, FAST_E4M3);
}

// A code is the upper byte of an f16, one exponent bit shorter and 2^8 too small; NaN becomes 480 / 2^8.
fn e4m3x4_f16(w: u32) -> vec4<f32> {
  let v = w << 8u;
  let odd = unpack2x16float((w & 0x80008000u) | ((w & 0x7f007f00u) >> 1u));
  let even = unpack2x16float((v & 0x80008000u) | ((v & 0x7f007f00u) >> 1u));
  return vec4<f32>(even.x, odd.x, even.y, odd.y);
}

// By integer arithmetic alone, so that no driver's handling of subnormals counts.
fn e4m3x4_exact(w: u32) -> vec4<f32> {
  let b = vec4<u32>(w) >> vec4<u32>(0u, 8u, 16u, 24u);
  let m = b & vec4<u32>(0x7fu);
  let s = (b & vec4<u32>(0x80u)) << vec4<u32>(24u);
  let normal = (m << vec4<u32>(20u)) + vec4<u32>(0x3c000000u);
  let subnormal = bitcast<vec4<u32>>(vec4<f32>(m) * 0.001953125);
  let t = select(select(normal, subnormal, m < vec4<u32>(8u)), vec4<u32>(0x7fc00000u), m == vec4<u32>(0x7fu));
  return bitcast<vec4<f32>>(t | s);
}

// The code nearest to x: ties to even, saturating to +-448, infinities too; NaN stays NaN with its sign.
fn e4m3_encode(x: f32) -> u32 {
  let u = bitcast<u32>(x);
  let sign = (u >> 24u) & 0x80u;
  let a = min(u & 0x7fffffffu, 0x43e00000u);
  let normal = ((a + 0x7ffffu + ((a >> 20u) & 1u)) >> 20u) - 960u;
  // Below 2^-6 the codes count steps of 2^-9.
  let shift = min(141u - (a >> 23u), 31u);
  let mantissa = (a & 0x7fffffu) | 0x800000u;
  let subnormal = (mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift;
  let code = select(normal, subnormal, a < 0x3c800000u);
  return select(code, 0x7fu, (u & 0x7fffffffu) > 0x7f800000u) | sign;
}

// The codes of four numbers, as a word.
fn e4m3x4_encode(x: vec4<f32>) -> u32 {
  return e4m3_encode(x.x) | (e4m3_encode(x.y) << 8u) | (e4m3_encode(x.z) << 16u) | (e4m3_encode(x.w) << 24u);
}
