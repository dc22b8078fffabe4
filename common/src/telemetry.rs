//! Logging for every binary: `tracing` to standard error, as text for people or as one JSON object a line.
//!
//! What is told: `RUST_LOG`, else `COLO_LOG`, else `[log] level`, else `info`. How: `COLO_LOG_FORMAT` (`text`, `json`),
//! else `[log] format`, else text. One process has one vm: [`enter_node`] makes the span with both names, which its
//! threads and tasks are started in ([`in_node`], [`node_span`]), and [`TermSpan`] the one inside it that changes with the
//! term. What belongs to an epoch has a span or an event of its own at debug level, with `term` and `epoch`, so at the
//! default level an epoch costs a look at a flag for each.

mod json;
mod span;

pub use span::{TermSpan, enter_node, in_node, node_span};

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::config::{LogConfig, LogFormat};
use json::Lines;

/// Where a filter is looked for, the first one that is set wins.
const FILTERS: [&str; 2] = ["RUST_LOG", "COLO_LOG"];
/// Whatever is filtered, lines have the names of their node and its term.
const SPANS: &str = "colo_common::telemetry::span=error";
/// Where the format is looked for.
const FORMAT: &str = "COLO_LOG_FORMAT";

/// How this process logs; what ends it tells it the same way.
static STARTED: OnceLock<LogFormat> = OnceLock::new();

/// Starts logging to standard error as the configuration says, or the environment. A second call keeps the first one's
/// settings.
pub fn init(config: &LogConfig) {
    if STARTED.get().is_some() {
        return;
    }
    let mut complaints = Vec::new();
    let format = format(config, &mut complaints);
    let mut filter = filter(config, &mut complaints);
    if let Ok(spans) = SPANS.parse() {
        filter = filter.add_directive(spans);
    }
    let all = registry().with(filter);
    let started = match format {
        LogFormat::Text => {
            let colours = std::io::stderr().is_terminal();
            all.with(fmt::layer().with_ansi(colours).with_writer(std::io::stderr)).try_init()
        }
        // A standard error that is closed has nobody to complain to.
        LogFormat::Json => {
            all.with(Lines::new(|line| drop(std::io::stderr().lock().write_all(line)))).try_init()
        }
    };
    if started.is_err() {
        tracing::debug!("logging was started before");
        return;
    }
    // Only a second thread that did the same could be before.
    let _ = STARTED.set(format);
    complaints.iter().for_each(|complaint| tracing::warn!("{complaint}"));
}

/// Whether this is a filter.
///
/// # Errors
/// Why not.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter).map(drop).map_err(|e| e.to_string())
}

fn filter(config: &LogConfig, complaints: &mut Vec<String>) -> EnvFilter {
    for name in FILTERS {
        let Some(value) = variable(name) else { continue };
        match EnvFilter::try_new(&value) {
            Ok(filter) => return filter,
            Err(e) => complaints
                .push(format!("{name} is no filter and does not count: {e}; write for instance info")),
        }
    }
    EnvFilter::try_new(&config.level).unwrap_or_else(|_| EnvFilter::new("info"))
}

fn format(config: &LogConfig, complaints: &mut Vec<String>) -> LogFormat {
    match variable(FORMAT).as_deref() {
        None => config.format,
        Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => {
            complaints.push(format!("{FORMAT} is {other:?} and does not count; write text or json"));
            config.format
        }
    }
}

/// An empty one is as good as none.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Ends the process when any of its threads panics: an own bug must not leave a node that only looks alive, and the
/// other node can take over from one that is dead.
pub fn end_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if STARTED.get() == Some(&LogFormat::Json) {
            // Several lines of text would be no JSON.
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            let words = panic.payload_as_str().unwrap_or("no words");
            let thread = std::thread::current();
            tracing::error!(place, thread = thread.name().unwrap_or("unnamed"), "panicked: {words}");
        } else {
            told(panic);
        }
        std::process::abort();
    }));
}

/// An error and its causes in one line, less those whose words are in it already.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let (mut line, mut next) = (String::new(), Some(error));
    while let Some(cause) = next {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !text.is_empty() && !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        next = cause.source();
    }
    line
}
