//! Why a request brought nothing, and what a user can do about it.

use quaver_core::Error;

use super::repo::Repo;

/// A request that brought nothing.
#[derive(Debug)]
pub enum Failure {
    /// The server cannot be reached or is not well: what is in the cache may do.
    Unavailable(String),
    /// The server refuses.
    Refused {
        /// The status of HTTP.
        status: u16,
        /// The hub's own word for it, such as `GatedRepo`, where it says one.
        code: String,
        /// The file that was asked for, if not the model as a whole.
        file: Option<String>,
    },
    /// Anything else.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Other(error)
    }
}

impl Failure {
    /// What happened, without a remedy; None where it is no matter of the server.
    pub fn brief(&self) -> Option<String> {
        match self {
            Failure::Unavailable(why) => Some(why.clone()),
            Failure::Refused { status, .. } => Some(format!("the hub answers HTTP {status}")),
            Failure::Other(_) => None,
        }
    }

    /// The error that a user sees.
    pub fn into_error(self, repo: &Repo, endpoint: &str, has_token: bool) -> Error {
        let why = match self {
            Failure::Other(error) => return error,
            Failure::Unavailable(why) => {
                format!("is no folder here and not whole in the cache, and {why}; check the network or HF_ENDPOINT")
            }
            Failure::Refused { status, code, file } => {
                refused(status, &code, file.as_deref(), &Asked { repo, endpoint, has_token })
            }
        };
        Error::hub(repo.to_string(), why)
    }
}

struct Asked<'a> {
    repo: &'a Repo,
    endpoint: &'a str,
    has_token: bool,
}

fn refused(status: u16, code: &str, file: Option<&str>, asked: &Asked) -> String {
    let Asked { repo: Repo { id, revision }, endpoint, has_token } = asked;
    match (status, code, file) {
        (_, "GatedRepo", _) if *has_token => {
            format!("is gated, and the account of the token has no access; ask for it at {endpoint}/{id}")
        }
        (_, "GatedRepo", _) => format!("is gated; accept its licence at {endpoint}/{id} and set HF_TOKEN"),
        (_, "RevisionNotFound", _) => format!("has no revision {revision} at {endpoint}; see {endpoint}/{id}"),
        (404, _, Some(file)) => format!("{endpoint} does not have its {file}; run again, or take another revision"),
        // The hub does not tell a stranger whether a private model exists.
        (401 | 404, _, None) if *has_token => format!(
            "is no folder here, and no model that {endpoint} shows to the token; check the spelling and HF_TOKEN"
        ),
        (401 | 404, _, None) => format!(
            "is no folder here, and no model at {endpoint}; check the spelling, or set HF_TOKEN if it is private"
        ),
        (401 | 403, ..) if *has_token => {
            format!("{endpoint} refuses the token (HTTP {status}); set HF_TOKEN to one that may read {endpoint}/{id}")
        }
        (401 | 403, ..) => {
            format!("{endpoint} refuses access (HTTP {status}); set HF_TOKEN to a token that may read {endpoint}/{id}")
        }
        _ => format!("{endpoint} answers HTTP {status}; try again later, or check HF_ENDPOINT"),
    }
}
