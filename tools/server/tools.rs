//! Tool calling in the forms of Llama 3.2: `{"name": "f", "parameters": {..}}`, several of them separated by semicolons
//! or in a list, or Python's `[f(a=1), g(b="x")]`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::sampling::refuse;
use super::structure::Grammar;
use super::tool_calls::ToolCalls;

/// Functions of a request, at most.
const MAX_TOOLS: usize = 128;

/// The fields of a request that speak of tools.
#[derive(Debug, Default, Deserialize)]
pub struct Tools {
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    functions: Option<Value>,
    function_call: Option<Value>,
}

/// Tools that were checked.
pub struct Checked {
    /// Name and schema of the parameters.
    functions: Vec<(String, Value)>,
    choice: Choice,
    /// Calls of an answer, at most.
    most: usize,
}

#[derive(Debug, PartialEq)]
enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

impl Tools {
    fn choice(&self) -> ApiResult<Choice> {
        let wrong = || ApiError::invalid("tool_choice", "tool_choice must be none, auto, required, or name a function");
        match &self.tool_choice {
            None | Some(Value::Null) if self.tools.as_ref().is_none_or(Vec::is_empty) => Ok(Choice::None),
            None | Some(Value::Null) => Ok(Choice::Auto),
            Some(Value::String(choice)) => match choice.as_str() {
                "none" => Ok(Choice::None),
                "auto" => Ok(Choice::Auto),
                "required" => Ok(Choice::Required),
                _ => Err(wrong()),
            },
            Some(object) => {
                let name = object.pointer("/function/name").or_else(|| object.get("name")).and_then(Value::as_str);
                name.map(|name| Choice::Named(name.to_owned())).ok_or_else(wrong)
            }
        }
    }

    /// What the chat template is given.
    pub fn for_template(&self) -> ApiResult<Option<Value>> {
        let tools = self.tools.as_ref().filter(|tools| !tools.is_empty());
        Ok(tools.filter(|_| self.choice().is_ok_and(|choice| choice != Choice::None)).cloned().map(Value::Array))
    }

    /// Checks them.
    pub fn check(&self) -> ApiResult<Checked> {
        // OpenAI's older names of tools and tool_choice.
        refuse("functions", self.functions.as_ref())?;
        refuse("function_call", self.function_call.as_ref())?;
        let tools = self.tools.as_deref().unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(ApiError::invalid(
                "tools",
                format!("{} tools are given, at most {MAX_TOOLS} may be", tools.len()),
            ));
        }
        let function = |(i, tool): (usize, &Value)| match tool.pointer("/function/name").and_then(Value::as_str) {
            Some(name) if tool["type"].as_str().is_none_or(|kind| kind == "function") => {
                let parameters = &tool["function"]["parameters"];
                let any = json!({"type": "object"});
                Ok((name.to_owned(), if parameters.is_object() { parameters.clone() } else { any }))
            }
            _ => Err(ApiError::invalid("tools", format!("tools[{i}] must be a function with a name"))),
        };
        let functions = tools.iter().enumerate().map(function).collect::<ApiResult<Vec<_>>>()?;
        let choice = self.choice()?;
        let is_known = |name: &String| functions.iter().any(|(have, _)| have == name);
        match &choice {
            Choice::Named(name) if !is_known(name) => {
                return Err(ApiError::invalid(
                    "tool_choice",
                    format!("tool_choice names {name}, which is none of the tools"),
                ));
            }
            Choice::Required if functions.is_empty() => {
                return Err(ApiError::invalid("tool_choice", "tool_choice is required, but there are no tools"));
            }
            _ => {}
        }
        let most = if self.parallel_tool_calls == Some(false) { 1 } else { MAX_TOOLS };
        Ok(Checked { functions, choice, most })
    }
}

impl Checked {
    /// The grammar of an answer that must be a call.
    pub fn grammar(&self) -> Option<Grammar> {
        let (calls, most): (Vec<Value>, usize) = match &self.choice {
            Choice::None | Choice::Auto => return None,
            Choice::Named(name) => (self.functions.iter().filter(|(have, _)| have == name).map(call).collect(), 1),
            Choice::Required => (self.functions.iter().map(call).collect(), self.most),
        };
        Some(Grammar::Calls { calls, most })
    }

    /// What finds the calls in one answer.
    pub fn calls(&self) -> ToolCalls {
        let names = match self.choice {
            Choice::None => Vec::new(),
            _ => self.functions.iter().map(|(name, _)| name.clone()).collect(),
        };
        ToolCalls::new(names, self.most)
    }
}

/// The schema of a function's call.
fn call((name, parameters): &(String, Value)) -> Value {
    let mut schema = json!({
        "type": "object", "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"], "additionalProperties": false
    });
    // References are from the root.
    for definitions in ["$defs", "definitions"] {
        if let Some(own) = parameters.get(definitions) {
            schema[definitions] = own.clone();
        }
    }
    schema
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Text for the user.
    Text(String),
    /// A call begins.
    Call {
        /// Its number.
        index: usize,
        /// Its own name.
        id: String,
        /// The function's.
        name: String,
    },
    /// More of a call's arguments, as JSON's text.
    Arguments {
        /// The call's number.
        index: usize,
        /// What follows.
        text: String,
    },
}

impl Piece {
    /// The delta of a chunk.
    pub fn json(self) -> Value {
        match self {
            Piece::Text(text) => json!({"content": text}),
            Piece::Call { index, id, name } => {
                let function = json!({"name": name, "arguments": ""});
                json!({"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]})
            }
            Piece::Arguments { index, text } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            }
        }
    }
}
