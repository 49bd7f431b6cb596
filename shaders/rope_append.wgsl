// rope_append: rotates q and k of qkv[m, (Q_HEADS + 2 KV_HEADS) DIM] by their positions, halves of a head against each
// other; writes q[m, Q_HEADS DIM], appends k and v to their pages. Reference: reference::rope_append
// grid (m), a workgroup a row; a thread writes four columns of q, or of a head of k or v.

struct Params {
  k_inv: f32,
  v_inv: f32,
  pages: u32,  // of a row of page_table
}

override WG: u32;
override OUT: u32;  // the dtype of qkv and q

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;  // q[m, row_words(OUT, Q_HEADS DIM)]
@group(0) @binding(3) var<storage, read> qkv: array<u32>;

fn input(row: u32, column: u32) -> f32 {
  let first = row * row_words(OUT, (Q_HEADS + 2u * KV_HEADS) * DIM);
  if (OUT == BF16) {
    return bf16x2(qkv[first + column / 2u])[column % 2u];
  }
  return bitcast<f32>(qkv[first + column]);
}

// A column of q, k or v, rotated unless it is one of v.
fn output(row: u32, at: u32, column: u32) -> f32 {
  let own = input(row, column);
  if (column >= (Q_HEADS + KV_HEADS) * DIM) {
    return own;
  }
  let half = DIM / 2u;
  let d = column % DIM;
  let angle = at * row_words(F32, DIM) + d % half;
  if (d < half) {
    return own * rope[angle] - input(row, column + half) * rope[angle + half];
  }
  return own * rope[angle] + input(row, column - half) * rope[angle + half];
}

// Four columns from `first` on; zeros from `end` on.
fn output4(row: u32, at: u32, first: u32, end: u32) -> vec4<f32> {
  var x = vec4<f32>(0.0);
  for (var i = 0u; i < 4u; i++) {
    if (first + i < end) {
      x[i] = output(row, at, first + i);
    }
  }
  return x;
}

@compute @workgroup_size(WG)
fn rope_append(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = workgroup.x;
  if (row >= live[0]) {
    return;
  }
  let at = position[row];
  let width = Q_HEADS * DIM;
  let q_groups = (width + 3u) / 4u;
  for (var g = lid; g < q_groups; g += WG) {
    let x = output4(row, at, 4u * g, width);
    store4(row * row_words(OUT, width), g, x, 1.0);
  }
  let page = page_table[seq[row] * p.pages + at / PAGE];
  let groups = (DIM + 3u) / 4u;
  for (var i = lid; i < 2u * KV_HEADS * groups; i += WG) {
    let head = i / groups;  // of k, then of v
    let g = i % groups;
    let first = (Q_HEADS + head) * DIM;
    let x = output4(row, at, first + 4u * g, first + DIM);
    append4(page, at, head, g, x);
  }
}
