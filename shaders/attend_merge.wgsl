// attend_merge: the rows of attend from their parts, COLS = q heads x DIM. Reference: reference::attend
// grid (m), a workgroup a row.

struct Params {
  inv: f32,
  scale: f32,  // of v
  splits: u32,
}

override DIM: u32;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(4) var<storage, read> parts: array<f32>;  // [m, q heads, splits, DIM + 2]: sums, largest score, norm

fn merged(row: u32, column: u32) -> f32 {
  let at = (row * (COLS / DIM) + column / DIM) * p.splits * (DIM + 2u);
  let d = column % DIM;
  if (p.splits == 1u) {
    return parts[at + d] * p.scale / parts[at + DIM + 1u];
  }
  var largest = parts[at + DIM];
  for (var s = 1u; s < p.splits; s++) {
    largest = max(largest, parts[at + s * (DIM + 2u) + DIM]);
  }
  var sum = 0.0;
  var norm = 0.0;
  for (var s = 0u; s < p.splits; s++) {
    let part = at + s * (DIM + 2u);
    let weight = exp_f32(parts[part + DIM] - largest);
    sum += weight * parts[part + d];
    norm += weight * parts[part + DIM + 1u];
  }
  return sum * p.scale / norm;
}

fn value4(row: u32, group: u32) -> vec4<f32> {
  let c = min(vec4<u32>(4u * group) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(COLS - 1u));
  return vec4<f32>(merged(row, c.x), merged(row, c.y), merged(row, c.z), merged(row, c.w));
}

@compute @workgroup_size(WG)
fn attend_merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (workgroup.x < live[AXIS]) {
    store_act(workgroup.x, lid);
  }
}
