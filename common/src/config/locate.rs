//! Finds the line and the key that an error is about, and the known key that was meant.

use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;

/// Longest word that is compared with the known ones: comparing costs its square.
const MAX_WORD: usize = 64;

/// Line and words for an error of the TOML reader.
pub(super) fn explain(text: &str, error: &toml::de::Error) -> (Option<usize>, Problem) {
    let message = error.message();
    let at = error.span().map(|span| span.start);
    let line = at.map(|at| line_at(text, at));
    // What is no TOML at all has no keys.
    let Ok(table) = DeTable::parse(text) else {
        return (line, Problem::new("", format!("{message}; this is not TOML, check quotes and brackets")));
    };
    let place = at.and_then(|at| key_at(table.get_ref(), at)).unwrap_or_default();
    let words = quoted(message);
    let Some((&given, known)) = words.split_first() else {
        return (line, Problem::new(place, format!("{message}; see the documentation of this key")));
    };
    let problem = if message.starts_with("missing field") {
        let key = if place.is_empty() { given.to_owned() } else { format!("{place}.{given}") };
        Problem::new(key, "this key is missing; add it")
    } else if message.starts_with("unknown field") {
        let key = if last_part(&place) == given { place } else { given.to_owned() };
        Problem::new(key, format!("this key is unknown; {}", suggestion(given, known)))
    } else if message.starts_with("unknown variant") {
        Problem::new(place, format!("{given:?} is none of its values; {}", suggestion(given, known)))
    } else {
        Problem::new(place, format!("{message}; give a value of that kind"))
    };
    (line, problem)
}

fn last_part(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// The line, counted from 1, of the key; none if the file does not have it.
pub(super) fn line_of(text: &str, key: &str) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    let mut table = table.get_ref();
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        let (name, value) = table.iter().find(|(name, _)| name.get_ref() == part)?;
        match (parts.peek(), value.get_ref()) {
            (None, _) => return Some(line_at(text, name.span().start)),
            (Some(_), DeValue::Table(inner)) => table = inner,
            _ => return None,
        }
    }
    None
}

fn line_at(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

/// The key, with its sections, that lies at this place or whose value does.
fn key_at(table: &DeTable<'_>, at: usize) -> Option<String> {
    let mut around: Option<(Range<usize>, String)> = None;
    for (name, value) in table {
        let inside = match value.get_ref() {
            DeValue::Table(inner) => key_at(inner, at),
            _ => None,
        };
        if let Some(inner) = inside {
            return Some(format!("{}.{inner}", name.get_ref()));
        }
        if touches(name, at) || touches(value, at) {
            around = Some((value.span(), name.get_ref().to_string()));
        }
    }
    around.map(|(_, name)| name)
}

fn touches<T>(part: &Spanned<T>, at: usize) -> bool {
    part.span().contains(&at)
}

/// The words in backquotes.
fn quoted(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

fn suggestion(given: &str, known: &[&str]) -> String {
    match nearest(given, known) {
        Some(meant) => format!("did you mean {meant}?"),
        None => format!("known here: {}", known.join(", ")),
    }
}

/// The known word that differs from `given` in at most a third of its letters.
fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    if given.len() > MAX_WORD {
        return None;
    }
    let (steps, word) = known.iter().map(|word| (distance(given, word), *word)).min()?;
    (steps <= given.len().max(3) / 3).then_some(word)
}

/// How many letters have to be changed, added or taken away.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in to.iter().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::{distance, line_of, nearest};

    #[test]
    fn words_are_near_or_far() {
        assert_eq!((distance("", "abc"), distance("abc", "abc"), distance("window", "widnow")), (3, 0, 2));
        let known = ["interval_ms", "window", "secondary"];
        assert_eq!(nearest("intervall_ms", &known), Some("interval_ms"));
        assert_eq!(nearest("widow", &known), Some("window"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(nearest(&"x".repeat(1000), &known), None);
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn keys_have_lines() {
        let text = "a = 1\n\n[s]\nb = 2\n[s.t]\n# c\nc = [\n1]\n";
        for (key, line) in [("a", 1), ("s", 3), ("s.b", 4), ("s.t.c", 7)] {
            assert_eq!(line_of(text, key), Some(line), "{key}");
        }
        for key in ["", "b", "a.b", "s.t.d"] {
            assert_eq!(line_of(text, key), None, "{key}");
        }
    }
}
