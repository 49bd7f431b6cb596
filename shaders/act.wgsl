// act: activations [m, COLS] to write, a workgroup a row, which finds the row's scale first. The shader's own part gives
// value4(row, group), the four numbers from column 4 group on, and a field `inv` of its parameters, the reciprocal of a
// static scale.

override OUT: u32;  // a dtype
override PER_TOKEN: bool;  // a scale a row, amax / 448
override COLS: u32;
override AXIS: u32;  // which word of live counts the rows

@group(0) @binding(2) var<storage, read_write> out: array<u32>;  // [m, row_words(OUT, COLS)]
@group(0) @binding(3) var<storage, read_write> out_scale: array<f32>;  // [m] where PER_TOKEN

// Four numbers of a row; zeros behind its end.
fn columns(row: u32, group: u32) -> vec4<f32> {
  let column = vec4<u32>(4u * group) + vec4<u32>(0u, 1u, 2u, 3u);
  return select(value4(row, group), vec4<f32>(0.0), column >= vec4<u32>(COLS));
}

// amax / 448, the f32 epsilon where that is zero or subnormal; infinity stays.
fn token_scale(amax: f32) -> f32 {
  let bits = bitcast<u32>(amax);
  let scale = select(divide(amax, 448.0), amax, bits == 0x7f800000u);
  return select(scale, 1.1920929e-7, bits < 0x04e00000u);
}

// Stores a row. All threads of the workgroup call.
fn store_act(row: u32, lid: u32) {
  let groups = (COLS + 3u) / 4u;
  var inv = p.inv;
  if (PER_TOKEN) {
    var amax = vec4<u32>(0u);
    for (var g = lid; g < groups; g += WG) {
      let a = bitcast<vec4<u32>>(columns(row, g)) & vec4<u32>(0x7fffffffu);
      amax = max(amax, select(a, vec4<u32>(0u), a > vec4<u32>(0x7f800000u)));
    }
    let most = max(max(amax.x, amax.y), max(amax.z, amax.w));
    let scale = token_scale(bitcast<f32>(workgroup_max(most, lid)));
    inv = select(divide(1.0, scale), 0.0, bitcast<u32>(scale) == 0x7f800000u);
    if (lid == 0u) {
      out_scale[row] = scale;
    }
  }
  let first = row * row_words(OUT, COLS);
  for (var g = lid; g < groups; g += WG) {
    store4(first, g, columns(row, g), inv);
  }
}
