// gather: out[w, COLS] f32 = x[wanted[w]]. Reference: Op::Gather
// grid (w), a workgroup a row.

override WG: u32;
override COLS: u32;

@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<u32>>;  // [w, row_words(F32, COLS) / 4]
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;  // [m, as out]
@group(0) @binding(4) var<storage, read> wanted: array<u32>;  // [w]

@compute @workgroup_size(WG)
fn gather(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = workgroup.x;
  if (row >= live[1]) {
    return;
  }
  let groups = row_words(F32, COLS) / 4u;
  let source = wanted[row] * groups;
  for (var g = lid; g < groups; g += WG) {
    out[row * groups + g] = x[source + g];
  }
}
