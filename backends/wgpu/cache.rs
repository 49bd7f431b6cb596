//! Compiled pipelines on disk, so that a driver compiles each once a machine: one file an adapter, driver and version of
//! Quaver, under the user's folder for caches. It saves time and nothing else: whatever fails here is logged, and no
//! error.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ::wgpu::{AdapterInfo, Features, PipelineCache, util};

use super::gpu::Gpu;
use super::pipelines::pipeline_cache;

/// Bytes of a file that is read, at most: some hundred times what the pipelines of a model take.
const MOST: u64 = 256 << 20;

/// See the module.
pub struct Cache {
    pub pipelines: PipelineCache,
    path: PathBuf,
}

impl Cache {
    /// What is kept for this adapter; None where the driver cannot give its pipelines away, or nobody has a folder.
    pub fn open(gpu: &Gpu, adapter: &AdapterInfo) -> Option<Self> {
        if !gpu.device.features().contains(Features::PIPELINE_CACHE) {
            return None;
        }
        Self::at(gpu, folder()?.join("quaver").join(name(adapter)?))
    }

    /// What a file keeps.
    fn at(gpu: &Gpu, path: PathBuf) -> Option<Self> {
        let kept = read(&path)
            .inspect_err(|e| {
                if e.kind() != io::ErrorKind::NotFound {
                    log::warn!("cannot read {}: {e}; pipelines are compiled again", path.display());
                }
            })
            .ok();
        let pipelines =
            pipeline_cache(gpu, kept.as_deref()).inspect_err(|e| log::warn!("no cache of pipelines: {e}")).ok()?;
        Some(Cache { pipelines, path })
    }

    /// Keeps what was compiled.
    pub fn save(&self) {
        if let Some(data) = self.pipelines.get_data()
            && let Err(e) = write(&self.path, &data)
        {
            log::warn!("cannot keep compiled pipelines in {}: {e}", self.path.display());
        }
    }
}

/// The user's folder for caches.
fn folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let own = || if cfg!(windows) { set("LOCALAPPDATA") } else { env::home_dir().map(|home| home.join(".cache")) };
    set("XDG_CACHE_HOME").filter(|folder| folder.is_absolute()).or_else(own)
}

/// The file of an adapter: what wgpu names it by, the driver, and Quaver's version, of plain characters.
fn name(adapter: &AdapterInfo) -> Option<String> {
    let key = util::pipeline_cache_key(adapter)?;
    let name = format!("{key}-{}-{}-{}", adapter.driver, adapter.driver_info, env!("CARGO_PKG_VERSION"));
    let plain = name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' });
    Some(plain.take(200).collect())
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    File::open(path)?.take(MOST).read_to_end(&mut data)?;
    Ok(data)
}

/// Writes beside the file and renames, so that no half of it is ever read.
fn write(path: &Path, data: &[u8]) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    let part = path.with_added_extension(format!("part-{}", std::process::id()));
    let renamed = File::create(&part).and_then(|mut file| file.write_all(data)).and_then(|()| fs::rename(&part, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&part);
    }
    renamed
}

#[cfg(test)]
mod tests {
    use ::wgpu::Adapter;

    use super::*;
    use crate::wgpu::adapter;

    #[test]
    fn what_is_kept_is_read_again_and_nonsense_replaced() {
        let folder = env::temp_dir().join(format!("quaver-pipelines-{}", std::process::id()));
        let keeps = |adapter: &&Adapter| adapter.features().contains(Features::PIPELINE_CACHE);
        for adapter in adapter::tests::some().iter().filter(keeps) {
            let gpu = Gpu::open(adapter, Features::PIPELINE_CACHE).unwrap();
            let path = folder.join(name(&adapter.get_info()).unwrap());
            write(&path, b"nonsense").unwrap();
            Cache::at(&gpu, path.clone()).unwrap().save();
            let kept = read(&path).unwrap();
            assert!(kept.len() > 8, "{kept:?}");
            let again = Cache::at(&gpu, path.clone()).unwrap();
            assert_eq!(again.pipelines.get_data().as_ref(), Some(&kept));
            let files = fs::read_dir(&folder).unwrap().count();
            assert_eq!(files, 1, "only the file itself is left");
            fs::remove_dir_all(&folder).unwrap();
        }
    }
}
