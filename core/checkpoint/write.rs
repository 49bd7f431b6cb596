//! Writes a checkpoint's tensors: safetensors files of a bounded size and, where there are several, their index, as
//! Hugging Face's tools lay them out. The tensors are computed one part after another while others are written, so that
//! memory holds a few of them only. [`place`] makes a folder appear whole or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, json};

use super::Tensor;
use super::tensors::{INDEX, SINGLE};
use crate::bytes::Bytes;
use crate::error::{Error, Result};

/// Bytes of a file, at most: Hugging Face's habit, and what its hub likes.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Bytes that are written at a time.
const CHUNK: usize = 16 << 20;

/// Parts that are computed ahead of the one that is written.
const AHEAD: usize = 2;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDesc {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl TensorDesc {
    /// A description from its parts.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        TensorDesc { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Tensors that are computed together, and stand in one file.
pub struct Part<'a> {
    descs: Vec<TensorDesc>,
    compute: Box<dyn FnOnce() -> Result<Vec<Bytes>> + Send + 'a>,
}

impl<'a> Part<'a> {
    /// Tensors, and how to compute the bytes of each, in this order.
    pub fn new(descs: Vec<TensorDesc>, compute: impl FnOnce() -> Result<Vec<Bytes>> + Send + 'a) -> Self {
        Part { descs, compute: Box::new(compute) }
    }

    /// A tensor as it is.
    pub fn copy(tensor: &'a Tensor) -> Self {
        let desc = TensorDesc::new(&tensor.name, tensor.dtype.into(), &tensor.shape);
        Part::new(vec![desc], || Ok(vec![tensor.data.clone()]))
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> u64 {
        self.descs.iter().map(|desc| desc.bytes() as u64).sum()
    }
}

/// Writes tensors to a folder that is there, in files of at most `max_shard_bytes` where a part does not take more by
/// itself. `on_written` is told of every so many bytes.
pub fn write_tensors(
    folder: &Path,
    parts: Vec<Part>,
    max_shard_bytes: u64,
    mut on_written: impl FnMut(u64),
) -> Result<()> {
    let shards = shards(parts, max_shard_bytes);
    let count = shards.len();
    let mut weight_map = Map::new();
    let mut total = 0;
    for (i, parts) in shards.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        total += parts.iter().map(Part::bytes).sum::<u64>();
        let tensors = parts.iter().flat_map(|part| &part.descs).map(|desc| (desc.name.clone(), json!(name)));
        weight_map.extend(tensors);
        write_shard(&folder.join(&name), parts, &mut on_written)?;
    }
    if count > 1 {
        weight_map.sort_keys();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        let path = folder.join(INDEX);
        fs::write(&path, format!("{index:#}\n")).map_err(|e| Error::io("write", path, e))?;
    }
    Ok(())
}

/// As many parts a shard as fit, in their order.
fn shards(parts: Vec<Part>, max_bytes: u64) -> Vec<Vec<Part>> {
    let mut shards: Vec<Vec<Part>> = Vec::new();
    let mut room = 0;
    for part in parts {
        let bytes = part.bytes();
        match shards.last_mut() {
            Some(shard) if bytes <= room => shard.push(part),
            _ => {
                room = max_bytes.max(bytes);
                shards.push(vec![part]);
            }
        }
        room -= bytes;
    }
    shards
}

fn write_shard(path: &Path, parts: Vec<Part>, on_written: &mut impl FnMut(u64)) -> Result<()> {
    let fail = |e| Error::io("write", path, e);
    let (header, offsets) = header(&parts);
    let mut file = File::create(path).map_err(fail)?;
    file.write_all(&header).map_err(fail)?;
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(AHEAD);
        scope.spawn(move || {
            for Part { descs, compute } in parts {
                let computed = compute().map(|tensors| (descs, tensors));
                // Nobody receives any more where writing failed, and nobody should where computing did.
                let failed = computed.is_err();
                if sender.send(computed).is_err() || failed {
                    break;
                }
            }
        });
        for computed in receiver {
            let (descs, tensors) = computed?;
            for (desc, bytes) in descs.iter().zip(tensors) {
                assert_eq!(bytes.len(), desc.bytes(), "{} has the bytes that its header promises", desc.name);
                let start = header.len() as u64 + offsets[&desc.name] as u64;
                file.seek(SeekFrom::Start(start)).map_err(fail)?;
                for at in (0..bytes.len()).step_by(CHUNK) {
                    let chunk = bytes.slice(at..bytes.len().min(at + CHUNK));
                    file.write_all(&chunk).map_err(fail)?;
                    chunk.release();
                    on_written(chunk.len() as u64);
                }
            }
        }
        file.sync_all().map_err(fail)
    })
}

