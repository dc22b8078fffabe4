//! Asks for metrics as Prometheus does, and reads the answer strictly: what the format (OpenMetrics 1.0, as text) does
//! not allow is an error, also where a scraper would let it pass.

use anyhow::{Context, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long an answer may take, and bytes of it at most.
const PATIENCE: Duration = Duration::from_secs(10);
const MAX_ANSWER: u64 = 4 << 20;

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: String,
}

/// Sends bytes as a request and takes the answer.
///
/// # Errors
/// Nobody answers, or not with HTTP.
pub fn ask(address: SocketAddr, request: &[u8]) -> anyhow::Result<Answer> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("no connection to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // One that is refused early may be answered and closed before all of it is sent.
    let _ = stream.write_all(request);
    let mut bytes = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut bytes).context("the answer breaks off")?;
    let text = String::from_utf8(bytes)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).context("no HTTP/1.1")?;
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").with_context(|| format!("{line:?} is no header"))?;
        Ok((name.to_ascii_lowercase(), value.to_owned()))
    });
    Ok(Answer {
        status: status.get(..3).context("no status")?.parse()?,
        headers: headers.collect::<anyhow::Result<_>>()?,
        body: body.to_owned(),
    })
}

/// The metrics of the node that listens there.
///
/// # Errors
/// It does not answer, or not as the format asks.
pub fn scrape(address: SocketAddr) -> anyhow::Result<Scrape> {
    let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(answer.status == 200, "the status is {}: {}", answer.status, answer.body);
    let kind = answer.headers.get("content-type").map(String::as_str);
    ensure!(kind == Some(colo_primary::metrics::CONTENT_TYPE), "the content is {kind:?}");
    Scrape::parse(&answer.body)
}

/// What a node told.
#[derive(Debug, Default)]
pub struct Scrape {
    families: BTreeMap<String, Family>,
    samples: Vec<Sample>,
}

#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The number.
    pub value: f64,
}

