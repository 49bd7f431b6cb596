// reduce: over the threads of a warp or a block; every thread gets the result. All of them must call.

struct Add { template <class T> static DEVICE_FUNCTION T of(T a, T b) { return a + b; } };
struct Max { template <class T> static DEVICE_FUNCTION T of(T a, T b) { return a > b ? a : b; } };
struct Min { template <class T> static DEVICE_FUNCTION T of(T a, T b) { return a < b ? a : b; } };

template <class Of, class T> DEVICE T warp_reduce(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = Of::of(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// `scratch` has 32 elements of shared memory; the threads of the block are a multiple of 32.
template <class Of, class T> DEVICE T block_reduce(T x, T* scratch) {
  x = warp_reduce<Of>(x);
  u32 warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (u32 i = 1; i < warps; i++) x = Of::of(x, scratch[i]);
  return x;
}
