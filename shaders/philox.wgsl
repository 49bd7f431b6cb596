// philox: Philox4x32-10, as core/philox.rs has it.

// The upper half of a product.
fn multiply_high(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}

// Four random words of a counter and a key.
fn philox(counter: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
  var c = counter;
  var key = seed;
  for (var i = 0u; i < 10u; i++) {
    let left = multiply_high(0xd2511f53u, c.x);
    let right = multiply_high(0xcd9e8d57u, c.z);
    c = vec4<u32>(right ^ c.y ^ key.x, 0xcd9e8d57u * c.z, left ^ c.w ^ key.y, 0xd2511f53u * c.x);
    key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
  }
  return c;
}

// The standard Gumbel number of a random word.
fn gumbel(word: u32) -> f32 {
  let u = f32(((word >> 9u) << 1u) | 1u) * 5.9604644775390625e-8;
  return -ln_f32(-ln_f32(u));
}
