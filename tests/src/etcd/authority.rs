//! A certificate authority for etcd's members and clients, as an operator would run one.

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::fmt;
use std::path::{Path, PathBuf};

/// Years in which a certificate is valid.
pub type Years = (i32, i32);
/// Valid while anybody runs this.
pub const NOW: Years = (2020, 2120);
/// Over long ago.
pub const LONG_AGO: Years = (2000, 2001);

/// The authority; its key lives in memory alone.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// A new one of this name.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let mut params = params(Vec::new(), name, NOW)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Writes `PATH.ca`, `PATH.pem` and `PATH.key`: a certificate for these hosts, for servers and clients alike.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn write(&self, path: &Path, names: &[String], years: Years) -> anyhow::Result<()> {
        let mut params = params(names.to_vec(), names.first().map_or("test", |name| name), years)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        for (end, text) in [("ca", &self.pem), ("pem", &certificate), ("key", &key.serialize_pem())] {
            let file = PathBuf::from(format!("{}.{end}", path.display()));
            std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

fn params(names: Vec<String>, subject: &str, (from, to): Years) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, subject);
    (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
    Ok(params)
}
