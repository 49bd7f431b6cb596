//! CUDA source of every op: one `.cu` file an op or variant, listed here for the CUDA backend and for the gate that
//! compiles each of them. No logic, no dependency.

/// One kernel file: the name of its op or variant and its CUDA C++ text.
pub struct Kernel {
    /// The op's name in snake case, with the architecture before it where it matters: `rms_norm`, `sm90_linear_fp8`.
    pub name: &'static str,
    /// The CUDA C++ text.
    pub source: &'static str,
}

/// Every kernel of this crate.
pub const KERNELS: &[Kernel] = &[];
