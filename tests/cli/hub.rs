//! Models by their Hugging Face ids, against a hub of the tests' own.

mod server;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use self::server::{COMMIT, ID, Request, Server, Site, etag};
use crate::support::checkpoints;
use crate::{HOOK, Quaver, greedy, quaver};

const WEIGHTS: &str = "model.safetensors";

/// What a client is: a home of its own, and the hub that it knows.
struct Client {
    home: TempDir,
    endpoint: String,
}

impl Client {
    fn of(server: &Server) -> Self {
        Client { home: tempfile::tempdir().unwrap(), endpoint: server.endpoint.clone() }
    }

    fn cache(&self) -> PathBuf {
        self.home.path().join("hub")
    }

    fn model(&self) -> PathBuf {
        self.cache().join("models--tests--Demo-FP8")
    }

    fn snapshot(&self) -> PathBuf {
        self.model().join("snapshots").join(COMMIT)
    }

    fn blob(&self, bytes: &[u8]) -> PathBuf {
        self.model().join("blobs").join(etag(bytes))
    }

    fn within(&self, run: Quaver) -> Quaver {
        let home = self.home.path().to_str().unwrap();
        run.env("HF_HOME", home).env("HF_ENDPOINT", &self.endpoint).env("NO_PROXY", "127.0.0.1")
    }

    /// Asks a model about Captain Hook.
    fn asks(&self, model: &str, args: &[&str]) -> Quaver {
        self.within(greedy(&[&["--model", model, HOOK.0], args].concat()))
    }

    /// `inspect`, which loads a model without running it.
    fn inspects(&self, model: &str) -> Quaver {
        self.within(quaver(["inspect", "--json", "--model", model]))
    }
}

/// An address where nobody listens.
fn nowhere() -> String {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    format!("http://{address}")
}

fn answer() -> String {
    format!("{}\n", HOOK.1)
}

/// The names of the files below a folder.
fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The ranges that a file was asked for in, one a GET of the host that sends it.
fn ranges(requests: &[Request], file: &str) -> Vec<Option<String>> {
    let gets = requests.iter().filter(|r| !r.is_hub && r.method == "GET" && r.path.contains(file));
    gets.map(|request| request.range.clone()).collect()
}

#[test]
fn a_model_is_downloaded_once_and_answers() {
    let server = Site::demo().serve();
    let mut client = Client::of(&server);
    assert_eq!(client.asks(ID, &[]).succeeds(), answer());
    let requests = server.requests();
    // The list, and a HEAD and a GET of each file that is read; large ones are redirected.
    assert_eq!(requests.len(), 1 + 2 * 6 + 2);
    assert_eq!(requests[0].path, format!("/api/models/{ID}/revision/main"));
    assert!(requests.iter().all(|r| !r.path.contains("README") && !r.path.contains("recipe")), "{requests:?}");

    // What is whole in the cache is used without a request.
    assert_eq!(client.inspects(ID).json()[0]["model"], ID);
    assert_eq!(server.requests(), []);
    client.endpoint = nowhere();
    for (args, offline) in [(&[][..], "0"), (&["--offline"], "0"), (&[], "1")] {
        assert_eq!(client.asks(ID, args).env("HF_HUB_OFFLINE", offline).succeeds(), answer());
    }
    assert_eq!(client.asks(&format!("{ID}@{COMMIT}"), &[]).env("QUAVER_OFFLINE", "1").succeeds(), answer());
}

#[test]
fn the_terms_of_a_model_come_with_it_and_go_on_with_what_is_made_of_it() {
    let mut site = Site::demo();
    for name in ["LICENSE.txt", "Notice", "USE_POLICY.md", "notes.txt"] {
        site.files.insert(name.into(), name.as_bytes().to_vec());
    }
    // What is quantized is no FP8 model yet.
    let tiny = checkpoints::folder("tiny-llama");
    for name in ["config.json", "model.safetensors"] {
        site.files.insert(name.into(), fs::read(tiny.join(name)).unwrap());
    }
    let client = Client::of(&site.serve());
    client.inspects(ID).succeeds();
    let made = client.home.path().join("made");
    client.within(quaver(["quantize", ID, &made.display().to_string(), "--scheme", "fp8-dynamic"])).succeeds();
    for name in ["LICENSE.txt", "Notice", "USE_POLICY.md"] {
        assert_eq!(fs::read_to_string(made.join(name)).unwrap(), name);
    }
    assert!(!made.join("notes.txt").exists());
    let card = fs::read_to_string(made.join("README.md")).unwrap();
    let command = format!("quaver quantize {ID}@{COMMIT} DIR --scheme fp8-dynamic --ignore lm_head\n");
    assert!(card.contains(&command) && card.contains(&format!("base_model: {ID}\n")), "{card}");
}

