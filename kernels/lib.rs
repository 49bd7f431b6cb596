//! CUDA source of every op: one `.cu` file an op or variant, joined with the headers that it shares with others and
//! listed here for the CUDA backend, for the gate that compiles each of them, and for the emulator. `ptx.cuh` has all
//! inline PTX. No logic, no dependency.

/// One kernel file: CUDA C++ that compiles as it stands.
#[derive(Debug)]
pub struct Kernel {
    /// The op's name in snake case, with the variant behind it or the architecture before it.
    pub name: &'static str,
    /// The CUDA C++ text, headers included.
    pub source: &'static str,
    /// The architectures that it is written for, those of [`TARGETS`].
    pub targets: &'static [&'static str],
}

/// What kernels are written for. Newer architectures take those of `sm_89`.
pub const TARGETS: &[&str] = &["sm_80", "sm_89", "sm_90a"];

/// The headers, in an order in which each finds those that it needs, and a file.
macro_rules! kernel {
    ($name:literal $(, $header:literal)* ; $targets:expr) => {
        Kernel {
            name: $name,
            source: concat!(
                "#line 1 \"ptx.cuh\"\n",
                include_str!("ptx.cuh"),
                "#line 1 \"numbers.cuh\"\n",
                include_str!("numbers.cuh"),
                $("#line 1 \"", $header, ".cuh\"\n", include_str!(concat!($header, ".cuh")),)*
                "#line 1 \"", $name, ".cu\"\n",
                include_str!(concat!($name, ".cu")),
            ),
            targets: $targets,
        }
    };
}

/// Every kernel of this crate.
pub const KERNELS: &[Kernel] = &[
    kernel!("abs_max", "reduce"; TARGETS),
    kernel!("attend", "math", "reduce", "paging"; TARGETS),
    kernel!("attend_merge", "math", "reduce", "paging", "act"; TARGETS),
    kernel!("copy_pages"; TARGETS),
    kernel!("embed"; TARGETS),
    kernel!("gather"; TARGETS),
    kernel!("linear", "epilogue"; TARGETS),
    kernel!("linear_gemv", "reduce", "epilogue"; TARGETS),
    kernel!("peak_read"; TARGETS),
    kernel!("quantize", "reduce", "act"; TARGETS),
    kernel!("rms_norm", "reduce", "act"; TARGETS),
    kernel!("rope_append", "paging", "heads"; TARGETS),
    kernel!("sample", "math", "reduce", "philox"; TARGETS),
    kernel!("sm80_attend", "math", "paging"; TARGETS),
    kernel!("sm80_gemv", "gemv_mma"; TARGETS),
    kernel!("sm80_gemv_gated", "math", "gemv_mma"; TARGETS),
    kernel!("sm80_gemv_rope", "paging", "heads", "gemv_mma"; TARGETS),
    kernel!("sm80_linear", "epilogue", "linear_mma"; TARGETS),
    kernel!("sm80_peak", "peak_mma"; TARGETS),
    kernel!("sm89_linear_e4m3", "epilogue", "linear_mma"; &["sm_89", "sm_90a"]),
    kernel!("sm89_peak", "peak_mma"; &["sm_89", "sm_90a"]),
    kernel!("sm90_linear_bf16", "epilogue", "linear_wgmma"; &["sm_90a"]),
    kernel!("sm90_linear_e4m3", "epilogue", "linear_wgmma"; &["sm_90a"]),
    kernel!("sm90_peak"; &["sm_90a"]),
    kernel!("swiglu", "math", "reduce", "act"; TARGETS),
];

/// A kernel file by its name.
pub fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

/// The emulator: the words of `ptx.cuh` for the CPU, and the program that runs kernels.
pub const EMULATOR_H: &str = include_str!("emulator/emulator.h");
/// See [`EMULATOR_H`].
pub const EMULATOR_CPP: &str = include_str!("emulator/emulator.cpp");
