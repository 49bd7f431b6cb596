// sm80_gemv_rope: sm80_gemv and the rope_append behind it: a block has 8 channels of a head and the 8 that these rotate with.
// Reference: reference::linear, reference::rope_append
// grid as gemv_mma.cuh says; dim a multiple of 16.

// What a thread turns its sum by, and where that goes; in shared memory while the sums need all registers.
struct Turn { float cosine, sine; u32 at, page; };

struct Roped {
  Heads heads;
  u32 qkv;      // the dtype that qkv is rounded to, and that of q
  Turn* turns;  // [ROWS, CHANNELS]

  // The head of the block's channels; the first of them, within half of it.
  DEVICE_FUNCTION u32 head() const { return blockIdx.x * 8 / (heads.dim / 2); }
  DEVICE_FUNCTION u32 first() const { return blockIdx.x * 8 % (heads.dim / 2); }
  DEVICE_FUNCTION u32 column(u32 i) const { return first() + i % 8 + i / 8 * (heads.dim / 2); }
  DEVICE_FUNCTION bool is_rotated() const { return head() < heads.q_heads + heads.kv_heads; }

  DEVICE_FUNCTION u32 channel(u32 i) const { return head() * heads.dim + column(i); }
  DEVICE_FUNCTION void begin(u32 row, u32 i, bool is_mine) {
    if (!is_mine) return;
    u32 at = heads.position[row], page = heads.page_table[(size_t)heads.seq[row] * heads.pages + at / heads.page_tokens];
    const float* angle = heads.rope + (size_t)at * padded(heads.dim) + first() + i % 8;
    Turn turn = {0.0f, 0.0f, at, page};
    if (is_rotated()) turn.cosine = angle[0], turn.sine = angle[heads.dim / 2];
    turns[threadIdx.x] = turn;
  }
  DEVICE_FUNCTION void finish(u32 row, u32 i, bool is_mine, float y) const {
    float x = rounded(qkv, y), other = __shfl_xor_sync(0xffffffffu, x, 8);
    if (!is_mine) return;
    Turn turn = turns[threadIdx.x];
    if (is_rotated()) x = rotate(x, other, turn.cosine, turn.sine, i < 8);
    if (head() < heads.q_heads) {
      store1(heads.q, qkv, (size_t)row * padded(heads.q_heads * heads.dim) + channel(i), x);
    } else {
      CacheRow to = find_cache_row(heads, turn.page, turn.at, head() - heads.q_heads);
      store_any1(to.cache, heads.cache, to.first + column(i), x * to.inv);
    }
  }
};

#define GEMV_ROPE(name, Product) \
  KERNEL(256, BLOCKS) name(OPERANDS, u32 qkv, HEADS) { \
    SHARED(Turn, turns, ROWS * CHANNELS); \
    gemv_mma<Product, DEEP / 2>(TAKEN_OPERANDS, Roped{TAKEN_HEADS, qkv, turns}); \
  } \
  ENTRY(name)

GEMV_ROPE(sm80_gemv_rope_bf16, Bf16)
GEMV_ROPE(sm80_gemv_rope_e4m3, E4m3)
