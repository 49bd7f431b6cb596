// emulator: fibers, schedules, and a device of its own process. It reads commands from stdin and answers on stdout:
//   a bytes              -> address              zeroed memory, with a page that nobody may touch behind it
//   w address bytes ...  (nothing)               writes
//   r address bytes      -> ...                  reads
//   s schedule           (nothing)               the schedule of the launches that follow
//   l name grid block shared most count (words ...)  -> 0 when it is done; a block has at most so much shared memory
// Numbers are words of 64 bits. Whatever is wrong is said on stderr, and ends the process.
#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

// Why a thread does not run.
enum State { READY, AT_BLOCK, AT_WARP, AT_BARRIER, DONE };

struct Copy { u32 to; const void* from; };
struct Product { float* d; u32 count; u64 a, b; bool add; Format format; };

// Asynchronous work of one thread: what is not committed yet, and the groups in order.
template <class T> struct Groups {
  std::vector<T> open;
  std::vector<std::vector<T>> committed;

  void commit() { committed.push_back(std::move(open)), open.clear(); }
  template <class F> void finish(int most, F run) {
    while ((int)committed.size() > most) {
      for (const T& item : committed.front()) run(item);
      committed.erase(committed.begin());
    }
  }
};

struct Thread {
  Index index;
  u32 id;
  State state;
  jmp_buf context;
  u32 exchanges;
  Groups<Copy> copies;
  Groups<Product> products;
  bool is_made, has_waited;
};

struct Warp {
  u32 ready, live, waiting;
  // What lanes gave each other, and what they gave the call before.
  u64 words[2][32];
  u32 a[2][32][4], b[2][32][2];
};

// A barrier of shared memory, as its 64 bits hold it.
struct Barrier { u16 count, pending; int phase_and_bytes; };
static_assert(sizeof(Barrier) == 8, "as large as CUDA's");
struct Box { u32 to; Map map; u64* barrier; u32 x, y; };

const size_t STACK = 256 << 10, SHARED = 228 << 10, STATIC = 64 << 10;
const u32 MOST_THREADS = 1024;

std::vector<Thread> threads(MOST_THREADS);
std::vector<Warp> warps(MOST_THREADS / 32);
Thread* running;
jmp_buf scheduler;
u32 live, block_waiting;
std::vector<Box> boxes;
std::vector<u64*> barriers;
// Static arrays, then what the launch asked for.
alignas(1024) u8 memory[STATIC + SHARED];
u32 reserved;
u32 launch_bytes;
// The static arrays of the kernel that runs: bytes by place.
std::map<u32, u32> arrays;
const char* kernel_name = "no kernel";
Launcher kernel;
const u64* const* arguments;

// The schedule: who is next, and whether asynchronous work waits until it must be done.
enum Order { FORWARD, BACKWARD, FIRST_AHEAD, LAST_AHEAD, RANDOM };
Order order;
bool is_lazy;
std::mt19937 chance;

struct Known { Launcher launcher; u32 arguments; };
std::map<std::string, Known>& entries() {
  static std::map<std::string, Known> all;
  return all;
}

void suspend() {
  if (!_setjmp(running->context)) _longjmp(scheduler, 1);
}

void park(State state) {
  running->state = state;
  warps[running->id / 32].ready--;
  suspend();
}

void wake(Thread& thread) {
  thread.state = READY;
  warps[thread.id / 32].ready++;
}

void release(State state, u32 first, u32 end) {
  for (u32 i = first; i < end; i++) {
    if (threads[i].state == state) wake(threads[i]);
  }
}

u32 thread_count() { return block_size.x * block_size.y * block_size.z; }

void release_block() {
  if (block_waiting == live) block_waiting = 0, release(AT_BLOCK, 0, thread_count());
}

void release_warp(u32 id) {
  Warp& warp = warps[id];
  if (warp.waiting == 0 || warp.waiting != warp.live) return;
  warp.waiting = 0;
  release(AT_WARP, 32 * id, min(32 * id + 32, thread_count()));
}

