//! What a chat template may be given: messages are checked and simplified here, before a template sees them.

use minijinja::Value as Jinja;
use quaver_core::{Error, Result};
use serde_json::Value;

/// Ends the last message while it is rendered, so that the place where it stops can be found again. The space shows
/// whether the template trims (the method of transformers' `continue_final_message`).
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Messages that a template can take: a non-empty array of objects, each with a string `role`, and with contents that
/// are strings wherever they were lists of text parts.
#[derive(Debug)]
pub(super) struct Messages(Vec<Value>);

impl Messages {
    pub(super) fn check(messages: &Value) -> Result<Self> {
        let Value::Array(messages) = messages else {
            return Err(Error::text("messages", format!("{}; give an array of messages", kind(messages))));
        };
        if messages.is_empty() {
            return Err(Error::text("messages", "empty; give at least one message"));
        }
        let checked = messages.iter().enumerate().map(|(index, message)| check(index, message));
        Ok(Messages(checked.collect::<Result<_>>()?))
    }

    /// Marks the end of the last message for [`cut`].
    pub(super) fn mark_last(&mut self) -> Result<()> {
        let last = self.0.len() - 1;
        match self.0[last].get_mut("content") {
            Some(Value::String(content)) => {
                content.push_str(CONTINUE_TAG);
                Ok(())
            }
            _ => Err(Error::text(format!("messages[{last}]"), "has no text to continue; give it a string content")),
        }
    }

    pub(super) fn to_jinja(&self) -> Jinja {
        self.0.iter().map(to_jinja).collect()
    }
}

/// Cuts a rendered text at the mark of [`Messages::mark_last`].
pub(super) fn cut(rendered: &str) -> Result<String> {
    let Some(at) = rendered.rfind(CONTINUE_TAG.trim_end()) else {
        let why = "leaves the last message out, so that it cannot be continued; ask for a new one instead";
        return Err(Error::text("chat template", why));
    };
    let keeps_spaces = rendered[at..].starts_with(CONTINUE_TAG);
    Ok(if keeps_spaces { &rendered[..at] } else { rendered[..at].trim_end() }.to_string())
}

fn check(index: usize, message: &Value) -> Result<Value> {
    let what = || format!("messages[{index}]");
    let Value::Object(fields) = message else {
        return Err(Error::text(what(), format!("{}; give an object with role and content", kind(message))));
    };
    match fields.get("role") {
        Some(Value::String(_)) => {}
        Some(role) => return Err(Error::text(what() + ".role", format!("{}; give a string", kind(role)))),
        None => return Err(Error::text(what(), "has no role; give one, such as \"user\"")),
    }
    let is_tool = matches!(fields["role"].as_str(), Some("tool" | "ipython"));
    let mut fields = fields.clone();
    match fields.get("content") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Array(parts)) if !is_tool || is_parts(parts) => {
            let text = flatten(index, parts)?;
            fields.insert("content".into(), text.into());
        }
        // The result of a tool may be any JSON: the template writes it out.
        Some(_) if is_tool => {}
        Some(content) => {
            let why = format!("{}; give a string or an array of {{\"type\": \"text\", \"text\": ..}}", kind(content));
            return Err(Error::text(what() + ".content", why));
        }
    }
    Ok(Value::Object(fields))
}

fn is_parts(parts: &[Value]) -> bool {
    !parts.is_empty() && parts.iter().all(|part| part["type"].is_string())
}

/// One string of a list of text parts, one a line: a template for text models does not know parts.
fn flatten(index: usize, parts: &[Value]) -> Result<String> {
    let texts = parts.iter().enumerate().map(|(at, part)| {
        let what = || format!("messages[{index}].content[{at}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text),
            (Some("text"), None) => Err(Error::text(what(), "has no text; give a string")),
            (Some(other), _) => Err(Error::text(what(), format!("the type {other} is not supported; give text"))),
            (None, _) => Err(Error::text(what(), "has no type; give {\"type\": \"text\", \"text\": ..}")),
        }
    });
    Ok(texts.collect::<Result<Vec<_>>>()?.join("\n"))
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "is null",
        Value::Bool(_) => "is a boolean",
        Value::Number(_) => "is a number",
        Value::String(_) => "is a string",
        Value::Array(_) => "is an array",
        Value::Object(_) => "is an object",
    }
}

/// JSON as a template's value, keys in order.
pub(super) fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(n), _) => Jinja::from(n),
            (_, Some(n)) => Jinja::from(n),
            _ => Jinja::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(fields) => Jinja::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), to_jinja(value)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(messages: Value) -> String {
        Messages::check(&messages).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_conversation_is_refused() {
        assert_eq!(refused(json!("Hi")), "messages: is a string; give an array of messages");
        assert_eq!(refused(json!([])), "messages: empty; give at least one message");
        assert_eq!(
            refused(json!([{"role": "user"}, 3])),
            "messages[1]: is a number; give an object with role and content"
        );
        assert_eq!(refused(json!([{"content": "Hi"}])), "messages[0]: has no role; give one, such as \"user\"");
        assert_eq!(refused(json!([{"role": null}])), "messages[0].role: is null; give a string");
    }

    #[test]
    fn contents_that_are_no_text_are_refused() {
        let content = |content: Value| refused(json!([{"role": "user", "content": content}]));
        let wanted = "give a string or an array of {\"type\": \"text\", \"text\": ..}";
        assert_eq!(content(json!(true)), format!("messages[0].content: is a boolean; {wanted}"));
        assert_eq!(content(json!({})), format!("messages[0].content: is an object; {wanted}"));
        assert_eq!(
            content(json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}])),
            "messages[0].content[1]: the type image_url is not supported; give text"
        );
        assert_eq!(content(json!([{"type": "text"}])), "messages[0].content[0]: has no text; give a string");
        assert_eq!(
            content(json!(["a"])),
            "messages[0].content[0]: has no type; give {\"type\": \"text\", \"text\": ..}"
        );
    }

    #[test]
    fn text_parts_become_one_string() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        for role in ["user", "tool"] {
            let messages = Messages::check(&json!([{"role": role, "content": parts, "name": "n"}])).unwrap();
            assert_eq!(messages.0[0], json!({"role": role, "content": "a\nb", "name": "n"}));
        }
    }

    #[test]
    fn tool_results_and_missing_contents_pass() {
        let messages = json!([{"role": "tool", "content": {"x": [1]}}, {"role": "tool", "content": [1]},
            {"role": "assistant", "content": null, "tool_calls": []}, {"role": "assistant"}]);
        assert_eq!(Messages::check(&messages).unwrap().0, *messages.as_array().unwrap());
    }

    #[test]
    fn only_text_can_be_continued() {
        let mut messages = Messages::check(&json!([{"role": "user", "content": "a"}, {"role": "assistant"}])).unwrap();
        let error = messages.mark_last().unwrap_err().to_string();
        assert_eq!(error, "messages[1]: has no text to continue; give it a string content");
    }
}
