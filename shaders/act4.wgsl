// act4: four activations as out has them, the one rounding point of everything that writes such.

// Stores the four from column 4 group on of a row that begins with the word `first`; as codes times `inv`, the reciprocal
// of their scale.
fn store4(first: u32, group: u32, v: vec4<f32>, inv: f32) {
  if (OUT == E4M3) {
    out[first + group] = e4m3x4_encode(v * inv);
  } else if (OUT == BF16) {
    out[first + 2u * group] = bf16x2_encode(v.xy);
    out[first + 2u * group + 1u] = bf16x2_encode(v.zw);
  } else {
    let at = first + 4u * group;
    let words = bitcast<vec4<u32>>(v);
    out[at] = words.x;
    out[at + 1u] = words.y;
    out[at + 2u] = words.z;
    out[at + 3u] = words.w;
  }
}
