// heads: what rope_append does to q, k and v, of the whole of qkv or as its parts come out of a Linear.

struct Heads {
  const float* rope;      // [positions, padded(dim)]: cosines, then sines, half of dim each
  const u32 *seq, *position, *page_table;
  u32 pages;              // columns of the page table
  void *q, *k, *v;        // [m, padded(q_heads dim)], and the cache
  u32 cache;              // its dtype
  u32 q_heads, kv_heads, dim, page_tokens;
  float k_inv, v_inv;     // reciprocals of the cache's scales
};

// The arguments that entry points end with, and what they are to Heads.
#define HEADS \
  const float *rope, const u32 *seq, const u32 *position, const u32 *page_table, u32 pages, void *q, void *k, void *v, \
      u32 cache, u32 q_heads, u32 kv_heads, u32 dim, u32 page_tokens, float k_inv, float v_inv
#define TAKEN_HEADS \
  {rope, seq, position, page_table, pages, q, k, v, cache, q_heads, kv_heads, dim, page_tokens, k_inv, v_inv}

// An element and the one half a head away, by an angle; `is_low` of the first half.
DEVICE float rotate(float x, float other, float cosine, float sine, bool is_low) {
  float turned = other * sine;
  return x * cosine + (is_low ? -turned : turned);
}

// Where a row of a cache begins for the heads behind those of q, first those of k, then those of v, and its reciprocal scale.
struct CacheRow { void* cache; size_t first; float inv; };

DEVICE CacheRow find_cache_row(const Heads& h, u32 page, u32 at, u32 head) {
  bool is_k = head < h.kv_heads;
  size_t row = kv_row(page, is_k ? head : head - h.kv_heads, at, h.kv_heads, h.page_tokens);
  float inv = h.cache != E4M3 ? 1.0f : is_k ? h.k_inv : h.v_inv;
  return {is_k ? h.k : h.v, row * padded(h.dim), inv};
}