#[test]
fn the_cache_is_laid_out_as_huggingface_hub_does() {
    let site = Site::demo();
    let (weights, config) = (site.files[WEIGHTS].clone(), site.files["config.json"].clone());
    let client = Client::of(&site.serve());
    client.inspects(ID).succeeds();
    assert_eq!(names(&client.cache()), [".locks", "models--tests--Demo-FP8"]);
    assert_eq!(names(&client.model()), [".no_exist", "blobs", "refs", "snapshots"]);
    assert_eq!(fs::read_to_string(client.model().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(names(&client.model().join(".no_exist").join(COMMIT)), ["chat_template.jinja"]);
    for (file, bytes) in [(WEIGHTS, weights), ("config.json", config)] {
        assert_eq!(fs::read(client.blob(&bytes)).unwrap(), bytes);
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(client.snapshot().join(file)).unwrap(),
            Path::new("../../blobs").join(etag(&bytes)),
            "{file}"
        );
    }
}

#[test]
fn the_cache_is_where_the_environment_says() {
    let server = Site::demo().serve();
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).display().to_string();
    for (variables, cache) in [
        (vec![("HF_HUB_CACHE", path("a")), ("HF_HOME", path("b"))], "a"),
        (vec![("HF_HOME", path("b")), ("XDG_CACHE_HOME", path("c"))], "b/hub"),
        (vec![("HF_HOME", "~/d".to_owned()), ("HOME", path(""))], "d/hub"),
        (vec![("XDG_CACHE_HOME", path("c")), ("HOME", path("e"))], "c/huggingface/hub"),
        (vec![("XDG_CACHE_HOME", String::new()), ("HOME", path("e"))], "e/.cache/huggingface/hub"),
    ] {
        let mut run = Client::of(&server).inspects(ID);
        run.command.env_remove("HF_HOME").envs(variables);
        run.succeeds();
        assert!(scratch.path().join(cache).join("models--tests--Demo-FP8").is_dir(), "{cache}");
    }
}

#[test]
fn a_model_of_pythons_cache_is_used() {
    let server = Site::demo().serve();
    let mut client = Client::of(&server);
    // As snapshot_download leaves it: it does not note which files there are not.
    fs::create_dir_all(client.snapshot()).unwrap();
    fs::create_dir_all(client.model().join("refs")).unwrap();
    fs::write(client.model().join("refs/main"), COMMIT).unwrap();
    for (name, bytes) in Site::demo().files {
        fs::write(client.snapshot().join(name), bytes).unwrap();
    }
    assert_eq!(client.asks(ID, &["--offline"]).succeeds(), answer());
    let endpoint = std::mem::replace(&mut client.endpoint, nowhere());
    let ran = client.asks(ID, &[]).run();
    assert_eq!((ran.code, ran.stdout), (Some(0), answer()));
    assert!(ran.stderr.contains("cannot be reached") && ran.stderr.contains("taking what the cache has"));
    // One request tells that nothing is missing; none follows.
    client.endpoint = endpoint;
    client.inspects(ID).succeeds();
    assert_eq!(server.requests().len(), 1);
    client.inspects(ID).succeeds();
    assert_eq!(server.requests(), []);
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let mut site = Site::demo();
    site.breaks = Some((WEIGHTS, 1_000_000, 1));
    let server = site.serve();
    assert_eq!(Client::of(&server).asks(ID, &[]).succeeds(), answer());
    assert_eq!(ranges(&server.requests(), WEIGHTS), [None, Some("bytes=1000000-".into())]);
}

#[test]
fn a_part_of_an_earlier_process_is_continued() {
    for ignores_ranges in [false, true] {
        let mut site = Site::demo();
        site.ignores_ranges = ignores_ranges;
        let weights = site.files[WEIGHTS].clone();
        let server = site.serve();
        let client = Client::of(&server);
        let blob = client.blob(&weights);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(blob.with_extension("incomplete"), &weights[..5_000_000]).unwrap();
        client.inspects(ID).succeeds();
        assert_eq!(ranges(&server.requests(), WEIGHTS), [Some("bytes=5000000-".into())]);
        assert_eq!(fs::read(blob).unwrap(), weights);
    }
}

#[test]
fn wrong_bytes_are_refused_and_not_kept() {
    for file in [WEIGHTS, "config.json"] {
        let mut site = Site::demo();
        site.corrupts = Some(file);
        let blob = etag(&site.files[file]);
        let server = site.serve();
        let client = Client::of(&server);
        client.asks(ID, &[]).fails(
            1,
            &format!(
                "{ID}: {file} came with other bytes than its checksum says, which are not kept; run again to download it"
            ),
        );
        assert!(!names(&client.model().join("blobs")).iter().any(|name| name.starts_with(&blob)));
        server.change(|site| site.corrupts = None);
        assert_eq!(client.asks(ID, &[]).succeeds(), answer());
    }
}

