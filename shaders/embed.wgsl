// embed: out[m, COLS] f32 = table[ids[m]], f32 or bf16; an id with bit 31 is a row of `sampled`. Reference: reference::embed
// The binding holds `rows` rows of the table from `first` on; ids of other rows are left to the slices that hold them.
// grid (m), a workgroup a row.

struct Params {
  first: u32,
  rows: u32,
}

override WG: u32;
override COLS: u32;
override TABLE: u32;  // its dtype

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [m, row_words(F32, COLS) / 4]
@group(0) @binding(3) var<storage, read> ids: array<u32>;  // [m]
@group(0) @binding(4) var<storage, read> sampled: array<u32>;  // [w, 44], the token first
@group(0) @binding(5) var<storage, read> table: array<u32>;  // [rows, row_words(TABLE, COLS)]

fn token(id: u32) -> u32 {
  if (id >> 31u == 0u) {
    return id;
  }
  let chosen = sampled[(id & 0x7fffffffu) * 44u];
  return select(chosen, 0u, chosen == 0xffffffffu);
}

@compute @workgroup_size(WG)
fn embed(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = workgroup.x;
  if (row >= live[0]) {
    return;
  }
  let source = token(ids[row]) - p.first;
  if (source >= p.rows) {
    return;
  }
  let groups = (COLS + 3u) / 4u;
  let first = source * row_words(TABLE, COLS);
  let to = row * row_words(F32, COLS) / 4u;
  for (var g = lid; g < groups; g += WG) {
    if (TABLE == BF16) {
      let at = first + 2u * g;
      out[to + g] = vec4<f32>(bf16x2(table[at]), bf16x2(table[at + 1u]));
    } else {
      let at = first + 4u * g;
      let words = vec4<u32>(table[at], table[at + 1u], table[at + 2u], table[at + 3u]);
      out[to + g] = bitcast<vec4<f32>>(words);
    }
  }
}
