// copy_pages: whole pages of one cache buffer, in the order of pairs[n, 2] (source, to). Reference: reference::copy_pages
// Each thread copies one place of every page, so that a page may be the source of a later pair.
// grid (page_words / 4 / WG).

struct Params {
  page: u32,  // vec4s a page
  pairs: u32,
}

override WG: u32;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read_write> cache: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> pairs: array<u32>;

@compute @workgroup_size(WG)
fn copy_pages(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= p.page) {
    return;
  }
  for (var i = 0u; i < p.pairs; i++) {
    let source = pairs[2u * i];
    let to = pairs[2u * i + 1u];
    if (source != to) {
      cache[to * p.page + id.x] = cache[source * p.page + id.x];
    }
  }
}
