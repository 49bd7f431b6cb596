//! The hub's side of HTTP: what a model holds, what a file is, and its bytes. Redirects are followed here, so that the
//! token goes to the hub alone and the hub's headers are seen before a file's host is.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::uri::Uri;
use ureq::http::{Response, header};
use ureq::{Agent, Body};

use super::etag::Etag;
use super::failure::Failure;
use super::repo::{Repo, is_commit};

/// The most hops of one request: a renamed model, the hub's cache of small files, a file's host.
const MAX_HOPS: usize = 8;

/// The longest list of a model's files that is read.
const MAX_LISTING_BYTES: u64 = 32 << 20;

/// The longest that anything but a file's bytes may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to one hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a model holds at a revision.
pub struct Listing {
    /// The revision's commit.
    pub commit: String,
    /// The names of its files.
    pub files: Vec<String>,
}

/// What a file is, before its bytes come.
#[derive(Clone)]
pub struct FileInfo {
    /// The name of its content.
    pub etag: Etag,
    /// Its bytes.
    pub size: u64,
}

/// A file's bytes.
pub struct Content {
    /// Where in the file they begin: where they were asked from, or 0.
    pub start: u64,
    /// The bytes.
    pub bytes: Box<dyn Read>,
}

enum Method {
    Head,
    Get { from: u64 },
}

impl Client {
    /// Connects on the first request.
    pub fn new(endpoint: &str, token: Option<&str>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("quaver/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(30)))
            .build();
        Client { agent: config.into(), endpoint: endpoint.to_owned(), token: token.map(str::to_owned) }
    }

    /// Asks what a model holds at a revision.
    pub fn listing(&self, repo: &Repo, revision: &str) -> Result<Listing, Failure> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!("{}/api/models/{}/revision/{}", self.endpoint, repo.id, revision.replace('/', "%2F"));
        let mut response = self.send(&url, Method::Get { from: 0 }, None)?;
        let body =
            response.body_mut().with_config().limit(MAX_LISTING_BYTES).read_to_vec().map_err(|e| self.lost(&e))?;
        let info: Info = serde_json::from_slice(&body).map_err(|e| self.odd(format_args!("a list of files: {e}")))?;
        if !is_commit(&info.sha) {
            return Err(self.odd("a commit"));
        }
        Ok(Listing { commit: info.sha, files: info.siblings.into_iter().map(|file| file.rfilename).collect() })
    }

    /// Asks what a file is.
    pub fn info(&self, repo: &Repo, commit: &str, file: &str) -> Result<FileInfo, Failure> {
        let response = self.send(&self.file_url(repo, commit, file), Method::Head, Some(file))?;
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        // The linked ones are those of the file; the plain ones, of a redirect, are its own.
        let own = |name| text(name).filter(|_| response.status() == 200);
        let etag = text("x-linked-etag").or_else(|| own("etag")).and_then(Etag::parse);
        let size = text("x-linked-size").or_else(|| own("content-length")).and_then(|size| size.parse().ok());
        match (etag, size) {
            (Some(etag), Some(size)) => Ok(FileInfo { etag, size }),
            _ => Err(self.odd(format_args!("the etag and size of {file}"))),
        }
    }

    /// Asks for the bytes of a file, from one of them on.
    pub fn content(&self, repo: &Repo, commit: &str, file: &str, from: u64) -> Result<Content, Failure> {
        let response = self.send(&self.file_url(repo, commit, file), Method::Get { from }, Some(file))?;
        let start = match response.status().as_u16() {
            206 => {
                let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
                let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
                match start {
                    Some(start) if start == from => start,
                    _ => return Err(self.odd(format_args!("the part of {file} that was asked for"))),
                }
            }
            _ => 0,
        };
        Ok(Content { start, bytes: Box::new(response.into_body().into_with_config().limit(u64::MAX).reader()) })
    }

