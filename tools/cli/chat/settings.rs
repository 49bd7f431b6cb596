//! What `/set` changes: the sampling of the turns to come.

use quaver::text::StopStrings;
use quaver::{Error, Result, SamplingParams};

/// How the next turns are answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How to choose tokens, and when to stop.
    pub params: SamplingParams,
    /// Texts that end an answer.
    pub stop: Vec<String>,
}

/// The names that `/set` knows.
const NAMES: [&str; 11] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "stop",
    "ignore_eos",
];

impl Settings {
    /// Every name with its value.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, String)> {
        NAMES.into_iter().map(|name| (name, self.value(name)))
    }

    fn value(&self, name: &str) -> String {
        let p = &self.params;
        match name {
            "temperature" => p.temperature.to_string(),
            "top_p" => p.top_p.to_string(),
            "top_k" => p.top_k.to_string(),
            "min_p" => p.min_p.to_string(),
            "repetition_penalty" => p.repetition_penalty.to_string(),
            "presence_penalty" => p.presence_penalty.to_string(),
            "frequency_penalty" => p.frequency_penalty.to_string(),
            "seed" => p.seed.map_or("none".into(), |seed| seed.to_string()),
            "max_tokens" => p.max_tokens.to_string(),
            "stop" if self.stop.is_empty() => "none".into(),
            "stop" => serde_json::json!(self.stop).to_string(),
            _ => p.ignore_eos.to_string(),
        }
    }

    /// Changes one value, or leaves all as they are and says why.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let name = name.replace('-', "_");
        let mut new = self.clone();
        let p = &mut new.params;
        match name.as_str() {
            "temperature" => p.temperature = parse(&name, value, "a number")?,
            "top_p" => p.top_p = parse(&name, value, "a number")?,
            "top_k" => p.top_k = parse(&name, value, "a whole number, 0 for all")?,
            "min_p" => p.min_p = parse(&name, value, "a number")?,
            "repetition_penalty" => p.repetition_penalty = parse(&name, value, "a number")?,
            "presence_penalty" => p.presence_penalty = parse(&name, value, "a number")?,
            "frequency_penalty" => p.frequency_penalty = parse(&name, value, "a number")?,
            "seed" if value == "none" => p.seed = None,
            "seed" => p.seed = Some(parse(&name, value, "a whole number or none")?),
            "max_tokens" => p.max_tokens = parse(&name, value, "a whole number")?,
            "ignore_eos" => p.ignore_eos = parse(&name, value, "true or false")?,
            "stop" => new.stop = stops(value)?,
            _ => {
                let why = format!("is no sampling parameter; there are {}", NAMES.join(", "));
                return Err(Error::text(name, why));
            }
        }
        new.params.validate()?;
        StopStrings::new(&new.stop)?;
        *self = new;
        Ok(())
    }
}

fn parse<T: std::str::FromStr>(name: &str, value: &str, wanted: &str) -> Result<T> {
    value.parse().map_err(|_| Error::text(name, format!("{value:?} is not {wanted}")))
}

/// `none`, a text, or JSON for what cannot be typed: `"\n"`, `["\n", "User:"]`.
fn stops(value: &str) -> Result<Vec<String>> {
    let json = |e| Error::text("stop", format!("is neither a JSON string nor a list of them: {e}"));
    match value.as_bytes().first() {
        _ if value == "none" => Ok(Vec::new()),
        Some(b'[') => serde_json::from_str(value).map_err(json),
        Some(b'"') => serde_json::from_str(value).map(|stop| vec![stop]).map_err(json),
        _ => Ok(vec![value.to_owned()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings { params: SamplingParams::default(), stop: Vec::new() }
    }

    #[test]
    fn every_name_can_be_set_and_is_listed_as_it_was_set() {
        let mut settings = settings();
        for (name, value) in [
            ("temperature", "0.5"),
            ("top_p", "0.25"),
            ("top_k", "40"),
            ("min_p", "0.125"),
            ("repetition_penalty", "1.5"),
            ("presence_penalty", "-1"),
            ("frequency_penalty", "2"),
            ("seed", "7"),
            ("max_tokens", "9"),
            ("stop", r#"["\n","User:"]"#),
            ("ignore_eos", "true"),
        ] {
            settings.set(name, value).unwrap();
            assert!(settings.list().any(|listed| listed == (name, value.into())), "{name}");
        }
        assert_eq!(settings.list().count(), NAMES.len());
        settings.set("seed", "none").unwrap();
        settings.set("stop", "\"\\n\"").unwrap();
        assert_eq!((settings.params.seed, &settings.stop[..]), (None, &["\n".to_owned()][..]));
        settings.set("stop", "none").unwrap();
        assert!(settings.stop.is_empty());
    }

    #[test]
    fn what_means_nothing_is_refused_and_changes_nothing() {
        let before = settings();
        let mut settings = before.clone();
        for (name, value, why) in [
            ("temperature", "hot", r#"temperature: "hot" is not a number"#),
            ("top-p", "2", "top_p is 2; it must be above 0 and at most 1 (1 turns it off)"),
            ("top_k", "-1", r#"top_k: "-1" is not a whole number, 0 for all"#),
            ("stop", r#""""#, "stop string 0: is empty; give at least one character"),
            ("ignore_eos", "maybe", r#"ignore_eos: "maybe" is not true or false"#),
        ] {
            assert_eq!(settings.set(name, value).unwrap_err().to_string(), why);
        }
        assert!(settings.set("warmth", "1").unwrap_err().to_string().starts_with("warmth: is no sampling parameter"));
        assert!(settings.set("stop", "[1]").is_err());
        assert_eq!(settings, before);
    }
}
