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
const OLDEST: Version = (12, 4);

/// What cards that NVRTC does not know are compiled for.
const PTX: &str = "compute_89";

/// Major and minor, of NVRTC, and of what a driver knows.
type Version = (i32, i32);

/// What is wrong where there is no compiler at all.
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
    /// The version of CUDA that the driver of the card knows; None where there is no card in question.
    driver: Option<Version>,
    /// Or why it cannot be used: what is in the cache runs without it.
    nvrtc: Result<Nvrtc, String>,
}

impl Compiler {
    /// For an architecture by its name.
    pub fn new(architecture: impl Into<String>) -> Self {
        Compiler { architecture: architecture.into(), driver: None, nvrtc: nvrtc() }
    }

    /// For a card of this compute capability under a driver of this CUDA version: its own instructions, or PTX, which the
    /// driver compiles, where NVRTC does not know the card.
    pub fn for_card(card: (u32, u32), driver: i32) -> Self {
        let driver = (driver / 1000, driver % 1000 / 10);
        let found = nvrtc().and_then(|nvrtc| Ok((nvrtc, target(card, driver, nvrtc.version, &nvrtc.architectures())?)));
        let (nvrtc, architecture) = match found {
            Ok((nvrtc, architecture)) => (Ok(nvrtc), architecture),
            Err(why) => (Err(why), own_architecture(card)),
        };
        Compiler { architecture, driver: Some(driver), nvrtc }
    }

