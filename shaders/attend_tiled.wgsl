// attend_tiled: attend for GPUs: a workgroup takes the scores of all queries of a tile over a chunk of positions, then
// sums the values by them; its threads divide both among themselves. Reference: reference::attend
// TILE queries (rows x heads of one kv head) of DIM elements fit in its memory. grid (tiles, kv heads, splits).

override TILE: u32;  // at most 32, and TILE x DIM at most 2048

var<workgroup> queries: array<vec4<f32>, 512>;  // [TILE, DIM / 4]
var<workgroup> scores: array<f32, 512>;  // [TILE, CHUNK]
var<workgroup> slots: array<u32, 16>;  // rows of the cache of a chunk
var<workgroup> largest: array<f32, 32>;  // score of a query
var<workgroup> correction: array<f32, 32>;  // of the section so far
var<workgroup> largest_of_sums: array<f32, 32>;  // as sums have it

// Elements 4 group .. 4 group + 3 of a row of v.
fn v4(row: u32, group: u32) -> vec4<f32> {
  let word = row * (16u >> KV) * ((DIM + 15u) / 16u) + (4u >> KV) * group;
  if (KV == E4M3) {
    return e4m3x4(v[word / 4u][word % 4u]);
  } else if (KV == BF16) {
    let words = v[word / 4u];
    let pair = select(words.xy, words.zw, word % 4u == 2u);
    return vec4<f32>(bf16x2(pair.x), bf16x2(pair.y));
  }
  return bitcast<vec4<f32>>(v[word / 4u]);
}

@compute @workgroup_size(WG)
fn attend_tiled(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let rows = TILE / GROUP;
  let tile = find_tile(workgroup, rows);
  if (!tile.is_any) {
    return;
  }
  let count = rows * GROUP;
  let blocks = (DIM + 15u) / 16u;
  let units = count * 4u * blocks;
  let row = tile.span.x + tile.index;
  let kv_head = p.begin + workgroup.y;
  let head = kv_head * GROUP;
  let behind = tile.span.y - tile.index;  // rows that there are
  for (var u = lid; u < units; u += WG) {
    let i = u / (4u * blocks);
    queries[u] = query4(row + min(i / GROUP, behind - 1u), head + i % GROUP, u % (4u * blocks) * 4u);
  }
  if (lid < count) {
    largest[lid] = NONE;
    largest_of_sums[lid] = NONE;
  }
  var sums: array<vec4<f32>, 4>;
  var section: array<vec4<f32>, 4>;
  var norms: vec4<f32>;
  var section_norms: vec4<f32>;
  for (var first = tile.begin; first < tile.end; first += CHUNK) {
    workgroupBarrier();
    if (lid < CHUNK) {
      let at = min(first + lid, tile.end - 1u);
      slots[lid] = kv_row(page_table[tile.span.z * p.pages + at / PAGE], kv_head, at);
    }
    workgroupBarrier();
    for (var s = lid; s < count * CHUNK; s += WG) {
      let i = s % count;
      let c = s / count;
      var score = 0.0;
      for (var b = 0u; b < blocks; b++) {
        let at = (i * blocks + b) * 4u;
        let own = mat4x4<f32>(queries[at], queries[at + 1u], queries[at + 2u], queries[at + 3u]);
        score += product(own, k16(slots[c], b));
      }
      let end = min(tile.span.w + tile.index + i / GROUP, tile.end - 1u);
      scores[i * CHUNK + c] = select(NONE, score * p.scale, first + c <= end);
    }
    workgroupBarrier();
    if (lid < count) {
      var top = largest[lid];
      for (var c = 0u; c < CHUNK; c++) {
        top = max(top, scores[lid * CHUNK + c]);
      }
      correction[lid] = exp_f32(largest[lid] - top);
      largest[lid] = top;
    }
    workgroupBarrier();
    for (var s = lid; s < count * CHUNK; s += WG) {
      let score = scores[s];
      scores[s] = select(exp_f32(score - largest[s / CHUNK]), 0.0, score == NONE);
    }
    workgroupBarrier();
    for (var n = 0u; n < 4u; n++) {
      let u = lid + n * WG;
      if (u < units) {
        let i = u / (4u * blocks);
        var sum = vec4<f32>(0.0);
        var norm = 0.0;
        for (var c = 0u; c < CHUNK; c++) {
          let weight = scores[i * CHUNK + c];
          sum += v4(slots[c], u % (4u * blocks)) * weight;
          norm += weight;
        }
        section[n] = section[n] * correction[i] + sum;
        section_norms[n] = section_norms[n] * correction[i] + norm;
      }
    }
    if (ends_section(first, tile)) {
      for (var n = 0u; n < 4u; n++) {
        let i = min((lid + n * WG) / (4u * blocks), 31u);
        let correction = exp_f32(largest_of_sums[i] - largest[i]);
        sums[n] = sums[n] * correction + section[n];
        norms[n] = norms[n] * correction + section_norms[n];
        section[n] = vec4<f32>(0.0);
        section_norms[n] = 0.0;
      }
      workgroupBarrier();
      if (lid < count) {
        largest_of_sums[lid] = largest[lid];
      }
    }
  }
  workgroupBarrier();
  for (var n = 0u; n < 4u; n++) {
    let u = lid + n * WG;
    let i = u / (4u * blocks);
    let d = u % (4u * blocks) * 4u;
    if (u >= units || i / GROUP >= behind) {
      continue;
    }
    if (WHOLE) {
      store_whole(row + i / GROUP, head + i % GROUP, d, sums[n], norms[n]);
      continue;
    }
    let at = part_at(row + i / GROUP, head + i % GROUP, workgroup.z);
    for (var e = 0u; e < min(DIM - min(d, DIM), 4u); e++) {
      parts[at + d + e] = sums[n][e];
    }
    if (d == 0u) {
      parts[at + DIM] = largest[i];
      parts[at + DIM + 1u] = norms[n];
    }
  }
}
