// paging: where a position's keys and values lie, and which rows attend together. A cache is
// [page, kv head, token, padded(dim)].

DEVICE size_t kv_row(u32 page, u32 head, u32 position, u32 kv_heads, u32 page_tokens) {
  return ((size_t)page * kv_heads + head) * page_tokens + position % page_tokens;
}

// Below every score.
#define NONE (-3e38f)

struct Tile { u32 first, rows, seq, position; };  // rows of one span, and the position of the first

// The tile's rows; none where there are fewer tiles.
DEVICE Tile find_tile(const u32* live, const uint4* spans, u32 tile, u32 tile_rows) {
  for (u32 s = 0; s < live[2]; s++) {
    uint4 span = spans[s];
    u32 tiles = (span.y + tile_rows - 1) / tile_rows;
    if (tile < tiles) {
      u32 skip = tile * tile_rows;
      return {span.x + skip, min(tile_rows, span.y - skip), span.z, span.w + skip};
    }
    tile -= tiles;
  }
  return {0, 0, 0, 0};
}
