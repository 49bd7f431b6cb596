//! A blob under way: `{etag}.incomplete`, which a later process goes on with. It becomes a blob only if its bytes are
//! those that the etag names. Whoever has one holds the blob's lock.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::etag::{Check, Etag};

/// The bytes so far, and their digest.
pub struct Part {
    path: PathBuf,
    file: File,
    check: Check,
    len: u64,
    size: u64,
}

/// How a part ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Finish {
    /// It is the blob now.
    Kept,
    /// It had other bytes than it should, and is gone.
    Dropped,
}

impl Part {
    /// Opens what an earlier attempt left, or an empty part.
    pub fn open(blob: &Path, etag: &Etag, size: u64) -> io::Result<Self> {
        let mut path = blob.as_os_str().to_owned();
        path.push(".incomplete");
        let path = PathBuf::from(path);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let len = file.metadata()?.len();
        let mut part = Part { path, file, check: etag.check(size), len, size };
        if len > size {
            part.restart(etag)?;
            return Ok(part);
        }
        let mut rest = (&part.file).take(len);
        let mut buffer = vec![0; 1 << 20];
        loop {
            match rest.read(&mut buffer)? {
                0 => return Ok(part),
                n => part.check.update(&buffer[..n]),
            }
        }
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True where all bytes are there.
    pub fn is_whole(&self) -> bool {
        self.len == self.size
    }

    /// Forgets all bytes.
    pub fn restart(&mut self, etag: &Etag) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.check = etag.check(self.size);
        self.len = 0;
        Ok(())
    }

    /// Adds bytes; those beyond the size are not taken.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = usize::try_from(self.size - self.len).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(room)];
        self.file.write_all(bytes)?;
        self.check.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes the blob of it, if it is that.
    pub fn finish(self, blob: &Path, etag: &Etag) -> io::Result<Finish> {
        if !self.is_whole() || !self.check.agrees(etag) {
            fs::remove_file(&self.path)?;
            return Ok(Finish::Dropped);
        }
        // A blob is trusted from here on, also behind a power failure.
        self.file.sync_all()?;
        drop(self.file);
        fs::rename(&self.path, blob)?;
        Ok(Finish::Kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// git hash-object of "hello\n".
    const HELLO: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

    #[test]
    fn a_part_goes_on_where_it_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, etag) = (dir.path().join(HELLO), Etag::parse(HELLO).unwrap());
        Part::open(&blob, &etag, 6).unwrap().push(b"hel").unwrap();
        let mut part = Part::open(&blob, &etag, 6).unwrap();
        assert_eq!((part.len(), part.is_whole()), (3, false));
        part.push(b"lo\nand more").unwrap();
        assert_eq!(part.finish(&blob, &etag).unwrap(), Finish::Kept);
        assert_eq!(fs::read(&blob).unwrap(), b"hello\n");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn wrong_bytes_are_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, etag) = (dir.path().join(HELLO), Etag::parse(HELLO).unwrap());
        for bytes in [&b"hellO\n"[..], b"hel"] {
            let mut part = Part::open(&blob, &etag, 6).unwrap();
            part.push(bytes).unwrap();
            assert_eq!(part.finish(&blob, &etag).unwrap(), Finish::Dropped);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_part_that_is_too_long_starts_over() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, etag) = (dir.path().join(HELLO), Etag::parse(HELLO).unwrap());
        fs::write(dir.path().join(format!("{HELLO}.incomplete")), "hello\nhello\n").unwrap();
        let mut part = Part::open(&blob, &etag, 6).unwrap();
        assert_eq!(part.len(), 0);
        part.push(b"hello\n").unwrap();
        assert_eq!(part.finish(&blob, &etag).unwrap(), Finish::Kept);
    }
}
