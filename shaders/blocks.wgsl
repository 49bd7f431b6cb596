// blocks: 16 elements of a row as numbers, from the vectors that hold them: one of E4M3, two of bf16, four of f32.

fn codes16(a: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(e4m3x4(a.x), e4m3x4(a.y), e4m3x4(a.z), e4m3x4(a.w));
}

fn codes16_finite(a: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(e4m3x4_finite(a.x), e4m3x4_finite(a.y), e4m3x4_finite(a.z), e4m3x4_finite(a.w));
}

fn bf16x16(a: vec4<u32>, b: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(
    vec4<f32>(bf16x2(a.x), bf16x2(a.y)),
    vec4<f32>(bf16x2(a.z), bf16x2(a.w)),
    vec4<f32>(bf16x2(b.x), bf16x2(b.y)),
    vec4<f32>(bf16x2(b.z), bf16x2(b.w)),
  );
}

fn f32x16(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> mat4x4<f32> {
  return mat4x4<f32>(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b), bitcast<vec4<f32>>(c), bitcast<vec4<f32>>(d));
}

fn product(a: mat4x4<f32>, b: mat4x4<f32>) -> f32 {
  return (dot(a[0], b[0]) + dot(a[1], b[1])) + (dot(a[2], b[2]) + dot(a[3], b[3]));
}
