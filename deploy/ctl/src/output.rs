//! Standard output for answers, standard error for everything else.

use serde::Serialize;
use std::io::{self, ErrorKind, Write};

use crate::error::CtlError;

/// Writes an answer, and out with it: a reader of a pipe waits for every line.
pub(crate) fn print(text: &str) -> Result<(), CtlError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(failed)
}

/// Writes an answer for scripts: one object on one line.
pub(crate) fn print_json(answer: &impl Serialize) -> Result<(), CtlError> {
    let line = serde_json::to_string(answer).map_err(|e| CtlError::Output(e.into()))?;
    print(&(line + "\n"))
}

/// What became of a write to standard output.
pub(crate) fn failed(error: io::Error) -> CtlError {
    if error.kind() == ErrorKind::BrokenPipe { CtlError::ReaderLeft } else { CtlError::Output(error) }
}

/// A line beside the answer.
pub(crate) fn note(text: &str) {
    aside(&format!("coloctl: {text}\n"));
}

/// Bytes beside the answer. Nobody is left to be told if it fails.
pub(crate) fn aside(text: &str) {
    let mut err = io::stderr().lock();
    drop(err.write_all(text.as_bytes()).and_then(|()| err.flush()));
}
