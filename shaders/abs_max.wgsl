// abs_max: out = max(out, max |x|), x[m, COLS] f32; NaN counts for nothing. Reference: reference::abs_max
// grid (m), a workgroup a row.

override AXIS: u32;  // which word of live counts the rows
override COLS: u32;

@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<atomic<u32>>;  // one f32, not negative: ordered as its bits
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;  // [m, row_words(F32, COLS) / 4]

@compute @workgroup_size(WG)
fn abs_max(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = workgroup.x;
  if (row >= live[AXIS]) {
    return;
  }
  let groups = (COLS + 3u) / 4u;
  var amax = vec4<u32>(0u);
  for (var g = lid; g < groups; g += WG) {
    let a = x[row * row_words(F32, COLS) / 4u + g] & vec4<u32>(0x7fffffffu);
    amax = max(amax, select(a, vec4<u32>(0u), a > vec4<u32>(0x7f800000u)));
  }
  let most = workgroup_max(max(max(amax.x, amax.y), max(amax.z, amax.w)), lid);
  if (lid == 0u) {
    atomicMax(&out[0], most);
  }
}
