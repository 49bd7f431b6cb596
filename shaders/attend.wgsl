// attend: softmax(q k^T / sqrt(DIM)) v of each row over one of `splits` parts of its context, causal, paged, grouped-query;
// attend_merge puts the parts together, unless there is one of each (WHOLE).
// Reference: reference::attend
// A tile is ROWS rows of one span. grid (tiles, kv heads, splits); a thread has one query head of one row, so that all
// threads of a workgroup read the same keys and values. DIM is at most 256.

@compute @workgroup_size(WG)
fn attend(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let rows = WG / GROUP;
  let tile = find_tile(workgroup, rows);
  let index = tile.index + lid / GROUP;  // of the row in its span
  if (!tile.is_any || index >= tile.span.y || lid >= rows * GROUP) {
    return;
  }
  let span = tile.span;
  let end = tile.end;
  let row = span.x + index;
  let kv_head = p.begin + workgroup.y;
  let head = kv_head * GROUP + lid % GROUP;
  let own = span.w + index;
  let blocks = (DIM + 15u) / 16u;
  var queries: array<mat4x4<f32>, 16>;
  var sums: array<mat4x4<f32>, 16>;
  var section: array<mat4x4<f32>, 16>;
  for (var b = 0u; b < blocks; b++) {
    let d = 16u * b;
    queries[b] = mat4x4<f32>(
      query4(row, head, d), query4(row, head, d + 4u), query4(row, head, d + 8u), query4(row, head, d + 12u));
  }
  var largest = NONE;
  var largest_of_sums = NONE;
  var norm = 0.0;
  var section_norm = 0.0;
  var scores: array<vec4<f32>, 4>;
  var slots: array<vec4<u32>, 4>;
  for (var first = tile.begin; first < end; first += CHUNK) {
    var most = vec4<f32>(largest);
    for (var t = 0u; t < 4u; t++) {
      // Behind the end the last position stands in, and weighs nothing.
      let place = vec4<u32>(first + 4u * t) + vec4<u32>(0u, 1u, 2u, 3u);
      let at = min(place, vec4<u32>(end - 1u));
      let pages = span.z * p.pages;
      slots[t] = vec4<u32>(
        kv_row(page_table[pages + at.x / PAGE], kv_head, at.x),
        kv_row(page_table[pages + at.y / PAGE], kv_head, at.y),
        kv_row(page_table[pages + at.z / PAGE], kv_head, at.z),
        kv_row(page_table[pages + at.w / PAGE], kv_head, at.w),
      );
      var score = vec4<f32>(0.0);
      for (var b = 0u; b < blocks; b++) {
        let own = queries[b];
        score += vec4<f32>(
          product(own, k16(slots[t].x, b)),
          product(own, k16(slots[t].y, b)),
          product(own, k16(slots[t].z, b)),
          product(own, k16(slots[t].w, b)),
        );
      }
      scores[t] = select(vec4<f32>(NONE), score * p.scale, place <= vec4<u32>(min(own, end - 1u)));
      most = max(most, scores[t]);
    }
    let top = max(max(most.x, most.y), max(most.z, most.w));
    let correction = exp_f32(largest - top);
    largest = top;
    var weights = vec4<f32>(0.0);
    for (var t = 0u; t < 4u; t++) {
      let s = scores[t] - vec4<f32>(top);
      let weight = vec4<f32>(exp_f32(s.x), exp_f32(s.y), exp_f32(s.z), exp_f32(s.w));
      scores[t] = select(weight, vec4<f32>(0.0), scores[t] == vec4<f32>(NONE));
      weights += scores[t];
    }
    section_norm = section_norm * correction + ((weights.x + weights.y) + (weights.z + weights.w));
    for (var b = 0u; b < blocks; b++) {
      var values = mat4x4<f32>();
      for (var t = 0u; t < 4u; t++) {
        let near = v16(slots[t].x, b) * scores[t].x + v16(slots[t].y, b) * scores[t].y;
        values += near + (v16(slots[t].z, b) * scores[t].z + v16(slots[t].w, b) * scores[t].w);
      }
      section[b] = section[b] * correction + values;
    }
    if (ends_section(first, tile)) {
      let correction = exp_f32(largest_of_sums - largest);
      largest_of_sums = largest;
      norm = norm * correction + section_norm;
      section_norm = 0.0;
      for (var b = 0u; b < blocks; b++) {
        sums[b] = sums[b] * correction + section[b];
        section[b] = mat4x4<f32>();
      }
    }
  }
  if (WHOLE) {
    for (var d = 0u; d < DIM; d += 4u) {
      store_whole(row, head, d, sums[d / 16u][d / 4u % 4u], norm);
    }
    return;
  }
  let at = part_at(row, head, workgroup.z);
  for (var d = 0u; d < DIM; d++) {
    parts[at + d] = sums[d / 16u][d / 4u % 4u][d % 4u];
  }
  parts[at + DIM] = largest;
  parts[at + DIM + 1u] = norm;
}