    fn file_url(&self, repo: &Repo, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, repo.id)
    }

    /// Sends a request and follows redirects: of a HEAD those within the hub, of a GET all.
    fn send(&self, url: &str, method: Method, file: Option<&str>) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        let is_head = matches!(method, Method::Head);
        for _ in 0..MAX_HOPS {
            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::Get { .. } => self.agent.get(&url),
            };
            request = request.header(header::ACCEPT_ENCODING, "identity");
            // A file takes as long as it takes; whatever else comes byte by byte is given up.
            if is_head || file.is_none() {
                request = request.config().timeout_global(Some(PATIENCE)).build();
            }
            if let Method::Get { from: from @ 1.. } = method {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| self.is_mine(&url)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| self.lost(&e))?;
            let status = response.status().as_u16();
            // The query may hold a signature.
            log::debug!("{}: HTTP {status}", url.split('?').next().unwrap_or(&url));
            match status {
                200 | 206 => return Ok(response),
                301 | 302 | 303 | 307 | 308 => {
                    let next = redirect(&url, &response).ok_or_else(|| self.odd("the place that it redirects to"))?;
                    if is_head && (response.headers().contains_key("x-linked-etag") || !self.is_mine(&next)) {
                        return Ok(response);
                    }
                    url = next;
                }
                429 | 500.. => return Err(Failure::Unavailable(format!("{} answers HTTP {status}", origin(&url)))),
                _ => {
                    let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
                    let (code, file) = (code.unwrap_or_default().to_owned(), file.map(str::to_owned));
                    return Err(Failure::Refused { status, code, file });
                }
            }
        }
        Err(self.odd("an end to its redirects"))
    }

    fn is_mine(&self, url: &str) -> bool {
        origin(url) == origin(&self.endpoint)
    }

    fn lost(&self, error: &ureq::Error) -> Failure {
        Failure::Unavailable(format!("{} cannot be reached ({error})", self.endpoint))
    }

    fn odd(&self, lacks: impl std::fmt::Display) -> Failure {
        Failure::Unavailable(format!("{} does not answer with {lacks}", self.endpoint))
    }
}

/// Scheme, host and port; nothing where a text is no URL.
fn origin(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let parts = uri.as_ref().and_then(|uri| uri.scheme_str().zip(uri.authority()));
    parts.map_or_else(String::new, |(scheme, authority)| format!("{scheme}://{authority}").to_ascii_lowercase())
}

/// The URL that a response redirects to.
fn redirect(from: &str, response: &Response<Body>) -> Option<String> {
    let to = response.headers().get(header::LOCATION)?.to_str().ok()?;
    match to {
        _ if to.starts_with("//") => Some(format!("{}:{to}", from.split_once(':')?.0)),
        _ if to.starts_with('/') => Some(origin(from) + to),
        _ if to.starts_with("http://") || to.starts_with("https://") => Some(to.to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirected(from: &str, to: &str) -> Option<String> {
        let response = Response::builder().header("location", to).body(Body::builder().data("")).unwrap();
        redirect(from, &response)
    }

    #[test]
    fn redirects_are_resolved() {
        let from = "https://hub:8/a/b?c";
        for (to, want) in [
            ("/x?y=%2F", Some("https://hub:8/x?y=%2F")),
            ("//cdn/x", Some("https://cdn/x")),
            ("http://cdn/x", Some("http://cdn/x")),
            ("x", None),
            ("file:///etc/passwd", None),
        ] {
            assert_eq!(redirected(from, to).as_deref(), want);
        }
    }

    #[test]
    fn the_token_is_for_one_scheme_host_and_port() {
        let client = Client::new("https://Hub.example/prefix", Some("t"));
        assert!(client.is_mine("https://hub.example/other"));
        for url in [
            "http://hub.example/",
            "https://hub.example:8443/",
            "https://hub.example.evil/",
            "https://evil/hub.example",
            "https://hub.example@evil/",
            "/",
            "",
        ] {
            assert!(!client.is_mine(url), "{url}");
        }
    }
}
