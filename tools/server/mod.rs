//! The server: OpenAI's HTTP API, as vLLM serves it, over the engine. A handler turns a request into an order, hands it
//! to the engine's thread, and turns what comes back into JSON. `quaver serve` is the caller.

mod account;
mod admission;
mod app;
mod batch;
mod chat;
mod completions;
mod error;
mod gbnf;
mod generation;
mod http;
mod info;
mod logprobs;
mod metrics;
mod model;
mod patient;
mod pythonic;
mod responses;
mod sampling;
mod sse;
mod structure;
mod tool_calls;
mod tools;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use quaver_core::{Error, Result};
use tokio::net::TcpListener;

pub use self::account::request_id;
use self::app::{App, BLOCKING_THREADS};
pub use self::batch::{Summary, run as batch};
use self::error::ApiError;
use self::model::Model;
use crate::LlmOptions;

/// How a server is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// A folder or a Hugging Face id; None for the demo model.
    pub model: Option<String>,
    /// Device, profile, memory, and how much runs side by side.
    pub llm: LlmOptions,
    /// The address to listen at, such as `127.0.0.1`.
    pub host: String,
    /// The port; 0 lets the system choose.
    pub port: u16,
    /// What clients may call the model; none for its own name.
    pub names: Vec<String>,
    /// Keys of which a request must have one; none for no such check.
    pub api_keys: Vec<String>,
    /// Origins whose pages may ask; none for none.
    pub cors_origins: Vec<String>,
    /// Requests that may wait for a place.
    pub max_queue: usize,
    /// Bytes of a request's body.
    pub max_body_size: u64,
    /// How long a request may take, from its body on.
    pub request_timeout: Duration,
    /// How long requests under way may take at the end.
    pub shutdown_timeout: Duration,
}

/// What happens to a server.
pub enum Event {
    /// It listens; requests are refused until it is ready.
    Listening(SocketAddr),
    /// The model is loaded.
    Ready,
    /// It takes no new requests and waits for those under way.
    Draining {
        /// How many there are.
        under_way: usize,
    },
    /// It ends, and breaks these off.
    Ended {
        /// How many there were.
        broken_off: usize,
    },
}

/// Serves until a first signal, then lets requests under way finish; a second one ends them. `signals` is called once,
/// within the server's runtime, for what gives the next signal whenever it is called.
///
/// # Errors
/// Where the address cannot be listened at, or the model cannot be loaded.
pub fn run<S: AsyncFnMut()>(options: Options, signals: impl FnOnce() -> S, on_event: impl Fn(Event)) -> Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime =
        runtime.worker_threads(2).max_blocking_threads(BLOCKING_THREADS).thread_name("http").enable_all().build();
    let failed = |e| Error::device("server", format!("no threads to serve with ({e}); free some memory"));
    let runtime = runtime.map_err(failed)?;
    let result = runtime.block_on(async {
        let address = format!("{}:{}", options.host, options.port);
        let cannot = |e| Error::device(&address, format!("cannot listen there ({e}); choose another --host or --port"));
        let listener = TcpListener::bind((options.host.as_str(), options.port)).await.map_err(cannot)?;
        on_event(Event::Listening(listener.local_addr().map_err(cannot)?));
        let app = Arc::new(App::new(options));
        let loading = {
            let app = Arc::clone(&app);
            tokio::task::spawn_blocking(move || {
                let Options { model, llm, names, max_queue, .. } = &app.options;
                let most = llm.engine.max_num_seqs.saturating_add(*max_queue);
                Model::load(model.as_deref(), llm, names, most).map(|model| app.ready(model))
            })
        };
        let under_way = || app.loaded().map_or(0, |model| model.service.under_way());
        let mut signal = signals();
        #[allow(clippy::async_yields_async, reason = "what ends the drain is awaited when it has begun")]
        let draining = async {
            signal().await;
            app.drain();
            on_event(Event::Draining { under_way: under_way() });
            let timeout = app.options.shutdown_timeout;
            async move {
                tokio::select! {
                    () = tokio::time::sleep(timeout) => {}
                    () = signal() => {}
                }
            }
        };
        let serving = http::serve(listener, router(&app), http::write_time(&app.options), draining);
        let loaded = async {
            let failed = |e| Error::device("server", format!("the model could not be loaded: {e}"));
            loading.await.map_err(failed)??;
            on_event(Event::Ready);
            std::future::pending::<Result<()>>().await
        };
        tokio::select! {
            () = serving => {
                on_event(Event::Ended { broken_off: under_way() });
                Ok(())
            }
            result = loaded => result,
        }
    });
    // Threads that have looked at GPUs end before the process does: drivers' exit handlers free what a thread that ends
    // beside them frees too. A model that is still being loaded is not waited for longer.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn router(app: &Arc<App>) -> Router {
    let router = Router::new()
        .route("/", get(info::page))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/v1/embeddings", post(info::embeddings))
        .route("/tokenize", post(info::tokenize))
        .route("/detokenize", post(info::detokenize))
        .route("/tokenizer_info", get(info::tokenizer_info))
        .route("/health", get(info::health))
        .route("/metrics", get(info::metrics))
        .route("/version", get(info::version))
        .fallback(info::not_found)
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(from_fn_with_state(Arc::clone(app), http::authorize));
    let router = match http::cors(&app.options.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(from_fn(http::identify)).with_state(Arc::clone(app))
}
