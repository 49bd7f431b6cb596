// copy_pages: copies pages of a cache from the first to the second of each pair, one pair after the other. Reference:
// reference::copy_pages
// A page is `vectors` of 16 bytes. grid (vectors / 256): a thread copies its vector of every pair.

KERNEL(256, 1) copy_pages(uint4* cache, const u32* pairs, u32 vectors, u32 count) {
  dependency_wait();
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  for (u32 pair = 0; pair < count; pair++) {
    u32 from = pairs[2 * pair], to = pairs[2 * pair + 1];
    if (from != to) cache[(size_t)to * vectors + i] = cache[(size_t)from * vectors + i];
  }
}
ENTRY(copy_pages)
