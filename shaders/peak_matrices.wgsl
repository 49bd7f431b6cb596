// peak_matrices: products of 16 x 16 matrices of f16 that are added up in f32, for a measurement of the device's
// arithmetic: in each workgroup 256 times four. grid (any), WG the subgroup size.

override WG: u32;

@group(0) @binding(2) var<storage, read_write> out: array<u32>;

var<workgroup> zeros: array<f16, 256>;
var<workgroup> sums: array<f32, 256>;

alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

@compute @workgroup_size(WG)
fn peak_matrices(@builtin(local_invocation_index) lid: u32) {
  for (var i = lid; i < 256u; i += WG) {
    zeros[i] = f16(out[0]);
    sums[i] = f32(out[0]);
  }
  workgroupBarrier();
  let x = coopLoadT<Left>(&zeros[0], 16u);
  let w = coopLoad<Right>(&zeros[0], 16u);
  var a = coopLoad<Sums>(&sums[0], 16u);
  var b = a;
  var c = a;
  var d = a;
  for (var i = 0u; i < 256u; i++) {
    a = coopMultiplyAdd(x, w, a);
    b = coopMultiplyAdd(x, w, b);
    c = coopMultiplyAdd(x, w, c);
    d = coopMultiplyAdd(x, w, d);
  }
  // Barriers, so that no sum is left out for the next one.
  coopStore(a, &sums[0], 16u);
  workgroupBarrier();
  coopStore(b, &sums[0], 16u);
  workgroupBarrier();
  coopStore(c, &sums[0], 16u);
  workgroupBarrier();
  coopStore(d, &sums[0], 16u);
  workgroupBarrier();
  if (lid == 0u && sums[0] < 0.0) {
    out[0] = 1u;
  }
}
