//! Where a model's files are: a folder, or a part of the binary. Everything else of the checkpoint asks for files by
//! their plain names, so that no name out of a file can reach another folder.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::bytes::Bytes;
use crate::error::{Error, Result};

use super::json;

/// The files of one model; cloning it copies no file.
///
/// ```no_run
/// # fn main() -> quaver_core::Result<()> {
/// use quaver_core::checkpoint::Files;
///
/// let files = Files::dir("Llama-3.2-1B-Instruct-FP8")?;
/// let tokenizer = files.require("tokenizer.json")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Files {
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Dir { path: PathBuf, name: String },
    Embedded { name: &'static str, files: &'static [(&'static str, &'static [u8])] },
}

impl Files {
    /// The files of a folder, which must hold a `config.json`.
    pub fn dir(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let metadata = std::fs::metadata(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                let why = "is not there; give the folder that holds the model's config.json";
                Error::checkpoint(path.display().to_string(), why)
            }
            _ => Error::io("read", &path, e),
        })?;
        if !metadata.is_dir() {
            let why = "is not a folder; give the folder that holds the model's config.json";
            return Err(Error::checkpoint(path.display().to_string(), why));
        }
        if !path.join("config.json").exists() {
            let why = "holds no config.json; give the folder of a Hugging Face checkpoint";
            return Err(Error::checkpoint(path.display().to_string(), why));
        }
        let name = path.display().to_string();
        Ok(Files { place: Place::Dir { path, name } })
    }

    /// The same files under another name than their folder's: a user knows a model of the cache by its id.
    pub fn named(mut self, id: impl Into<String>) -> Self {
        if let Place::Dir { name, .. } = &mut self.place {
            *name = id.into();
        }
        self
    }

    /// Files that are a part of the binary: names and contents.
    pub fn embedded(name: &'static str, files: &'static [(&'static str, &'static [u8])]) -> Self {
        Files { place: Place::Embedded { name, files } }
    }

    /// The folder as it was given, unless it was named; or the name of what is embedded.
    pub fn name(&self) -> String {
        match &self.place {
            Place::Dir { name, .. } => name.clone(),
            Place::Embedded { name, .. } => (*name).to_owned(),
        }
    }

    /// The folder, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Dir { path, .. } => Some(path),
            Place::Embedded { .. } => None,
        }
    }

    /// The plain names that stand beside `config.json`, in order.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match &self.place {
            Place::Embedded { files, .. } => files.iter().map(|(name, _)| (*name).to_owned()).collect(),
            Place::Dir { path, .. } => {
                let entries = std::fs::read_dir(path).map_err(|e| Error::io("read", path, e))?;
                let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string()));
                let names = names.collect::<Result<Vec<_>, _>>().map_err(|e| Error::io("read", path, e))?;
                // What is no text is no name that anybody asks for.
                names.into_iter().flatten().filter(|name| is_plain(name)).collect()
            }
        };
        names.sort();
        Ok(names)
    }

    /// A file, mapped; `None` where there is none of that name. Names with path separators are refused.
    pub fn get(&self, file: &str) -> Result<Option<Bytes>> {
        if !is_plain(file) {
            let why = "is not a plain file name; a model's files lie side by side in its folder";
            return Err(Error::checkpoint(json::clipped(file), why));
        }
        match &self.place {
            Place::Embedded { files, .. } => {
                Ok(files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| Bytes::from(*bytes)))
            }
            Place::Dir { path: dir, .. } => {
                let path = dir.join(file);
                let metadata = match std::fs::metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(Error::io("read", path, e)),
                };
                // Opening a pipe would wait for a writer for ever.
                if !metadata.is_file() {
                    return Err(Error::checkpoint(path.display().to_string(), "is not a file; download it again"));
                }
                Bytes::map(&path).map(Some)
            }
        }
    }

    /// A file that the model cannot do without.
    pub fn require(&self, file: &str) -> Result<Bytes> {
        self.get(file)?
            .ok_or_else(|| Error::checkpoint(self.name(), format!("holds no {file}; download the whole model")))
    }

    /// A JSON file; `None` where there is none of that name.
    pub(crate) fn json(&self, file: &str) -> Result<Option<Value>> {
        self.get(file)?.map(|bytes| json::parse(file, &bytes)).transpose()
    }
}

/// True for a name that stays in its folder on every system.
fn is_plain(file: &str) -> bool {
    !matches!(file, "" | "." | "..") && !file.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_files_and_none_for_others() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let files = Files::dir(dir.path()).unwrap();
        assert_eq!(&*files.require("config.json").unwrap(), b"{}");
        assert!(files.get("tokenizer.json").unwrap().is_none());
        assert_eq!(files.name(), dir.path().display().to_string());
        assert_eq!(
            files.require("tokenizer.json").unwrap_err().to_string(),
            format!("{}: holds no tokenizer.json; download the whole model", dir.path().display())
        );
        let files = files.named("org/name");
        assert_eq!((files.name().as_str(), files.path()), ("org/name", Some(dir.path())));
    }

    #[test]
    fn embedded_files_are_found_by_name() {
        let files = Files::embedded("demo", &[("config.json", b"{}"), ("a", b"1")]);
        assert_eq!(files.name(), "demo");
        assert_eq!(&*files.require("a").unwrap(), b"1");
        assert_eq!(files.require("b").unwrap_err().to_string(), "demo: holds no b; download the whole model");
    }

    #[test]
    fn what_is_no_model_folder_is_refused_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &Path| Files::dir(path).unwrap_err().to_string();
        assert_eq!(
            message(dir.path()),
            format!("{}: holds no config.json; give the folder of a Hugging Face checkpoint", dir.path().display())
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(
            message(&file),
            format!("{}: is not a folder; give the folder that holds the model's config.json", file.display())
        );
        let absent = dir.path().join("absent");
        assert_eq!(
            message(&absent),
            format!("{}: is not there; give the folder that holds the model's config.json", absent.display())
        );
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        let files = Files::embedded("demo", &[]);
        for name in ["", ".", "..", "../config.json", "/etc/passwd", "a\\b", "c:d", "a\0b"] {
            let message = files.get(name).unwrap_err().to_string();
            assert_eq!(
                message,
                format!(
                    "{}: is not a plain file name; a model's files lie side by side in its folder",
                    name.replace('\0', " ")
                )
            );
        }
    }

    #[test]
    fn a_folder_in_the_place_of_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
        assert_eq!(
            Files::dir(dir.path()).unwrap().get("model.safetensors").unwrap_err().to_string(),
            format!("{}: is not a file; download it again", dir.path().join("model.safetensors").display())
        );
    }
}
