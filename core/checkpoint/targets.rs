//! Which modules a config group or an ignore list means: by name, by a `re:` pattern, or by class. The rules are those
//! of compressed-tensors (`match_named_modules` in compressed_tensors/utils/match.py).

use regex::bytes::{Regex, RegexBuilder};

use crate::error::{Error, Result};

use super::json::clipped;

/// Bytes that one compiled pattern may take; those of llm-compressor take about 10 KiB.
const PATTERN_BYTES: usize = 1 << 18;

/// The classes that a linear layer is an instance of: `torch.nn.Linear` and its base.
const LINEAR_CLASSES: [&str; 2] = ["Linear", "Module"];

/// A name, pattern or class.
#[derive(Clone, Debug)]
pub(super) struct Target {
    text: String,
    pattern: Option<Regex>,
}

/// How closely a target meets a module: closer ones come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Match {
    Name,
    Pattern,
    Class,
}

impl Target {
    /// Compiles the pattern behind `re:`; anything else is a name or a class.
    pub(super) fn new(text: &str) -> Result<Self> {
        let pattern = text.strip_prefix("re:").map(compile).transpose()?;
        Ok(Target { text: text.to_owned(), pattern })
    }

    /// The text as the config has it.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether, and how, the target means the linear layer of this name.
    pub(super) fn meets(&self, module: &str) -> Option<Match> {
        match &self.pattern {
            Some(pattern) => pattern.is_match(module.as_bytes()).then_some(Match::Pattern),
            None if self.text == module => Some(Match::Name),
            None => LINEAR_CLASSES.contains(&self.text.as_str()).then_some(Match::Class),
        }
    }
}

/// Python's `re.match` is anchored at the start and open at the end. Module names are ASCII, so that patterns need no
/// Unicode tables.
fn compile(pattern: &str) -> Result<Regex> {
    RegexBuilder::new(&format!(r"\A(?:{pattern})"))
        .unicode(false)
        .size_limit(PATTERN_BYTES)
        .dfa_size_limit(PATTERN_BYTES)
        .build()
        .map_err(|e| {
            // The last line of the message says what is wrong; those before it quote the pattern.
            let message = e.to_string();
            let why = message.lines().last().unwrap_or_default().trim_start_matches("error: ");
            let what = format!("pattern re:{} of quantization_config ({})", clipped(pattern), clipped(why));
            Error::unsupported_model(what, "module names and patterns without lookaround are")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meets(target: &str, module: &str) -> Option<Match> {
        Target::new(target).unwrap().meets(module)
    }

    #[test]
    fn targets_meet_names_patterns_and_classes_as_in_compressed_tensors() {
        let q_proj = "model.layers.0.self_attn.q_proj";
        for (target, module, want) in [
            ("lm_head", "lm_head", Some(Match::Name)),
            ("q_proj", q_proj, None),
            ("model.layers.0", q_proj, None),
            ("re:.*q_proj", q_proj, Some(Match::Pattern)),
            ("re:q_proj", q_proj, None),
            ("re:model", q_proj, Some(Match::Pattern)),
            (r"re:^model\.layers\.\d+\..*_proj$", q_proj, Some(Match::Pattern)),
            (r"re:model\.layers\.1$|lm_head", "lm_head", Some(Match::Pattern)),
            (r"re:x|.*self_attn", q_proj, Some(Match::Pattern)),
            (r"re:x|self_attn", q_proj, None),
            ("re:(?i)LM_HEAD", "lm_head", Some(Match::Pattern)),
            ("Linear", q_proj, Some(Match::Class)),
            ("Module", q_proj, Some(Match::Class)),
            ("Embedding", q_proj, None),
        ] {
            assert_eq!(meets(target, module), want, "{target} on {module}");
        }
    }

    #[test]
    fn patterns_that_cannot_be_compiled_are_named() {
        let supported = "module names and patterns without lookaround are";
        for (pattern, why) in [
            ("(?!lm_head).*", "look-around, including look-ahead and look-behind, is not supported"),
            ("(", "unclosed group"),
            ("(a{1000}){1000}", "Compiled regex exceeds size limit of 262144 bytes."),
        ] {
            assert_eq!(
                Target::new(&format!("re:{pattern}")).unwrap_err().to_string(),
                format!("pattern re:{pattern} of quantization_config ({why}) is not supported: {supported}")
            );
        }
    }
}
