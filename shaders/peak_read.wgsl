// peak_read: reads all of x once, for a measurement of the device's bandwidth. Neighbouring threads read side by side.
// grid (any), 256 threads at most.

override WG: u32;

@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;

@compute @workgroup_size(WG)
fn peak_read(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) workgroups: vec3<u32>,
  @builtin(local_invocation_index) lid: u32,
) {
  let count = arrayLength(&x);
  let step = workgroups.x * WG;
  var all = vec4<u32>(0u);
  for (var i = workgroup.x * WG + lid; i < count; i += step) {
    all |= x[i];
  }
  // x is zeros, which the compiler cannot know: what is read has to be.
  if (any(all != vec4<u32>(0u))) {
    out[0] = all.x;
  }
}
