// linear_wide: linear for one or two rows, weights read 32 bytes at a time (linear_wide_w).
// Reference: reference::linear. grid (n / TN / WG, m / TM)

@compute @workgroup_size(WG)
fn linear_wide(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  run_tile(workgroup, lid);
}
