//! Grammars in the notation of llama.cpp and XGrammar (`root ::= "a" | [0-9]+`), written in Lark's.

use std::collections::{BTreeMap, BTreeSet};
use std::str::Chars;

/// True where a grammar is in this notation: a line begins with a name and `::=`.
pub fn is_one(grammar: &str) -> bool {
    let name = |line: &str| line.split_once("::=").map(|(name, _)| name.trim().to_owned());
    grammar.lines().filter_map(name).any(|name| !name.is_empty() && name.chars().all(is_name))
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-')
}

/// The same grammar in Lark's notation. As in Lark, a rule that never comes back to itself becomes a token, which is
/// matched as long as it can be.
///
/// # Errors
/// What is wrong, or not supported: lookahead, conditions, and anything else than rules of literals, classes, names,
/// groups and repetitions.
pub fn to_lark(grammar: &str) -> Result<String, String> {
    let rules = rules(&tokens(grammar)?)?;
    if !rules.contains_key("root") {
        return Err("the grammar has no rule named root; add one".into());
    }
    let numbers: BTreeMap<&str, usize> = rules.keys().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
    let mut reached = BTreeMap::new();
    for (name, body) in &rules {
        if let Some(unknown) = names(body).find(|name| !numbers.contains_key(name)) {
            return Err(format!("the rule {name} names {unknown}, which is no rule"));
        }
        reached.insert(name.as_str(), reach(name, &rules));
    }
    let recurs = |name: &str| reached[name].contains(name);
    let is_token = |name: &str| !recurs(name) && !reached[name].iter().any(|name| recurs(name));
    let spell = |name: &str| format!("{}{}", if is_token(name) { "T" } else { "r" }, numbers[name]);
    let mut lark = format!("start: {}\n", spell("root"));
    for (name, body) in &rules {
        let words = body.iter().map(|token| match token {
            Token::Name(name) => spell(name),
            Token::Word(word) => word.clone(),
            Token::Defines => String::new(),
        });
        lark += &format!("{}: {}\n", spell(name), words.collect::<Vec<_>>().join(" "));
    }
    Ok(lark)
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// A rule's name.
    Name(String),
    /// `::=`.
    Defines,
    /// Anything else, in Lark's notation.
    Word(String),
}

type Rules = BTreeMap<String, Vec<Token>>;

fn names(body: &[Token]) -> impl Iterator<Item = &str> {
    body.iter().filter_map(|token| if let Token::Name(name) = token { Some(name.as_str()) } else { None })
}

/// The rules that a rule leads to.
fn reach<'a>(from: &'a str, rules: &'a Rules) -> BTreeSet<&'a str> {
    let (mut reached, mut left) = (BTreeSet::new(), vec![from]);
    while let Some(body) = left.pop().and_then(|name| rules.get(name)) {
        left.extend(names(body).filter(|name| reached.insert(*name)));
    }
    reached
}

fn rules(tokens: &[Token]) -> Result<Rules, String> {
    let starts: Vec<usize> = (1..tokens.len()).filter(|i| tokens[*i] == Token::Defines).map(|i| i - 1).collect();
    if starts.first() != Some(&0) {
        return Err("the grammar must begin with a rule, such as: root ::= \"a\"".into());
    }
    let mut rules = Rules::new();
    for (i, &start) in starts.iter().enumerate() {
        let Token::Name(name) = &tokens[start] else { return Err("a rule's name must stand before ::=".into()) };
        let body = &tokens[start + 2..*starts.get(i + 1).unwrap_or(&tokens.len())];
        if body.is_empty() || rules.insert(name.clone(), body.to_vec()).is_some() {
            return Err(format!("the rule {name} is empty, or defined twice"));
        }
    }
    Ok(rules)
}

