//! Development certificates: made on first use, so that everything runs on one host without any preparation, and taken
//! on loopback alone.
//!
//! They are made as a whole beside their place and renamed to it; so processes that start at the same time all use
//! the same ones, and a crash leaves nothing that looks whole. The authority's key is thrown away.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{DEVELOPMENT_NAME, Identity, Role, TlsError, files};
use crate::durable::{self, Lock};

/// How long a process waits for another one that is making certificates: some milliseconds of work.
const PATIENCE: Duration = Duration::from_secs(30);

/// The place that all development nodes of a user share: `$COLO_DEV_TLS`, else `colo/dev-tls` below
/// `$XDG_STATE_HOME` or `~/.local/state`.
///
/// # Errors
/// None of these is set.
pub fn development_directory() -> Result<PathBuf, TlsError> {
    directory_by(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn directory_by(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, TlsError> {
    variable("COLO_DEV_TLS")
        .or_else(|| Some(variable("XDG_STATE_HOME")?.join("colo/dev-tls")))
        .or_else(|| Some(variable("HOME")?.join(".local/state/colo/dev-tls")))
        .ok_or(TlsError::NoPlace)
}

/// Certificates for development, in their directory.
#[derive(Clone, Debug)]
pub struct DevCerts {
    directory: PathBuf,
}

impl DevCerts {
    /// The certificates in `directory`, which are made if they are not there.
    ///
    /// # Errors
    /// They cannot be made, or others could have read the keys.
    pub fn ensure(directory: &Path) -> Result<Self, TlsError> {
        let failed =
            |what, remedy| move |source| TlsError::File { what, path: directory.to_owned(), source, remedy };
        const PLACE: &str = "set COLO_DEV_TLS to a directory that can be written, or name one in [tls]";
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            durable::create_directory(parent).map_err(failed("create the parent of", PLACE))?;
        }
        let lock = durable::lock(&durable::beside(directory, "lock"), Lock::Exclusive, PATIENCE)
            .map_err(failed("lock", PLACE))?;
        let _lock = lock.ok_or_else(|| {
            failed("lock", "another process has held the lock beside it for long: end it if it is frozen")(
                ErrorKind::TimedOut.into(),
            )
        })?;
        match fs::metadata(directory) {
            Ok(found) if found.permissions().mode() & 0o077 != 0 => {
                let open = io::Error::other("others may look into it");
                Err(failed("use", "chmod 700 it, or remove it if the keys in it may be known to others")(
                    open,
                ))
            }
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => make(directory, failed("write", PLACE)),
            Err(e) => Err(failed("look at", PLACE)(e)),
        }?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The identity of `role`.
    ///
    /// # Errors
    /// The files were damaged since they were made.
    pub fn identity(&self, role: Role) -> Result<Identity, TlsError> {
        let identity = files::load(&self.directory, role)?;
        if identity.is_development() {
            return Ok(identity);
        }
        Err(TlsError::Content {
            path: files::certificate_path(&self.directory, role),
            reason: "it was not made for development".to_owned(),
            remedy: "name its directory in [tls]",
        })
    }
}

/// Makes all files in a directory beside `directory` and renames that. The caller holds the lock.
fn make(directory: &Path, failed: impl Fn(io::Error) -> TlsError) -> Result<(), TlsError> {
    let files = certificates()?;
    let write = || {
        let building = durable::beside(directory, "new");
        if building.exists() {
            // Left over by a crash.
            fs::remove_dir_all(&building)?;
        }
        DirBuilder::new().mode(0o700).create(&building)?;
        for (name, pem) in &files {
            durable::replace(&building.join(name), pem.as_bytes())?;
        }
        fs::rename(&building, directory)?;
        durable::sync_parent(directory)
    };
    write().map_err(failed)
}

/// File names and texts of a new authority and what it has issued.
fn certificates() -> Result<Vec<(String, String)>, rcgen::Error> {
    let mut params = lasting(Vec::new(), "Colo development authority")?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate()?;
    let mut files = vec![("ca.pem".to_owned(), params.self_signed(&key)?.pem())];
    let authority = Issuer::new(params, key);
    for role in [Role::Node, Role::Operator] {
        let names = vec![role.name().to_owned(), DEVELOPMENT_NAME.to_owned()];
        let mut params = lasting(names, &format!("Colo development {role}"))?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if role == Role::Node {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate()?;
        files.push((format!("{}.pem", role.stem()), params.signed_by(&key, &authority)?.pem()));
        files.push((format!("{}.key", role.stem()), key.serialize_pem()));
    }
    Ok(files)
}

/// Nobody renews them, so they are valid for as long as anybody will develop with them.
fn lasting(names: Vec<String>, subject: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, subject);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::{DevCerts, directory_by};
    use crate::tls::{Identity, Role};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::thread;

    #[test]
    fn all_who_start_at_once_share_one_authority() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("deep/er/tls");
        let start = |_| {
            let directory = directory.clone();
            thread::spawn(move || DevCerts::ensure(&directory).unwrap().identity(Role::Node).unwrap().pem.ca)
        };
        let threads: Vec<_> = (0..8).map(start).collect();
        let mut authorities: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        authorities.dedup();
        assert_eq!(authorities.len(), 1);
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 5);
        let certs = DevCerts::ensure(&directory).unwrap();
        assert_eq!(certs.identity(Role::Operator).unwrap().role(), Role::Operator);
    }

    #[test]
    fn what_a_crash_left_is_made_anew() {
        let place = tempfile::tempdir().unwrap();
        let building = place.path().join("tls.new");
        fs::create_dir(&building).unwrap();
        fs::write(building.join("ca.pem"), "half").unwrap();
        let certs = DevCerts::ensure(&place.path().join("tls")).unwrap();
        assert!(certs.identity(Role::Node).unwrap().is_development());
        assert!(!building.exists());
    }

    #[test]
    fn they_are_refused_where_others_looked_and_off_development() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("tls");
        DevCerts::ensure(&directory).unwrap();
        let error = Identity::load(&directory, Role::Node).unwrap_err().to_string();
        assert!(error.contains("node.pem") && error.contains("good for loopback only"), "{error}");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let error = DevCerts::ensure(&directory).unwrap_err().to_string();
        assert!(error.contains("others may look into it") && error.contains("chmod 700"), "{error}");
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        let error = DevCerts::ensure(&file.join("tls")).unwrap_err().to_string();
        assert!(error.contains("set COLO_DEV_TLS"), "{error}");
    }

    #[test]
    fn the_place_is_found_by_the_environment() {
        let by = |set: &[(&str, &str)]| {
            let set: Vec<_> = set.iter().map(|(k, v)| (String::from(*k), PathBuf::from(*v))).collect();
            directory_by(move |name| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        assert_eq!(by(&[("HOME", "/h")]).unwrap(), PathBuf::from("/h/.local/state/colo/dev-tls"));
        let state = by(&[("HOME", "/h"), ("XDG_STATE_HOME", "/s")]).unwrap();
        assert_eq!(state, PathBuf::from("/s/colo/dev-tls"));
        assert_eq!(by(&[("HOME", "/h"), ("COLO_DEV_TLS", "/d")]).unwrap(), PathBuf::from("/d"));
        assert!(by(&[]).unwrap_err().to_string().contains("set HOME or COLO_DEV_TLS"));
    }
}
