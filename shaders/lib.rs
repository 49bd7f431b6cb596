//! WGSL source of every op: one `.wgsl` file an op or variant, listed here for the wgpu backend and for the tests that
//! validate each of them. No logic, no dependency.

/// One shader: the name of its op or variant and its WGSL text.
pub struct Shader {
    /// The op's name in snake case, with the variant behind it: `linear`, `linear_gemv`.
    pub name: &'static str,
    /// The WGSL text, complete but for the `override` constants that a pipeline fills in.
    pub source: &'static str,
}

/// Every shader of this crate.
pub const SHADERS: &[Shader] = &[];
