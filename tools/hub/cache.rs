//! Hugging Face's cache on disk, in the layout of its Python library, which shares it:
//! `models--org--name/{refs,blobs,snapshots,.no_exist}` and `.locks/`
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>). A blob is named by its etag and whole; a snapshot
//! is a folder of links to blobs; an empty file in `.no_exist` says that a commit has no such file.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use quaver_core::{Error, Result};
use serde::Deserialize;

use super::etag::Etag;
use super::repo::{Repo, is_commit, is_plain};

/// The weights in one piece.
pub const SINGLE: &str = "model.safetensors";

/// The list of the weights' pieces.
pub const INDEX: &str = "model.safetensors.index.json";

/// What is read of a model beside its weights.
pub const SMALL: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// One model in the cache.
pub struct Cached {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cached {
    /// The place of a model in the cache at `root`, whether it is there or not.
    pub fn new(root: &Path, repo: &Repo) -> Self {
        let name = format!("models--{}", repo.id.replace('/', "--"));
        Cached { folder: root.join(&name), locks: root.join(".locks").join(name) }
    }

    /// The commit that a revision was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        is_commit(commit.trim()).then(|| commit.trim().to_owned())
    }

    /// Notes which commit a revision is.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_parent(&path)?;
        let part = path.with_added_extension(format!("part-{}", std::process::id()));
        fs::write(&part, commit).and_then(|()| fs::rename(&part, &path)).map_err(|e| Error::io("write", &path, e))
    }

    /// The files of a commit.
    pub fn snapshot(&self, commit: &str) -> Snapshot {
        Snapshot {
            folder: self.folder.join("snapshots").join(commit),
            absent: self.folder.join(".no_exist").join(commit),
        }
    }

    /// Where a blob is or comes to be.
    pub fn blob(&self, etag: &Etag) -> PathBuf {
        self.folder.join("blobs").join(etag.as_str())
    }

    /// Keeps other processes from a blob until the lock is dropped; waits for one that is at it.
    pub fn lock(&self, etag: &Etag) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", etag.as_str()));
        make_parent(&path)?;
        let failed = |e| Error::io("lock", &path, e);
        let lock = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                log::warn!("waiting for another process that downloads the same file");
                lock.lock().map_err(failed)?;
            }
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        Ok(lock)
    }
}

/// The files of one commit of a model, as far as they are in the cache.
pub struct Snapshot {
    folder: PathBuf,
    absent: PathBuf,
}

impl Snapshot {
    /// The folder that holds them.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// True where a file is there, whole.
    pub fn has(&self, file: &str) -> bool {
        self.folder.join(file).is_file()
    }

    /// True where there is what a model cannot do without.
    pub fn can_be_loaded(&self) -> bool {
        let has_shards = || self.shards().is_ok_and(|shards| shards.iter().all(|shard| self.has(shard)));
        self.has("config.json") && (self.has(SINGLE) || has_shards())
    }

    /// True where a request could bring nothing more: each file is there, or known not to exist.
    pub fn is_complete(&self) -> bool {
        let is_settled = |file| self.has(file) || self.absent.join(file).exists();
        self.can_be_loaded() && SMALL.into_iter().all(is_settled)
    }

    /// Notes that the commit has no such file. A cache that cannot be written to is asked about again, no more.
    pub fn set_absent(&self, file: &str) {
        let path = self.absent.join(file);
        if !path.exists()
            && let Err(error) =
                make_parent(&path).and_then(|()| File::create(&path).map_err(|e| Error::io("write", path, e)))
        {
            log::debug!("{error}");
        }
    }

    /// Puts a blob in place as a file.
    pub fn link(&self, file: &str, blob: &Path) -> Result<()> {
        let path = self.folder.join(file);
        make_parent(&path)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io("replace", &path, e)),
            _ => {}
        }
        link(blob, &path).map_err(|e| Error::io("link", &path, e))
    }

    /// The files that the index lists.
    pub fn shards(&self) -> Result<BTreeSet<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: serde_json::Map<String, serde_json::Value>,
        }
        let path = self.folder.join(INDEX);
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let damaged = |why: String| Error::checkpoint(INDEX, format!("{why}; tell those who published the model"));
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|e| damaged(format!("is no index of shards: {e}")))?;
        let shard = |shard: &serde_json::Value| match shard.as_str() {
            Some(name) if is_plain(name) => Ok(name.to_owned()),
            _ => Err(damaged(format!("lists {shard:.100}, which is no plain file name"))),
        };
        index.weight_map.values().map(shard).collect()
    }
}

/// Makes the folders above a file.
pub fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().expect("files of the cache lie in folders of it");
    fs::create_dir_all(parent).map_err(|e| Error::io("make", parent, e))
}

/// A relative link, so that the cache can be moved.
#[cfg(unix)]
fn link(blob: &Path, path: &Path) -> io::Result<()> {
    let blob = blob.file_name().expect("a blob has a name");
    std::os::unix::fs::symlink(Path::new("../../blobs").join(blob), path)
}

/// A hard link: symbolic ones take a privilege on Windows.
#[cfg(not(unix))]
fn link(blob: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(blob, path)
}
