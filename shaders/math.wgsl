// math: functions that WGSL leaves to the driver, to the last digits of f32 on every device.

// e^x within two units in the last place; 0 below -87, as large as f32 holds above 88.7. (Cephes, expf.)
fn exp_f32(x: f32) -> f32 {
  let y = min(x, 88.7);
  let n = floor(y * 1.44269504088896341 + 0.5);
  let r = (y - n * 0.693359375) - n * -2.12194440e-4;
  let z = r * r;
  let a = ((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2;
  let e = ((a * r + 1.6666665459e-1) * r + 5.0000001201e-1) * z + r + 1.0;
  // In two factors, as n may be 128.
  let half = i32(n) / 2;
  let scaled = e * bitcast<f32>(u32(half + 127) << 23u) * bitcast<f32>(u32(i32(n) - half + 127) << 23u);
  return select(scaled, 0.0, y < -87.0);
}

// The natural logarithm of a positive normal number, within two units in the last place. (Cephes, logf.)
fn ln_f32(x: f32) -> f32 {
  let bits = bitcast<u32>(x);
  var e = f32(i32(bits >> 23u) - 126);
  var m = bitcast<f32>((bits & 0x7fffffu) | 0x3f000000u);
  if (m < 0.70710678) {
    e -= 1.0;
    m += m;
  }
  let f = m - 1.0;
  let z = f * f;
  let a = ((7.0376836292e-2 * f - 1.1514610310e-1) * f + 1.1676998740e-1) * f - 1.2420140846e-1;
  let b = ((a * f + 1.4249322787e-1) * f - 1.6668057665e-1) * f + 2.0000714765e-1;
  let c = ((b * f - 2.4999993993e-1) * f + 3.3333331174e-1) * f * z;
  return (c - 2.12194440e-4 * e - 0.5 * z) + f + 0.693359375 * e;
}

// a / b rounded to nearest even, for a = 0 or a normal, and a quotient that is normal: bit by bit, since drivers may
// be off by 2.5 units in the last place.
fn divide(a: f32, b: f32) -> f32 {
  let u = bitcast<u32>(a);
  let v = bitcast<u32>(b);
  let divisor = (v & 0x7fffffu) | 0x800000u;
  var rest = (u & 0x7fffffu) | 0x800000u;
  var exponent = i32(u >> 23u) - i32(v >> 23u) + 127;
  if (rest < divisor) {
    rest <<= 1u;
    exponent -= 1;
  }
  var quotient = 0u;
  for (var i = 0u; i < 24u; i++) {
    quotient <<= 1u;
    if (rest >= divisor) {
      rest -= divisor;
      quotient |= 1u;
    }
    rest <<= 1u;
  }
  // `rest` is twice the remainder: above the divisor rounds up, equal to it goes to even. A carry moves on as it should.
  let up = rest > divisor || (rest == divisor && (quotient & 1u) == 1u);
  let rounded = (u32(exponent) << 23u) + (quotient & 0x7fffffu) + u32(up);
  return select(bitcast<f32>(rounded), 0.0, u < 0x800000u);
}

// 1 / sqrt(x) for x > 0: what the driver gives, to the last digit but one, and a step of Newton's.
fn inverse_sqrt(x: f32) -> f32 {
  let y = inverseSqrt(x);
  return y + 0.5 * y * (1.0 - x * y * y);
}

// silu(gate) * up
fn swiglu4(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
  let e = vec4<f32>(exp_f32(-gate.x), exp_f32(-gate.y), exp_f32(-gate.z), exp_f32(-gate.w));
  return gate / (1.0 + e) * up;
}
