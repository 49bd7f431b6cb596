// paging: where a position's keys and values lie, and which rows attend together. A cache is
// [page, kv head, token, padded(dim)].

DEVICE size_t kv_row(u32 page, u32 head, u32 position, u32 kv_heads, u32 page_tokens) {
  return ((size_t)page * kv_heads + head) * page_tokens + position % page_tokens;
}

// The same where many positions are looked up: division by `page_tokens` as a product, exact while a position times
// page_tokens is below 2^32.
struct PageOf {
  u32 page_tokens, inverse;
  DEVICE_FUNCTION PageOf(u32 page_tokens) : page_tokens(page_tokens), inverse(0xffffffffu / page_tokens) {}
  // The entry of the page table.
  DEVICE_FUNCTION u32 operator()(u32 position) const { return (u32)((u64)(position + 1) * inverse >> 32); }
  DEVICE_FUNCTION u32 row(u32 page, u32 head, u32 position, u32 kv_heads) const {
    return (page * kv_heads + head - (*this)(position)) * page_tokens + position;
  }
};

// Below every score.
#define NONE (-3e38f)

struct Tile { u32 first, rows, seq, position; };  // rows of one span, and the position of the first

// The tile's rows; none where there are fewer tiles. Whole warps call: a lane looks at one span of 32.
DEVICE Tile find_tile(const u32* live, const uint4* spans, u32 tile, u32 tile_rows) {
  u32 lane = threadIdx.x % 32, count = live[2];
  auto look = [&](u32 at) { return at < count ? spans[at] : make_uint4(0, 0, 0, 0); };
  uint4 next = look(lane);
  for (u32 first = 0; first < count; first += 32) {
    uint4 span = next;
    next = look(first + 32 + lane);
    u32 tiles = (span.y + tile_rows - 1) / tile_rows, end = tiles;
#pragma unroll
    for (u32 by = 1; by < 32; by *= 2) {
      u32 before = __shfl_sync(0xffffffffu, end, lane - by);
      if (lane >= by) end += before;
    }
    u32 behind = __ballot_sync(0xffffffffu, tile < end);
    if (behind != 0) {
      u32 own = __ffs(behind) - 1, skip = (tile - __shfl_sync(0xffffffffu, end - tiles, own)) * tile_rows;
      u32 row = __shfl_sync(0xffffffffu, span.x, own), rows = __shfl_sync(0xffffffffu, span.y, own);
      u32 seq = __shfl_sync(0xffffffffu, span.z, own), position = __shfl_sync(0xffffffffu, span.w, own);
      return {row + skip, min(tile_rows, rows - skip), seq, position + skip};
    }
    tile -= __shfl_sync(0xffffffffu, end, 31);
  }
  return {0, 0, 0, 0};
}

// No part of a context is shorter but the last.
#define LEAST_PART 64

struct Part { u32 begin, end, count; };  // positions, and how many parts the context has

// One of at most `splits` parts of a context, of whole chunks; empty where there are fewer.
DEVICE Part find_part(u32 context, u32 splits, u32 chunk, u32 part) {
  u32 length = max((context + splits - 1) / splits, (u32)LEAST_PART);
  length = (length + chunk - 1) / chunk * chunk;
  u32 begin = min(part * length, context);
  return {begin, min(begin + length, context), (context + length - 1) / length};
}

// What a part leaves behind its sums: largest score, norm, and in the first part how many there are, as bits.
#define PART_TAIL 4