/// The header of a file, its length before it, and where each tensor begins behind it: the widest dtype first, then by
/// name, so that all are aligned; as `safetensors` orders them, byte for byte.
fn header(parts: &[Part]) -> (Vec<u8>, HashMap<String, usize>) {
    let mut descs: Vec<&TensorDesc> = parts.iter().flat_map(|part| &part.descs).collect();
    descs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    let mut offsets = HashMap::new();
    let infos = descs.into_iter().map(|desc| {
        let start = end;
        end += desc.bytes();
        offsets.insert(desc.name.clone(), start);
        let info = TensorInfo { dtype: desc.dtype, shape: desc.shape.clone(), data_offsets: (start, end) };
        (desc.name.clone(), info)
    });
    let infos = infos.collect();
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).expect("offsets and shapes are computed from each other");
    let mut json = serde_json::to_vec(&metadata).expect("names, shapes and offsets are JSON");
    json.resize(json.len().next_multiple_of(8), b' ');
    ([&(json.len() as u64).to_le_bytes()[..], &json].concat(), offsets)
}

/// Fills a folder beside its place and renames it, so that it is there whole or not at all, a power cut included. It must
/// not exist yet. What earlier runs to the same place left behind when they were killed is removed.
pub fn place(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.exists() {
        let why = "is there already; give a folder that is not, or remove it";
        return Err(Error::text(folder.display().to_string(), why));
    }
    remove_stale(folder);
    let part = folder.with_added_extension(format!("part-{}", std::process::id()));
    let fail = |e| Error::io("write", &part, e);
    // The lock is what tells this run from one that was killed.
    let placed = fs::create_dir_all(&part).map_err(fail).and_then(|()| {
        let _lock = File::open(&part).inspect(|part| drop(part.try_lock()));
        fill(&part)?;
        sync_all(&part).map_err(fail)?;
        fs::rename(&part, folder).and_then(|()| sync(parent(folder))).map_err(|e| Error::io("write", folder, e))
    });
    if placed.is_err() {
        // What remains of a folder that could not be filled is of no use; its error is the one to report.
        let _ = fs::remove_dir_all(&part);
    }
    placed
}

/// Removes what killed runs left behind: folders that nobody holds the lock of. Where folders cannot be locked they stay.
fn remove_stale(folder: &Path) {
    let Some(name) = folder.file_name() else { return };
    let prefix = format!("{}.part-", name.to_string_lossy());
    for entry in fs::read_dir(parent(folder)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if pid.is_some_and(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
            && File::open(entry.path()).is_ok_and(|part| part.try_lock().is_ok())
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            log::warn!("{}: is left from a run that was killed, and stays: {error}", entry.path().display());
        }
    }
}

/// The folder that holds a path.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Has the disk hold a folder's files, and their names.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        sync(&entry?.path())?;
    }
    sync(folder)
}

/// Has the disk hold a file, or a folder's names. Only Unix opens folders.
fn sync(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_filled_beside_its_place_and_what_killed_runs_left_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("Llama-3.2");
        let stale = scratch.path().join("Llama-3.2.part-1");
        let others = ["Llama-3.1.part-1", "Llama-3.part-1", "Llama-3.2.part-x", "Llama-3.2.part-2"];
        for path in others.map(|name| scratch.path().join(name)).iter().chain([&stale]) {
            fs::create_dir(path).unwrap();
        }
        fs::write(stale.join("model.safetensors"), "half").unwrap();
        let running = File::open(scratch.path().join(others[3])).unwrap();
        running.try_lock().unwrap();
        place(&folder, |part| {
            assert_eq!(part, scratch.path().join(format!("Llama-3.2.part-{}", std::process::id())));
            assert!(!folder.exists() && !stale.exists());
            // Another run to the same place leaves this one alone.
            remove_stale(&folder);
            fs::write(part.join("config.json"), "{}").map_err(|e| Error::io("write", part, e))
        })
        .unwrap();
        assert_eq!(fs::read(folder.join("config.json")).unwrap(), b"{}");
        let left = fs::read_dir(scratch.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut left: Vec<String> = left.collect();
        left.sort();
        assert_eq!(left, ["Llama-3.1.part-1", "Llama-3.2", "Llama-3.2.part-2", "Llama-3.2.part-x", "Llama-3.part-1"]);
    }
}
