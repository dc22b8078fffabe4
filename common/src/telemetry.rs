//! Logging for every binary: `tracing` to standard error, levels by `COLO_LOG` (`info` when it is unset).

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts logging to standard error. A second call keeps the first one's settings.
pub fn init() {
    let filter = EnvFilter::try_from_env("COLO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    let started = logger.with_writer(std::io::stderr).try_init();
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}

/// Ends the process when any of its threads panics: an own bug must not leave a node that only looks alive, and the
/// other node can take over from one that is dead.
pub fn end_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
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
