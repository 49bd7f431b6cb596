//! From CUDA C++ to what a card runs: by NVRTC, kept in the cache folder. A machine without NVRTC runs what
//! `quaver kernels build` put there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs};

use quaver_core::{Error, Result};
use quaver_kernels::{KERNELS, Kernel, TARGETS};

use super::cache;
use super::sys::{self, Compiled, Nvrtc};

/// How kernels are compiled. Contraction is off, so that f32 means the same here as on the CPU.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "--ptxas-options=-v"];

/// The oldest NVRTC that knows all instructions: `mma.sync` on E4M3 came with PTX 8.4 (PTX ISA, release notes).
const OLDEST: (i32, i32) = (12, 4);

const MISSING: &str = "there is no NVRTC; install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` (CUDA 12: \
                       nvidia-cuda-nvrtc-cu12), or copy the cache folder of a machine where `quaver kernels build` ran, or \
                       take --backend wgpu or cpu";

/// A kernel file, compiled.
pub struct Built {
    /// A cubin, or PTX.
    pub image: Vec<u8>,
    /// False where it was in the cache.
    pub is_new: bool,
    /// Where it is kept.
    pub path: PathBuf,
}

/// What an entry point takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The entry point.
    pub name: String,
    /// Of each thread.
    pub registers: u32,
    /// Bytes of registers that are kept in local memory, stored and loaded.
    pub spills: u32,
    /// Bytes of local memory of each thread.
    pub stack: u32,
    /// Bytes of shared memory that every block has, besides what a launch asks for.
    pub shared: u32,
}

/// A kernel file compiled anew, and what the assembler says of it.
pub struct Assembled {
    /// A cubin, or PTX, of which the assembler says nothing.
    pub image: Vec<u8>,
    /// Its entry points.
    pub entries: Vec<Entry>,
    /// What else it remarks: that products of a warpgroup wait for each other, or that it adds waits which are not written.
    pub remarks: Vec<String>,
}

/// Compiles for one architecture.
pub struct Compiler {
    /// As the option names it: `sm_90a`, `compute_89`.
    pub architecture: String,
    nvrtc: Option<Nvrtc>,
}

impl Compiler {
    /// For an architecture by its name.
    pub fn new(architecture: impl Into<String>) -> Self {
        Compiler { architecture: architecture.into(), nvrtc: nvrtc() }
    }

    /// For a card of this compute capability under a driver of this CUDA version: its own instructions, or PTX, which the
    /// driver compiles, where NVRTC does not know the card.
    pub fn for_card((major, minor): (u32, u32), driver: i32) -> Result<Self> {
        let nvrtc = nvrtc();
        let architecture = match (major, minor) {
            (9, 0) => "sm_90a".into(),
            _ => format!("sm_{major}{minor}"),
        };
        let Some(found) = nvrtc else { return Ok(Compiler { architecture, nvrtc }) };
        let own = (10 * major + minor) as i32;
        if found.version < OLDEST {
            let ((major, minor), (least_major, least_minor)) = (found.version, OLDEST);
            let why = format!("NVRTC {major}.{minor} is too old; install {least_major}.{least_minor} or later");
            return Err(Error::device("cuda", why));
        }
        // Cubins run under any driver of their major version (CUDA Compatibility, "Minor Version Compatibility").
        if found.version.0 > driver / 1000 {
            let (major, minor) = found.version;
            let why = format!(
                "NVRTC {major}.{minor} is newer than the driver, which knows CUDA {}.{}; update the driver, or install NVRTC \
                 {} (`pip install nvidia-cuda-nvrtc-cu{}`)",
                driver / 1000,
                driver % 1000 / 10,
                driver / 1000,
                driver / 1000,
            );
            return Err(Error::device("cuda", why));
        }
        let architecture = if found.architectures().contains(&own) { architecture } else { "compute_89".into() };
        Ok(Compiler { architecture, nvrtc })
    }

    /// A kernel file: from the cache, or compiled and put there.
    pub fn build(&self, kernel: &Kernel) -> Result<Built> {
        let Some(nvrtc) = self.nvrtc else { return self.find(kernel) };
        let path = cache::folder()?.join(self.file(kernel, nvrtc.version));
        if let Ok(image) = fs::read(&path) {
            return Ok(Built { image, is_new: false, path });
        }
        let Compiled { image, .. } = self.run(nvrtc, kernel)?;
        static WRITTEN: AtomicU32 = AtomicU32::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let beside = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let written = fs::write(&beside, &image).and_then(|()| fs::rename(&beside, &path));
        written.map_err(|e| Error::io("write", &path, e))?;
        Ok(Built { image, is_new: true, path })
    }

