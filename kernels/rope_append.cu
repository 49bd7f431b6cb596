// rope_append: rotates q and k of qkv[m, (q_heads + 2 kv_heads) dim] by their positions, halves of a head against each
// other; writes q[m, q_heads dim], appends k and v to their pages. Reference: reference::rope_append
// grid (m, blocks a row); a thread writes four elements of a head.

KERNEL(256, 1) rope_append(const u32* live, const void* qkv, u32 in, HEADS) {
  dependency_wait();
  Heads h = TAKEN_HEADS;
  u32 row = blockIdx.x;
  if (row >= live[0]) return;
  u32 at = position[row], half = dim / 2, groups = (dim + 3) / 4;
  u32 page = page_table[(size_t)seq[row] * pages + at / page_tokens];
  size_t from = (size_t)row * padded((q_heads + 2 * kv_heads) * dim);
  const float* angle = rope + (size_t)at * padded(dim);
  for (u32 task = blockIdx.y * blockDim.x + threadIdx.x; task < (q_heads + 2 * kv_heads) * groups;
       task += gridDim.y * blockDim.x) {
    u32 head = task / groups, first = task % groups * 4;
    bool is_rotated = head < q_heads + kv_heads;
    Four y;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 d = first + i;
      y.x[i] = 0.0f;
      if (d < dim) {
        size_t own = from + head * dim + d;
        float x = load1(qkv, in, own);
        if (is_rotated) {
          u32 pair = d % half;
          float other = load1(qkv, in, d < half ? own + half : own - half);
          x = rotate(x, other, angle[pair], angle[pair + half], d < half);
        }
        y.x[i] = x;
      }
    }
    if (head < q_heads) {
      for (u32 i = 0; i < 4; i++) {
        if (first + i < dim) store1(q, in, (size_t)row * padded(q_heads * dim) + head * dim + first + i, y.x[i]);
      }
    } else {
      CacheRow to = find_cache_row(h, page, at, head - q_heads);
#pragma unroll
      for (int i = 0; i < 4; i++) y.x[i] *= to.inv;
      store4(to.cache, cache, to.first + first, y);
    }
  }
}
ENTRY(rope_append)
