//! Connections and what every request passes: the size of its head, its id, its key, a line in the log; and how all of it
//! ends.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use super::Options;
use super::account::{Account, Followed, REQUEST};
use super::app::App;
use super::error::ApiError;
use super::patient::Patient;

/// How long a client may take to send the head of a request, or to begin the next one on the same connection.
const HEAD_TIME: Duration = Duration::from_secs(30);

/// How long a client may take nothing of what is written to it, at most.
const WRITE_TIME: Duration = Duration::from_secs(60);

/// Bytes of the head of a request, and its lines. Beyond twice as much the connection ends without a word of ours.
const HEAD_BYTES: usize = 64 << 10;
const HEAD_LINES: usize = 100;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives each request an id, or keeps its own, and writes a line into the log when it is over.
pub async fn identify(request: Request, next: Next) -> Response {
    let own = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let what = format!("{} {}", request.method(), request.uri().path());
    // The answer to HEAD is over with its head.
    let account = Account::new(what, own.filter(|id| !id.is_empty() && id.len() <= 128));
    let mut followed = Followed::new(Arc::clone(&account), request.method() == Method::HEAD);
    let mut response = match head_is_small(&request) {
        true => REQUEST.scope(Arc::clone(&account), next.run(request)).await,
        false => ApiError::head_too_large(HEAD_LINES, HEAD_BYTES).into_response(),
    };
    let id = HeaderValue::from_str(account.id()).expect("it came as a header or is hexadecimal");
    response.headers_mut().insert(REQUEST_ID, id);
    followed.began(response.status());
    response.map(|body| followed.body(body))
}

/// Whether the head of a request has no more lines and bytes than it may.
fn head_is_small(request: &Request) -> bool {
    let line = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + ": \r\n".len();
    let bytes = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    let lines = request.headers();
    lines.len() <= HEAD_LINES && bytes + lines.iter().map(line).sum::<usize>() <= HEAD_BYTES
}

/// Lets a request pass that has one of the keys, where there are any; `/health` is for everybody.
pub async fn authorize(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() || request.uri().path() == "/health" {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION).and_then(key).unwrap_or_default();
    // Digests, all of them and to their ends, so that the time says nothing about a key.
    let given = Sha256::digest(given);
    let is_right = keys.iter().fold(false, |found, key| {
        let differs = Sha256::digest(key).iter().zip(&given).fold(0, |differs, (a, b)| differs | (a ^ b));
        found | (std::hint::black_box(differs) == 0)
    });
    if is_right { next.run(request).await } else { ApiError::unauthorized().into_response() }
}

/// The key of an `Authorization` header: a bearer's token, or the password of a browser.
fn key(header: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, value) = header.to_str().ok()?.split_once(' ')?;
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Some(value.trim().as_bytes().to_vec()),
        "basic" => {
            let pair = base64(value.trim())?;
            let colon = pair.iter().position(|byte| *byte == b':')?;
            Some(pair[colon + 1..].to_vec())
        }
        _ => None,
    }
}

/// Decodes RFC 4648's base64.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// Which pages of other origins may ask; None where none may.
pub fn cors(origins: &[String]) -> Option<CorsLayer> {
    let layer = CorsLayer::new().allow_methods(Any).expose_headers([REQUEST_ID]);
    // `*` would not cover Authorization.
    let layer = layer.allow_headers(AllowHeaders::mirror_request());
    if origins.is_empty() {
        return None;
    }
    if origins.iter().any(|origin| origin == "*") {
        return Some(layer.allow_origin(Any));
    }
    Some(layer.allow_origin(origins.iter().filter_map(|origin| origin.parse().ok()).collect::<Vec<HeaderValue>>()))
}

/// Serves connections until `stop` is over; then lets requests under way finish, answers new ones as the handlers do,
/// and ends when none is left, or when what `stop` gave is over. A client that takes nothing for `write_time` is left.
pub async fn serve<G: Future<Output = ()>>(
    listener: TcpListener,
    router: axum::Router,
    write_time: Duration,
    stop: impl Future<Output = G>,
) {
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    let give_up = loop {
        tokio::select! {
            accepted = listener.accept() => if let Some(stream) = usable(accepted).await {
                let connection = graceful.watch(connection(stream, write_time, &router));
                tokio::spawn(async move { note(connection.await) });
            },
            give_up = &mut stop => break give_up,
        }
    };
    let (mut give_up, mut finished) = (std::pin::pin!(give_up), std::pin::pin!(graceful.shutdown()));
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Some(stream) = usable(accepted).await {
                let connection = connection(stream, write_time, &router);
                tokio::spawn(async move { note(connection.await) });
            },
            () = &mut finished => return,
            () = &mut give_up => return,
        }
    }
}

/// How long a client may take nothing of what is written to it: no longer than its request may take.
pub fn write_time(options: &Options) -> Duration {
    WRITE_TIME.min(options.request_timeout.max(Duration::from_secs(1)))
}

fn connection(stream: TcpStream, write_time: Duration, router: &axum::Router) -> Connection {
    // Tokens are small, and each is awaited.
    if let Err(error) = stream.set_nodelay(true) {
        log::debug!("a connection waits for full packets: {error}");
    }
    let service: HyperService = TowerToHyperService::new(Adapter(router.clone()));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(2 * HEAD_BYTES)
        .max_headers(2 * HEAD_LINES)
        .serve_connection(TokioIo::new(Patient::new(stream, write_time)), service)
}

type Connection = http1::Connection<TokioIo<Patient>, HyperService>;

type HyperService = TowerToHyperService<Adapter>;

/// The router as a service of hyper's bodies.
#[derive(Clone)]
struct Adapter(axum::Router);

impl tower::Service<hyper::Request<hyper::body::Incoming>> for Adapter {
    type Response = Response;
    type Error = Infallible;
    type Future = axum::routing::future::RouteFuture<Infallible>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: hyper::Request<hyper::body::Incoming>) -> Self::Future {
        tower::Service::call(&mut self.0, request.map(Body::new))
    }
}

/// A connection, unless it could not be had: then a moment passes, because the next one cannot be had either where file
/// descriptors have run out.
async fn usable(accepted: std::io::Result<(TcpStream, std::net::SocketAddr)>) -> Option<TcpStream> {
    match accepted {
        Ok((stream, _)) => Some(stream),
        Err(error) => {
            log::warn!("a connection could not be accepted: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

/// Clients break connections off as they like.
fn note(result: Result<(), hyper::Error>) {
    if let Err(error) = result {
        log::debug!("a connection broke off: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_as_bearer_tokens_or_as_passwords() {
        let get = |value: &str| key(&HeaderValue::from_str(value).unwrap());
        assert_eq!(get("Bearer sk-1"), Some(b"sk-1".to_vec()));
        assert_eq!(get("bearer  sk-1 "), Some(b"sk-1".to_vec()));
        // `printf 'me:a:secret?>' | base64`, and without a name.
        assert_eq!(get("Basic bWU6YTpzZWNyZXQ/Pg=="), Some(b"a:secret?>".to_vec()));
        assert_eq!(get("Basic OmtleQ=="), Some(b"key".to_vec()));
        for wrong in ["sk-1", "Basic !", "Basic a2V5", "Digest x"] {
            assert_eq!(get(wrong), None, "{wrong}");
        }
    }
}
