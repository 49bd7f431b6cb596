//! Brings what a model needs, and no more, from the hub into the cache: the small files first, so that a model that
//! could not be run is refused before its weights are fetched. The weights come last, so that a snapshot that has them
//! has all.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use quaver_core::checkpoint::{Checkpoint, Files};
use quaver_core::{Error, Result};

use super::cache::{Cached, INDEX, SINGLE, SMALL, Snapshot, make_parent};
use super::client::{Client, FileInfo};
use super::failure::Failure;
use super::part::{Finish, Part};
use super::repo::{Repo, is_plain};
use crate::model::is_terms;

/// Seconds before the next attempt, after so many that brought no bytes.
const PAUSES_S: [u64; 5] = [0, 1, 2, 4, 8];

/// One model on its way from the hub to the cache.
pub struct Download<'a> {
    pub repo: &'a Repo,
    /// The repository's revision, or the commit that the cache has begun with.
    pub revision: &'a str,
    pub client: &'a Client,
    pub cached: &'a Cached,
}

impl Download<'_> {
    /// Brings what is missing at the revision.
    pub fn run(&self) -> Result<Snapshot, Failure> {
        let listing = self.client.listing(self.repo, self.revision)?;
        let holds = |file: &str| listing.files.iter().any(|name| name == file);
        let weights = [SINGLE, INDEX].into_iter().find(|file| holds(file));
        let Some(weights) = weights.filter(|_| holds("config.json")) else {
            let why = format!("holds no config.json with {SINGLE} or {INDEX}; take a repository of safetensors");
            return Err(Error::hub(self.repo.to_string(), why).into());
        };
        let snapshot = self.cached.snapshot(&listing.commit);
        let file = |name: &str| self.file(&listing.commit, &snapshot, name);
        for name in SMALL {
            if holds(name) { file(name)? } else { snapshot.set_absent(name) }
        }
        listing.files.iter().filter(|name| is_plain(name) && is_terms(name)).try_for_each(|name| file(name))?;
        Checkpoint::check(&Files::dir(snapshot.folder())?)?;
        file(weights)?;
        if weights == INDEX {
            let shards = snapshot.shards()?;
            if let Some(shard) = shards.iter().find(|shard| !holds(shard)) {
                let why = format!("its index lists {shard}, which it does not hold; take another revision");
                return Err(Error::hub(self.repo.to_string(), why).into());
            }
            shards.iter().try_for_each(|shard| file(shard))?;
        }
        self.cached.set_commit(self.revision, &listing.commit)?;
        Ok(snapshot)
    }

    /// Brings one file, unless it is there.
    fn file(&self, commit: &str, snapshot: &Snapshot, name: &str) -> Result<(), Failure> {
        if snapshot.has(name) {
            return Ok(());
        }
        let info = self.client.info(self.repo, commit, name)?;
        let blob = self.cached.blob(&info.etag);
        let _lock = self.cached.lock(&info.etag)?;
        // Whoever had the lock may have brought it, and read it already: a link that holds is never replaced.
        if snapshot.has(name) {
            return Ok(());
        }
        if blob.metadata().is_ok_and(|metadata| metadata.len() == info.size) {
            log::debug!("{name}: is in the cache");
        } else {
            self.blob(commit, name, &info, &blob)?;
            log::info!("{name}: downloaded {} bytes", info.size);
        }
        Ok(snapshot.link(name, &blob)?)
    }

    /// Brings one blob, in as many attempts as it takes.
    fn blob(&self, commit: &str, name: &str, info: &FileInfo, blob: &Path) -> Result<(), Failure> {
        make_parent(blob)?;
        let write_failed = |error| self.write_failed(error, name, info, blob);
        let mut part = Part::open(blob, &info.etag, info.size).map_err(write_failed)?;
        let bar = bar(name, info.size);
        let mut pauses = PAUSES_S.iter();
        while !part.is_whole() {
            let before = part.len();
            bar.set_position(before);
            bar.reset_eta();
            let attempt = self.attempt(commit, name, info, &mut part, &bar);
            let Err(Failure::Unavailable(why)) = attempt else {
                attempt?;
                continue;
            };
            if part.len() > before {
                pauses = PAUSES_S.iter();
            }
            let Some(pause) = pauses.next() else {
                let why = format!("{name}: {why}; run again: the download goes on where it stopped");
                return Err(Error::hub(self.repo.to_string(), why).into());
            };
            log::info!("{name}: {why}; going on at byte {}", part.len());
            sleep(Duration::from_secs(*pause));
        }
        bar.finish_and_clear();
        match part.finish(blob, &info.etag).map_err(write_failed)? {
            Finish::Kept => Ok(()),
            Finish::Dropped => {
                let why = "came with other bytes than its checksum says, which are not kept; run again to download it";
                Err(Error::hub(self.repo.to_string(), format!("{name} {why}")).into())
            }
        }
    }

    /// One request for what a part lacks.
    fn attempt(
        &self,
        commit: &str,
        name: &str,
        info: &FileInfo,
        part: &mut Part,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        let write_failed = |error| self.write_failed(error, name, info, &self.cached.blob(&info.etag));
        let mut content = self.client.content(self.repo, commit, name, part.len())?;
        if content.start != part.len() {
            part.restart(&info.etag).map_err(write_failed)?;
        }
        let mut buffer = vec![0; 1 << 20];
        while !part.is_whole() {
            let broken = |why: String| Failure::Unavailable(format!("the connection broke ({why})"));
            match content.bytes.read(&mut buffer) {
                Ok(0) => return Err(broken(format!("{} of {} bytes came", part.len(), info.size))),
                Ok(n) => part.push(&buffer[..n]).map_err(write_failed)?,
                Err(error) => return Err(broken(error.to_string())),
            }
            bar.set_position(part.len());
        }
        Ok(())
    }

    fn write_failed(&self, error: std::io::Error, name: &str, info: &FileInfo, blob: &Path) -> Failure {
        let folder = blob.parent().unwrap_or(blob);
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let (size, folder) = (info.size, folder.display());
                let why = format!(
                    "no space is left for {name}, which has {size} bytes, in {folder}; free some or set HF_HUB_CACHE, \
                     and run again: the download goes on where it stopped"
                );
                Error::hub(self.repo.to_string(), why).into()
            }
            _ => Error::io("write", folder, error).into(),
        }
    }
}

/// A bar on stderr, where that is a terminal.
fn bar(name: &str, size: u64) -> ProgressBar {
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).expect("the template is sound");
    ProgressBar::new(size).with_style(style).with_message(name.to_owned())
}
