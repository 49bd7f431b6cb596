//! The one error type of the runtime. Each message says in one line what is wrong and what to do.

use std::path::PathBuf;

/// The result of everything in this workspace that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a checkpoint on disk and a token. See each message for its remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model or of the user could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, a verb: `read`, `map`, `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file of a checkpoint is damaged, or disagrees with its `config.json`.
    #[error("{file}: {why}")]
    Checkpoint {
        /// The file, or the file and the tensor in it.
        file: String,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// A tensor of a checkpoint is missing, misshapen or holds values that cannot be used.
    #[error("tensor {name}: {why}")]
    Tensor {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The checkpoint is sound, but made in a way that this runtime does not run.
    #[error("{what} is not supported: {supported}")]
    UnsupportedModel {
        /// The architecture, format or option that the checkpoint asks for.
        what: String,
        /// What is supported instead.
        supported: String,
    },
    /// A backend cannot run an op of the program.
    #[error("{backend} cannot run {op}: {why}")]
    Unsupported {
        /// The backend's name.
        backend: String,
        /// The op's label in the program.
        op: String,
        /// The reason.
        why: String,
    },
    /// A program's ops and buffers do not fit together: a bug of its builder, found before it runs.
    #[error("program line {line} ({op}): {why}")]
    Program {
        /// The op's place in the program.
        line: usize,
        /// The op's label.
        op: String,
        /// What does not fit.
        why: String,
    },
    /// A device could not be opened or failed while it ran.
    #[error("{device}: {why}")]
    Device {
        /// The backend or device.
        device: String,
        /// What happened and what to do.
        why: String,
    },
    /// A prompt does not fit the context.
    #[error(
        "prompt has {got} tokens, the context holds {max} and needs room for an answer; \
         shorten it, or raise --max-model-len or --kv-cache-memory"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        got: usize,
        /// Tokens that a sequence can hold.
        max: usize,
    },
    /// A text is so long that its tokens cannot fit the context: found before it is tokenized.
    #[error(
        "the prompt has {bytes} bytes, and {context} tokens, which the context holds, are never more than {most}; \
         shorten it, or raise --max-model-len or --kv-cache-memory"
    )]
    TextTooLong {
        /// Bytes of the text.
        bytes: usize,
        /// Bytes that as many tokens as the context holds can stand for.
        most: usize,
        /// Tokens that a sequence can hold.
        context: usize,
    },
    /// A prompt is empty, so that there is nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    PromptEmpty,
    /// A token id lies outside the vocabulary.
    #[error("token id {id} is out of range: the vocabulary has {vocab} entries")]
    TokenOutOfRange {
        /// The id that was given.
        id: u32,
        /// Entries of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter has a value that means nothing.
    #[error("{name} is {value}; it must be {allowed}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// The value that was given.
        value: String,
        /// The values that are allowed.
        allowed: &'static str,
    },
    /// As many requests are under way as may be.
    #[error("{under_way} requests are under way, and no more may wait; try again later, or raise --max-queue")]
    Busy {
        /// Requests that run or wait.
        under_way: usize,
    },
    /// Memory that a plan needs is not there.
    #[error("{what} needs {need} bytes, {have} are available; {remedy}")]
    OutOfMemory {
        /// What the memory is for.
        what: String,
        /// Bytes that it needs.
        need: u64,
        /// Bytes that there are.
        have: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// A model could not be had from the Hugging Face hub.
    #[error("{what}: {why}")]
    Hub {
        /// The model's id, or the setting that is wrong.
        what: String,
        /// What happened and what to do.
        why: String,
    },
    /// Text, a tokenizer or a chat template could not be used.
    #[error("{what}: {why}")]
    Text {
        /// The tokenizer, template or input.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// An I/O failure at `path`; `action` is a verb, such as `read`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { action, path: path.into(), source }
    }

    /// A damaged or contradictory checkpoint file.
    pub fn checkpoint(file: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Checkpoint { file: file.into(), why: why.into() }
    }

    /// A tensor that cannot be used.
    pub fn tensor(name: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Tensor { name: name.into(), why: why.into() }
    }

    /// A sound checkpoint that this runtime does not run.
    pub fn unsupported_model(what: impl Into<String>, supported: impl Into<String>) -> Self {
        Error::UnsupportedModel { what: what.into(), supported: supported.into() }
    }

    /// A device that could not be opened or failed.
    pub fn device(device: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Device { device: device.into(), why: why.into() }
    }

    /// A model that could not be had from the Hugging Face hub.
    pub fn hub(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Hub { what: what.into(), why: why.into() }
    }

    /// Text, a tokenizer or a template that could not be used.
    pub fn text(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Text { what: what.into(), why: why.into() }
    }
}
