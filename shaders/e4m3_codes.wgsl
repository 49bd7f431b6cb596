// e4m3_codes: the values of all 256 codes, in order: what an adapter makes of them before it may decode fast.
// grid (1), 64 threads.

@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [64]

@compute @workgroup_size(64)
fn e4m3_codes(@builtin(local_invocation_index) lid: u32) {
  out[lid] = e4m3x4_finite(lid * 0x04040404u + 0x03020100u);
}
