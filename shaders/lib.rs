//! WGSL source of every op: one `.wgsl` file an op or variant, joined with the pieces that it shares with others and
//! listed here for the wgpu backend and for the tests that validate each of them. No logic, no dependency.

/// One shader: the name of its op or variant and its WGSL text.
#[derive(Debug)]
pub struct Shader {
    /// The op's name in snake case, with the variant behind it; its entry point bears the same name.
    pub name: &'static str,
    /// The files that it is joined with, without their ending.
    pub pieces: &'static [&'static str],
    /// The WGSL text, complete but for the `override` constants that a pipeline fills in.
    pub source: &'static str,
}

/// A shader and the pieces that it is joined with, all of them files.
macro_rules! shader {
    ($name:literal $(, $piece:literal)*) => {
        Shader {
            name: $name,
            pieces: &[$($piece),*],
            source: concat!($(include_str!(concat!($piece, ".wgsl")), "\n",)* include_str!(concat!($name, ".wgsl"))),
        }
    };
}

/// Every shader of this crate.
pub const SHADERS: &[Shader] = &[
    shader!("abs_max", "dtype", "reduce"),
    shader!("attend", "dtype", "e4m3", "blocks", "math", "paging", "attend_tile", "act4"),
    shader!("attend_merge", "dtype", "e4m3", "math", "reduce", "act", "act4"),
    shader!("attend_tiled", "dtype", "e4m3", "blocks", "math", "paging", "attend_tile", "act4"),
    shader!("copy_pages"),
    shader!("e4m3_codes", "e4m3"),
    shader!("embed", "dtype"),
    shader!("gather", "dtype"),
    shader!("linear", "dtype", "e4m3", "blocks", "linear_io", "linear_w", "linear_thread", "linear_store"),
    shader!(
        "linear_gated",
        "dtype",
        "e4m3",
        "math",
        "blocks",
        "linear_io",
        "linear_wide_w",
        "linear_thread",
        "linear_fold",
        "act4"
    ),
    shader!("linear_matrix", "matrices", "dtype", "e4m3", "blocks", "linear_io", "linear_w"),
    shader!(
        "linear_rope",
        "dtype",
        "e4m3",
        "blocks",
        "linear_io",
        "linear_wide_w",
        "linear_thread",
        "linear_fold",
        "act4",
        "paging",
        "append"
    ),
    shader!("linear_row", "dtype", "e4m3", "blocks", "linear_io", "linear_w"),
    shader!("linear_tiled", "dtype", "e4m3", "blocks", "linear_io", "linear_w"),
    shader!("linear_wide", "dtype", "e4m3", "blocks", "linear_io", "linear_wide_w", "linear_thread", "linear_store"),
    shader!("peak_matrices", "matrices"),
    shader!("peak_products"),
    shader!("peak_read"),
    shader!("quantize", "dtype", "e4m3", "math", "reduce", "act", "act4"),
    shader!("rms_norm", "dtype", "e4m3", "math", "reduce", "act", "act4"),
    shader!("rope_append", "dtype", "e4m3", "act4", "paging", "append"),
    shader!("sample", "dtype", "math", "reduce", "philox"),
    shader!("swiglu", "dtype", "e4m3", "math", "reduce", "act", "act4"),
];

/// A shader by its name.
pub fn find(name: &str) -> Option<&'static Shader> {
    SHADERS.iter().find(|shader| shader.name == name)
}
