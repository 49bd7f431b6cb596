// sm80_attend: as attend, on tensor cores: q in bf16, keys and values in bf16, or in E4M3, which bf16 holds. A weight is
// the sum of three bf16 numbers, so that it keeps its 24 bits. Reference: reference::attend
// A block has a tile of QUERIES / group rows of one span with the `group` query heads of one kv head, a warp 16 queries.
// grid (tiles, kv heads, splits). Shared memory: queries, keys, values, each 64 rows of DIM bf16 and 16 bytes.

#define QUERIES 64
#define CHUNK 64

// Eight elements of a row of the cache, as bf16.
DEVICE uint4 eight(const void* cache, u32 dtype, size_t at) {
  if (dtype == BF16) return *(const uint4*)((const u16*)cache + at);
  Four a = load4(cache, E4M3, at), b = load4(cache, E4M3, at + 4);
  return make_uint4(bf16x2_encode(a.x[0], a.x[1]), bf16x2_encode(a.x[2], a.x[3]), bf16x2_encode(b.x[0], b.x[1]),
                    bf16x2_encode(b.x[2], b.x[3]));
}

// The bf16 parts of two numbers; what is left of them stays.
DEVICE u32 take_part(float& low, float& high) {
  u32 pair = bf16x2_encode(low, high);
  low -= bf16_low(pair);
  high -= bf16_high(pair);
  return pair;
}

template <int DIM>
DEVICE void attend_mma(const u32* live, const u16* q, const void* k, const void* v, u32 cache, const u32* page_table,
                       u32 pages, const uint4* spans, float* parts, u32 group, u32 kv_heads, u32 page_tokens,
                       float scale) {
  dependency_wait();
  LAUNCH_SHARED(shared);
  const u32 PITCH = 2 * DIM + 16, VECTORS = DIM / 8;
  u8 *queries = shared, *keys = queries + QUERIES * PITCH, *values = keys + CHUNK * PITCH;
  u32 tile_rows = QUERIES / group, head = blockIdx.y, splits = gridDim.z, q_heads = kv_heads * group;
  Tile tile = find_tile(live, spans, blockIdx.x, tile_rows);
  if (tile.rows == 0) return;
  u32 context = tile.position + tile.rows;
  Part part = find_part(context, splits, CHUNK, blockIdx.z);
  u32 begin = part.begin, end = part.end;
  if (begin == end) return;
  u32 count = tile.rows * group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (u32 i = threadIdx.x; i < QUERIES * VECTORS; i += blockDim.x) {
    u32 query = i / VECTORS, d = i % VECTORS * 8;
    size_t at = ((size_t)(tile.first + query / group) * q_heads + head * group + query % group) * DIM + d;
    uint4 own = query < count ? *(const uint4*)(q + at) : make_uint4(0, 0, 0, 0);
    *(uint4*)(queries + query * PITCH + 2 * d) = own;
  }
  // Of 16 queries a lane has those of rows lane / 4 and 8 further on.
  float largest[2] = {NONE, NONE}, norm[2] = {0.0f, 0.0f}, sums[DIM / 8][4] = {};
  u32 q_at = shared_address(queries) + (warp * 16 + lane % 16) * PITCH + lane / 16 * 16;
  u32 k_at = shared_address(keys) + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;
  u32 v_at = shared_address(values) + (lane % 8 + lane / 8 % 2 * 8) * PITCH + lane / 16 * 16;

  for (u32 first = begin; first < end; first += CHUNK) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < CHUNK * VECTORS; i += blockDim.x) {
      u32 t = i / VECTORS, d = i % VECTORS * 8;
      // Behind the end the last position stands in, and weighs nothing.
      u32 position = min(first + t, end - 1);
      u32 page = page_table[(size_t)tile.seq * pages + position / page_tokens];
      size_t at = kv_row(page, head, position, kv_heads, page_tokens) * DIM + d;
      *(uint4*)(keys + t * PITCH + 2 * d) = eight(k, cache, at);
      *(uint4*)(values + t * PITCH + 2 * d) = eight(v, cache, at);
    }
    __syncthreads();
    if (warp * 16 >= count) continue;
    float scores[CHUNK / 8][4] = {};
