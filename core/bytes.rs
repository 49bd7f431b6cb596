//! Shared read-only bytes: a memory-mapped file, a part of the binary, or a vector, and views into them.
//! Weights travel as [`Bytes`] from the checkpoint to the backends, so that a host backend computes straight from the
//! mapped file. This is the one file of this crate that maps memory.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

/// A range of shared bytes; cloning it clones a reference.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<memmap2::Mmap>),
    Vec(Arc<Vec<u8>>),
    Static(&'static [u8]),
}

impl Bytes {
    /// Maps a file; pages are read from disk when they are first touched.
    #[allow(unsafe_code)]
    pub fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        if len == 0 {
            return Ok(Bytes::from(Vec::new()));
        }
        // SAFETY: the map is private and read-only. A file that another process truncates while it is mapped would
        // fault; model files are written once and replaced by rename (as every tool of this ecosystem does), which
        // leaves the mapped inode untouched.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        let range = 0..map.len();
        Ok(Bytes { owner: Owner::Mapped(Arc::new(map)), range })
    }

    /// A part of these bytes, without a copy.
    ///
    /// # Panics
    /// Where `range` reaches past the end: callers check lengths that come from a file before.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "slice {range:?} of {} bytes", self.len());
        let start = self.range.start;
        Bytes { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl Bytes {
    /// Says that these bytes are not needed soon. The pages of a mapped file leave this process, and are read again
    /// where they are needed after all; anything else stays.
    #[allow(unsafe_code)]
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Mapped(map) = &self.owner {
            let (offset, len) = (self.range.start, self.range.len());
            // SAFETY: dropping pages of a private read-only map of a file loses nothing: the next access maps the same
            // contents of the file again, so that no reference into the map ever sees other bytes.
            let released = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
            if let Err(e) = released {
                log::debug!("the system keeps {len} bytes of a mapped file: {e}");
            }
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Mapped(map) => map,
            Owner::Vec(vec) => vec,
            Owner::Static(slice) => slice,
        };
        &all[self.range.clone()]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(vec: Vec<u8>) -> Self {
        let range = 0..vec.len();
        Bytes { owner: Owner::Vec(Arc::new(vec)), range }
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(slice: &'static [u8]) -> Self {
        Bytes { owner: Owner::Static(slice), range: 0..slice.len() }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({} bytes)", self.len())
    }
}
