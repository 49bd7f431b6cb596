// sm80_attend: as attend, on tensor cores: q in bf16, keys and values in bf16, or in E4M3, which bf16 holds. A weight is
// the sum of three bf16 numbers, so that it keeps its 24 bits. Reference: reference::attend
// A block has a tile of QUERIES / group rows of one span with the `group` query heads of one kv head. A warp has 16 of its
// queries; where there are no more than 16, as in decoding, and `may_share`, SHARERS warps have all of them and 16 positions
// each of every chunk: then sums depend on how many rows a span has. grid (tiles, kv heads, splits), the last tiles first, as
// they have the longest contexts.
// Shared memory: of bf16 caches two chunks of keys and of values, one is copied while the other is used, each CHUNK rows of
// DIM bf16 and 16 bytes; of E4M3 one such, and one as it is in the cache. Then the sums of the sharers, in the same place.

#define QUERIES 128
#define CHUNK 64
#define THREADS 256
#define SHARERS 4
// Below every score that is not scaled yet, and far from infinity when it is.
#define LEAST_SCORE (-1e30f)

// The bf16 parts of two numbers; what is left of them stays.
DEVICE u32 take_part(float& low, float& high) {
  u32 pair = bf16x2_encode(low, high);
  low -= bf16_low(pair);
  high -= bf16_high(pair);
  return pair;
}

// What a warp has found so far. Of its 16 queries a lane has lane / 4 and 8 further on: the largest score before it is
// scaled, its own share of the norm, and two of eight elements of each sum.
template <int DIM> struct Found { float largest[2], norm[2], sums[DIM / 8][4]; };

// COUNT positions from `first` on; the lane's row of their keys for load_matrices is at `keys`, that of the values CHUNK rows
// behind. All of the warp's queries see those below `seen`, and query i those below limit(i). A weight is 2^(factor score).
template <int COUNT, int DIM, class F>
DEVICE void add_positions(Found<DIM>& found, const u32 (&queries)[DIM / 16][4], u32 keys, u32 first, u32 seen,
                          F limit, float factor) {
  const u32 PITCH = 2 * DIM + 16, values = keys + CHUNK * PITCH, lane = threadIdx.x % 32;
  float scores[COUNT / 8][4] = {};
#pragma unroll
  for (u32 d = 0; d < DIM; d += 16) {
#pragma unroll
    for (u32 t = 0; t < COUNT; t += 16) {
      u32 four[4];
      load_matrices(four, keys + t * PITCH + 2 * d);
      u32 left[2] = {four[0], four[2]}, right[2] = {four[1], four[3]};
      mma_bf16(scores[t / 8], queries[d / 16], left);
      mma_bf16(scores[t / 8 + 1], queries[d / 16], right);
    }
  }
  if (first + COUNT > seen) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      u32 own = limit(lane / 4 + 8 * half);
#pragma unroll
      for (u32 i = 0; i < COUNT / 4; i++) {
        bool is_seen = first + i / 2 * 8 + lane % 4 * 2 + i % 2 < own;
        if (!is_seen) scores[i / 2][2 * half + i % 2] = __uint_as_float(0xff800000u);
      }
    }
  }
  float most[2];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    most[half] = found.largest[half];
#pragma unroll
    for (u32 i = 0; i < COUNT / 4; i++) most[half] = fmaxf(most[half], scores[i / 2][2 * half + i % 2]);
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
  }
  if (__ballot_sync(0xffffffffu, most[0] > found.largest[0] || most[1] > found.largest[1]) != 0) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      float correction = exp2_approx((found.largest[half] - most[half]) * factor);
      found.largest[half] = most[half];
      found.norm[half] *= correction;
#pragma unroll
      for (int i = 0; i < DIM / 8; i++) found.sums[i][2 * half] *= correction, found.sums[i][2 * half + 1] *= correction;
    }
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    float behind = -most[half] * factor, weights = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT / 4; i++) {
      float& score = scores[i / 2][2 * half + i % 2];
      score = exp2_approx(fmaf(score, factor, behind));
      weights += score;
    }
    found.norm[half] += weights;
  }
