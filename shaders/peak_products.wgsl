// peak_products: products of f32 that are added up, for a measurement of the device's arithmetic: in each thread 256 times
// 32. grid (any), 256 threads at most.

override WG: u32;

@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn peak_products(@builtin(local_invocation_index) lid: u32) {
  // Unlike in every sum and thread, or the compiler would compute them once.
  let step = x[0] + vec4<f32>(f32(lid));
  let factor = x[1];
  var a = step;
  var b = step + 1.0;
  var c = step + 2.0;
  var d = step + 3.0;
  var e = step + 4.0;
  var f = step + 5.0;
  var g = step + 6.0;
  var h = step + 7.0;
  for (var i = 0u; i < 256u; i++) {
    a = fma(a, factor, step);
    b = fma(b, factor, step);
    c = fma(c, factor, step);
    d = fma(d, factor, step);
    e = fma(e, factor, step);
    f = fma(f, factor, step);
    g = fma(g, factor, step);
    h = fma(h, factor, step);
  }
  // Sums of numbers that are not negative.
  let all = ((a + b) + (c + d)) + ((e + f) + (g + h));
  if (any(all < vec4<f32>(0.0))) {
    out[0] = bitcast<u32>(all.x);
  }
}
