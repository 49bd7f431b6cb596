// linear_wide: linear for codes of both operands, one or two rows and K a multiple of 32, which reads weights 32 bytes at
// a time: a processor that poses as a GPU fetches them lane by lane, at a cost a fetch. Needs integers of 64 bits.
// Reference: reference::linear. grid (n / TN / WG, m / TM)

@group(0) @binding(4) var<storage, read> w: array<vec4<u64>>;  // [n, K / 32]

// A step is two blocks of 16 products.
const STEP = 2u;

alias Ws = array<vec4<u64>, 8>;

fn read_w(ws: ptr<function, Ws>, j: u32, step: u32) {
  (*ws)[j] = w[step];
}

fn w4(ws: ptr<function, Ws>, j: u32, c: u32) -> vec4<f32> {
  let codes = (*ws)[j][c / 2u];
  return e4m3x4_small(u32(select(codes, codes >> 32u, c % 2u == 1u)));
}

@compute @workgroup_size(WG)
fn linear_wide(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  run_tile(workgroup, lid);
}
