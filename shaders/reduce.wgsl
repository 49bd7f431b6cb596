// reduce: over the threads of a workgroup; every thread gets the result. All of them must call, in uniform control flow.
// In two steps of SIDE words, so that sums are short and barriers few.

override WG: u32;  // SIDE squared
override SIDE: u32;  // at most 16

var<workgroup> shared_words: array<u32, 256>;
var<workgroup> shared_parts: array<u32, 16>;

// Puts each thread's word where all can read it.
fn share(word: u32, lid: u32) {
  workgroupBarrier();
  shared_words[lid] = word;
  workgroupBarrier();
}

fn workgroup_sum(x: f32, lid: u32) -> f32 {
  share(bitcast<u32>(x), lid);
  if (lid < SIDE) {
    var sum = 0.0;
    for (var i = 0u; i < SIDE; i++) {
      sum += bitcast<f32>(shared_words[lid * SIDE + i]);
    }
    shared_parts[lid] = bitcast<u32>(sum);
  }
  workgroupBarrier();
  var sum = 0.0;
  for (var i = 0u; i < SIDE; i++) {
    sum += bitcast<f32>(shared_parts[i]);
  }
  return sum;
}

fn workgroup_max(x: u32, lid: u32) -> u32 {
  share(x, lid);
  if (lid < SIDE) {
    var most = 0u;
    for (var i = 0u; i < SIDE; i++) {
      most = max(most, shared_words[lid * SIDE + i]);
    }
    shared_parts[lid] = most;
  }
  workgroupBarrier();
  var most = 0u;
  for (var i = 0u; i < SIDE; i++) {
    most = max(most, shared_parts[i]);
  }
  return most;
}

fn workgroup_min(x: u32, lid: u32) -> u32 {
  return ~workgroup_max(~x, lid);
}
