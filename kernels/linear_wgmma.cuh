// linear_wgmma: out[m, first + n] (+)= x[m, k] . w[n, k]^T on the tensor cores of warpgroups. The includer says what
// PRODUCT a warpgroup takes of 64 rows and CHANNELS channels of 32 bytes each.
//
// A block has ROWS rows x CHANNELS channels: one warp brings DEPTH bytes of each at a time, `slots` of them under way; a
// warpgroup for each 64 rows multiplies. Tensor cores sum with fewer bits than f32 has, so that each stage's sums are added to
// f32 ones (DeepGEMM, "two-level accumulation"). Few tiles are cut along k as well, gridDim.z parts of each: the block of a
// tile that comes last adds them up, in their order. grid (n / CHANNELS, m / ROWS, parts); shared memory: slots x (ROWS +
// CHANNELS) x DEPTH.

#define DEPTH 128
#define MOST_SLOTS 12
// Tiles of rows that are worked on side by side, so that what they read is still in the cache: blocks come in the order of
// their numbers.
#define BAND 16

// Threads of a block: of 64 rows, a warp beside the warpgroup; of more, a warpgroup, as registers are given by such.
#define WGMMA_THREADS(ROWS) (ROWS == 64 ? 160 : ROWS * 2 + 128)

// The sums of a tile's parts, of which this thread has `sums`; true in the block that comes last, which then has them all.
// parts: [tiles, parts, sums / 4, threads, 4] f32; counters: [tiles], zero before and after. All threads but those that copy
// call.
template <u32 THREADS, u32 SUMS>
DEVICE bool add_parts(float* parts, u32* counters, u32 tile, float (&sums)[SUMS]) {
  SHARED(u32, before, 1);
  const u32 VECTORS = SUMS / 4 * THREADS;
  u32 thread = threadIdx.x, count = gridDim.z;
  float4* of_tile = (float4*)parts + (size_t)tile * count * VECTORS + thread;
#pragma unroll
  for (u32 i = 0; i < SUMS; i += 4) {
    of_tile[blockIdx.z * VECTORS + i / 4 * THREADS] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) *before = atomicAdd(&counters[tile], 1u);
  __syncthreads();
  if (*before + 1 < count) return false;
  __threadfence();
  if (thread == 0) counters[tile] = 0;
#pragma unroll
  for (u32 i = 0; i < SUMS; i++) sums[i] = 0.0f;
#pragma unroll 2
  for (u32 part = 0; part < count; part++) {
#pragma unroll
    for (u32 i = 0; i < SUMS; i += 4) {
      float4 own = load_shared_by_blocks(of_tile + part * VECTORS + i / 4 * THREADS);
      sums[i] += own.x, sums[i + 1] += own.y, sums[i + 2] += own.z, sums[i + 3] += own.w;
    }
  }
  return true;
}

// The slot that a stage lies in, and the parity of its barriers' phase.
struct Slot {
  u32 stage = 0, at = 0, parity = 0;

  DEVICE_FUNCTION void next(u32 slots) {
    stage++, at++;
    if (at == slots) at = 0, parity ^= 1;
  }
};

