// linear_thread: what linear and linear_wide share, where a thread has a tile of TN channels x TM rows: how its sums are
// cut into chunks, NaN among codes, and its tile's way out.

override WG: u32;
override TM: u32;  // at most 8
override TN: u32;  // at most 8

// Blocks of 16 products whose sums are taken on their own before they are added to the others: four additions each, and
// about as many chunks, so that both sums are short.
fn chunk_of(blocks: u32) -> u32 {
  var count = 1u;
  for (; 4u * count * count < blocks; count *= 2u) {
  }
  return count;
}

// A NaN among the codes of a row makes all of its sums NaN. Codes are decoded as if there were none, and the words of a
// tile are looked at for one.

// The upper bit of each byte that is a NaN code.
fn nan_bits(codes: vec4<u32>) -> vec4<u32> {
  return ((codes & vec4<u32>(0x7f7f7f7fu)) + vec4<u32>(0x01010101u)) & vec4<u32>(0x80808080u);
}

// Whether a row of codes has a NaN.
fn has_nan(first: u32, blocks: u32) -> bool {
  var seen = vec4<u32>();
  for (var block = 0u; block < blocks; block++) {
    seen |= nan_bits(x[first + block]);
  }
  return any(seen != vec4<u32>());
}

// Stores a tile's sums, of codes that were decoded small. x_rows has the first vector of each row, seen the NaN bits of
// the words of all.
fn store_tile(
  row: u32,
  tile: u32,
  x_rows: ptr<function, array<u32, 8>>,
  seen: vec4<u32>,
  sums: ptr<function, array<f32, 64>>,
) {
  let unit = select(1.0, e4m3_unit(), X == E4M3) * select(1.0, e4m3_unit(), W == E4M3);
  for (var i = 0u; i < TM; i++) {
    let is_nan = any(seen != vec4<u32>()) && has_nan((*x_rows)[i], (K + 15u) / 16u);
    for (var j = 0u; j < TN; j++) {
      let sum = (*sums)[i * TN + j] * unit;
      store_at(row + i, tile + j, select(sum, bitcast<f32>(bitcast<u32>(sum) | 0x7fc00000u), is_nan));
    }
  }
}