#pragma unroll
  for (u32 t = 0; t < COUNT; t += 16) {
    float(&left)[4] = scores[t / 8], (&right)[4] = scores[t / 8 + 1];
    u32 parts[3][4];
#pragma unroll
    for (int i = 0; i < 3; i++) {
      parts[i][0] = take_part(left[0], left[1]), parts[i][1] = take_part(left[2], left[3]);
      parts[i][2] = take_part(right[0], right[1]), parts[i][3] = take_part(right[2], right[3]);
    }
#pragma unroll
    for (u32 d = 0; d < DIM; d += 16) {
      u32 four[4];
      load_matrices_transposed(four, values + t * PITCH + 2 * d);
      u32 low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
#pragma unroll
      for (int i = 0; i < 3; i++) {
        mma_bf16(found.sums[d / 8], parts[i], low);
        mma_bf16(found.sums[d / 8 + 1], parts[i], high);
      }
    }
  }
}

template <int DIM, bool ARE_CODES>
DEVICE void attend_mma(const u32* live, const u16* q, u32 may_share, const u8* k, const u8* v, const u32* page_table,
                       u32 pages, const uint4* spans, float* parts, u32 group, u32 kv_heads, u32 page_tokens,
                       float scale) {
  LAUNCH_SHARED(shared);
  // Bytes of a row in shared memory, of a chunk of keys, of keys and values; of a row in the cache. A thread copies a
  // vector of 16 bytes of COPIED rows of a chunk, STRIDE rows apart.
  const u32 PITCH = 2 * DIM + 16, SIDE = CHUNK * PITCH, PAIR = 2 * SIDE, BYTES = ARE_CODES ? DIM : 2 * DIM;
  const u32 VECTORS = BYTES / 16, STRIDE = THREADS / VECTORS, COPIED = CHUNK / STRIDE;
  u32 head = blockIdx.y, splits = gridDim.z, q_heads = kv_heads * group;
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Spans and the page table are nobody's output: they are read while the kernel before runs.
  Tile tile = find_tile(live, spans, gridDim.x - 1 - blockIdx.x, QUERIES / group);
  Part part = find_part(tile.position + tile.rows, splits, CHUNK, blockIdx.z);
  u32 end = part.end, page[COPIED];
  bool is_idle = tile.rows == 0 || part.begin == end;
  PageOf page_of(page_tokens);
  // Behind the end the last position stands in.
  auto position_of = [&](u32 first, u32 i) { return min(first + threadIdx.x / VECTORS + i * STRIDE, end - 1); };
  auto find_pages = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < COPIED; i++) page[i] = page_table[(size_t)tile.seq * pages + page_of(position_of(first, i))];
  };
  if (!is_idle) find_pages(part.begin);
  dependency_wait();
  if (is_idle) return;

  // Keys, and values `side` bytes behind; zeros behind the end.
  auto copy = [&](u32 first, u32 to, u32 pitch, u32 side) {
#pragma unroll
    for (u32 i = 0; i < COPIED; i++) {
      u32 t = threadIdx.x / VECTORS + i * STRIDE, byte = threadIdx.x % VECTORS * 16;
      u32 position = position_of(first, i), row = page_of.row(page[i], head, position, kv_heads);
      size_t from = (size_t)row * BYTES + byte;
      copy16_async(to + t * pitch + byte, k + from, first + t < end);
      copy16_async(to + side + t * pitch + byte, v + from, first + t < end);
    }
    copy_commit();
  };
  u32 base = shared_address(shared), codes = base + PAIR;
  if (ARE_CODES) copy(part.begin, codes, DIM, CHUNK * DIM);
  else copy(part.begin, base, PITCH, SIDE);
  find_pages(part.begin + CHUNK);

  u32 count = tile.rows * group;
  bool is_shared = may_share && count <= 16;
  u32 own = is_shared ? 0 : warp * 16, behind = is_shared ? warp * 16 : 0;
  bool is_used = is_shared ? warp < SHARERS : own < count;
  // The query's row of q, as of heads.
  auto row_of = [&](u32 query) { return (tile.first + query / group) * q_heads + head * group + query % group; };
  u32 queries[DIM / 16][4];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 query = own + lane / 4 + 8 * half;
    const u16* from = q + (size_t)row_of(query) * DIM;