// Where a fiber lives: every job of its thread, one after the other.
void fiber() {
  for (;;) {
    kernel(arguments);
    Thread& own = *running;
    if (!own.copies.open.empty()) fail("thread %u ends with copies that it did not commit", own.id);
    if (!own.products.committed.empty()) fail("thread %u ends without waiting for its products", own.id);
    if (!own.has_waited) fail("thread %u ends without a dependency_wait", own.id);
    Warp& warp = warps[own.id / 32];
    if (warp.waiting > 0) fail("thread %u ends while its warp waits for it", own.id);
    live--, warp.live--;
    own.state = DONE, warp.ready--;
    release_block();
    suspend();
  }
}

void make_fiber(Thread& thread) {
  thread.is_made = true;
  void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  static ucontext_t back, start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack, start.uc_stack.ss_size = STACK, start.uc_link = nullptr;
  // The fiber waits for its first job where it would for any other.
  makecontext(&start, (void (*)())+[] {
    Thread* own = running;
    if (!_setjmp(own->context)) swapcontext(&start, &back);
    fiber();
  }, 0);
  running = &thread;
  swapcontext(&back, &start);
}

// The warp that runs next; -1 where none can.
int next_warp(u32 count, int last) {
  std::vector<int> ready;
  for (u32 i = 0; i < count; i++) {
    if (warps[i].ready > 0) ready.push_back((int)i);
  }
  if (ready.empty()) return -1;
  if (order == FIRST_AHEAD) return ready.front();
  if (order == LAST_AHEAD) return ready.back();
  if (order == RANDOM) return ready[chance() % ready.size()];
  if (order == FORWARD) {
    for (int i : ready) if (i > last) return i;
    return ready.front();
  }
  for (size_t i = ready.size(); i-- > 0;) if (ready[i] < last) return ready[i];
  return ready.back();
}

void try_phase(u64* at) {
  Barrier* barrier = (Barrier*)at;
  if (barrier->pending > 0 || barrier->phase_and_bytes >> 1 != 0) return;
  barrier->pending = barrier->count;
  barrier->phase_and_bytes ^= 1;
  release(AT_BARRIER, 0, thread_count());
}

u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }

void bring(const Box& box) {
  for (u32 y = 0; y < box.map.box_height; y++) {
    for (u32 x = 0; x < box.map.box_width; x++) {
      bool is_inside = box.x + x < box.map.width && box.y + y < box.map.height;
      u8 byte = is_inside ? box.map.base[(box.y + y) * box.map.pitch + box.x + x] : 0;
      *shared(swizzled(box.to + y * box.map.box_width + x)) = byte;
    }
  }
  ((Barrier*)box.barrier)->phase_and_bytes -= (int)(box.map.box_width * box.map.box_height) * 2;
  try_phase(box.barrier);
}

// Brings one of the boxes that are under way; false where there is none.
bool bring_some() {
  if (boxes.empty()) return false;
  size_t i = chance() % boxes.size();
  Box box = boxes[i];
  boxes.erase(boxes.begin() + (long)i);
  bring(box);
  return true;
}

void run_block() {
  u32 count = thread_count(), warp_count = (count + 31) / 32;
  memset(memory, 0xff, STATIC + launch_bytes);
  live = count, block_waiting = 0;
  barriers.clear();
  for (u32 w = 0; w < warp_count; w++) warps[w].ready = warps[w].live = min(32u, count - 32 * w), warps[w].waiting = 0;
  for (u32 i = 0; i < count; i++) {
    Thread& thread = threads[i];
    if (!thread.is_made) make_fiber(thread);
    thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    thread.id = i, thread.state = READY, thread.exchanges = 0, thread.has_waited = false;
  }
  for (int last = -1; live > 0;) {
    if (!boxes.empty() && (!is_lazy || chance() % 8 == 0)) bring_some();
    int warp = next_warp(warp_count, last);
    if (warp < 0) {
      if (bring_some()) continue;
      fail("all threads wait: %u at __syncthreads, %u live", block_waiting, live);
    }
    bool is_backward = order == BACKWARD || order == LAST_AHEAD || (order == RANDOM && chance() % 2);
    for (u32 i = 0; i < 32; i++) {
      u32 id = 32 * (u32)warp + (is_backward ? 31 - i : i);
      if (id >= count || threads[id].state != READY) continue;
      running = &threads[id];
      thread_index = running->index;
      if (!_setjmp(scheduler)) _longjmp(running->context, 1);
    }
    last = warp;
  }
  if (!boxes.empty()) fail("a block ends before a box that it asked for is there");
  for (u64* at : barriers) {
    if (((Barrier*)at)->phase_and_bytes >> 1 != 0) fail("a barrier expects bytes that nobody brings");
  }
}

