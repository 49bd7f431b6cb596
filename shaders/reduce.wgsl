// reduce: over the threads of a workgroup; every thread gets the result. All of them must call, in uniform control flow.

override WG: u32;

var<workgroup> shared_words: array<u32, 256>;

// Puts each thread's word where all can read it.
fn share(word: u32, lid: u32) {
  workgroupBarrier();
  shared_words[lid] = word;
  workgroupBarrier();
}

fn workgroup_sum(x: f32, lid: u32) -> f32 {
  share(bitcast<u32>(x), lid);
  var sum = 0.0;
  for (var i = 0u; i < WG; i++) {
    sum += bitcast<f32>(shared_words[i]);
  }
  return sum;
}

fn workgroup_max_u32(x: u32, lid: u32) -> u32 {
  share(x, lid);
  var most = 0u;
  for (var i = 0u; i < WG; i++) {
    most = max(most, shared_words[i]);
  }
  return most;
}

fn workgroup_min_u32(x: u32, lid: u32) -> u32 {
  return ~workgroup_max_u32(~x, lid);
}
