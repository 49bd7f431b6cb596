// emulator: the words of ptx.cuh for the CPU, so that g++ compiles the kernels as they are, for cards of the architecture
// QUAVER_EMULATED, which counts as __CUDA_ARCH__ does. One block at a time; each of
// its threads is a fiber, which runs until it has to wait for others. Who goes on then is the schedule's choice, and so is
// when an asynchronous copy or product happens: at once, or when it is waited for at the latest. Shared memory holds NaN
// before a block begins. Tensor cores sum as few bits as cards do (`tensor_sum`). What is not modelled: fences, bank
// conflicts, registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {

struct Index { u32 x, y, z; };

// What kernels see of themselves.
extern Index thread_index, block_index, block_size, grid_size;

[[noreturn]] void fail(const char* format, ...);

// A thread that ends without having called it is an error.
void dependency_wait();
// Waiting for the threads of the block, of the warp.
void block_barrier();
void warp_barrier();
// The word that a lane gave in the same call.
u64 exchange(u64 word, u32 lane);

// Shared memory: a place for an array that every block has, what the launch asked for, and addresses of 32 bits.
u32 reserve(u32 bytes);
u8* array(u32 at, u32 bytes);
u8* shared(u32 at);
u8* launch_shared();
u32 address_of(const void* p);

void copy16(u32 to, const void* from, bool is_there);
void commit_copies();
void wait_copies(int most);

// The rows that the lanes of the warp name.
void load_matrices(u32 (&r)[4], u32 row, bool is_transposed);
enum Format { BF16_PAIRS, F16_PAIRS, E4M3_CODES };
void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Format format);

// A tensor map: rows of bytes in memory, and the box that one copy brings, swizzled by 128 bytes.
struct Map { const u8* base; u64 pitch; u32 width, height, box_width, box_height; u64 rest[12]; };
static_assert(sizeof(Map) == 128, "as large as CUDA's");

void barrier_init(u64* barrier, u32 count);
void barrier_arrive(u64* barrier, u32 bytes);
void barrier_wait(u64* barrier, u32 parity);
void copy_box(u32 to, const Map* map, u64* barrier, u32 x, u32 y);

// Of `count` sums a thread.
void wgmma(float* d, u32 count, u64 a, u64 b, bool add, Format format);
void commit_wgmma();
void wait_wgmma(int most);

float e4m3_value(u32 code);
u32 e4m3_code(float x);
float f16_value(u32 half);
u32 f16_code(float x);
u32 bf16_code(float x);

// Arguments arrive as words; a map takes as many as it has.
typedef void (*Launcher)(const u64* const* words);
template <class... A, size_t... I>
void call(void (*kernel)(A...), const u64* const* words, std::index_sequence<I...>) {
  kernel(*(const std::remove_const_t<A>*)words[I]...);
}
template <auto kernel> struct Call;
template <class... A, void (*kernel)(A...)> struct Call<kernel> {
  static void launch(const u64* const* words) { call(kernel, words, std::index_sequence_for<A...>{}); }
  static constexpr u32 arguments = sizeof...(A);
};
struct Entry { Entry(const char* name, Launcher launcher, u32 arguments); };

}  // namespace emulator

#define __restrict__
#define DEVICE static inline
#define DEVICE_FUNCTION inline
#define KERNEL(threads, blocks) static void
#define ENTRY(name) static emulator::Entry entry_##name(#name, &emulator::Call<&name>::launch, \
                                                        emulator::Call<&name>::arguments);
