// swiglu: out = silu(gate) * up of gate_up[m, 2 COLS], f32 or bf16. Reference: reference::swiglu
// grid (m), a workgroup a row.

struct Params {
  inv: f32,
}

override IN: u32;  // the dtype of gate_up

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(4) var<storage, read> gate_up: array<u32>;  // [m, row_words(IN, 2 COLS)]

fn input(row: u32, column: u32) -> f32 {
  let first = row * row_words(IN, 2u * COLS);
  if (IN == BF16) {
    return bf16x2(gate_up[first + column / 2u])[column % 2u];
  }
  return bitcast<f32>(gate_up[first + column]);
}

fn value4(row: u32, group: u32) -> vec4<f32> {
  let c = min(vec4<u32>(4u * group) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(COLS - 1u));
  let gate = vec4<f32>(input(row, c.x), input(row, c.y), input(row, c.z), input(row, c.w));
  let d = c + COLS;
  return swiglu4(gate, vec4<f32>(input(row, d.x), input(row, d.y), input(row, d.z), input(row, d.w)));
}

@compute @workgroup_size(WG)
fn swiglu(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (workgroup.x < live[AXIS]) {
    store_act(workgroup.x, lid);
  }
}