fn tokens(grammar: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = grammar;
    while let Some(c) = rest.chars().next() {
        let behind = &rest[c.len_utf8()..];
        let token = match c {
            _ if c.is_whitespace() => {
                rest = behind;
                continue;
            }
            '#' => {
                rest = behind.find('\n').map_or("", |end| &behind[end..]);
                continue;
            }
            ':' if rest.starts_with("::=") => {
                rest = &rest[3..];
                Token::Defines
            }
            '"' => {
                let (chars, behind) = quoted(behind, '"')?;
                rest = behind;
                let text: String = chars.into_iter().map(|(c, _)| c).collect();
                Token::Word(serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f"))
            }
            '[' => {
                let (chars, behind) = quoted(behind, ']')?;
                rest = behind;
                Token::Word(class(&chars)?)
            }
            '{' => {
                let end = behind.find('}').ok_or("a { is never closed")?;
                rest = &behind[end + 1..];
                let range = &behind[..end];
                if range.is_empty() || !range.chars().all(|c| c.is_ascii_digit() || c == ',') {
                    return Err(format!("{{{range}}} is no repetition; write {{m}}, {{m,}} or {{m,n}}"));
                }
                Token::Word(format!("{{{range}}}"))
            }
            '.' => {
                rest = behind;
                Token::Word("/(?s:.)/".into())
            }
            '(' | ')' | '|' | '*' | '+' | '?' => {
                rest = behind;
                Token::Word(c.into())
            }
            _ if is_name(c) => {
                let (name, behind) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
                rest = behind;
                Token::Name(name.into())
            }
            other => {
                return Err(format!("{other:?} is not supported; write rules of literals, classes, names and groups"));
            }
        };
        tokens.push(token);
    }
    Ok(tokens)
}

/// A character, and whether it was escaped.
type Quoted = (char, bool);

/// Characters up to a quote, and what is behind it.
fn quoted(text: &str, quote: char) -> Result<(Vec<Quoted>, &str), String> {
    let mut found = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c == quote => return Ok((found, chars.as_str())),
            '\\' => {
                let c = match chars.next() {
                    Some('n') => Some('\n'),
                    Some('r') => Some('\r'),
                    Some('t') => Some('\t'),
                    Some('x') => code(&mut chars, 2),
                    Some('u') => code(&mut chars, 4),
                    Some('U') => code(&mut chars, 8),
                    Some(c) if !c.is_ascii_alphanumeric() => Some(c),
                    other => return Err(format!("\\{} is no escape", other.unwrap_or(' '))),
                };
                found.push((c.ok_or("an escape is no character's number")?, true));
            }
            c => found.push((c, false)),
        }
    }
    Err(format!("a {quote} is missing"))
}

/// A character by its number, in so many hexadecimal digits.
fn code(chars: &mut Chars, digits: usize) -> Option<char> {
    let number = chars.by_ref().take(digits).try_fold(0, |number, c| Some(number << 4 | c.to_digit(16)?))?;
    char::from_u32(number)
}

/// A class, as a regular expression.
fn class(chars: &[Quoted]) -> Result<String, String> {
    let is_negated = chars.first() == Some(&('^', false));
    let chars = &chars[usize::from(is_negated)..];
    if chars.is_empty() {
        return Err("a class [] is empty".into());
    }
    let mut text = String::from(if is_negated { "/[^" } else { "/[" });
    for (i, (c, is_escaped)) in chars.iter().enumerate() {
        let is_range = *c == '-' && !is_escaped && i > 0 && i + 1 < chars.len();
        text += &if is_range { "-".into() } else { format!("\\x{{{:x}}}", u32::from(*c)) };
    }
    Ok(text + "]/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_larks_and_what_is_not_supported_is_named() {
        assert!(is_one("# a\n root ::= \"b\"") && !is_one("start: \"::=\"") && !is_one("::= a"));
        let sql = "root ::= \"SELECT \" column # one\ncolumn ::= \"a\\\"\" | [a-z_]{1,3}\n";
        assert_eq!(
            to_lark(sql).unwrap(),
            "start: T1\nT0: \"a\\\"\" | /[\\x{61}-\\x{7a}\\x{5f}]/ {1,3}\nT1: \"SELECT \" T0\n"
        );
        let nested = "root ::= \"(\" root \")\" | digit+\ndigit ::= [^-\\]]";
        assert_eq!(to_lark(nested).unwrap(), "start: r1\nT0: /[^\\x{2d}\\x{5d}]/\nr1: \"(\" r1 \")\" | T0 +\n");
        for (wrong, why) in [
            ("a ::= \"b\"", "no rule named root"),
            ("root ::= b", "names b, which is no rule"),
            ("root ::= \"b", "a \" is missing"),
            ("root ::= [b", "a ] is missing"),
            ("root ::= \"\\q\"", "\\q is no escape"),
            ("root ::= \"\\uD800\"", "no character's number"),
            ("root ::= (?=a)", "'='"),
            ("root ::= a{x}", "no repetition"),
            ("root ::=", "is empty"),
            ("::= a", "must begin with a rule"),
        ] {
            let error = to_lark(wrong).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }
}