#pragma unroll
    for (u32 i = 0; i < DIM / 8; i++) {
      queries[i / 2][i % 2 * 2 + half] = query < count ? *(const u32*)(from + 8 * i + lane % 4 * 2) : 0;
    }
  }
  auto limit = [&](u32 query) { return min(end, tile.position + (own + query) / group + 1); };
  u32 seen = limit(0);
  Found<DIM> found = {{LEAST_SCORE, LEAST_SCORE}, {0.0f, 0.0f}, {}};
  float factor = scale * 1.44269504088896341f;
  u32 lane_at = base + (behind + lane % 16) * PITCH + lane / 16 * 16;

  u32 use = 0;
  for (u32 first = part.begin; first < end; first += CHUNK) {
    copy_wait<0>();
    __syncthreads();
    if (ARE_CODES) {
      for (u32 i = threadIdx.x; i < 2 * CHUNK * DIM / 4; i += THREADS) {
        Four four = load4(shared + PAIR, E4M3, 4 * i);
        store4(shared + i / (DIM / 4) * PITCH, BF16, i % (DIM / 4) * 4, four);
      }
      __syncthreads();
    }
    u32 next = first + CHUNK;
    if (next < end) {
      if (ARE_CODES) copy(next, codes, DIM, CHUNK * DIM);
      else copy(next, base + (PAIR - use), PITCH, SIDE);
      find_pages(next + CHUNK);
    }
    if (is_shared && is_used) {
      add_positions<16>(found, queries, lane_at + use, first + behind, seen, limit, factor);
    } else if (is_used) {
#pragma unroll 1
      for (u32 t = 0; t < CHUNK && first + t < end; t += 32) {
        add_positions<32>(found, queries, lane_at + use + t * PITCH, first + t, seen, limit, factor);
      }
    }
    if (!ARE_CODES) use = PAIR - use;
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    found.norm[half] += __shfl_xor_sync(0xffffffffu, found.norm[half], 1);
    found.norm[half] += __shfl_xor_sync(0xffffffffu, found.norm[half], 2);
  }
  auto part_of = [&](u32 query) {
    return parts + ((size_t)row_of(query) * splits + blockIdx.z) * (DIM + PART_TAIL);
  };
  // The sums of a query, its largest score, its norm.
  float* all = (float*)shared;
  const u32 WIDTH = DIM + PART_TAIL;
  if (is_shared) __syncthreads();
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 query = own + lane / 4 + 8 * half;
    if (query >= count || !is_used) continue;
    float* to = is_shared ? all + (warp * 16 + query) * WIDTH : part_of(query);
#pragma unroll
    for (u32 i = 0; i < DIM / 4; i++) to[i / 2 * 8 + lane % 4 * 2 + i % 2] = found.sums[i / 2][2 * half + i % 2];
    if (lane % 4 == 0) {
      to[DIM] = found.largest[half] * scale, to[DIM + 1] = found.norm[half], to[DIM + 2] = __uint_as_float(part.count);
    }
  }
  if (!is_shared) return;
  __syncthreads();
  for (u32 i = threadIdx.x; i < count * DIM; i += THREADS) {
    u32 query = i / DIM, d = i % DIM;
    const float* of_query = all + query * WIDTH;
    float largest = NONE, sum = 0.0f, norm = 0.0f;
#pragma unroll
    for (u32 j = 0; j < SHARERS; j++) largest = fmaxf(largest, of_query[j * 16 * WIDTH + DIM]);
#pragma unroll
    for (u32 j = 0; j < SHARERS; j++) {
      const float* from = of_query + j * 16 * WIDTH;
      float weight = exp_f32(from[DIM] - largest);
      sum = fmaf(weight, from[d], sum), norm = fmaf(weight, from[DIM + 1], norm);
    }
    float* to = part_of(query);
    to[d] = sum;
    if (d == 0) to[DIM] = largest, to[DIM + 1] = norm, to[DIM + 2] = __uint_as_float(part.count);
  }
}

#define ATTEND_MMA(name, DIM, ARE_CODES, BLOCKS) \
  KERNEL(THREADS, BLOCKS) name(const u32* live, const u16* q, u32 may_share, const u8* k, const u8* v, \
                               const u32* page_table, u32 pages, const uint4* spans, float* parts, u32 group, \
                               u32 kv_heads, u32 page_tokens, float scale) { \
    attend_mma<DIM, ARE_CODES>(live, q, may_share, k, v, page_table, pages, spans, parts, group, kv_heads, page_tokens, \
                               scale); \
  } \
  ENTRY(name)

ATTEND_MMA(sm80_attend_bf16_64, 64, false, 2)
ATTEND_MMA(sm80_attend_bf16_128, 128, false, 1)
ATTEND_MMA(sm80_attend_e4m3_64, 64, true, 2)
ATTEND_MMA(sm80_attend_e4m3_128, 128, true, 1)
