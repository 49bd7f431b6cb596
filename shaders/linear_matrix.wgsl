// linear_matrix: linear of codes for GPUs with matrices of 16 x 16 f16, which hold E4M3 exactly, and sums in f32.
// Reference: reference::linear
// A workgroup decodes 64 rows and 64 channels into its memory, two blocks at a time; each of its four subgroups
// multiplies 32 of the one with 32 of the other. A device may sum with less than f32 holds: its sums are added to others
// every 128 products. WG is four times the subgroup size. grid (n / 64, m / 64).

override WG: u32;

var<workgroup> xs: array<f16, 2048>;  // [64 rows, 32]
var<workgroup> ws: array<f16, 2048>;  // [64 channels, 32]
var<workgroup> products: array<f32, 4096>;  // [64 rows, 64 channels]

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

fn put_x(values: vec4<f32>, at: u32) {
  let halves = vec4<f16>(values);
  xs[at] = halves.x;
  xs[at + 1u] = halves.y;
  xs[at + 2u] = halves.z;
  xs[at + 3u] = halves.w;
}

fn put_w(values: vec4<f32>, at: u32) {
  let halves = vec4<f16>(values);
  ws[at] = halves.x;
  ws[at + 1u] = halves.y;
  ws[at + 2u] = halves.z;
  ws[at + 3u] = halves.w;
}

@compute @workgroup_size(WG)
fn linear_matrix(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(local_invocation_index) lid: u32,
  @builtin(subgroup_id) subgroup: u32,
) {
  let m = live[AXIS];
  let row = (p.base + workgroup.y) * 64u;
  let tile = (p.begin + workgroup.x) * 64u;
  if (row >= m) {
    return;
  }
  let blocks = (K + 15u) / 16u;
  let r = subgroup / 2u * 32u;
  let c = subgroup % 2u * 32u;
  var t00 = Sums();
  var t01 = Sums();
  var t10 = Sums();
  var t11 = Sums();
  var s00 = Sums();
  var s01 = Sums();
  var s10 = Sums();
  var s11 = Sums();
  for (var first = 0u; first < blocks; first += 2u) {
    workgroupBarrier();
    for (var i = lid; i < 128u; i += WG) {
      let own = i / 2u;
      let block = first + i % 2u;
      var x_block = mat4x4<f32>();
      var w_block = mat4x4<f32>();
      if (block < blocks) {
        x_block = x16(min(row + own, m - 1u) * blocks + block);
        w_block = w16(channel_at(tile + own) * blocks + block);
      }
      for (var v = 0u; v < 4u; v++) {
        put_x(x_block[v], 16u * i + 4u * v);
        put_w(w_block[v], 16u * i + 4u * v);
      }
    }
    workgroupBarrier();
    for (var k = 0u; k < 32u; k += 16u) {
      let x0 = coopLoadT<Left>(&xs[r * 32u + k], 32u);
      let x1 = coopLoadT<Left>(&xs[(r + 16u) * 32u + k], 32u);
      let w0 = coopLoad<Right>(&ws[c * 32u + k], 32u);
      let w1 = coopLoad<Right>(&ws[(c + 16u) * 32u + k], 32u);
      s00 = coopMultiplyAdd(x0, w0, s00);
      s01 = coopMultiplyAdd(x0, w1, s01);
      s10 = coopMultiplyAdd(x1, w0, s10);
      s11 = coopMultiplyAdd(x1, w1, s11);
    }
    if (first % 8u == 6u || first + 2u >= blocks) {
      t00 = t00 + s00;
      t01 = t01 + s01;
      t10 = t10 + s10;
      t11 = t11 + s11;
      s00 = Sums();
      s01 = Sums();
      s10 = Sums();
      s11 = Sums();
    }
  }
  coopStoreT(t00, &products[r * 64u + c], 64u);
  coopStoreT(t01, &products[r * 64u + c + 16u], 64u);
  coopStoreT(t10, &products[(r + 16u) * 64u + c], 64u);
  coopStoreT(t11, &products[(r + 16u) * 64u + c + 16u], 64u);
  workgroupBarrier();
  for (var i = lid; i < 2048u; i += WG) {
    let at = row + i / 32u;
    let place = tile + 2u * (i % 32u);
    store_at(at, place, products[2u * i]);
    store_at(at, place + 1u, products[2u * i + 1u]);
  }
}
