//! Which instructions the cpu backend uses: what the machine has, or what the user forces.

use super::portable::Portable;
use super::vector::Work;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512, simd};
use quaver_core::{Error, Result};

/// An instruction set, with the proof that this machine has it.
#[derive(Clone, Copy)]
pub enum Isa {
    /// AVX-512 with BF16 for products of FP8 and bf16, AVX2 for f32.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// What every machine of this architecture has; on aarch64 that includes NEON.
    Portable(Portable),
}

impl Isa {
    /// Every instruction set that this machine has, the best first.
    pub fn all() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx512::detect().map(Isa::Avx512));
            all.extend(Avx2::detect().map(Isa::Avx2));
        }
        all.push(Isa::Portable(Portable));
        all
    }

    /// The instruction set of a name, the best one where None.
    pub fn find(name: Option<&str>) -> Result<Isa> {
        let all = Isa::all();
        let found = all.iter().find(|isa| name.is_none_or(|name| isa.name() == name));
        found.copied().ok_or_else(|| {
            let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
            let name = name.unwrap_or_default();
            Error::device("cpu", format!("there is no variant {name}; this machine has {}", names.join(", ")))
        })
    }

    /// Runs something with the vector instructions of this set.
    pub fn run(self, work: impl Work) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(wide) => simd::run_avx512(wide, work),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(narrow) => simd::run_avx2(narrow, work),
            Isa::Portable(portable) => work.run(portable),
        }
    }

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            Isa::Portable(_) => "portable",
        }
    }
}