#define SHARED(type, name, count) \
  static const u32 place_of_##name = emulator::reserve(sizeof(type) * (count)); \
  type* const name = (type*)emulator::array(place_of_##name, sizeof(type) * (count))
#define LAUNCH_SHARED(name) u8* const name = emulator::launch_shared()
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
typedef emulator::Map TensorMap;
#define TENSOR_MAP(name) const TensorMap name

using std::max;
using std::min;

DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE float __uint_as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
DEVICE u32 __float_as_uint(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }

DEVICE void __syncthreads() { emulator::block_barrier(); }
DEVICE void __threadfence() {}
DEVICE void __syncwarp() { emulator::warp_barrier(); }
template <class T> DEVICE T __shfl_sync(u32, T x, u32 lane) {
  u64 word = 0;
  memcpy(&word, &x, sizeof x);
  word = emulator::exchange(word, lane % 32);
  memcpy(&x, &word, sizeof x);
  return x;
}
template <class T> DEVICE T __shfl_xor_sync(u32 mask, T x, u32 by) { return __shfl_sync(mask, x, (threadIdx.x % 32) ^ by); }
DEVICE u32 __ballot_sync(u32 mask, bool is_set) {
  u32 bits = (u32)is_set << threadIdx.x % 32;
  for (u32 by = 1; by < 32; by *= 2) bits |= __shfl_xor_sync(mask, bits, by);
  return bits;
}
DEVICE int __ffs(u32 bits) { return __builtin_ffs((int)bits); }
DEVICE int __popc(u32 bits) { return __builtin_popcount(bits); }
// One fiber runs at a time.
DEVICE u32 atomicMax(u32* to, u32 x) { u32 old = *to; *to = max(old, x); return old; }
DEVICE u32 atomicAdd(u32* to, u32 x) { u32 old = *to; *to = old + x; return old; }
DEVICE u64 atomicAdd(u64* to, u64 x) { u64 old = *to; *to = old + x; return old; }
DEVICE u64 atomicMin(u64* to, u64 x) { u64 old = *to; *to = min(old, x); return old; }

DEVICE void dependency_wait() { emulator::dependency_wait(); }
DEVICE u32 shared_address(const void* p) { return emulator::address_of(p); }
DEVICE u32 bf16x2_encode(float low, float high) { return emulator::bf16_code(low) | emulator::bf16_code(high) << 16; }
DEVICE float f16_low(u32 halves) { return emulator::f16_value(halves & 0xffff); }
DEVICE float f16_high(u32 halves) { return emulator::f16_value(halves >> 16); }
// Cards before 8.9 do it by hand (`numbers.cuh`).
#if QUAVER_EMULATED >= 890
#define HAS_E4M3
DEVICE u32 e4m3x2_encode(float low, float high) { return emulator::e4m3_code(low) | emulator::e4m3_code(high) << 8; }
DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  // Exact: an f16 has one exponent bit more.
  auto half = [](u32 code) -> u32 {
    if ((code & 0x7f) == 0x7f) return 0x7fff;
    float x = emulator::e4m3_value(code);
    u32 bits = __float_as_uint(x), sign = (code & 0x80) << 8;
    return x == 0 ? sign : sign | (((bits >> 13) & 0x3ffff) - (112 << 10));
  };
  return half(pair & 0xff) | half(pair >> 8 & 0xff) << 16;
}
#endif
DEVICE u32 f16x2_multiply(u32 a, u32 b) {
  return emulator::f16_code(f16_low(a) * f16_low(b)) | emulator::f16_code(f16_high(a) * f16_high(b)) << 16;
}
DEVICE u32 bf16x2_multiply(u32 a, u32 b) {
  return bf16x2_encode(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                       __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u));
}
// As far off as cards may be, by as many units as the bits of x happen to say.
DEVICE float exp2_approx(float x) {
  float y = exp2f(x);
  if (y < 1.17549435e-38f) return 0.0f;
  if (x == 0.0f || !(y < 1e38f)) return y;
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(x) * 0x9e3779b1u >> 16) % 5 - 2);
}
DEVICE float4 load_shared_by_blocks(const float4* p) { return *p; }
DEVICE uint4 stream16(const void* p) { return *(const uint4*)p; }

DEVICE void copy16_async(u32 to, const void* from, bool is_there) { emulator::copy16(to, from, is_there); }
DEVICE void copy_commit() { emulator::commit_copies(); }
template <int N> DEVICE void copy_wait() { emulator::wait_copies(N); }
DEVICE void load_matrices(u32 (&r)[4], u32 row) { emulator::load_matrices(r, row, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 row) { emulator::load_matrices(r, row, true); }
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::mma(d, a, b, emulator::BF16_PAIRS); }
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::mma(d, a, b, emulator::F16_PAIRS); }
DEVICE void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulator::mma(d, a, b, emulator::E4M3_CODES); }

DEVICE void barrier_init(u64* barrier, u32 count) { emulator::barrier_init(barrier, count); }
DEVICE void barrier_init_done() {}
DEVICE void barrier_arrive(u64* barrier) { emulator::barrier_arrive(barrier, 0); }
DEVICE void barrier_arrive_expecting(u64* barrier, u32 bytes) { emulator::barrier_arrive(barrier, bytes); }
DEVICE void barrier_wait(u64* barrier, u32 parity) { emulator::barrier_wait(barrier, parity); }
DEVICE void copy_box_async(u32 to, const TensorMap* map, u64* barrier, u32 x, u32 y) {
  emulator::copy_box(to, map, barrier, x, y);
}
template <int N> DEVICE void registers_give() {}
template <int N> DEVICE void registers_take() {}
DEVICE void wgmma_begin() {}
DEVICE void wgmma_commit() { emulator::commit_wgmma(); }
template <int N> DEVICE void wgmma_wait() { emulator::wait_wgmma(N); }
template <int N> DEVICE void wgmma_e4m3(float (&d)[N], u64 a, u64 b, bool add) {
  emulator::wgmma(d, N, a, b, add, emulator::E4M3_CODES);
}
template <int N> DEVICE void wgmma_bf16(float (&d)[N], u64 a, u64 b, bool add) {
  emulator::wgmma(d, N, a, b, add, emulator::BF16_PAIRS);
}
