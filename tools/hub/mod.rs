//! Models from the Hugging Face hub: an id becomes a folder of the cache that Python's huggingface_hub shares. What is
//! whole in the cache is used without a request; so a run does not depend on the network, nor a model change under one.
//! `crate::model` is the caller.

mod cache;
mod client;
mod download;
mod etag;
mod failure;
mod part;
mod repo;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use quaver_core::{Error, Result};

use self::cache::Cached;
use self::client::Client;
use self::download::Download;

pub use self::repo::Repo;

/// The public hub.
const ENDPOINT: &str = "https://huggingface.co";

/// Where models come from and go to.
pub struct Hub {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// The hub that the environment names, in Hugging Face's variables
    /// (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).
    pub fn from_env(offline: bool) -> Result<Self> {
        let home = match (folder("HF_HOME"), folder("XDG_CACHE_HOME"), env::home_dir()) {
            (Some(home), _, _) => home,
            (None, Some(cache), _) => cache.join("huggingface"),
            (None, None, Some(user)) => user.join(".cache/huggingface"),
            (None, None, None) => return Err(Error::hub("HF_HOME", "there is no home folder; set it to one")),
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::hub("HF_ENDPOINT", format!("is {endpoint}; a URL is expected, such as {ENDPOINT}")));
        }
        Ok(Hub {
            cache: folder("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint,
            token: token(&home)?,
            offline: offline || text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
        })
    }

    /// The folder that holds a model; downloads what the cache lacks.
    pub fn folder(&self, repo: &Repo) -> Result<PathBuf> {
        let cached = Cached::new(&self.cache, repo);
        let begun = cached.commit(&repo.revision).map(|commit| (cached.snapshot(&commit), commit));
        let begun = begun.filter(|(snapshot, _)| snapshot.can_be_loaded());
        if let Some((snapshot, _)) = &begun
            && (self.offline || snapshot.is_complete())
        {
            log::info!("{repo}: from the cache, {}", snapshot.folder().display());
            return Ok(snapshot.folder().to_owned());
        }
        if self.offline {
            let cache = self.cache.display();
            let why = format!(
                "is no folder here and not whole in {cache}; run once without --offline or HF_HUB_OFFLINE to download it"
            );
            return Err(Error::hub(repo.to_string(), why));
        }
        let client = Client::new(&self.endpoint, self.token.as_deref());
        // What the cache has begun with is completed, not replaced by what the revision is now.
        let revision = begun.as_ref().map_or(&repo.revision, |(_, commit)| commit);
        let download = Download { repo, revision, client: &client, cached: &cached }.run();
        match (download, &begun) {
            (Ok(snapshot), _) => Ok(snapshot.folder().to_owned()),
            (Err(failure), Some((snapshot, _))) if let Some(why) = failure.brief() => {
                log::warn!("{repo}: {why}; taking what the cache has");
                Ok(snapshot.folder().to_owned())
            }
            (Err(failure), _) => Err(failure.into_error(repo, &self.endpoint, self.token.is_some())),
        }
    }
}

/// HF_TOKEN, or what `hf auth login` wrote.
fn token(home: &Path) -> Result<Option<String>> {
    let file = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
    let token = text("HF_TOKEN").or_else(|| fs::read_to_string(&file).ok());
    let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
    match &token {
        Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(Error::hub("HF_TOKEN", "holds characters that no token has; copy it again"))
        }
        _ => Ok(token),
    }
}

/// A variable that is set to something.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// A variable's path; a leading `~` is the home folder, as in Python.
fn folder(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env::var_os(name).filter(|value| !value.is_empty())?);
    match (path.strip_prefix("~"), env::home_dir()) {
        (Ok(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(path),
    }
}

/// What huggingface_hub takes for yes.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}