#[test]
fn the_token_is_sent_to_the_hub_alone() {
    let server = Site::demo().serve();
    let from_env = |client: &Client| client.inspects(ID).env("HF_TOKEN", "hf_secret");
    let from_file = |client: &Client| {
        fs::write(client.home.path().join("token"), "hf_secret\n").unwrap();
        client.inspects(ID)
    };
    let from_path = |client: &Client| {
        let path = client.home.path().join("elsewhere");
        fs::write(&path, "hf_secret").unwrap();
        client.inspects(ID).env("HF_TOKEN_PATH", path.to_str().unwrap())
    };
    let runs: [&dyn Fn(&Client) -> Quaver; 3] = [&from_env, &from_file, &from_path];
    for run in runs {
        run(&Client::of(&server)).succeeds();
        let requests = server.requests();
        assert!(requests.iter().any(|request| !request.is_hub));
        for request in requests {
            assert_eq!(request.authorization.as_deref(), request.is_hub.then_some("Bearer hf_secret"), "{request:?}");
        }
    }
}

#[test]
fn no_log_holds_the_token() {
    let client = Client::of(&Site::demo().serve());
    let ran = client.inspects(ID).env("HF_TOKEN", "hf_secret").env("RUST_LOG", "trace").run();
    assert_eq!(ran.code, Some(0));
    assert!(ran.stderr.contains("HTTP 302") && ran.stderr.contains("/large/model.safetensors: HTTP 200"));
    for secret in ["hf_secret", "signature"] {
        assert!(!ran.stderr.contains(secret), "{secret}");
    }
}

#[test]
fn what_the_hub_refuses_is_said_with_its_remedy() {
    let server = Site::demo().serve();
    let (client, endpoint) = (Client::of(&server), &server.endpoint);
    client.inspects("tests/absent").fails(
        1,
        &format!(
            "tests/absent: is no folder here, and no model at {endpoint}; check the spelling, or set HF_TOKEN if it is \
             private"
        ),
    );
    client.inspects("tests/absent").env("HF_TOKEN", "hf_x").fails(
        1,
        &format!(
            "tests/absent: is no folder here, and no model that {endpoint} shows to the token; check the spelling and \
             HF_TOKEN"
        ),
    );
    let other = format!("{ID}@other");
    client.inspects(&other).fails(1, &format!("{other}: has no revision other at {endpoint}; see {endpoint}/{ID}"));
    for (refuses, token, why) in [
        ((401, "GatedRepo"), "", format!("is gated; accept its licence at {endpoint}/{ID} and set HF_TOKEN")),
        (
            (403, "GatedRepo"),
            "hf_x",
            format!("is gated, and the account of the token has no access; ask for it at {endpoint}/{ID}"),
        ),
        (
            (401, ""),
            "hf_x",
            format!("{endpoint} refuses the token (HTTP 401); set HF_TOKEN to one that may read {endpoint}/{ID}"),
        ),
        (
            (403, ""),
            "",
            format!("{endpoint} refuses access (HTTP 403); set HF_TOKEN to a token that may read {endpoint}/{ID}"),
        ),
        (
            (404, "EntryNotFound"),
            "",
            format!("{endpoint} does not have its config.json; run again, or take another revision"),
        ),
        (
            (503, ""),
            "",
            format!(
                "is no folder here and not whole in the cache, and {endpoint} answers HTTP 503; check the network or \
                 HF_ENDPOINT"
            ),
        ),
        ((418, ""), "", format!("{endpoint} answers HTTP 418; try again later, or check HF_ENDPOINT")),
    ] {
        server.change(|site| site.refuses = Some(refuses));
        client.inspects(ID).env("HF_TOKEN", token).fails(1, &format!("{ID}: {why}"));
    }
}

#[test]
fn without_a_hub_the_cache_decides() {
    let client = Client { home: tempfile::tempdir().unwrap(), endpoint: nowhere() };
    let message = format!(
        "{ID}: is no folder here and not whole in {}; run once without --offline or HF_HUB_OFFLINE to download it",
        client.cache().display()
    );
    client.asks(ID, &["--offline"]).fails(1, &message);
    client.asks(ID, &[]).env("HF_HUB_OFFLINE", "1").fails(1, &message);
    client.asks(ID, &[]).fails_with(
        1,
        &[
            ID,
            "is no folder here and not whole in the cache",
            &client.endpoint,
            "cannot be reached",
            "check the network",
        ],
    );
    client
        .asks(ID, &[])
        .env("HF_ENDPOINT", "hub")
        .fails(1, "HF_ENDPOINT: is hub; a URL is expected, such as https://huggingface.co");
}

