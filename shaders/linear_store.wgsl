// linear_store: the tiles of linear_thread are neighbouring channels, whose sums are stored.

fn channel_of(tile: u32, j: u32) -> u32 {
  return channel_at(tile + j);
}

// `sums` has those of the row from `at` on.
fn finish(row: u32, tile: u32, sums: ptr<function, array<f32, 64>>, at: u32) {
  for (var j = 0u; j < TN; j++) {
    store_at(row, tile + j, (*sums)[at + j]);
  }
}
