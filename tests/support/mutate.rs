//! Bad input out of good, for fuzz tests: bytes and JSON, changed at random. The same number gives the same input again.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::tiny::Random;

/// Tries inputs one after another: `few` of them, or as many as QUAVER_FUZZ says. `make` gives an input as bytes, and
/// `run` must survive it; the input under way is kept in a file, also where the process dies of it.
pub fn fuzz(name: &str, few: u64, mut make: impl FnMut(&mut Mutator) -> Vec<u8>, mut run: impl FnMut(&[u8])) {
    let count = std::env::var("QUAVER_FUZZ").map_or(few, |count| count.parse().expect("QUAVER_FUZZ is a number"));
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
    for number in 0..count {
        let input = make(&mut Mutator { random: Random(number) });
        fs::write(&kept, &input).unwrap();
        run(&input);
    }
    fs::remove_file(&kept).unwrap();
    println!("{name}: {count} inputs");
}

/// See the module.
pub struct Mutator {
    random: Random,
}

impl Mutator {
    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.random.next() as usize % n
    }

    /// One of some.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Changed in one to six places: bits, bytes, pieces left out or repeated, words put in, numbers made extreme.
    pub fn bytes(&mut self, of: &[u8], words: &[&str]) -> Vec<u8> {
        let mut bytes = of.to_vec();
        for _ in 0..=self.below(6) {
            let at = self.below(bytes.len() + 1);
            let end = bytes.len().min(at + 1 + self.below(24));
            match self.below(7) {
                0 if at < end => bytes[at] ^= 1 << self.below(8),
                1 if at < end => bytes[at] = self.random.next() as u8,
                2 => drop(bytes.drain(at..end)),
                3 => {
                    let piece = bytes[at..end].repeat(1 + self.below(40));
                    drop(bytes.splice(at..at, piece));
                }
                4 => {
                    let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    let number = *self.pick(&["0", "-1", "1e999", "4294967296", "18446744073709551615", "0.1"]);
                    drop(bytes.splice(at..at + digits, number.bytes()));
                }
                5 if self.below(8) == 0 => bytes.truncate(at),
                _ => drop(bytes.splice(at..at, self.pick(words).bytes())),
            }
        }
        bytes
    }

    /// Changed in one to three values, which become strange, or one another, or go.
    pub fn json(&mut self, of: &Value) -> Value {
        let mut value = of.clone();
        for _ in 0..=self.below(3) {
            let mut all = vec![String::new()];
            paths(&value, "", &mut all);
            let (at, other) = (self.pick(&all).clone(), self.pick(&all).clone());
            let strange = match self.below(12) {
                0 => value.pointer(&other).cloned().unwrap_or_default(),
                1 => json!([value.pointer(&at)]),
                2 => json!({"type": value.pointer(&at)}),
                3 => Value::Null,
                4 => json!(""),
                5 => json!([]),
                6 => json!({}),
                7 => json!(self.below(2) == 0),
                8 => json!(*self.pick(&[0i64, -1, 1, 2, 1 << 32, i64::MAX, i64::MIN])),
                9 => json!(*self.pick(&[0.5, -0.0, 1e-45, 1e39, 1e308, 2.5])),
                10 => json!("é\u{0}\u{10ffff}<|eot_id|>".repeat(1 + self.below(9))),
                _ => (0..self.below(200)).fold(Value::Null, |inner, _| json!([inner])),
            };
            if let Some(place) = value.pointer_mut(&at) {
                *place = strange;
            }
        }
        value
    }
}

/// JSON pointers of all values below one.
fn paths(value: &Value, at: &str, into: &mut Vec<String>) {
    let mut child = |key: &str, value: &Value| {
        let path = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
        into.push(path.clone());
        paths(value, &path, into);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| child(key, value)),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, value)| child(&i.to_string(), value)),
        _ => {}
    }
}
