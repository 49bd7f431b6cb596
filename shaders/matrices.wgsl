// matrices: what a shader that multiplies cooperative matrices of f16 has to enable; joined first.
enable f16;
enable wgpu_cooperative_matrix;
