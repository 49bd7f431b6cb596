// linear: out[m, first + n] (+)= x[m, K] . w[n, K]^T, decoded in registers, sums in f32. Reference: reference::linear
// A thread has a tile of channels x rows (linear_thread): for processors that pose as GPUs, and adapters without
// subgroups. grid (n / TN / WG, m / TM).

// A step is a block of 16 products.
const STEP = 1u;

// Blocks as vectors: one of E4M3, two of bf16, four of f32 for each channel of the tile.
alias Ws = array<vec4<u32>, 32>;

// Reads a step of a channel's elements.
fn read_w(ws: ptr<function, Ws>, j: u32, step: u32) {
  let vectors = 4u >> W;
  for (var v = 0u; v < vectors; v++) {
    (*ws)[j * vectors + v] = w[step * vectors + v];
  }
}

// Elements 4 c .. 4 c + 3 of it, codes small.
fn w4(ws: ptr<function, Ws>, j: u32, c: u32) -> vec4<f32> {
  if (W == E4M3) {
    return e4m3x4_small((*ws)[j][c]);
  } else if (W == BF16) {
    return bf16_quarter((*ws)[2u * j + c / 2u], c);
  }
  return bitcast<vec4<f32>>((*ws)[4u * j + c]);
}

@compute @workgroup_size(WG)
fn linear(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  run_tile(workgroup, lid);
}
