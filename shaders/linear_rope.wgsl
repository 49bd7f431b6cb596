// linear_rope: linear_wide and the rope_append behind it. A thread's tile is four channels of a head and the four that these
// rotate with. Reference: reference::linear, reference::rope_append
// grid (n / TN / WG, m / TM); DIM a multiple of 16, TN 8; out is q, of qkv's dtype.

fn channel_of(tile: u32, j: u32) -> u32 {
  return tile / DIM * DIM + tile % DIM / 2u + j % 4u + select(0u, DIM / 2u, j >= 4u);
}

fn finish(row: u32, tile: u32, sums: ptr<function, array<f32, 64>>, at: u32) {
  let head = tile / DIM;
  let d = tile % DIM / 2u;
  let x = between4(OUT, row, channel_of(tile, 0u), sums, at);
  let y = between4(OUT, row, channel_of(tile, 4u), sums, at + 4u);
  var low = x;
  var high = y;
  if (head < Q_HEADS + KV_HEADS) {
    let angle = position[row] * row_words(F32, DIM) + d;
    let c = vec4<f32>(rope[angle], rope[angle + 1u], rope[angle + 2u], rope[angle + 3u]);
    let sine = angle + DIM / 2u;
    let s = vec4<f32>(rope[sine], rope[sine + 1u], rope[sine + 2u], rope[sine + 3u]);
    low = x * c - y * s;
    high = y * c + x * s;
  }
  let group = d / 4u;
  let half = DIM / 8u;
  if (head < Q_HEADS) {
    let first = row * p.stride;
    store4(first, head * DIM / 4u + group, low, 1.0);
    store4(first, head * DIM / 4u + group + half, high, 1.0);
  } else {
    let at = position[row];
    let page = page_table[seq[row] * p.pages + at / PAGE];
    append4(page, at, head - Q_HEADS, group, low);
    append4(page, at, head - Q_HEADS, group + half, high);
  }
}

@compute @workgroup_size(WG)
fn linear_rope(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  run_tile(workgroup, lid);
}