#pragma unroll
    for (u32 d = 0; d < DIM; d += 16) {
      u32 qs[4];
      load_matrices(qs, q_at + 2 * d);
#pragma unroll
      for (u32 t = 0; t < CHUNK; t += 16) {
        u32 four[4];
        load_matrices(four, k_at + t * PITCH + 2 * d);
        u32 left[2] = {four[0], four[1]}, right[2] = {four[2], four[3]};
        mma_bf16(scores[t / 8], qs, left);
        mma_bf16(scores[t / 8 + 1], qs, right);
      }
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      u32 own = tile.position + (warp * 16 + lane / 4 + 8 * half) / group;
      float most = largest[half];
#pragma unroll
      for (u32 i = 0; i < CHUNK / 4; i++) {
        u32 at = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float& score = scores[i / 2][2 * half + i % 2];
        score = at < end && at <= own ? score * scale : NONE;
        most = fmaxf(most, score);
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      float correction = exp_f32(largest[half] - most), weights = 0.0f;
      largest[half] = most;
#pragma unroll
      for (u32 i = 0; i < CHUNK / 4; i++) {
        float& score = scores[i / 2][2 * half + i % 2];
        score = score == NONE ? 0.0f : exp_f32(score - most);
        weights += score;
      }
      norm[half] = fmaf(norm[half], correction, weights);
#pragma unroll
      for (int i = 0; i < DIM / 8; i++) sums[i][2 * half] *= correction, sums[i][2 * half + 1] *= correction;
    }
#pragma unroll
    for (u32 t = 0; t < CHUNK; t += 16) {
      float(&left)[4] = scores[t / 8], (&right)[4] = scores[t / 8 + 1];
#pragma unroll
      for (int i = 0; i < 3; i++) {
        u32 weights[4] = {take_part(left[0], left[1]), take_part(left[2], left[3]), take_part(right[0], right[1]),
                          take_part(right[2], right[3])};
#pragma unroll
        for (u32 d = 0; d < DIM; d += 16) {
          u32 four[4];
          load_matrices_transposed(four, v_at + t * PITCH + 2 * d);
          u32 low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
          mma_bf16(sums[d / 8], weights, low);
          mma_bf16(sums[d / 8 + 1], weights, high);
        }
      }
    }
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 query = warp * 16 + lane / 4 + 8 * half;
    float all = norm[half] + __shfl_xor_sync(0xffffffffu, norm[half], 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    if (query < count) {
      size_t row = tile.first + query / group;
      float* to = parts + ((row * q_heads + head * group + query % group) * splits + blockIdx.z) * (DIM + PART_TAIL);
#pragma unroll
      for (u32 i = 0; i < DIM / 4; i++) to[i / 2 * 8 + lane % 4 * 2 + i % 2] = sums[i / 2][2 * half + i % 2];
      if (lane % 4 == 0) to[DIM] = largest[half], to[DIM + 1] = all, to[DIM + 2] = __uint_as_float(part.count);
    }
  }
}

#define ATTEND_MMA(name, DIM) \
  KERNEL(128, 1) name(const u32* live, const u16* q, u32, const void* k, const void* v, u32 cache, \
                      const u32* page_table, u32 pages, const uint4* spans, float* parts, u32 group, u32 kv_heads, \
                      u32, u32 page_tokens, float scale) { \
    attend_mma<DIM>(live, q, k, v, cache, page_table, pages, spans, parts, group, kv_heads, page_tokens, scale); \
  } \
  ENTRY(name)

ATTEND_MMA(sm80_attend_64, 64)
ATTEND_MMA(sm80_attend_128, 128)