impl Scrape {
    /// Reads an answer.
    ///
    /// # Errors
    /// The first thing that the format does not allow.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let body = text.strip_suffix("# EOF\n").context("it does not end with # EOF")?;
        ensure!(body.is_empty() || body.ends_with('\n'), "the last line has no end");
        let (mut this, mut current) = (Self::default(), String::new());
        for (number, line) in body.lines().enumerate() {
            this.line(line, &mut current).with_context(|| format!("line {}: {line}", number + 1))?;
        }
        this.check()?;
        Ok(this)
    }

    /// Names as the table of metrics has them.
    pub fn names(&self) -> BTreeSet<String> {
        let with_end = |(name, family): (&String, &Family)| match family.kind.as_str() {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            _ => name.clone(),
        };
        self.families.iter().map(with_end).collect()
    }

    /// The type and the words of a family.
    pub fn family(&self, name: &str) -> Option<(&str, &str)> {
        self.families.get(name).map(|family| (family.kind.as_str(), family.help.as_str()))
    }

    /// All samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The value of the one sample with this name that has these labels among its own.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        let has = |sample: &&Sample| {
            let given = |(label, value): &(&str, &str)| sample.labels.get(*label).is_some_and(|v| v == value);
            sample.name == name && labels.iter().all(given)
        };
        let found: Vec<_> = self.samples.iter().filter(has).collect();
        match found[..] {
            [sample] => Ok(sample.value),
            _ => bail!("{} samples of {name} with {labels:?}", found.len()),
        }
    }

    fn line(&mut self, line: &str, current: &mut String) -> anyhow::Result<()> {
        let Some(words) = line.strip_prefix("# ") else { return self.sample(line, current) };
        let mut parts = words.splitn(3, ' ');
        let (what, name) = (parts.next().unwrap_or_default(), parts.next().context("no name")?);
        let rest = parts.next().context("nothing behind the name")?;
        ensure!(is_name(name), "{name:?} is no name");
        if name != current {
            ensure!(!self.families.contains_key(name), "{name} comes apart, or twice");
            self.families.insert(name.to_owned(), Family::default());
            name.clone_into(current);
        }
        let begun = self.samples.last().is_some_and(|sample| family_of(&sample.name, current).is_some());
        ensure!(!begun, "words about {name} come after its samples");
        let family = self.families.get_mut(name).context("a family that was just made")?;
        let place = match what {
            "TYPE" => {
                ensure!(["gauge", "counter", "histogram", "info"].contains(&rest), "no such type");
                &mut family.kind
            }
            "HELP" => &mut family.help,
            _ => bail!("neither HELP nor TYPE"),
        };
        ensure!(place.is_empty(), "{what} comes twice");
        rest.clone_into(place);
        Ok(())
    }

    fn sample(&mut self, line: &str, current: &str) -> anyhow::Result<()> {
        let family = self.families.get(current).context("a sample before any family")?;
        let end = line.find(['{', ' ']).context("no value")?;
        let (name, rest) = line.split_at(end);
        let suffix = family_of(name, current).with_context(|| format!("it is not of {current}"))?;
        let fits = match family.kind.as_str() {
            "gauge" => suffix.is_empty(),
            "counter" => suffix == "_total",
            "info" => suffix == "_info",
            "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
            _ => bail!("{current} has no type"),
        };
        ensure!(fits, "a {} has no sample {name}", family.kind);
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (BTreeMap::new(), rest),
        };
        let value = number(rest.strip_prefix(' ').context("no space before the value")?)?;
        ensure!(family.kind == "gauge" || value >= 0.0, "it is less than nothing");
        ensure!(family.kind != "info" || value == 1.0, "an info is 1");
        ensure!((suffix == "_bucket") == labels.contains_key("le"), "le is of buckets, and buckets have it");
        self.samples.push(Sample { name: name.to_owned(), labels, value });
        Ok(())
    }

    fn check(&self) -> anyhow::Result<()> {
        let mut seen = BTreeSet::new();
        for Sample { name, labels, .. } in &self.samples {
            ensure!(seen.insert((name, labels)), "{name}{labels:?} comes twice");
        }
        for (name, family) in &self.families {
            ensure!(!family.kind.is_empty() && !family.help.is_empty(), "{name} lacks its type or its help");
            let of_it = || self.samples.iter().filter(|sample| family_of(&sample.name, name).is_some());
            ensure!(of_it().next().is_some(), "{name} has no sample");
            if family.kind == "histogram" {
                for count in of_it().filter(|sample| sample.name.ends_with("_count")) {
                    self.check_buckets(name, count)?;
                }
            }
        }
        Ok(())
    }

    /// Buckets rise in bounds and in counts, and end with all.
    fn check_buckets(&self, name: &str, count: &Sample) -> anyhow::Result<()> {
        let (mut bound, mut most) = (f64::NEG_INFINITY, 0.0);
        let bucket = format!("{name}_bucket");
        for sample in self.samples.iter().filter(|sample| sample.name == bucket) {
            let mut labels = sample.labels.clone();
            let le = number(&labels.remove("le").context("no le")?)?;
            if labels != count.labels {
                continue;
            }
            ensure!(le > bound && sample.value >= most, "the buckets of {name}{labels:?} do not rise");
            (bound, most) = (le, sample.value);
        }
        ensure!(bound == f64::INFINITY && most == count.value, "the buckets of {name} do not end with all");
        let labels: Vec<_> =
            count.labels.iter().map(|(label, value)| (label.as_str(), value.as_str())).collect();
        self.value(&format!("{name}_sum"), &labels).map(drop)
    }
}

/// What is behind the family's name, if it is one that some type has.
fn family_of<'a>(sample: &'a str, family: &str) -> Option<&'a str> {
    let suffix = sample.strip_prefix(family)?;
    ["", "_total", "_info", "_bucket", "_sum", "_count"].contains(&suffix).then_some(suffix)
}

fn is_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    first && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn number(text: &str) -> anyhow::Result<f64> {
    let plain = text.bytes().all(|b| b.is_ascii_digit() || b".+-eE".contains(&b));
    match text {
        "+Inf" => Ok(f64::INFINITY),
        _ if plain => text.parse().with_context(|| format!("{text:?} is no number")),
        _ => bail!("{text:?} is no number"),
    }
}

