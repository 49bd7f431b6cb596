// rms_norm: out = x / sqrt(mean(x^2) + eps) * gamma, x[m, COLS] f32. Reference: reference::rms_norm
// grid (m), a workgroup a row.

struct Params {
  inv: f32,
  eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;  // [m, row_words(F32, COLS) / 4]
@group(0) @binding(5) var<storage, read> gamma: array<vec4<f32>>;  // [COLS / 4]

var<private> norm: f32;

fn value4(row: u32, group: u32) -> vec4<f32> {
  return x[row * row_words(F32, COLS) / 4u + group] * norm * gamma[group];
}

@compute @workgroup_size(WG)
fn rms_norm(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = workgroup.x;
  if (row >= live[AXIS]) {
    return;
  }
  let groups = (COLS + 3u) / 4u;
  var squares = vec4<f32>(0.0);
  for (var g = lid; g < groups; g += WG) {
    let v = x[row * row_words(F32, COLS) / 4u + g];
    squares += v * v;
  }
  let sum = workgroup_sum((squares.x + squares.y) + (squares.z + squares.w), lid);
  norm = inverse_sqrt(sum / f32(COLS) + p.eps);
  store_act(row, lid);
}
