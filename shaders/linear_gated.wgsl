// linear_gated: linear_wide and the swiglu behind it: out = silu(gate) * up, where w has the channels of gate, then as many
// of up, and half of a thread's tile is of each. Reference: reference::linear, reference::swiglu
// grid (n / TN / WG, m / TM); n / 2 a multiple of 16, TN 8.

override GATE_UP: u32;  // the dtype that gate and up are rounded to

fn channel_of(tile: u32, j: u32) -> u32 {
  return tile / 2u + j % 4u + select(0u, p.n / 2u, j >= 4u);
}

fn finish(row: u32, tile: u32, sums: ptr<function, array<f32, 64>>, at: u32) {
  let gate = between4(GATE_UP, row, channel_of(tile, 0u), sums, at);
  let up = between4(GATE_UP, row, channel_of(tile, 4u), sums, at + 4u);
  store4(row * p.stride, tile / 8u, swiglu4(gate, up), p.inv);
}

@compute @workgroup_size(WG)
fn linear_gated(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  run_tile(workgroup, lid);
}
