//! A hub of the tests' own: Hugging Face's URLs and headers over a model's files, with a second port in the place of
//! the host that large files are redirected to. It does what it is told to do wrong, and notes what it was asked.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::support::checkpoints::demo;

/// The model that is served.
pub const ID: &str = "tests/Demo-FP8";

/// Its only commit.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of this size are kept as large ones are: behind a redirect, known by their SHA-256.
const LARGE: usize = 100_000;

/// What the hub holds, and what it does wrong.
pub struct Site {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files that the list names and others that it does not name, in the place of all.
    pub listed: Option<Vec<String>>,
    /// Answers all but the list of files with this status and code.
    pub refuses: Option<(u16, &'static str)>,
    /// Breaks off a file's bytes at this many, as often as it says.
    pub breaks: Option<(&'static str, usize, usize)>,
    /// Sends a file's bytes with one changed.
    pub corrupts: Option<&'static str>,
    /// Sends files whole, whatever part is asked for.
    pub ignores_ranges: bool,
    /// The etag of every file, in the place of its own.
    pub etag: Option<&'static str>,
}

impl Site {
    /// A hub that holds the demo model.
    pub fn demo() -> Self {
        let files = fs::read_dir(demo()).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
        });
        Site {
            files: files.collect(),
            listed: None,
            refuses: None,
            breaks: None,
            corrupts: None,
            ignores_ranges: false,
            etag: None,
        }
    }

    /// The demo model with an index in the place of its weights, that lists these as its only shard.
    pub fn sharded(shard: &str) -> Self {
        let mut site = Site::demo();
        let weights = site.files.remove("model.safetensors").unwrap();
        let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        let tensors: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&weights[8..8 + header]).unwrap();
        let names = tensors.keys().filter(|name| *name != "__metadata__");
        let map: BTreeMap<_, _> = names.map(|name| (name, shard)).collect();
        site.files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into());
        site.files.insert(shard.to_owned(), weights);
        site
    }

    /// Starts to serve.
    pub fn serve(self) -> Server {
        let log = Arc::default();
        let [hub, files] = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [hub_url, files_url] = [&hub, &files].map(|l| format!("http://{}", l.local_addr().unwrap()));
        let shared = Arc::new(Shared { site: Mutex::new(self), files_url, log: Arc::clone(&log) });
        for (listener, is_hub) in [(hub, true), (files, false)] {
            let shared = Arc::clone(&shared);
            // The threads end with the process of the tests.
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || shared.answer(stream.unwrap(), is_hub));
                }
            });
        }
        Server { endpoint: hub_url, log, shared }
    }
}

/// A request that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub is_hub: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

/// A hub that runs.
pub struct Server {
    pub endpoint: String,
    log: Arc<Mutex<Vec<Request>>>,
    shared: Arc<Shared>,
}

impl Server {
    /// The requests since this was last asked.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Changes what it does.
    pub fn change(&self, change: impl FnOnce(&mut Site)) {
        change(&mut self.shared.site.lock().unwrap());
    }
}

/// The etag of a file: as the hub names it, and as the cache names its blob.
pub fn etag(bytes: &[u8]) -> String {
    let digest = match bytes.len() {
        LARGE.. => Sha256::digest(bytes).to_vec(),
        len => Sha1::new_with_prefix(format!("blob {len}\0")).chain_update(bytes).finalize().to_vec(),
    };
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Shared {
    site: Mutex<Site>,
    files_url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Shared {
    fn answer(&self, stream: TcpStream, is_hub: bool) {
        let Some(request) = read(&stream, is_hub) else { return };
        self.log.lock().unwrap().push(request.clone());
        let path = request.path.split('?').next().unwrap();
        let file = path.strip_prefix(&format!("/{ID}/resolve/{COMMIT}/")).or_else(|| path.strip_prefix("/large/"));
        let mut site = self.site.lock().unwrap();
        if [format!("/api/models/{ID}/revision/main"), format!("/api/models/{ID}/revision/{COMMIT}")]
            .contains(&path.to_owned())
        {
            let names = site.listed.clone().unwrap_or_else(|| site.files.keys().cloned().collect());
            let names: Vec<_> = names.iter().map(|name| json!({"rfilename": name})).collect();
            let body = json!({"id": ID, "sha": COMMIT, "siblings": names}).to_string();
            return send(&stream, &request, 200, &[], body.as_bytes());
        }
        if path.starts_with(&format!("/api/models/{ID}/revision/")) {
            return send(&stream, &request, 404, &[("X-Error-Code", "RevisionNotFound")], b"");
        }
        let Some((name, mut bytes)) = file.and_then(|file| Some((file, site.files.get(file)?.clone()))) else {
            // The hub does not tell strangers whether a private model exists.
            return send(&stream, &request, 401, &[("X-Error-Code", "RepoNotFound")], b"");
        };
        if let Some((status, code)) = site.refuses {
            return send(&stream, &request, status, &[("X-Error-Code", code)], b"");
        }
        let tag = format!("\"{}\"", site.etag.map_or_else(|| etag(&bytes), str::to_owned));
        let size = bytes.len().to_string();
        if is_hub && bytes.len() >= LARGE {
            let location = format!("{}/large/{name}?signature=x", self.files_url);
            let headers = [("Location", &*location), ("X-Linked-Etag", &*tag), ("X-Linked-Size", &*size)];
            return send(&stream, &request, 302, &headers, b"Found");
        }
        if site.corrupts == Some(name) {
            bytes[10] ^= 1;
        }
        let range = request.range.as_deref().filter(|_| !site.ignores_ranges);
        let from = range.map_or(0, |range| range["bytes=".len()..range.len() - 1].parse().unwrap());
        let content_range = format!("bytes {from}-{}/{size}", bytes.len() - 1);
        let headers = [("ETag", &*tag), ("Content-Range", &*content_range)];
        let (status, headers) = if range.is_some() { (206, &headers[..]) } else { (200, &headers[..1]) };
        let mut until = bytes.len();
        if let Some((file, at, times @ 1..)) = &mut site.breaks
            && *file == name
            && request.method == "GET"
        {
            *times -= 1;
            until = until.min(*at);
        }
        drop(site);
        let declared = bytes.len() - from;
        send_part(&stream, &request, status, headers, declared, &bytes[from..until.max(from)]);
    }
}

fn read(stream: &TcpStream, is_hub: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let line = lines.next()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut request = Request { is_hub, method, path, range: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.to_owned()),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(request)
}

fn send(stream: &TcpStream, request: &Request, status: u16, headers: &[(&str, &str)], body: &[u8]) {
    send_part(stream, request, status, headers, body.len(), body);
}

fn send_part(
    mut stream: &TcpStream,
    request: &Request,
    status: u16,
    headers: &[(&str, &str)],
    length: usize,
    body: &[u8],
) {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("HTTP/1.1 {status} x\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    let body = if request.method == "HEAD" { &[][..] } else { body };
    // A client that has read enough hangs up.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}
