// linear_row: linear for GPUs where rows are few: a subgroup takes TN channels at a time and divides their elements
// among its threads, so that these read weights side by side. Reference: reference::linear
// grid (n / CHANNELS, m / TM). A workgroup has CHANNELS channels and TM rows.

override WG: u32;
override TM: u32;  // at most 8
override TN: u32;  // at most 4; even, since two channels may share a word of out
override CHANNELS: u32;  // a multiple of TN

@compute @workgroup_size(WG)
fn linear_row(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
  @builtin(subgroup_invocation_id) lane: u32,
  @builtin(subgroup_size) lanes: u32,
) {
  let m = live[AXIS];
  let row = (p.base + workgroup.y) * TM;
  if (row >= m) {
    return;
  }
  let blocks = (K + 15u) / 16u;
  for (var first = subgroup * TN; first < CHANNELS; first += subgroups * TN) {
    let tile = (p.begin + workgroup.x) * CHANNELS + first;
    if (tile >= p.n + shifted()) {
      break;
    }
    var sums: array<f32, 32>;
    for (var block = lane; block < blocks; block += lanes) {
      var channels: array<mat4x4<f32>, 4>;
      for (var j = 0u; j < TN; j++) {
        channels[j] = w16(channel_at(tile + j) * blocks + block);
      }
      for (var i = 0u; i < TM; i++) {
        let values = x16(min(row + i, m - 1u) * blocks + block);
        for (var j = 0u; j < TN; j++) {
          sums[i * TN + j] += product(values, channels[j]);
        }
      }
    }
    for (var i = 0u; i < TM; i++) {
      for (var j = 0u; j < TN; j++) {
        let sum = subgroupAdd(sums[i * TN + j]);
        if (lane == 0u) {
          store_at(row + i, tile + j, sum);
        }
      }
    }
  }
}
