// embed: out[m, cols] = table[ids[m], cols]; an id with bit 31 is a row of `sampled`, [w, 44], whose token comes first.
// Reference: reference::embed
// grid (m), a block a row.

KERNEL(256, 1) embed(const u32* live, const u32* ids, const u32* sampled, const void* table, u32 dtype, float* out,
                     u32 cols) {
  dependency_wait();
  u32 row = blockIdx.x, stride = padded(cols);
  if (row >= live[0]) return;
  u32 id = ids[row];
  if (id >> 31) id = sampled[(id & 0x7fffffff) * 44];
  size_t from = id == 0xffffffff ? 0 : (size_t)id * stride;
  for (u32 g = threadIdx.x; g < (cols + 3) / 4; g += blockDim.x) {
    store4(out, F32, (size_t)row * stride + 4 * g, load4(table, dtype, from + 4 * g));
  }
}
ENTRY(embed)
