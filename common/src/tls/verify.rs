//! Verifiers: chains by rustls-webpki, roles by the names in a certificate.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use std::sync::Arc;
use webpki::EndEntityCert;

use super::{Role, TlsError, peer_role, provider};

/// Takes any client of the authority; none is not taken.
pub(super) fn client_verifier(roots: &Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|e| TlsError::Setup(rustls::Error::General(e.to_string())))
}

/// Takes servers of the authority by their name.
pub(super) fn server_verifier(roots: &Arc<RootCertStore>) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    WebPkiServerVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|e| TlsError::Setup(rustls::Error::General(e.to_string())))
}

/// Whether the certificate is good for `name`.
pub(super) fn carries(certificate: &CertificateDer<'_>, name: &str) -> Result<bool, TlsError> {
    let parsed = EndEntityCert::try_from(certificate)
        .map_err(|e| TlsError::NoRole(format!("it cannot be read ({e})")))?;
    let name = ServerName::try_from(name).expect("the names of roles are DNS names");
    match parsed.verify_is_valid_for_subject_name(&name) {
        Ok(()) => Ok(true),
        Err(webpki::Error::CertNotValidForName(_)) => Ok(false),
        Err(e) => Err(TlsError::NoRole(format!("its names cannot be read ({e})"))),
    }
}

/// DER of the object identifier 2.5.4.3, with its tag and length.
const COMMON_NAME: [u8; 5] = [0x06, 0x03, 0x55, 0x04, 0x03];
/// Tags of the strings that a common name may be: UTF8String, PrintableString, IA5String.
const STRINGS: [u8; 3] = [0x0c, 0x13, 0x16];

/// The first common name of the subject.
pub(super) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    let subject = parsed.subject();
    let at = subject.windows(COMMON_NAME.len()).position(|window| window == COMMON_NAME)?;
    let [tag, length, rest @ ..] = subject.get(at + COMMON_NAME.len()..)? else { return None };
    // A name is at most 64 characters (X.520), so its length is one byte.
    let text = rest.get(..usize::from(*length)).filter(|_| STRINGS.contains(tag) && *length < 0x80)?;
    let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect();
    (!text.is_empty()).then_some(text)
}

/// Takes clients that are nodes.
#[derive(Debug)]
pub(super) struct NodesOnly {
    chains: Arc<dyn ClientCertVerifier>,
}

impl NodesOnly {
    /// Beside what `chains` checks.
    pub(super) fn new(chains: Arc<dyn ClientCertVerifier>) -> Self {
        Self { chains }
    }
}

impl ClientCertVerifier for NodesOnly {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chains.verify_client_cert(end_entity, intermediates, now)?;
        match peer_role(end_entity) {
            Ok(Role::Node) => Ok(verified),
            // The alert is of the fixed kind "access denied"; the reason stays in this node's log.
            Ok(Role::Operator) | Err(_) => {
                Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chains.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}