#[test]
fn a_model_in_shards_is_downloaded_with_the_shards_of_its_index() {
    let mut site = Site::sharded("model-00001-of-00001.safetensors");
    site.files.insert("model-00002-of-00002.safetensors".into(), b"of no index".to_vec());
    let server = site.serve();
    let client = Client::of(&server);
    assert_eq!(client.asks(ID, &[]).succeeds(), answer());
    assert!(server.requests().iter().all(|request| !request.path.contains("00002")));
    assert_eq!(client.asks(ID, &["--offline"]).succeeds(), answer());
    // A shard that is gone is fetched again, and not done without.
    fs::remove_file(client.snapshot().join("model-00001-of-00001.safetensors")).unwrap();
    client.asks(ID, &["--offline"]).fails_with(1, &["is no folder here and not whole in"]);
    assert_eq!(client.asks(ID, &[]).succeeds(), answer());
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    for shard in ["../../../../evil", "/tmp/evil", "a/b", "..", ".hidden", "a\\b", "a?b"] {
        let client = Client::of(&Site::sharded(shard).serve());
        client.inspects(ID).fails(
            1,
            &format!(
                "model.safetensors.index.json: lists {}, which is no plain file name; tell those who published the model",
                serde_json::json!(shard)
            ),
        );
        assert_eq!(names(client.home.path()), ["hub"]);
        assert_eq!(names(&client.cache()), [".locks", "models--tests--Demo-FP8"]);
    }
    let mut site = Site::demo();
    site.etag = Some("../../../../evil");
    let client = Client::of(&site.serve());
    client.inspects(ID).fails_with(1, &["does not answer with the etag and size of config.json"]);
    assert_eq!(names(client.home.path()), [""; 0]);
}

#[test]
fn an_index_that_lists_more_than_there_is_is_refused() {
    let mut site = Site::sharded("a.safetensors");
    site.files.remove("a.safetensors");
    Client::of(&site.serve())
        .inspects(ID)
        .fails(1, &format!("{ID}: its index lists a.safetensors, which it does not hold; take another revision"));
}

#[test]
fn what_cannot_be_run_is_refused_before_its_weights_come() {
    let mut site = Site::demo();
    let config = String::from_utf8(site.files["config.json"].clone()).unwrap();
    site.files.insert("config.json".into(), config.replace("LlamaForCausalLM", "GPT2LMHeadModel").into());
    let server = site.serve();
    let client = Client::of(&server);
    client.inspects(ID).fails(1, "architecture GPT2LMHeadModel is not supported: LlamaForCausalLM is");
    assert!(server.requests().iter().all(|request| !request.path.contains(WEIGHTS)));

    let mut site = Site::demo();
    site.files.remove(WEIGHTS);
    Client::of(&site.serve()).inspects(ID).fails(
        1,
        &format!(
            "{ID}: holds no config.json with model.safetensors or model.safetensors.index.json; take a repository of \
             safetensors"
        ),
    );
}

#[test]
fn a_folder_wins_and_paths_are_no_ids() {
    let server = Site::demo().serve();
    let client = Client::of(&server);
    let model = client.home.path().join(ID);
    fs::create_dir_all(&model).unwrap();
    for (name, bytes) in Site::demo().files {
        fs::write(model.join(name), bytes).unwrap();
    }
    let mut run = client.asks(ID, &[]);
    run.command.current_dir(client.home.path());
    assert_eq!(run.succeeds(), answer());
    for path in ["./tests/absent", "/tests/absent", "a/b/c", "../a/b"] {
        let message = format!("{path}: is not there; give the folder that holds the model's config.json");
        client.inspects(path).fails(1, &message);
    }
    for name in ["absent", "a/b c", "a/..", "a/b@"] {
        let message =
            format!("{name}: is no folder here, and no Hugging Face id, which would be org/name or org/name@revision");
        client.inspects(name).fails(1, &message);
    }
    assert_eq!(server.requests(), []);
}

#[test]
fn processes_side_by_side_download_a_model_once() {
    let server = Site::demo().serve();
    let client = Client::of(&server);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let ran = client.inspects(ID).run();
                assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            });
        }
    });
    let requests = server.requests();
    assert_eq!(ranges(&requests, WEIGHTS), [None]);
    assert_eq!(client.asks(ID, &["--offline"]).succeeds(), answer());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_with_its_remedy() {
    let site = Site::demo();
    let weights = site.files[WEIGHTS].clone();
    let client = Client::of(&site.serve());
    let blob = client.blob(&weights);
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", blob.with_extension("incomplete")).unwrap();
    client.inspects(ID).fails(
        1,
        &format!(
            "{ID}: no space is left for {WEIGHTS}, which has {} bytes, in {}; free some or set HF_HUB_CACHE, and run \
             again: the download goes on where it stopped",
            weights.len(),
            blob.parent().unwrap().display()
        ),
    );
}