template <class Product, int ROWS, int CHANNELS>
DEVICE void linear_wgmma(u32 m, const TensorMap& x, const TensorMap& w, u32 n, u32 row_bytes, u32 slots, float* parts,
                         u32* counters, const Epilogue& e) {
  LAUNCH_SHARED(shared);
  SHARED(u64, full, MOST_SLOTS);
  SHARED(u64, empty, MOST_SLOTS);
  const u32 GROUPS = ROWS / 64, X = ROWS * DEPTH, W = CHANNELS * DEPTH, SUMS = CHANNELS / 2;
  u32 tile = blockIdx.y * gridDim.x + blockIdx.x, in_band = tile % (BAND * gridDim.x), band = tile - in_band;
  u32 band_rows = min(gridDim.y - band / gridDim.x, (u32)BAND);
  u32 row = (band / gridDim.x + in_band % band_rows) * ROWS, channel = in_band / band_rows * CHANNELS;
  if (row >= m) return;
  u32 base = shared_address(shared), group = threadIdx.x / 128, stages = (row_bytes + DEPTH - 1) / DEPTH;
  u32 first = stages * blockIdx.z / gridDim.z, count = stages * (blockIdx.z + 1) / gridDim.z - first;
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < slots; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], GROUPS * 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (group == GROUPS) {
    if (GROUPS > 1) registers_give<40>();
    if (threadIdx.x % 128 == 0) {
      for (Slot slot; slot.stage < count; slot.next(slots)) {
        u32 s = slot.stage, to = base + slot.at * (X + W);
        barrier_wait(&empty[slot.at], slot.parity ^ 1);
        barrier_arrive_expecting(&full[slot.at], X + W);
        copy_box_async(to, &x, &full[slot.at], (first + s) * DEPTH, row);
        copy_box_async(to + X, &w, &full[slot.at], (first + s) * DEPTH, channel);
      }
    }
    return;
  }
  if (GROUPS > 1) registers_take<232>();
  // A stage's sums are added while the products of the next one run.
  float sums[SUMS] = {}, even[SUMS], odd[SUMS];
  Slot multiplied, taken;
  auto multiply = [&](float (&part)[SUMS]) {
    u32 from = base + multiplied.at * (X + W);
    barrier_wait(&full[multiplied.at], multiplied.parity);
    u64 xs = matrix_descriptor(from + group * 64 * DEPTH), ws = matrix_descriptor(from + X);
    wgmma_begin();
#pragma unroll
    for (u32 i = 0; i < DEPTH / 32; i++) Product::add(part, xs + 2 * i, ws + 2 * i, i > 0);
    wgmma_commit();
    multiplied.next(slots);
  };
  auto take = [&](const float (&part)[SUMS]) {
    if (threadIdx.x % 32 == 0) barrier_arrive(&empty[taken.at]);
    taken.next(slots);
#pragma unroll
    for (u32 i = 0; i < SUMS; i++) sums[i] += part[i];
  };
  multiply(even);
  for (u32 s = 0; s + 2 < count; s += 2) {
    multiply(odd);
    wgmma_wait<1>();
    take(even);
    multiply(even);
    wgmma_wait<1>();
    take(odd);
  }
  if (count % 2 == 0) {
    multiply(odd);
    wgmma_wait<1>();
    take(even);
    wgmma_wait<0>();
    take(odd);
  } else {
    wgmma_wait<0>();
    take(even);
  }
  if (gridDim.z > 1 && !add_parts<GROUPS * 128>(parts, counters, tile, sums)) return;
  // Of a warp's 16 rows a lane has columns 2 (lane % 4) and the next of each eight, of rows lane / 4 and 8 further on.
  u32 lane = threadIdx.x % 32, own_row = row + group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  finish_tile<CHANNELS / 8>(e, m, n, own_row, channel + lane % 4 * 2, [&](u32 half, u32 j, u32 i) {
    return sums[4 * j + 2 * half + i];
  });
}

#define LINEAR_WGMMA(name, Product, ROWS, CHANNELS, BLOCKS) \
  KERNEL(WGMMA_THREADS(ROWS), BLOCKS) name(const u32* live, u32 axis, TENSOR_MAP(x), TENSOR_MAP(w), u32 n, u32 row_bytes, \
                                          u32 slots, float* parts, u32* counters, void* out, u32 out_type, u32 stride, u32 first, \
                                          u32 add, float x_scale, const float* x_scales, const float* w_scales) { \
    dependency_wait(); \
    linear_wgmma<Product, ROWS, CHANNELS>(live[axis], x, w, n, row_bytes, slots, parts, counters, \
                                          {out, out_type, stride, first, add, x_scale, x_scales, w_scales}); \
  } \
  ENTRY(name)
