// attend: softmax(q k^T / sqrt(dim)) v of each row over one of `splits` parts of its context, causal, paged,
// grouped-query, in f32; attend_merge puts the parts together. Reference: reference::attend
// A block has a tile of QUERIES / group rows of one span with the `group` query heads of one kv head. grid (tiles,
// kv heads, splits). A warp scores four queries against 32 positions, one a lane; then a lane sums dim / 32 elements.

#define QUERIES 16
#define WARPS 4
#define OWN (QUERIES / WARPS)
#define CHUNK 32
#define MOST_DIM 256

KERNEL(128, 1) attend(const u32* live, const void* q, u32 q_type, const void* k, const void* v, u32 cache,
                      const u32* page_table, u32 pages, const uint4* spans, float* parts, u32 group, u32 kv_heads,
                      u32 dim, u32 page_tokens, float scale) {
  dependency_wait();
  LAUNCH_SHARED(shared);
  u32 width = padded(dim), pitch = width + 4;
  float* queries = (float*)shared;           // [QUERIES, width]
  float* keys = queries + QUERIES * width;   // [CHUNK, pitch]
  float* values = keys + CHUNK * pitch;      // [CHUNK, width]
  float* weights = values + CHUNK * width;   // [QUERIES, CHUNK]
  u32 tile_rows = QUERIES / group, head = blockIdx.y, splits = gridDim.z;
  Tile tile = find_tile(live, spans, blockIdx.x, tile_rows);
  if (tile.rows == 0) return;
  u32 context = tile.position + tile.rows;
  Part part = find_part(context, splits, CHUNK, blockIdx.z);
  u32 begin = part.begin, end = part.end;
  if (begin == end) return;
  u32 count = tile.rows * group, warp = threadIdx.x / 32, lane = threadIdx.x % 32, q_heads = kv_heads * group;

  for (u32 i = threadIdx.x; i < QUERIES * width; i += blockDim.x) {
    u32 query = i / width, d = i % width;
    size_t row = tile.first + query / group;
    size_t at = row * padded(q_heads * dim) + (head * group + query % group) * dim + d;
    queries[i] = query < count && d < dim ? load1(q, q_type, at) : 0.0f;
  }
  float largest[OWN], norm[OWN], sums[OWN][MOST_DIM / 32] = {};
#pragma unroll
  for (int i = 0; i < OWN; i++) largest[i] = NONE, norm[i] = 0.0f;

  for (u32 first = begin; first < end; first += CHUNK) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < CHUNK * width / 4; i += blockDim.x) {
      u32 t = i / (width / 4), d = i % (width / 4) * 4;
      // Behind the end the last position stands in, and weighs nothing.
      u32 position = min(first + t, end - 1);
      u32 page = page_table[(size_t)tile.seq * pages + position / page_tokens];
      size_t at = kv_row(page, head, position, kv_heads, page_tokens) * width + d;
      store4(keys, F32, t * pitch + d, load4(k, cache, at));
      store4(values, F32, t * width + d, load4(v, cache, at));
    }
    __syncthreads();
    if (warp * OWN >= count) continue;
    float scores[OWN] = {};
    for (u32 d = 0; d < width; d += 4) {
      Four key = load4(keys, F32, lane * pitch + d);
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
        Four query = load4(queries, F32, (warp * OWN + i) * width + d);
#pragma unroll
        for (int j = 0; j < 4; j++) scores[i] = fmaf(query.x[j], key.x[j], scores[i]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
      u32 own = tile.position + (warp * OWN + i) / group;
      bool is_seen = first + lane < end && first + lane <= own;
      float score = is_seen ? scores[i] * scale : NONE;
      float most = fmaxf(largest[i], warp_reduce<Max>(score));
      float weight = is_seen ? exp_f32(score - most) : 0.0f;
      float correction = exp_f32(largest[i] - most);
      norm[i] = fmaf(norm[i], correction, warp_reduce<Add>(weight));
      largest[i] = most;
      weights[(warp * OWN + i) * CHUNK + lane] = weight;
#pragma unroll
      for (int j = 0; j < MOST_DIM / 32; j++) sums[i][j] *= correction;
    }
    __syncwarp();
#pragma unroll
    for (u32 j = 0; j < MOST_DIM / 32; j++) {
      u32 d = lane + 32 * j;
      if (d >= dim) break;
      float chunk[OWN] = {};
      for (u32 t = 0; t < CHUNK; t++) {
        float value = values[t * width + d];
#pragma unroll
        for (u32 i = 0; i < OWN; i++) chunk[i] = fmaf(weights[(warp * OWN + i) * CHUNK + t], value, chunk[i]);
      }
#pragma unroll
      for (int i = 0; i < OWN; i++) sums[i][j] += chunk[i];
    }
  }
#pragma unroll
  for (u32 i = 0; i < OWN; i++) {
    u32 query = warp * OWN + i;
    if (query >= count) break;
    size_t row = tile.first + query / group;
    float* to = parts + ((row * q_heads + head * group + query % group) * splits + blockIdx.z) * (dim + PART_TAIL);
#pragma unroll
    for (u32 j = 0; j < MOST_DIM / 32; j++) {
      if (lane + 32 * j < dim) to[lane + 32 * j] = sums[i][j];
    }
    if (lane == 0) to[dim] = largest[i], to[dim + 1] = norm[i], to[dim + 2] = __uint_as_float(part.count);
  }
}
ENTRY(attend)
