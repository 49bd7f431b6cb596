// quantize: x[m, COLS] f32, rounded or quantized to out. Reference: reference::quantize
// grid (m), a workgroup a row.

struct Params {
  inv: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;  // [m, row_words(F32, COLS) / 4]

fn value4(row: u32, group: u32) -> vec4<f32> {
  return x[row * row_words(F32, COLS) / 4u + group];
}

@compute @workgroup_size(WG)
fn quantize(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (workgroup.x < live[AXIS]) {
    store_act(workgroup.x, lid);
  }
}