/// Labels up to the closing brace, and what is behind it.
fn labels(mut rest: &str) -> anyhow::Result<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        let (name, quoted) = rest.split_once("=\"").context("a label has no value")?;
        ensure!(is_name(name), "{name:?} is no label");
        let (value, behind) = quoted_value(quoted)?;
        ensure!(labels.insert(name.to_owned(), value).is_none(), "{name} comes twice");
        match behind.as_bytes().first() {
            Some(b',') => rest = &behind[1..],
            Some(b'}') => return Ok((labels, &behind[1..])),
            _ => bail!("neither a comma nor a brace behind a label"),
        }
    }
}

fn quoted_value(text: &str) -> anyhow::Result<(String, &str)> {
    let (mut value, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => value.push(match chars.next() {
                Some((_, 'n')) => '\n',
                Some((_, c @ ('"' | '\\'))) => c,
                other => bail!("{other:?} is no escape"),
            }),
            c => value.push(c),
        }
    }
    bail!("a label's value has no end")
}

#[cfg(test)]
mod tests {
    use super::Scrape;

    #[test]
    fn what_the_format_allows_is_read() {
        let text = "# HELP a Words.\n# TYPE a gauge\na{x=\"q\\\"\\\\\\n\",y=\"\"} -1.5\na 2\n# HELP c C.\n# TYPE c counter\n\
                    c_total 3.0\n# HELP h H.\n# TYPE h histogram\nh_sum 0.5\nh_count 2\nh_bucket{le=\"0.1\"} 1\n\
                    h_bucket{le=\"+Inf\"} 2\n# EOF\n";
        let scrape = Scrape::parse(text).unwrap();
        assert_eq!(scrape.value("a", &[("x", "q\"\\\n")]).unwrap(), -1.5);
        assert_eq!(scrape.names().into_iter().collect::<Vec<_>>(), ["a", "c_total", "h"]);
        assert_eq!(scrape.family("h"), Some(("histogram", "H.")));
    }

    #[test]
    fn what_it_does_not_allow_is_refused() {
        let gauge = "# HELP a A.\n# TYPE a gauge\n";
        let histogram = "# HELP h H.\n# TYPE h histogram\n";
        for (text, why) in [
            (format!("{gauge}a 1\n"), "EOF"),
            (format!("{gauge}a 1\n# EOF\n\n"), "EOF"),
            (format!("{gauge}a 1\na 1\n# EOF\n"), "twice"),
            (format!("{gauge}a one\n# EOF\n"), "no number"),
            (format!("{gauge}a NaN\n# EOF\n"), "no number"),
            (format!("{gauge}a{{x=1}} 1\n# EOF\n"), "no value"),
            (format!("{gauge}a{{x=\"1\",x=\"2\"}} 1\n# EOF\n"), "twice"),
            (format!("{gauge}a{{x=\"\\t\"}} 1\n# EOF\n"), "no escape"),
            (format!("{gauge}a_total 1\n# EOF\n"), "no sample"),
            (format!("{gauge}b 1\n# EOF\n"), "not of a"),
            (format!("{gauge}# EOF\n"), "has no sample"),
            ("a 1\n# EOF\n".to_owned(), "before any family"),
            ("# TYPE a gauge\na 1\n# EOF\n".to_owned(), "lacks its type or its help"),
            (format!("{gauge}a 1\n# TYPE a gauge\n# EOF\n"), "after its samples"),
            (format!("{gauge}a 1\n# HELP b B.\n# TYPE b gauge\nb 1\n# HELP a A.\n# EOF\n"), "comes apart"),
            ("# HELP c C.\n# TYPE c counter\nc_total -1\n# EOF\n".to_owned(), "less than nothing"),
            (format!("{histogram}h_sum 1\nh_count 1\nh_bucket{{le=\"1\"}} 1\n# EOF\n"), "do not end"),
            (
                format!(
                    "{histogram}h_sum 1\nh_count 1\nh_bucket{{le=\"1\"}} 2\nh_bucket{{le=\"+Inf\"}} 1\n# EOF\n"
                ),
                "do not rise",
            ),
        ] {
            let error = format!("{:#}", Scrape::parse(&text).unwrap_err());
            assert!(error.contains(why), "{error:?} lacks {why:?}: {text}");
        }
    }
}
