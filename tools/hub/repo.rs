//! What names a model on the hub: `org/name`, or `org/name@revision`. Names become parts of paths and of URLs, so that
//! whatever could leave either is no name.

use std::fmt;

/// The branch where no revision is asked for.
const MAIN: &str = "main";

/// A model on the hub, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// `org/name`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Repo {
    /// Reads an id; None where a text is none. The rules are those of huggingface_hub, but that an id has an
    /// organization always: a bare name is a folder.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (org, name) = id.split_once('/')?;
        let is_id = is_id_part(org) && is_id_part(name) && is_revision(revision);
        is_id.then(|| Repo { id: id.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            MAIN => f.write_str(&self.id),
            revision => write!(f, "{}@{revision}", self.id),
        }
    }
}

fn is_id_part(part: &str) -> bool {
    // `--` stands for the slash in the cache's folder names.
    is_plain(part) && part.len() <= 96 && !part.starts_with('-') && !part.ends_with(['-', '.']) && !part.contains("--")
}

fn is_revision(revision: &str) -> bool {
    revision.len() <= 200 && revision.split('/').all(is_plain)
}

/// True for a commit's full hash, which is what snapshots are named by.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// True for a name that stays in its folder on every system, and needs no escapes in a URL.
pub fn is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=255).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.') && !name.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_with_their_revisions() {
        for (text, id, revision) in [
            ("RedHatAI/Llama-3.2-1B-Instruct-FP8", "RedHatAI/Llama-3.2-1B-Instruct-FP8", "main"),
            ("a/b_c@v1.0", "a/b_c", "v1.0"),
            ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ] {
            let repo = Repo::parse(text).unwrap();
            assert_eq!((repo.id.as_str(), repo.revision.as_str()), (id, revision));
            assert_eq!(repo.to_string(), text);
        }
        assert_eq!(Repo::parse("a/b@main").unwrap().to_string(), "a/b");
    }

    #[test]
    fn what_could_leave_a_folder_or_a_url_is_no_id() {
        for text in [
            "",
            "a",
            "/",
            "a/",
            "/a",
            "/a/b",
            "./a",
            "../a",
            "a/..",
            "a/.b",
            "a/b/c",
            "a//b",
            "~/a",
            "a\\b/c",
            "a/b c",
            "a/b?c",
            "a/b#c",
            "a/b%2e",
            "a/-b",
            "a/b.",
            "a/b..c",
            "a--b/c",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/x",
            "a/b@x y",
            "a/b@x@y",
            "ä/b",
            "C:/a",
            "a/b\n",
        ] {
            assert_eq!(Repo::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_commit_is_forty_hex_digits() {
        assert!(is_commit(&"0a".repeat(20)));
        assert!(!is_commit(&"0A".repeat(20)) && !is_commit("0a") && !is_commit(&"0g".repeat(20)));
    }
}