float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

// Bits behind the leading one of the largest addend that tensor cores keep of all. Of E4M3 products Hopper's keep the highest
// 14 bits "of each mantissa product after sign-fill right shifting" (DeepSeek-V3 Technical Report, 3.5.2; 3.3.2 for what it
// costs), and Ada's are taken for no better. Of bf16 ones they keep at least one more than f32 has (Fasi, Higham, Mikaitis,
// Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021).
const int E4M3_BITS = 13, PAIRS_BITS = 24;

int exponent_of(double x) {
  u64 bits;
  memcpy(&bits, &x, sizeof bits);
  return (int)(bits >> 52 & 0x7ff) - 1023;
}

double power(int exponent) {
  u64 bits = (u64)(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A sum as tensor cores take it: all addends, what was summed before among them, are shifted to the largest one's exponent,
// lose the bits behind `kept`, and are added as integers; the sum keeps as many bits.
float tensor_sum(const double* addends, u32 count, int kept) {
  int largest = -1023;
  for (u32 i = 0; i < count; i++) largest = max(largest, exponent_of(addends[i]));
  double plain = 0;
  if (largest == 1024) {
    for (u32 i = 0; i < count; i++) plain += addends[i];
    return (float)plain;
  }
  if (largest == -1023) return 0;
  double to_integer = power(kept - largest);
  long long sum = 0;
  for (u32 i = 0; i < count; i++) sum += (long long)(addends[i] * to_integer);
  if (sum == 0) return 0;
  double result = (double)sum * power(largest - kept);
  int own = exponent_of(result);
  return (float)((double)(long long)(result * power(kept - own)) * power(own - kept));
}

// The elements of 32 bytes of a row of a matrix in shared memory, as its descriptor lays it out; how many they are.
u32 descriptor_row(u64 descriptor, u32 row, Format format, float* elements) {
  u32 start = (u32)(descriptor & 0x3fff) << 4, eight_rows = (u32)(descriptor >> 32 & 0x3fff) << 4;
  u32 at = start + row / 8 * eight_rows + row % 8 * 128, size = format == E4M3_CODES ? 1 : 2;
  for (u32 k = 0; k < 32 / size; k++) {
    const u8* p = shared(swizzled(at + k * size));
    elements[k] = format == E4M3_CODES ? e4m3_value(*p) : bf16_value(p[0] | (u32)p[1] << 8);
  }
  return 32 / size;
}

// This thread's rows of a product of a warpgroup: those of its warp, two of them.
void multiply(const Product& product) {
  u32 in_group = running->id % 128, warp = in_group / 32, lane = in_group % 32, columns = product.count * 2;
  static float b[128][32];
  static u64 cached = ~0ull;
  static u32 cached_thread = 0;
  // The lanes of a warp come one after the other, and see the same memory.
  if (cached != product.b || cached_thread / 32 != running->id / 32 || cached_thread >= running->id) {
    for (u32 n = 0; n < columns; n++) descriptor_row(product.b, n, product.format, b[n]);
  }
  cached = product.b, cached_thread = running->id;
  for (u32 half = 0; half < 2; half++) {
    float a[32];
    u32 depth = descriptor_row(product.a, 16 * warp + lane / 4 + 8 * half, product.format, a);
    for (u32 j = 0; j < columns / 8; j++) {
      for (u32 i = 0; i < 2; i++) {
        const float* column = b[8 * j + lane % 4 * 2 + i];
        float& d = product.d[4 * j + 2 * half + i];
        double addends[33];
        for (u32 k = 0; k < depth; k++) addends[k] = (double)a[k] * column[k];
        addends[depth] = product.add ? d : 0.0;
        d = tensor_sum(addends, depth + 1, product.format == E4M3_CODES ? E4M3_BITS : PAIRS_BITS);
      }
    }
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  fprintf(stderr, "%s, block (%u, %u, %u): ", kernel_name, block_index.x, block_index.y, block_index.z);
  vfprintf(stderr, format, list);
  va_end(list);
  fflush(stderr);
  _exit(3);
}

void dependency_wait() { running->has_waited = true; }

void block_barrier() {
  block_waiting++;
  running->state = AT_BLOCK;
  warps[running->id / 32].ready--;
  release_block();
  suspend();
}

void warp_barrier() {
  u32 id = running->id / 32;
  if (warps[id].live != min(32u, thread_count() - 32 * id)) fail("a lane of warp %u is gone", id);
  warps[id].waiting++;
  running->state = AT_WARP;
  warps[id].ready--;
  release_warp(id);
  suspend();
}

u64 exchange(u64 word, u32 lane) {
  u64* words = warps[running->id / 32].words[running->exchanges++ % 2];
  words[running->id % 32] = word;
  warp_barrier();
  return words[lane];
}

u32 reserve(u32 bytes) {
  u32 at = reserved;
  reserved += (bytes + 15) / 16 * 16;
  if (reserved > STATIC) fail("static shared memory is full");
  memset(memory + at, 0xff, bytes);
  return at;
}

u8* array(u32 at, u32 bytes) {
  arrays[at] = bytes;
  return shared(at);
}

u8* shared(u32 at) {
  if (at >= sizeof memory) fail("shared address %u", at);
  return memory + at;
}
u8* launch_shared() { return memory + STATIC; }

u32 address_of(const void* p) {
  const u8* at = (const u8*)p;
  if (at < memory || at >= memory + STATIC + launch_bytes) fail("%p is no shared memory", p);
  return (u32)(at - memory);
}

void copy16(u32 to, const void* from, bool is_there) {
  if (to % 16 || (uintptr_t)from % 16) fail("a copy of 16 bytes is not aligned");
  Copy copy = {to, is_there ? from : nullptr};
  running->copies.open.push_back(copy);
  if (!is_lazy && is_there) memcpy(shared(to), from, 16);
}

void commit_copies() { running->copies.commit(); }

void wait_copies(int most) {
  running->copies.finish(most, [](const Copy& copy) {
    if (copy.from) memcpy(shared(copy.to), copy.from, 16);
    else memset(shared(copy.to), 0, 16);
  });
}

void load_matrices(u32 (&r)[4], u32 row, bool is_transposed) {
  if (row % 16) fail("a row of load_matrices is not aligned");
  u32 lane = running->id % 32;
  u64* rows = warps[running->id / 32].words[running->exchanges++ % 2];
  rows[lane] = row;
  warp_barrier();
  for (u32 i = 0; i < 4; i++) {
    u16 pair[2];
    for (u32 j = 0; j < 2; j++) {
      u32 own = is_transposed ? lane % 4 * 2 + j : lane / 4, column = is_transposed ? lane / 4 : lane % 4 * 2 + j;
      memcpy(&pair[j], shared((u32)rows[8 * i + own] + 2 * column), 2);
    }
    r[i] = pair[0] | (u32)pair[1] << 16;
  }
  // Nobody overwrites what a lane of the warp has still to read.
  warp_barrier();
}

void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Format format) {
  u32 lane = running->id % 32, side = running->exchanges++ % 2;
  Warp& warp = warps[running->id / 32];
  memcpy(warp.a[side][lane], a, sizeof a);
  memcpy(warp.b[side][lane], b, sizeof b);
  warp_barrier();
  for (u32 i = 0; i < 4; i++) {
    u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double addends[33];
    u32 count = 0;
    for (u32 t = 0; t < 4; t++) {
      for (u32 half = 0; half < 2; half++) {
        u32 x = warp.a[side][row % 8 * 4 + t][row / 8 + 2 * half], w = warp.b[side][column * 4 + t][half];
        if (format == BF16_PAIRS) {
          addends[count++] = (double)bf16_value(x & 0xffff) * bf16_value(w & 0xffff);
          addends[count++] = (double)bf16_value(x >> 16) * bf16_value(w >> 16);
        } else if (format == F16_PAIRS) {
          addends[count++] = (double)f16_value(x & 0xffff) * f16_value(w & 0xffff);
          addends[count++] = (double)f16_value(x >> 16) * f16_value(w >> 16);
        } else {
          for (u32 j = 0; j < 32; j += 8) addends[count++] = (double)e4m3_value(x >> j & 0xff) * e4m3_value(w >> j & 0xff);
        }
      }
    }
    addends[count++] = d[i];
    d[i] = tensor_sum(addends, count, format == E4M3_CODES ? E4M3_BITS : PAIRS_BITS);
  }
}

void barrier_init(u64* at, u32 count) {
  *(Barrier*)at = {(u16)count, (u16)count, 0};
  barriers.push_back(at);
}

void barrier_arrive(u64* at, u32 bytes) {
  Barrier* barrier = (Barrier*)at;
  if (barrier->pending == 0) fail("more arrivals at a barrier than it counts");
  barrier->phase_and_bytes += (int)bytes * 2;
  barrier->pending--;
  try_phase(at);
}

void barrier_wait(u64* at, u32 parity) {
  while ((u32)(((volatile Barrier*)at)->phase_and_bytes & 1) == parity % 2) park(AT_BARRIER);
}

void copy_box(u32 to, const Map* map, u64* barrier, u32 x, u32 y) {
  if (to % 1024) fail("a box is not aligned to 1024 bytes");
  boxes.push_back({to, *map, barrier, x, y});
}

void wgmma(float* d, u32 count, u64 a, u64 b, bool add, Format format) {
  Product product = {d, count, a, b, add, format};
  if (is_lazy) running->products.open.push_back(product);
  else multiply(product);
}

void commit_wgmma() { running->products.commit(); }

void wait_wgmma(int most) {
  running->products.finish(most, multiply);
  warp_barrier();
}

float e4m3_value(u32 code) {
  static const std::vector<float> values = [] {
    std::vector<float> list(256);
    for (u32 i = 0; i < 256; i++) {
      u32 exponent = i >> 3 & 15, mantissa = i & 7;
      float size = exponent ? ldexpf(1 + mantissa / 8.0f, (int)exponent - 7) : ldexpf(mantissa / 8.0f, -6);
      list[i] = copysignf((i & 0x7f) == 0x7f ? NAN : size, i & 0x80 ? -1.0f : 1.0f);
    }
    return list;
  }();
  return values[code & 0xff];
}

u32 e4m3_code(float x) {
  u32 sign = __float_as_uint(x) >> 24 & 0x80;
  if (x != x) return 0x7f;
  float size = fabsf(x);
  if (size >= 448) return sign | 0x7e;
  if (size < ldexpf(1, -6)) return sign | (u32)nearbyintf(size * 512);
  int exponent;
  u32 eighths = (u32)nearbyintf(frexpf(size, &exponent) * 16);
  return sign | (((u32)(exponent + 5) << 3) + eighths);
}

float f16_value(u32 half) {
  u32 exponent = half >> 10 & 31, mantissa = half & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent     ? ldexpf(1 + mantissa / 1024.0f, (int)exponent - 15)
                              : ldexpf(mantissa / 1024.0f, -14);
  return half & 0x8000 ? -size : size;
}

u32 f16_code(float x) {
  u32 sign = __float_as_uint(x) >> 16 & 0x8000;
  float size = fabsf(x);
  if (x != x) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < ldexpf(1, -14)) return sign | (u32)nearbyintf(ldexpf(size, 24));
  int exponent;
  u32 bits = (u32)nearbyintf(ldexpf(frexpf(size, &exponent), 11));
  return sign | (((u32)(exponent + 13) << 10) + bits);
}

u32 bf16_code(float x) {
  u32 bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

Entry::Entry(const char* name, Launcher launcher, u32 arguments) { entries()[name] = {launcher, arguments}; }

namespace {

u64 word() {
  u64 value;
  if (fread(&value, sizeof value, 1, stdin) != 1) exit(0);
  return value;
}

void bytes_in(void* to, size_t count) {
  if (fread(to, 1, count, stdin) != count) exit(0);
}

void answer(const void* from, size_t count) {
  fwrite(from, 1, count, stdout);
  fflush(stdout);
}

u64 allocate(u64 bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  u8* base = (u8*)mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) fail("no memory for %llu bytes", bytes);
  mprotect(base + size, page, PROT_NONE);
  // The last byte is as close to that page as the alignment of vectors allows.
  return (u64)(base + size - (bytes + 15) / 16 * 16);
}

void launch() {
  char name[128] = {};
  u64 length = word();
  if (length >= sizeof name) fail("a name of %llu bytes", length);
  bytes_in(name, length);
  grid_size = {(u32)word(), (u32)word(), (u32)word()};
  block_size = {(u32)word(), (u32)word(), (u32)word()};
  launch_bytes = (u32)word();
  u32 most_shared = (u32)word();
  std::vector<std::vector<u64>> words(word());
  std::vector<const u64*> places;
  for (auto& argument : words) {
    argument.resize(word());
    bytes_in(argument.data(), 8 * argument.size());
    places.push_back(argument.data());
  }
  kernel_name = name;
  auto found = entries().find(name);
  if (found == entries().end()) fail("there is no such kernel");
  if (found->second.arguments != words.size()) fail("%zu arguments, not %u", words.size(), found->second.arguments);
  if (thread_count() > MOST_THREADS) fail("%u threads; at most %u", thread_count(), MOST_THREADS);
  if (launch_bytes > most_shared) fail("%u bytes of shared memory; at most %u", launch_bytes, most_shared);
  arrays.clear();
  kernel = found->second.launcher, arguments = places.data();
  std::vector<u64> blocks((u64)grid_size.x * grid_size.y * grid_size.z);
  for (u64 i = 0; i < blocks.size(); i++) blocks[i] = i;
  if (order == RANDOM) std::shuffle(blocks.begin(), blocks.end(), chance);
  if (order == BACKWARD) std::reverse(blocks.begin(), blocks.end());
  for (u64 i : blocks) {
    block_index = {(u32)(i % grid_size.x), (u32)(i / grid_size.x % grid_size.y), (u32)(i / grid_size.x / grid_size.y)};
    run_block();
  }
  u32 all = launch_bytes;
  for (auto [at, bytes] : arrays) all += (bytes + 15) / 16 * 16;
  if (all > most_shared) fail("%u bytes of shared memory; at most %u", all, most_shared);
  kernel_name = "no kernel";
  u64 done = 0;
  answer(&done, sizeof done);
}

void out_of_bounds(int, siginfo_t* info, void*) {
  fail("thread %u touches %p, which is not its own", running ? running->id : 0, info->si_addr);
}

}  // namespace
}  // namespace emulator

int main() {
  using namespace emulator;
  stack_t stack = {};
  stack.ss_sp = malloc(1 << 16), stack.ss_size = 1 << 16;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = out_of_bounds, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  for (int command; (command = getchar()) != EOF;) {
    if (command == 'a') {
      u64 address = allocate(word());
      answer(&address, sizeof address);
    } else if (command == 'w') {
      void* to = (void*)word();
      bytes_in(to, word());
    } else if (command == 'r') {
      void* from = (void*)word();
      answer(from, word());
    } else if (command == 's') {
      u64 schedule = word();
      order = (Order)(schedule % 5), is_lazy = schedule / 5 % 2, chance.seed((u32)schedule);
    } else if (command == 'l') {
      launch();
    } else {
      fail("an unknown command, %d", command);
    }
  }
}
