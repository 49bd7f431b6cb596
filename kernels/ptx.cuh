// ptx: the words of CUDA that kernels are written in, and all inline PTX. For the CPU, emulator/emulator.h has the same
// words. Kernels are compiled without contraction: a product that is added in one rounding is written fmaf.

#ifdef QUAVER_EMULATED
#include "emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_FUNCTION __device__ __forceinline__
// A kernel of at most so many threads a block, of which `blocks` are to fit a multiprocessor.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Makes a kernel known to the emulator.
#define ENTRY(name)
// An array in shared memory; the shared memory that a launch asks for.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define LAUNCH_SHARED(name) extern __shared__ __align__(1024) u8 name[]

// What a tensor map is to a kernel: opaque (cuTensorMapEncodeTiled).
struct __align__(64) TensorMap { u8 opaque[128]; };
#define TENSOR_MAP(name) const __grid_constant__ TensorMap name

// Every thread of every kernel calls it, before it reads what another kernel writes, writes anything, or returns: from here
// on all that the kernel before has written is there. Kernels start while the one before still runs, and the next may
// start from here on: it waits in its turn. (Programmatic dependent launch; elsewhere a kernel starts when the one before is done.)
DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The address of shared memory as instructions take it.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Two numbers as bf16, to nearest even; `low` is in the lower half.
DEVICE u32 bf16x2_encode(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#if __CUDA_ARCH__ >= 890
#define HAS_E4M3
// Two numbers as E4M3, to nearest even, saturating; `low` is in the lower byte.
DEVICE u32 e4m3x2_encode(float low, float high) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// Two codes as f16, exact.
DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)pair));
  return halves;
}
#endif

DEVICE float f16_low(u32 halves) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(halves));
  return x;
}

DEVICE float f16_high(u32 halves) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(halves));
  return x;
}

// Products of f16 pairs, exact where f16 holds them.
DEVICE u32 f16x2_multiply(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Products of bf16 pairs, exact.
DEVICE u32 bf16x2_multiply(u32 a, u32 b) {
  u32 product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// 2^x within two units in the last place, 0 where that is subnormal (PTX ISA, ex2).
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes that are read once: they leave what is in the first-level cache alone.
DEVICE uint4 stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// What another block of the same kernel has written, before a fence.
DEVICE float4 load_shared_by_blocks(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

// Copies 16 bytes to shared memory, zeros where `is_there` is false. In groups: see copy_commit, copy_wait.
DEVICE void copy16_async(u32 to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements: thread t names row t % 8 of matrix t / 8, and gets elements 2 (t % 4) of row t / 4.
DEVICE void load_matrices(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// The same, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// d[16, 8] += a[16, 16] . b[8, 16]^T of a warp.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of f16.
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDA_ARCH__ >= 890
// d[16, 8] += a[16, 32] . b[8, 32]^T of a warp.
DEVICE void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#if __CUDA_ARCH__ == 900
// A barrier in shared memory whose phases end when `count` arrivals and all expected bytes are there.
DEVICE void barrier_init(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}
// Makes new barriers known to the copy engine.
DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive_expecting(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; before the first phase, that of parity 1 has ended.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  asm volatile("{\n .reg .pred p;\n AGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @p bra DONE;\n"
               " bra AGAIN;\n DONE:\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Copies the box of a tensor map whose first byte is (x, y) to shared memory, and tells the barrier its bytes.
DEVICE void copy_box_async(u32 to, const TensorMap* map, u64* barrier, u32 x, u32 y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(to), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}

// Registers of each thread of a warpgroup.
template <int N> DEVICE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups of this warpgroup but the last N.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31}, %32, %33, p"
#define SUMS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p"
// d[64, 2 SUMS] (+)= a[64, 32 bytes] . b[2 SUMS, 32 bytes]^T of a warpgroup; d is set, not added to, where `add` is false.
#define WGMMA(name, SUMS, SHAPE, ADD, END, ...) \
  DEVICE void name(float (&d)[SUMS], u64 a, u64 b, bool add) { \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " ADD ", 0;\n wgmma.mma_async.sync.aligned." SHAPE " " SUMS_##SUMS END \
                 : __VA_ARGS__ \
                 : "l"(a), "l"(b), "r"((u32)add)); \
  }
WGMMA(wgmma_e4m3, 32, "m64n64k32.f32.e4m3.e4m3", "%34", ", 1, 1;\n}", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24))
WGMMA(wgmma_e4m3, 64, "m64n128k32.f32.e4m3.e4m3", "%66", ", 1, 1;\n}", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32),
      EIGHT(40), EIGHT(48), EIGHT(56))
WGMMA(wgmma_bf16, 32, "m64n64k16.f32.bf16.bf16", "%34", ", 1, 1, 0, 0;\n}", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24))
WGMMA(wgmma_bf16, 64, "m64n128k16.f32.bf16.bf16", "%66", ", 1, 1, 0, 0;\n}", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24),
      EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56))
#endif
#endif

// The descriptor of a matrix of rows of 128 bytes in shared memory, swizzled by 128 bytes, K along the rows (PTX ISA,
// "Shared memory matrix layout"): address and strides in units of 16 bytes; 8 rows are 1024 bytes; layout 1 at bit 62.
DEVICE u64 matrix_descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
