//! A file that keeps the results of a long run as they come, a JSON line each, so that a run that was broken off goes on
//! where it was. Its first line says of what the results are; a file of something else is refused.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use quaver_core::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A journal of results; none where no file is given.
pub struct Journal<T> {
    /// What earlier runs brought, in order.
    pub earlier: Vec<T>,
    file: Option<(PathBuf, File)>,
    results: PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> Journal<T> {
    /// Opens a journal of what `head` says, or begins one.
    pub fn open(path: Option<&Path>, head: &Value) -> Result<Self> {
        let Some(path) = path else { return Ok(Journal { earlier: Vec::new(), file: None, results: PhantomData }) };
        let fail = |e| Error::io("write", path, e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| Error::io("read", path, e))?;
        let mut lines = text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let (mut earlier, mut end) = (Vec::new(), 0);
        match lines.next() {
            Some(line) if serde_json::from_slice(line).ok().as_ref() == Some(head) => {
                end += line.len();
                // A line that was broken off in the middle is done again.
                for line in lines {
                    let Ok(result) = serde_json::from_slice(line) else { break };
                    earlier.push(result);
                    end += line.len();
                }
            }
            None if text.is_empty() => {}
            _ => {
                let why = "is of another model, text or arithmetic; give another file, or remove it to begin anew";
                return Err(Error::text(path.display().to_string(), why));
            }
        }
        file.set_len(end as u64).and_then(|()| file.seek(std::io::SeekFrom::End(0))).map_err(fail)?;
        let mut journal = Journal { earlier, file: Some((path.to_owned(), file)), results: PhantomData };
        if end == 0 {
            journal.write(head)?;
        }
        Ok(journal)
    }

    /// Keeps a result.
    pub fn push(&mut self, result: &T) -> Result<()> {
        self.write(result)
    }

    fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(value).expect("results are JSON");
        line.push(b'\n');
        file.write_all(&line).map_err(|e| Error::io("write", path.as_path(), e))
    }
}
