//! What a launch is made of, as plain data: ops are lowered to kernels without a device, so that tests can look at them.

use quaver_core::op::{Buf, DType};

/// One launch of one entry point.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// The file, as `quaver_kernels` names it.
    pub file: &'static str,
    /// The entry point in it.
    pub entry: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block.
    pub threads: u32,
    /// Bytes of shared memory that the launch asks for.
    pub shared: u32,
    /// The arguments, in their order.
    pub args: Vec<Arg>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// The address of a buffer.
    Buf(Buf),
    /// The address of so many bytes between the blocks and the kernels of one op.
    Scratch(u64),
    /// The address of so many words that are zero before and after each kernel.
    Counters(u32),
    /// No address.
    Null,
    U32(u32),
    F32(f32),
    /// A tensor map of a buffer: boxes of so many rows and 128 bytes, swizzled.
    Boxes {
        buf: Buf,
        rows: u32,
    },
}

/// A dtype as kernels number it (`numbers.cuh`).
pub const fn code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 | DType::U32 => 0,
        DType::Bf16 => 1,
        DType::E4m3 => 2,
    }
}

impl Kernel {
    /// A kernel whose file has one entry point, of its own name.
    pub fn new(file: &'static str, grid: [u32; 3], threads: u32, args: impl Into<Vec<Arg>>) -> Self {
        Kernel { file, entry: file.into(), grid, threads, shared: 0, args: args.into() }
    }
}
