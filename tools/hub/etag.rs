//! What a file on the hub is known by: the SHA-256 of a large file, git's SHA-1 of any other. It is the file's name in
//! the cache, and what the bytes are checked against.

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::repo::is_plain;

/// The name of a file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Etag(String);

impl Etag {
    /// Reads a header's value, with or without quotes. What could not be a file's name is none.
    pub fn parse(header: &str) -> Option<Self> {
        let tag = header.trim().trim_start_matches("W/").trim_matches('"');
        is_plain(tag).then(|| Etag(tag.to_owned()))
    }

    /// The tag alone.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What checks the bytes of a file of `size` bytes.
    pub fn check(&self, size: u64) -> Check {
        let is_hex = self.0.bytes().all(|b| b.is_ascii_hexdigit());
        match self.0.len() {
            64 if is_hex => Check::Sha256(Sha256::new()),
            // https://git-scm.com/book/en/v2/Git-Internals-Git-Objects: a blob's hash is over a header, too.
            40 if is_hex => Check::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
            _ => Check::SizeAlone,
        }
    }
}

/// A digest of bytes as they come.
#[derive(Clone)]
pub enum Check {
    /// Of a large file.
    Sha256(Sha256),
    /// Of a file that git keeps itself.
    Git(Sha1),
    /// A mirror's own tag says nothing about the bytes.
    SizeAlone,
}

impl Check {
    /// Takes further bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Check::Sha256(sha) => sha.update(bytes),
            Check::Git(sha) => sha.update(bytes),
            Check::SizeAlone => {}
        }
    }

    /// True where the bytes are those that the tag names.
    pub fn agrees(self, etag: &Etag) -> bool {
        match self {
            Check::Sha256(sha) => hex(&sha.finalize()).eq_ignore_ascii_case(&etag.0),
            Check::Git(sha) => hex(&sha.finalize()).eq_ignore_ascii_case(&etag.0),
            Check::SizeAlone => true,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agrees(tag: &str, bytes: &[u8]) -> bool {
        let etag = Etag::parse(tag).unwrap();
        let mut check = etag.check(bytes.len() as u64);
        bytes.chunks(2).for_each(|chunk| check.update(chunk));
        check.agrees(&etag)
    }

    #[test]
    fn bytes_are_held_to_their_tag() {
        // sha256sum and git hash-object of "hello\n".
        let sha256 = "\"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03\"";
        let git = "W/\"ce013625030ba8dba906f756967f9e9ca394464a\"";
        for tag in [sha256, git] {
            assert!(agrees(tag, b"hello\n") && !agrees(tag, b"hellO\n") && !agrees(tag, b"hello"));
        }
        assert!(agrees("a-mirrors-own", b"anything"));
    }

    #[test]
    fn a_tag_that_is_no_file_name_is_none() {
        for tag in ["", "\"\"", "../x", "a/b", ".x", "a b", "a\\b"] {
            assert_eq!(Etag::parse(tag), None, "{tag:?}");
        }
    }
}
