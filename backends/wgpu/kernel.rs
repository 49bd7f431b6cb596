//! What a dispatch is made of, as plain data: ops are lowered to kernels without a device, so that tests can look at
//! them.

use quaver_core::op::{Buf, DType};

/// One dispatch of one shader.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// The shader's name, and its entry point's.
    pub shader: &'static str,
    /// Its override constants.
    pub constants: Vec<(&'static str, f64)>,
    /// The words of binding 0, a uniform; empty where the shader has none.
    pub params: Vec<u32>,
    /// The storage buffers, by binding.
    pub bindings: Vec<(u32, Binding)>,
    /// Workgroups.
    pub grid: [u32; 3],
    /// Operations, where they may be many.
    pub ops: f64,
}

/// A storage buffer of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// A part of a buffer, only read.
    Read(Buf, usize),
    /// A part of a buffer.
    Write(Buf, usize),
    /// So many bytes between two kernels of one op, only read.
    ReadScratch(u64),
    /// The same, written.
    WriteScratch(u64),
    /// Not used with these constants; read-only.
    Unread,
    /// Not used with these constants.
    Unwritten,
}

impl Binding {
    /// True where the shader declares it `read_write`.
    pub const fn is_written(self) -> bool {
        matches!(self, Binding::Write(..) | Binding::WriteScratch(_) | Binding::Unwritten)
    }
}

/// A dtype as shaders number it (`dtype.wgsl`).
pub const fn code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 | DType::U32 => 0,
        DType::Bf16 => 1,
        DType::E4m3 => 2,
    }
}

impl Kernel {
    /// A kernel without constants, parameters and bindings.
    pub fn new(shader: &'static str, grid: [u32; 3]) -> Self {
        Kernel { shader, constants: Vec::new(), params: Vec::new(), bindings: Vec::new(), grid, ops: 0.0 }
    }

    /// Sets an override constant.
    pub fn constant(mut self, name: &'static str, value: impl Into<f64>) -> Self {
        self.constants.push((name, value.into()));
        self
    }

    /// Sets several.
    pub fn constants(mut self, constants: &[(&'static str, u32)]) -> Self {
        self.constants.extend(constants.iter().map(|&(name, value)| (name, f64::from(value))));
        self
    }

    /// Gives it its share of so many operations, which `x` by `y` workgroups have in all.
    pub fn share(mut self, ops: f64, x: u32, y: u32) -> Self {
        let groups = self.grid.iter().map(|groups| f64::from(*groups)).product::<f64>();
        self.ops = ops * groups / (f64::from(x) * f64::from(y)).max(1.0);
        self
    }

    /// Sets the words of the uniform.
    pub fn params(mut self, words: impl Into<Vec<u32>>) -> Self {
        self.params = words.into();
        self
    }

    /// Binds a buffer.
    pub fn bind(mut self, binding: u32, buffer: Binding) -> Self {
        self.bindings.push((binding, buffer));
        self
    }

    /// Binds a buffer that is one part, to be read.
    pub fn read(self, binding: u32, buf: Buf) -> Self {
        self.bind(binding, Binding::Read(buf, 0))
    }

    /// Binds a buffer that is one part, to be written.
    pub fn write(self, binding: u32, buf: Buf) -> Self {
        self.bind(binding, Binding::Write(buf, 0))
    }
}