    /// A kernel file compiled anew, whatever the cache holds.
    pub fn compile(&self, kernel: &Kernel) -> Result<Assembled> {
        let nvrtc = self.nvrtc.ok_or_else(|| Error::device("cuda", MISSING))?;
        let Compiled { image, log } = self.run(nvrtc, kernel)?;
        Ok(Assembled { image, entries: entries(&log), remarks: remarks(&log) })
    }

    fn run(&self, nvrtc: Nvrtc, kernel: &Kernel) -> Result<Compiled> {
        let architecture = format!("--gpu-architecture={}", self.architecture);
        let options: Vec<&str> = std::iter::once(architecture.as_str()).chain(OPTIONS).collect();
        let name = format!("{}.cu", kernel.name);
        nvrtc
            .compile(&name, kernel.source, &options)
            .map_err(|log| Error::device("cuda", format!("{name} cannot be compiled for {}: {log}", self.architecture)))
    }

    /// Where no compiler is, a file of any compiler's will do.
    fn find(&self, kernel: &Kernel) -> Result<Built> {
        let folder = cache::folder()?;
        let own = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let version = name.strip_prefix("nvrtc-").and_then(|rest| rest.split('-').next()?.split_once('.'));
            let version = version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            version.is_some_and(|version| self.file(kernel, version) == name)
        };
        let entries = fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))?;
        let path = entries.filter_map(|entry| Some(entry.ok()?.path())).find(own);
        let Some(path) = path else {
            // What the driver compiles will do, too.
            let number = self.architecture.strip_prefix("sm_").map(|number| number.trim_end_matches('a'));
            return match number.and_then(|number| number.parse().ok()) {
                Some(89..=999u32) => Compiler { architecture: "compute_89".into(), nvrtc: None }.find(kernel),
                _ => Err(Error::device("cuda", MISSING)),
            };
        };
        let image = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        Ok(Built { image, is_new: false, path })
    }

    /// What a kernel's file is called: the compiler's version, the architecture, the name, and what it was made from.
    fn file(&self, kernel: &Kernel, (major, minor): (i32, i32)) -> String {
        let key = cache::key([kernel.source, &self.architecture].into_iter().chain(OPTIONS));
        format!("nvrtc-{major}.{minor}-{}-{}-{key}", self.architecture, kernel.name)
    }
}

/// The kernels that are written for an architecture, `sm_90a` or `compute_89`; newer ones take those of sm_89.
pub fn kernels_for(architecture: &str) -> Result<Vec<&'static Kernel>> {
    let unknown = || {
        let why =
            format!("there is no architecture {architecture}; give one such as {}, compute_89", TARGETS.join(", "));
        Error::device("cuda", why)
    };
    let number = architecture.strip_prefix("sm_").or_else(|| architecture.strip_prefix("compute_"));
    let digits = number.map(|number| number.trim_end_matches(['a', 'f']));
    let target = match (architecture, digits.and_then(|digits| digits.parse().ok())) {
        ("sm_90a" | "compute_90a", _) => "sm_90a",
        // Cards of 9.0 run code of sm_90a, which has their tensor cores' instructions.
        ("sm_90", _) => return Err(Error::device("cuda", "give sm_90a in place of sm_90")),
        (_, Some(80..89u32)) => "sm_80",
        (_, Some(89..=999)) => "sm_89",
        _ => return Err(unknown()),
    };
    Ok(KERNELS.iter().filter(|kernel| kernel.targets.contains(&target)).collect())
}

/// The entry points of an assembler's log: lines of three, of which the first names one.
fn entries(log: &str) -> Vec<Entry> {
    // The number that stands before these words.
    let before = |line: &str, words: &str| -> Option<u32> {
        line.split(words).next().filter(|head| head.len() < line.len())?.split_whitespace().next_back()?.parse().ok()
    };
    let mut entries: Vec<Entry> = Vec::new();
    for line in log.lines() {
        if let Some(name) = line.split("entry function '").nth(1).and_then(|rest| rest.split('\'').next()) {
            entries.push(Entry { name: name.to_owned(), registers: 0, spills: 0, stack: 0, shared: 0 });
        } else if let Some(entry) = entries.last_mut() {
            let spills = [before(line, " bytes spill stores"), before(line, " bytes spill loads")];
            entry.spills += spills.into_iter().flatten().sum::<u32>();
            entry.stack += before(line, " bytes stack frame").unwrap_or(0);
            entry.registers += before(line, " registers").unwrap_or(0);
            entry.shared += before(line, " bytes smem").unwrap_or(0);
        }
    }
    entries
}