    /// A kernel file: from the cache, or compiled and put there.
    pub fn build(&self, kernel: &Kernel) -> Result<Built> {
        let folder = cache::folder()?;
        let nvrtc = match &self.nvrtc {
            Ok(nvrtc) => *nvrtc,
            Err(why) => return self.find(&folder, kernel).ok_or_else(|| Error::device("cuda", why)),
        };
        let path = folder.join(self.file(kernel, nvrtc.version));
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
        let nvrtc = self.nvrtc.clone().map_err(|why| Error::device("cuda", why))?;
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

    /// Where no compiler is, a file of any compiler's will do whose code the driver takes, or what the driver compiles; the
    /// newest.
    fn find(&self, folder: &Path, kernel: &Kernel) -> Option<Built> {
        let own = |path: &PathBuf| {
            let name = path.file_name()?.to_str()?;
            let (major, minor) = name.strip_prefix("nvrtc-")?.split('-').next()?.split_once('.')?;
            let version = (major.parse().ok()?, minor.parse().ok()?);
            let is_taken = self.driver.is_none_or(|driver| takes(driver, version, &self.architecture));
            (is_taken && self.file(kernel, version) == name).then_some(version)
        };
        let entries = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        let newest = entries.filter_map(|path| Some((own(&path)?, path))).max();
        if let Some((_, path)) = newest
            && let Ok(image) = fs::read(&path)
        {
            return Some(Built { image, is_new: false, path });
        }
        let number = self.architecture.strip_prefix("sm_")?.trim_end_matches('a').parse();
        let ptx = Compiler { architecture: PTX.into(), driver: self.driver, nvrtc: self.nvrtc.clone() };
        number.is_ok_and(|number: u32| number >= 89).then(|| ptx.find(folder, kernel))?
    }

    /// What a kernel's file is called: the compiler's version, the architecture, the name, and what it was made from.
    fn file(&self, kernel: &Kernel, (major, minor): Version) -> String {
        let key = cache::key([kernel.source, &self.architecture].into_iter().chain(OPTIONS));
        format!("nvrtc-{major}.{minor}-{}-{}-{key}", self.architecture, kernel.name)
    }
}

/// The code that is a card's own.
fn own_architecture((major, minor): (u32, u32)) -> String {
    // The tensor cores of 9.0 have instructions that no later card has.
    format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" })
}

/// Does a driver take what an NVRTC of this version compiled? Cubins run under any driver of their major version, PTX only
/// under one that knows its version (CUDA Compatibility, "Minor Version Compatibility").
fn takes(driver: Version, nvrtc: Version, architecture: &str) -> bool {
    if architecture.starts_with("compute_") { nvrtc <= driver } else { nvrtc.0 <= driver.0 }
}

/// What an NVRTC that knows these architectures compiles to for a card under a driver; or why it does not do.
fn target(card: (u32, u32), driver: Version, nvrtc: Version, known: &[i32]) -> Result<String, String> {
    let (major, minor) = nvrtc;
    if nvrtc < OLDEST {
        return Err(format!("NVRTC {major}.{minor} is too old; install {}.{} or later", OLDEST.0, OLDEST.1));
    }
    let own = (10 * card.0 + card.1) as i32;
    let architecture = if known.contains(&own) { own_architecture(card) } else { PTX.to_owned() };
    if takes(driver, nvrtc, &architecture) {
        return Ok(architecture);
    }
    let knows = format!("the driver knows CUDA {}.{}", driver.0, driver.1);
    Err(match nvrtc.0 > driver.0 {
        true => format!(
            "NVRTC {major}.{minor} is too new, {knows}; update the driver, or install NVRTC {} (`pip install {}`)",
            driver.0,
            if driver.0 > 12 { "nvidia-cuda-nvrtc" } else { "nvidia-cuda-nvrtc-cu12" },
        ),
        false => format!(
            "NVRTC {major}.{minor} has only PTX for this card, which is too new, {knows}; update the driver to one that knows \
             {major}.{minor}"
        ),
    })
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

/// NVRTC, or why there is none: in the folder that `QUAVER_NVRTC` names and nowhere else; where it names none, in
/// `CUDA_HOME`'s or `CUDA_PATH`'s, in /usr/local/cuda, in a Python environment, or where the system's loader looks.
pub fn nvrtc() -> Result<Nvrtc, String> {
    let set = |name: &str| env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let named = set("QUAVER_NVRTC").map(|folder| named(&folder)).transpose()?;
    if let Some(files) = named {
        return sys::load_nvrtc(&[files], true)?.ok_or_else(|| MISSING.to_owned());
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).chain([PathBuf::from("/usr/local/cuda")]);
    let toolkits = toolkits.flat_map(|home| ["lib64", "lib", "bin", "bin/x64"].map(|folder| home.join(folder)));
    let pythons =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set).chain(["/usr", "/usr/local"].map(PathBuf::from));
    let pythons = pythons.chain(set("HOME").map(|home| home.join(".local")));
    let sites = pythons.flat_map(|home| site_packages(&home));
    let wheels = sites.flat_map(|site| {
        ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cuda_nvrtc/bin"].map(|folder| site.join(folder))
    });
    let mut homes: Vec<_> = toolkits.chain(wheels).filter_map(|folder| libraries(&folder)).collect();
    // Of two versions the one whose code the driver runs.
    if let Some(Ok(driver)) = sys::driver_version() {
        let major = format!(".so.{}", driver / 1000);
        homes.sort_by_key(|files| !files.iter().any(|file| file.to_string_lossy().contains(&major)));
    }
    sys::load_nvrtc(&homes, false)?.ok_or_else(|| MISSING.to_owned())
}

/// The files of NVRTC in the folder that the user names.
fn named(folder: &Path) -> Result<Vec<PathBuf>, String> {
    libraries(folder).ok_or_else(|| {
        let folder = folder.display();
        format!(
            "QUAVER_NVRTC is {folder}, which holds no libnvrtc and libnvrtc-builtins; name their folder, or unset it"
        )
    })
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
    fn a_card_gets_its_own_code_or_ptx_that_the_driver_takes() {
        let known = [80, 86, 89, 90];
        for (card, driver, nvrtc, expected) in [
            ((9, 0), (13, 0), (13, 0), Ok("sm_90a")),
            ((8, 6), (12, 2), (12, 9), Ok("sm_86")),
            ((8, 9), (13, 0), (12, 4), Ok("sm_89")),
            ((12, 0), (13, 0), (13, 0), Ok("compute_89")),
            ((12, 0), (13, 0), (12, 9), Ok("compute_89")),
            ((9, 0), (13, 0), (12, 3), Err("NVRTC 12.3 is too old; install 12.4 or later")),
            (
                (9, 0),
                (12, 8),
                (13, 0),
                Err(
                    "NVRTC 13.0 is too new, the driver knows CUDA 12.8; update the driver, or install NVRTC 12 (`pip install \
                     nvidia-cuda-nvrtc-cu12`)",
                ),
            ),
            (
                (12, 0),
                (13, 0),
                (13, 1),
                Err(
                    "NVRTC 13.1 has only PTX for this card, which is too new, the driver knows CUDA 13.0; update the driver to \
                     one that knows 13.1",
                ),
            ),
        ] {
            let got = target(card, driver, nvrtc, &known);
            assert_eq!(got.as_deref().map_err(String::as_str), expected, "{card:?} {driver:?} {nvrtc:?}");
        }
    }

    #[test]
    fn a_folder_without_nvrtc_is_no_nvrtc() {
        let error = named(Path::new("/nowhere")).unwrap_err();
        let expected =
            "QUAVER_NVRTC is /nowhere, which holds no libnvrtc and libnvrtc-builtins; name their folder, or unset it";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_is_in_the_cache_runs_without_nvrtc() {
        let folder = env::temp_dir().join(format!("quaver-kernels-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let compiler = |architecture: &str, driver| Compiler {
            architecture: architecture.into(),
            driver,
            nvrtc: Err("there is no NVRTC".into()),
        };
        for (architecture, version) in [("sm_90a", (12, 6)), ("sm_90a", (13, 1)), ("compute_89", (12, 9))] {
            let path = folder.join(compiler(architecture, None).file(&KERNELS[0], version));
            fs::write(path, format!("{architecture} {version:?}")).unwrap();
        }
        for (architecture, driver, found) in [
            ("sm_90a", None, Some("sm_90a (13, 1)")),
            ("sm_90a", Some((13, 0)), Some("sm_90a (13, 1)")),
            ("sm_90a", Some((12, 0)), Some("sm_90a (12, 6)")),
            ("sm_120", Some((13, 0)), Some("compute_89 (12, 9)")),
            ("sm_120", Some((12, 8)), None),
            ("sm_80", Some((13, 0)), None),
        ] {
            let built = compiler(architecture, driver).find(&folder, &KERNELS[0]);
            let image = built.map(|built| String::from_utf8(built.image).unwrap());
            assert_eq!(image.as_deref(), found, "{architecture} {driver:?}");
        }
        // Another source is not what was compiled.
        assert!(compiler("sm_90a", None).find(&folder, &KERNELS[1]).is_none());
        fs::remove_dir_all(&folder).unwrap();
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
