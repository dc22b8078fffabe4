//! Whether a node is being emptied: a file in the directory where all its processes have theirs, so that it holds for each
//! of them and over their ends.

use colo_common::durable;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The file. No vm has such a name.
const NAME: &str = ".draining";

/// Why it cannot be said.
#[derive(Debug, thiserror::Error)]
#[error("cannot write or remove {path}: {source}; is the node's directory writable, and is there room?")]
pub struct DrainError {
    path: PathBuf,
    source: std::io::Error,
}

/// Where it is said.
#[derive(Clone, Debug)]
pub struct Drain(PathBuf);

impl Drain {
    /// Of the node that has its files in `directory`.
    pub fn of(directory: &Path) -> Self {
        Self(directory.join(NAME))
    }

    /// Whether the node is being emptied.
    pub fn is_on(&self) -> bool {
        self.0.exists()
    }

    /// It is from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(&self) -> Result<(), DrainError> {
        durable::replace(&self.0, b"").map_err(|source| self.failed(source))
    }

    /// It is not any more.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn end(&self) -> Result<(), DrainError> {
        match std::fs::remove_file(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(self.failed(e)),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: std::io::Error) -> DrainError {
        DrainError { path: self.0.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::Drain;

    #[test]
    fn it_is_said_in_a_file_and_taken_back() {
        let place = tempfile::tempdir().unwrap();
        let drain = Drain::of(place.path());
        assert!(!drain.is_on());
        drain.begin().unwrap();
        drain.begin().unwrap();
        assert!(Drain::of(place.path()).is_on());
        drain.end().unwrap();
        drain.end().unwrap();
        assert!(!drain.is_on());
        let error = Drain::of(&place.path().join("missing")).begin().unwrap_err().to_string();
        assert!(error.contains("missing") && error.contains("writable"), "{error}");
    }
}
