//! Text in and out of a model: messages become a prompt, a prompt becomes token ids, ids become text again.
//!
//! Everything below this module speaks token ids only. What it computes equals what Hugging Face's `transformers`
//! computes from the same files; the command line and the server are its callers.
//!
//! ```
//! use quaver::text::{ChatTemplate, RenderOptions, Tokenizer};
//! use serde_json::json;
//!
//! let tokenizer = Tokenizer::from_json(include_bytes!("../demo/tokenizer.json"))?;
//! let template = ChatTemplate::from_files(Some(include_bytes!("../demo/tokenizer_config.json")), None)?.unwrap();
//! let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
//! let ids = tokenizer.encode_chat(&template, &json!([{"role": "user", "content": "Who is Captain Hook?"}]), &options)?;
//! assert_eq!(ids[0], 4080); // one <|begin_of_text|>, from the template
//!
//! let mut detokenizer = tokenizer.detokenizer(true);
//! let mut text = String::new();
//! for id in tokenizer.encode("Café 😀", false)? {
//!     text += &detokenizer.push(id)?; // whole characters only
//! }
//! text += &detokenizer.finish();
//! assert_eq!(text, "Café 😀");
//! # Ok::<(), quaver_core::Error>(())
//! ```

mod answer_text;
mod chat_template;
mod detokenizer;
mod messages;
mod pieces;
mod reading;
mod stop_strings;
mod tojson;
mod tokenizer;

pub use answer_text::AnswerText;
pub use chat_template::{ChatTemplate, RenderOptions};
pub use detokenizer::Detokenizer;
pub use reading::TokenizerReading;
pub use stop_strings::{Piece, StopStrings};
pub use tokenizer::Tokenizer;

/// A message of another library as part of our one-line errors.
pub(crate) fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