/// The lines of an assembler's log that it numbers as remarks.
fn remarks(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.starts_with("ptxas") && line.contains(": (C")).map(str::to_owned).collect()
}

/// NVRTC, where this machine has it: in `CUDA_HOME`'s or `CUDA_PATH`'s folder, in /usr/local/cuda, in a Python
/// environment, or where the system's loader looks.
pub fn nvrtc() -> Option<Nvrtc> {
    let set = |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).chain([PathBuf::from("/usr/local/cuda")]);
    let toolkits = toolkits.flat_map(|home| ["lib64", "lib", "bin", "bin/x64"].map(|folder| home.join(folder)));
    let named = set("QUAVER_NVRTC").into_iter();
    let pythons =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set).chain(["/usr", "/usr/local"].map(PathBuf::from));
    let pythons = pythons.chain(set("HOME").map(|home| home.join(".local")));
    let sites = pythons.flat_map(|home| site_packages(&home));
    let wheels = sites.flat_map(|site| {
        ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cuda_nvrtc/bin"].map(|folder| site.join(folder))
    });
    let mut homes: Vec<_> = named.chain(toolkits).chain(wheels).filter_map(|folder| libraries(&folder)).collect();
    // Of two versions the one whose code the driver runs.
    if let Some(Ok(driver)) = sys::driver_version() {
        let major = format!(".so.{}", driver / 1000);
        homes.sort_by_key(|files| !files.iter().any(|file| file.to_string_lossy().contains(&major)));
    }
    sys::load_nvrtc(&homes)
}

/// The folders of a Python environment that hold packages.
fn site_packages(home: &Path) -> Vec<PathBuf> {
    let lib = home.join("lib");
    let versions = fs::read_dir(&lib).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    versions.flat_map(|version| ["site-packages", "dist-packages"].map(|name| version.join(name))).collect()
}

/// The files of NVRTC in a folder, those first that others need.
fn libraries(folder: &Path) -> Option<Vec<PathBuf>> {
    let files = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> = files.filter(|path| is_nvrtc(path)).collect();
    // `nvrtc-builtins` is needed by the other; of several versions the newest comes first.
    files.sort_by(|a, b| b.cmp(a));
    let builtins = files.iter().find(|path| is_builtins(path))?.clone();
    let compiler = files.iter().find(|path| !is_builtins(path))?.clone();
    Some(vec![builtins, compiler])
}

fn is_nvrtc(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_library = name.contains(".so") || name.ends_with(".dll");
    is_library && (name.starts_with("libnvrtc") || name.starts_with("nvrtc")) && !name.contains(".alt.")
}

fn is_builtins(path: &Path) -> bool {
    path.to_string_lossy().contains("builtins")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_log_is_read_entry_by_entry() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'attend' for 'sm_80'\n\
                   ptxas info    : Function properties for attend\n\
                   ptxas         .     24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n\
                   ptxas info    : Used 209 registers, used 1 barriers, 128 bytes smem, 452 bytes cmem[0]\n";
        let entry = Entry { name: "attend".into(), registers: 209, spills: 24, stack: 24, shared: 128 };
        assert_eq!(entries(log), [entry]);
        assert!(remarks(log).is_empty());
        let remark = "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
                      insufficient register resources for the wgmma pipeline in the function 'sm90_linear_e4m3_64'";
        assert_eq!(remarks(&format!("k.cu(77): warning #177-D\n{remark}\n{log}")), [remark]);
    }

    #[test]
    fn an_architecture_has_the_kernels_that_it_can_run() {
        let has = |architecture: &str, name: &str| {
            kernels_for(architecture).unwrap().iter().any(|kernel| kernel.name == name)
        };
        assert!(has("sm_90a", "sm90_linear_e4m3") && has("sm_90a", "sm80_linear"));
        assert!(has("sm_120", "sm89_linear_e4m3") && has("compute_89", "sm89_linear_e4m3"));
        assert!(!has("sm_86", "sm89_linear_e4m3") && !has("sm_120", "sm90_linear_e4m3"));
        for wrong in ["", "sm_", "sm_75", "90", "sm_9x"] {
            assert!(kernels_for(wrong).is_err(), "{wrong}");
        }
    }
}
