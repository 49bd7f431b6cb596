//! Figures of earlier runs: a CSV file that grows by one row a figure, so that a run can be held against the last one of
//! the same model on the same machine.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use quaver_core::{Error, Result};

use super::report::{Figure, Phase, Subject};

/// The file's first line. What lies between `commit` and `unit` says whether two rows are of the same thing.
const HEADER: [&str; 12] = [
    "time",
    "commit",
    "machine",
    "backend",
    "device",
    "variant",
    "model",
    "case",
    "figure",
    "unit",
    "value",
    "share_of_floor",
];
const KEY: std::ops::Range<usize> = 2..10;
const VALUE: usize = 10;

/// The longest file that is read: some 300,000 figures.
const MAX_BYTES: u64 = 64 << 20;

/// See the module.
pub struct History {
    path: PathBuf,
    /// The latest value of each thing.
    latest: HashMap<Vec<String>, f64>,
}

impl History {
    /// Reads a file, or makes it; so that one that cannot be used is refused before anything is measured.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = open(path)?;
        file.lock_shared().map_err(|e| Error::io("read", path, e))?;
        let text = read(path, &mut file)?;
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let mut latest = HashMap::new();
        for (i, record) in reader.records().enumerate() {
            let damaged = |why: String| refuse(path, format!("row {} {why}; mend it or give another file", i + 2));
            let record = record.map_err(|e| damaged(format!("is damaged ({e})")))?;
            let value = record[VALUE].parse().map_err(|_| damaged(format!("has the value {:?}", &record[VALUE])))?;
            latest.insert(KEY.map(|i| record[i].to_owned()).collect(), value);
        }
        Ok(History { path: path.to_owned(), latest })
    }

    /// A figure over its value in the latest run before this one; None where there was none, and for memory that is as
    /// much as the cases of a run need.
    pub fn to_last(&self, subject: &Subject, figure: &Figure) -> Option<f64> {
        if matches!(figure.name, "kv_cache" | "peak_memory" | "device_memory") {
            return None;
        }
        let key: Vec<String> = row(subject, figure, "")[KEY].to_vec();
        self.latest.get(&key).map(|last| figure.value / last)
    }

    /// Appends figures, all in one write.
    pub fn append(&self, subject: &Subject, figures: &[Figure]) -> Result<()> {
        let failed = |e: std::io::Error| Error::io("write", &self.path, e);
        let mut file = open(&self.path)?;
        file.lock().map_err(failed)?;
        let text = read(&self.path, &mut file)?;
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut rows = csv::Writer::from_writer(Vec::new());
        let mut push = |row: &[String]| rows.write_record(row).expect("rows of one width go into memory");
        if text.is_empty() {
            push(&HEADER.map(str::to_owned));
        }
        figures.iter().for_each(|figure| push(&row(subject, figure, &time)));
        let mut bytes = rows.into_inner().expect("memory takes what is flushed");
        if !text.is_empty() && !text.ends_with('\n') {
            bytes.insert(0, b'\n');
        }
        file.write_all(&bytes).map_err(failed)
    }
}

fn open(path: &Path) -> Result<File> {
    // A pipe would be waited for.
    if path.metadata().is_ok_and(|metadata| !metadata.is_file() || metadata.len() > MAX_BYTES) {
        let why = format!("is no file of at most {} MiB; give another one", MAX_BYTES >> 20);
        return Err(refuse(path, why));
    }
    OpenOptions::new().read(true).append(true).create(true).open(path).map_err(|e| Error::io("open", path, e))
}

/// The text of a file that is empty or has the right header.
fn read(path: &Path, file: &mut File) -> Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|e| Error::io("read", path, e))?;
    let header = text.lines().next().unwrap_or_default();
    if !text.is_empty() && header != HEADER.join(",") {
        return Err(refuse(path, format!("is no file of quaver bench: its header is not {}", HEADER.join(","))));
    }
    Ok(text)
}

fn refuse(path: &Path, why: String) -> Error {
    Error::text(path.display().to_string(), why)
}

fn row(subject: &Subject, figure: &Figure, time: &str) -> [String; HEADER.len()] {
    let device = &subject.device;
    [
        time.to_owned(),
        crate::COMMIT.to_owned(),
        subject.machine.clone(),
        device.backend.to_owned(),
        device.name.clone(),
        device.variant.unwrap_or(&device.driver).to_owned(),
        subject.model.clone(),
        figure.case.clone(),
        figure.name.to_owned(),
        figure.unit.to_owned(),
        figure.value.to_string(),
        figure.phase.as_ref().map(|phase: &Phase| phase.share_of_floor().to_string()).unwrap_or_default(),
    ]
}
