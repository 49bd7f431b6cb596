// linear_tiled: linear for GPUs where rows are many: a workgroup of 256 threads decodes 64 rows and 64 channels into its
// memory, two blocks at a time, and each thread multiplies 4 of the one with 4 of the other. Reference: reference::linear
// grid (n / 64, m / 64).

// [8 vectors of a step, 64 rows or channels]: neighbouring threads read neighbouring vectors.
var<workgroup> xs: array<vec4<f32>, 512>;
var<workgroup> ws: array<vec4<f32>, 512>;

// Steps whose sum is taken on its own.
const CHUNK = 16u;

// The columns of `to` from a block's elements.
fn put_x(block: mat4x4<f32>, at: u32) {
  xs[at] = block[0];
  xs[at + 64u] = block[1];
  xs[at + 128u] = block[2];
  xs[at + 192u] = block[3];
}

fn put_w(block: mat4x4<f32>, at: u32) {
  ws[at] = block[0];
  ws[at + 64u] = block[1];
  ws[at + 128u] = block[2];
  ws[at + 192u] = block[3];
}

@compute @workgroup_size(256)
fn linear_tiled(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = live[AXIS];
  let row = (p.base + workgroup.y) * 64u;
  let tile = (p.begin + workgroup.x) * 64u;
  if (row >= m) {
    return;
  }
  let blocks = (K + 15u) / 16u;
  // What the thread decodes: one block of a row of x, or of a channel of w.
  let own = lid / 2u % 64u;
  let x_row = min(row + own, m - 1u) * blocks;
  let w_row = channel_at(tile + own) * blocks;
  let to = lid % 2u * 256u + own;
  // What it multiplies: rows r .. r + 3, and places c, c + 1, c + 32, c + 33, as two channels may share a word of out.
  let r = lid / 16u * 4u;
  let c = lid % 16u * 2u;
  var sums: array<vec4<f32>, 4>;
  var chunk: array<vec4<f32>, 4>;
  for (var first = 0u; first < blocks; first += 2u) {
    let block = first + lid % 2u;
    var values = mat4x4<f32>();
    if (block < blocks) {
      if (lid < 128u) {
        values = x16(x_row + block);
      } else {
        values = w16(w_row + block);
      }
    }
    workgroupBarrier();
    if (lid < 128u) {
      put_x(values, to);
    } else {
      put_w(values, to);
    }
    workgroupBarrier();
    for (var v = 0u; v < 512u; v += 64u) {
      let w0 = ws[v + c];
      let w1 = ws[v + c + 1u];
      let w2 = ws[v + c + 32u];
      let w3 = ws[v + c + 33u];
      for (var i = 0u; i < 4u; i++) {
        let x = xs[v + r + i];
        chunk[i] += vec4<f32>(dot(x, w0), dot(x, w1), dot(x, w2), dot(x, w3));
      }
    }
    if (first / 2u % CHUNK == CHUNK - 1u || first + 2u >= blocks) {
      for (var i = 0u; i < 4u; i++) {
        sums[i] += chunk[i];
        chunk[i] = vec4<f32>(0.0);
      }
    }
  }
  for (var i = 0u; i < 4u; i++) {
    for (var j = 0u; j < 4u; j++) {
      store_at(row + r + i, tile + c + j % 2u + j / 2u * 32u, sums[i][j]);
    }
  }
}
