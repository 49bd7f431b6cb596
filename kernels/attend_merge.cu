// attend_merge: the rows of attend from their parts, cols = q heads x dim. Reference: reference::attend
// parts: [m, q heads, splits, dim + PART_TAIL] f32: sums, largest score, norm, parts in use. grid (m, blocks a row): see
// act.cuh; a thread takes four columns at a time.

// Parts whose numbers are loaded at once.
#define AT_ONCE 8

// N columns of a head from its column d on; `own` is its first part.
template <int N>
DEVICE void merge(float (&y)[N], const float* own, u32 count, u32 dim, u32 d, float v_scale) {
  u32 stride = dim + PART_TAIL;
  float largest = NONE, norm = 0.0f, sums[N] = {};
  for (u32 first = 0; first < count; first += AT_ONCE) {
    float scores[AT_ONCE], norms[AT_ONCE], most = largest;
    Four columns[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      // Behind the last part it stands in, and weighs nothing.
      const float* part = own + min(first + i, count - 1) * stride;
      scores[i] = first + i < count ? part[dim] : NONE;
      norms[i] = part[dim + 1];
      columns[i] = N == 4 ? load4(part, F32, d) : Four{{part[d]}};
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) most = fmaxf(most, scores[i]);
    float correction = exp_f32(largest - most);
    largest = most;
    norm *= correction;
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] *= correction;
#pragma unroll
    for (u32 s = 0; s < AT_ONCE; s++) {
      float weight = first + s < count ? exp_f32(scores[s] - most) : 0.0f;
      norm = fmaf(weight, norms[s], norm);
#pragma unroll
      for (int i = 0; i < N; i++) sums[i] = fmaf(weight, columns[s].x[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) y[i] = sums[i] * v_scale / norm;
}

KERNEL(512, 1) attend_merge(const u32* live, u32 axis, void* out, float* out_scale, float inv, u32 dtype, u32 cols,
                            const float* parts, u32 dim, u32 splits, float v_scale) {
  SHARED(float, scratch, 32);
  dependency_wait();
  u32 row = blockIdx.x, head_size = splits * (dim + PART_TAIL);
  const float* of_row = parts + (size_t)row * (cols / dim) * head_size;
  u32 count = __float_as_uint(of_row[dim + 2]);
  if (row >= live[axis]) return;
  // A row is asked for twice where it has a scale: what a thread merged last is kept.
  u32 kept_group = 0xffffffffu;
  Four kept;
  store_act({out, out_scale, inv, dtype, cols}, row, scratch, [&](u32 g) {
    if (g == kept_group) return kept;
    kept_group = g;
    if (dim % 4 == 0) {
      merge<4>(kept.x, of_row + (size_t)(4 * g / dim) * head_size, count, dim, 4 * g % dim, v_scale);
      return kept;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 column = min(4 * g + i, cols - 1);
      float y[1];
      merge<1>(y, of_row + (size_t)(column / dim) * head_size, count, dim, column % dim, v_scale);
      kept.x[i] = y[0];
    }
    return kept;
  });
}
ENTRY(attend_merge)
